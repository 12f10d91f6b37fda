"""`covey serve`: a coordinator for a real fleet, from one TOML file. docs/coordinator.md lists every setting.

Runs until the asked number of rounds is published and keeps a checkpoint of each; started again, it goes on in the
round that was under way, else after the newest readable checkpoint. An abandoned round is repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct, field
from rich.console import Console

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import rule_from_table
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.aggregation.screening import Arrivals
from covey_coordinator.coordinator import Coordinator, Engine, RoundResult, Timing, shuffle_seed
from covey_coordinator.fleet import MIN_CHUNK_BYTES, Fleet
from covey_coordinator.orders import Orders, Revocations
from covey_coordinator.records import ACCEPTED
from covey_coordinator.retained import RetainedNote
from covey_coordinator.roster import Roster, RosterFile
from covey_coordinator.store import Checkpoint, RunStore, only_one
from covey_coordinator.watching import events
from covey_coordinator.watching.board import Board
from covey_coordinator.watching.display import live_status, printable
from covey_coordinator.watching.logs import EventLog
from covey_coordinator.watching.metrics import (
    DEFAULT_LISTEN,
    MetricsServer,
    StoreSize,
    Traffic,
    exposition,
    parse_listen,
)
from covey_coordinator.watching.presence import PresenceKeeper
from covey_edge import config as edge_config
from covey_edge.config import BrokerSettings, NotNegative, Positive, read_broker, read_file, read_toml, roster_from
from covey_edge.mqtt import Broker
from covey_edge.outbox import NumberFile
from covey_edge.retired import RetiredKeys
from covey_edge.runtime import Model
from covey_protocol.bundle import Manifest, check_plan, read_bundle
from covey_protocol.codec import Sequence
from covey_protocol.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    CoveyError,
    RuleError,
    RunError,
    StorageError,
    TrainingError,
)
from covey_protocol.forms import WITHHOLDING
from covey_protocol.messages import (
    DEFAULT_CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    MAX_DURATION_MS,
    MAX_EPOCHS,
    MAX_GRADIENT_NORM,
    MAX_LEARNING_RATE,
    MAX_PROXIMAL_WEIGHT,
    MAX_STALENESS,
    TrainingPlan,
)
from covey_protocol.round import Phase
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import check_name

AtLeastOne = Annotated[int, Meta(ge=1)]
PER_NUMBER = ("median", "trimmed-mean", "meamed", "bulyan")  # rules that look at each number of the updates for itself
MOST_ABANDONED = 10  # rounds in a row; then an operator has to look


class ServerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    engine: str = "direct"
    optimizer: str = "sgd"
    learning_rate: Positive = 1.0


class TrainingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    epochs: Annotated[int, Meta(ge=1, le=MAX_EPOCHS)] = 1
    learning_rate: Annotated[float, Meta(gt=0, le=MAX_LEARNING_RATE)] = 0.1
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0
    gradient_clip_norm: Annotated[float, Meta(ge=0, le=MAX_GRADIENT_NORM)] = 0.0
    proximal_weight: Annotated[float, Meta(ge=0, le=MAX_PROXIMAL_WEIGHT)] = 0.0


class WireSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """compression, kept_fraction: as in the training plan. encryption: of updates, to a key of each round."""

    compression: str = "none"
    kept_fraction: Annotated[float, Meta(ge=0, le=1)] = 0.0
    encryption: bool = False


class RoundSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """devices: how many must be online before a round starts. quorum: fewest updates that may be aggregated.

    goal: so many updates end the round, 0 for waiting for everyone. max_staleness: above 0, rounds are asynchronous.
    """

    devices: AtLeastOne
    quorum: AtLeastOne
    goal: Annotated[int, Meta(ge=0)] = 0
    max_staleness: Annotated[int, Meta(ge=0, le=MAX_STALENESS)] = 0
    duration_s: Annotated[float, Meta(ge=1, le=MAX_DURATION_MS / 1000)] = 600.0
    answer_s: Positive = 20.0
    grace_s: NotNegative = 3.0
    wait_s: Positive = 3600.0
    pause_s: NotNegative = 0.0


class MetricsSettings(Struct, frozen=True, forbid_unknown_fields=True):
    listen: str = DEFAULT_LISTEN


class CoordinatorConfig(Struct, frozen=True, forbid_unknown_fields=True):
    fleet: str
    run: str
    bundle: str
    key_file: str
    rounds: AtLeastOne
    broker: BrokerSettings
    devices: edge_config.Roster
    round: RoundSettings
    aggregation: dict[str, Any] = field(default_factory=lambda: {"rule": "multi-krum"})
    server: ServerSettings = ServerSettings()
    training: TrainingSettings = TrainingSettings()
    wire: WireSettings = WireSettings()
    metrics: MetricsSettings | None = None
    runs_dir: str = "runs"
    bundle_key: str | None = None  # whose seal the bundle has, where that is not key_file's
    chunk_bytes: Annotated[int, Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)] = DEFAULT_CHUNK_BYTES
    rule: Any = None  # what [aggregation] was called; kept to refuse it in words


Say = Callable[[str], None]


def serve(
    path: Path,
    say: Say,
    check: Callable[[], None] = lambda: None,
    *,
    terminal: Console | None = None,
    log_events: bool = False,
) -> None:
    """Run a coordinator as its file says. Raises the errors of covey_protocol.errors.

    check: called a few times a second; may raise to end the run. terminal: for a live status, above which is then
    printed what would go to `say`. log_events: log what happens, see watching.logs.
    """
    file = RosterFile(path)
    config = read_toml(path, CoordinatorConfig)
    check_name(config.run, "run")
    if config.round.quorum > config.round.devices:
        raise ConfigError(
            f"{path}: a quorum of {config.round.quorum} needs round.devices of as many", "lower the quorum"
        )
    if config.round.devices > len(config.devices):
        raise ConfigError(
            f"{path}: round.devices = {config.round.devices}, but [devices] holds {len(config.devices)} keys",
            "add the missing devices' keys or lower round.devices",
        )
    _check_goal(path, config.round)
    if config.metrics is not None:
        parse_listen(config.metrics.listen)
    folder = path.parent
    key = SealingKey.from_pem(read_file(folder / config.key_file), config.key_file)
    data = read_file(folder / config.bundle)
    bundle = read_bundle(data, PublicKey.from_hex(config.bundle_key) if config.bundle_key else key.public)
    _check_plan(path, config, bundle.manifest)
    rule = _rule(path, config)
    rule.check(config.round.quorum)
    _warn_of_sparse_rows(config, say)
    keys, broker = roster_from(config.devices), read_broker(config.broker, folder)
    runs = folder / config.runs_dir
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_one(runs / config.run))
        store = RunStore(runs / config.run)
        stack.callback(store.close)
        roster = Roster(keys, RetiredKeys(runs / f"{config.fleet}.retired.json"))
        board, keeper, orders = Board(list(config.devices)), PresenceKeeper(store), Orders(runs / config.run)
        watch = events.all_of(board, keeper, *([EventLog()] if log_events else []))
        stack.enter_context(_noted(store, config, watch))

        def check_and_keep() -> None:
            check()
            keeper.keep()
            file.renew(roster)

        if terminal is not None:
            say = stack.enter_context(live_status(board, terminal))
        engine = make_engine(
            config.server.engine,
            rule,
            bundle.manifest.parameters,
            config.server.optimizer,
            config.server.learning_rate,
        )
        stack.callback(engine.close)
        check()  # making an engine takes seconds
        fleet = _fleet(config, broker, roster, key, runs, check_and_keep)
        if config.metrics is not None:
            say(f"metrics: {_serve_metrics(stack, config.metrics, board, fleet, store)}")
        fleet.connect()
        stack.callback(fleet.close)
        say(f"{config.fleet}: connected to {fleet.broker}")
        coordinator = Coordinator(
            fleet,
            store,
            leave_open=True,
            watch=watch,
            aborted=orders.abort_reason,
            revoked=Revocations(runs, config.fleet).reasons,
        )
        run_rounds(coordinator, engine, config, data, Model(bundle).parameters(), say, orders, watch)
    say(f"checkpoints: {store.checkpoints(config.run)}")


def _fleet(
    config: CoordinatorConfig,
    broker: Broker,
    roster: Roster,
    key: SealingKey,
    runs: Path,
    check: Callable[[], None],
) -> Fleet:
    numbers = NumberFile(runs / f"{config.fleet}.sequence")
    sequence = Sequence(time.time_ns(), numbers.load(), numbers.store)
    note = RetainedNote(runs / f"{config.fleet}.retained")
    chunk_bytes = config.chunk_bytes
    return Fleet(broker, config.fleet, key, roster, sequence=sequence, note=note, chunk_bytes=chunk_bytes, check=check)


def _serve_metrics(
    stack: contextlib.ExitStack, settings: MetricsSettings, board: Board, fleet: Fleet, store: RunStore
) -> str:
    """Until the stack ends; the address."""
    stored = StoreSize(store.folder)

    def page() -> str:
        return exposition(board.state(), Traffic(fleet.received_bytes, fleet.sent_bytes, stored()), time.monotonic())

    server = MetricsServer(settings.listen, page)
    stack.callback(server.close)
    return server.url


@contextlib.contextmanager
def _noted(store: RunStore, config: CoordinatorConfig, watch: events.Watcher) -> Iterator[None]:
    """The store says that the run goes on, and afterwards how it ended."""
    store.started(config.run, config.rounds, time.time_ns() // 1_000_000)
    code, why = EXIT_OK, ""
    try:
        yield
    except BaseException as exc:
        code, why = _ending(exc)
        with contextlib.suppress(StorageError):  # what is on its way to the operator says more
            store.ended(config.run, code, why, time.time_ns() // 1_000_000)
        raise
    else:
        store.ended(config.run, code, why, time.time_ns() // 1_000_000)
    finally:
        watch(events.RunEnded(code, why))


def _ending(error: BaseException) -> tuple[int, str]:
    if isinstance(error, CoveyError):
        return error.exit_code, error.what
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "stopped by a signal"
    return EXIT_BUG, type(error).__name__


def run_rounds(
    coordinator: Coordinator,
    engine: Engine,
    config: CoordinatorConfig,
    bundle: bytes,
    initial: npt.NDArray[np.float32],
    say: Say,
    orders: Orders,
    watch: events.Watcher = events.unwatched,
) -> None:
    """Everything after the connection: take up what the last start left, then rounds until all are published."""
    run, store = config.run, coordinator.store
    parameters, done = _resume(store, engine, run, initial, say)
    watch(events.RunStarted(config.fleet, run, config.rounds, done))
    coordinator.announce(run)
    abandoned = 0
    while done < config.rounds:
        result = coordinator.resume_round(run_id=run, bundle=bundle, parameters=parameters, engine=engine)
        if result is None:
            devices = _ready(coordinator, config, say, orders, watch)
            result = _new_round(coordinator, engine, config, bundle, parameters, done + 1, devices)
        for line in _lines(done + 1, config.rounds, result):
            say(printable(line))
        if result.outcome == Phase.PUBLISHED.value:
            parameters, done, abandoned = result.parameters, done + 1, 0
        else:
            abandoned += 1
            _give_up_if_hopeless(abandoned, result.reason)
        coordinator.tidy(run)
        coordinator.attend(config.round.pause_s if done < config.rounds else 0, orders.stand)
    coordinator.linger(run)


def _ready(
    coordinator: Coordinator, config: CoordinatorConfig, say: Say, orders: Orders, watch: events.Watcher
) -> list[str]:
    """The devices of a new round: when enough are online, and nobody has ordered otherwise."""
    settings = config.round
    while True:
        _obey(coordinator, config.run, say, orders, watch)
        if len(coordinator.online()) < settings.devices:
            say(f"waiting for {settings.devices} devices")
            watch(events.Waits(f"waiting for {settings.devices} devices"))
        found = coordinator.wait_for(settings.devices, settings.wait_s, unless=orders.stand)
        if not orders.stand():
            return found


def _obey(coordinator: Coordinator, run: str, say: Say, orders: Orders, watch: events.Watcher) -> None:
    """Return when there is no pause (any more). RunError where the run is aborted."""
    paused = orders.paused()
    if paused is not None and orders.aborted() is None:
        reason = paused.told("paused by the operator")
        say(reason)
        watch(events.Waits(reason))
        coordinator.attend(math.inf, lambda: orders.paused() is None or orders.aborted() is not None)
        if orders.aborted() is None:
            say("resumed by the operator")
    aborted = orders.abort_reason()
    if aborted is not None:
        coordinator.linger(run)
        raise RunError(f"run {run} was {aborted}", "an abort is for good: give the next run another name")


def _new_round(
    coordinator: Coordinator,
    engine: Engine,
    config: CoordinatorConfig,
    bundle: bytes,
    parameters: npt.NDArray[np.float32],
    number: int,
    devices: list[str],
) -> RoundResult:
    settings = config.round
    return coordinator.run_round(
        run_id=config.run,
        number=number,
        bundle=bundle,
        parameters=parameters,
        plan=_plan(config, number),
        # in an asynchronous round who comes later may take part, too
        device_ids=coordinator.admitted() if settings.max_staleness else devices,
        quorum=settings.quorum,
        engine=engine,
        timing=Timing(settings.duration_s, settings.answer_s, settings.grace_s),
        goal=settings.goal,
        max_staleness=settings.max_staleness,
        encrypt=config.wire.encryption,
    )


def _rule(path: Path, config: CoordinatorConfig) -> Rule:
    if config.rule is not None:
        raise ConfigError(
            f"{path}: there is no table [rule]",
            'write [aggregation] with rule = "...", num_byzantine, before and the rule\'s settings as its keys',
        )
    try:
        return rule_from_table(config.aggregation)
    except ConfigError as exc:
        raise ConfigError(f"{path}: [aggregation]: {exc.what}", exc.remedy) from exc


def _warn_of_sparse_rows(config: CoordinatorConfig, say: Say) -> None:
    """Such a round ends well and teaches the model nothing: measured in docs/coordinator.md."""
    steps = [step.get("step") if isinstance(step, dict) else step for step in config.aggregation.get("before", [])]
    if config.aggregation["rule"] in PER_NUMBER and config.wire.compression in WITHHOLDING and "nnm" not in steps:
        say(
            f"warning: {config.aggregation['rule']} sees mostly zeros in {config.wire.compression} updates and learns"
            ' little or nothing; set before = ["nnm"] in [aggregation], or another rule or compression'
        )


def _check_plan(path: Path, config: CoordinatorConfig, manifest: Manifest) -> None:
    try:
        check_plan(manifest, _plan(config, 1))
    except (ConfigError, TrainingError) as exc:
        raise ConfigError(f"{path}: {exc.what}", f"{exc.remedy}, or leave the setting out") from exc


def _check_goal(path: Path, settings: RoundSettings) -> None:
    if settings.max_staleness and not settings.goal:
        raise ConfigError(
            f"{path}: round.max_staleness = {settings.max_staleness} without a round.goal",
            "say with round.goal how many updates are aggregated at once",
        )
    if settings.goal and not settings.quorum <= settings.goal <= settings.devices:
        raise ConfigError(
            f"{path}: round.goal = {settings.goal} is not between round.quorum = {settings.quorum} and"
            f" round.devices = {settings.devices}",
            "choose one between them",
        )


def _plan(config: CoordinatorConfig, number: int) -> TrainingPlan:
    training = config.training
    return TrainingPlan(
        epochs=training.epochs,
        learning_rate=training.learning_rate,
        shuffle_seed=shuffle_seed(training.seed, number),
        gradient_clip_norm=training.gradient_clip_norm,
        proximal_weight=training.proximal_weight,
        compression=config.wire.compression,
        kept_fraction=config.wire.kept_fraction,
    )


def _resume(
    store: RunStore, engine: Engine, run: str, initial: npt.NDArray[np.float32], say: Say
) -> tuple[npt.NDArray[np.float32], int]:
    """The newest readable checkpoint's parameters, with its state in the engine, and its round; else initial and 0.

    Models of later rounds that cannot be read any more are computed again, as far as their updates are still here.
    """
    found = store.newest_checkpoint(run, len(initial))
    parameters, done = (found.parameters, found.number) if found is not None else (initial, 0)
    if found is not None and found.state and not engine.load_state(found.state):
        say("the rule or the server optimizer is another one now: its memory starts afresh")
    for round_id, number, sha256 in store.later_models(run, done):
        mended = _mended(store, engine, run, round_id, Checkpoint(number, parameters, b""), sha256)
        if mended is None:
            say(f"the model of round {number} is damaged and cannot be computed again: its updates are lost")
            break
        say(f"the model of round {number} was damaged; it is computed again from the stored updates")
        parameters, done = mended, number
    if done:
        say(f"going on after round {done}")
    return parameters, done


def _mended(
    store: RunStore, engine: Engine, run: str, round_id: str, before: Checkpoint, sha256: str
) -> npt.NDArray[np.float32] | None:
    """The parameters that the round made of those before it; None, and nothing changed, unless they have this hash."""
    updates, state = store.kept_updates(round_id), engine.saved_state()
    arrivals = Arrivals(updates, len(before.parameters))
    for device_id, (offer, update) in updates.items():
        arrivals.add(device_id, update, offer.num_examples)
    try:
        screened = arrivals.screened(updates, refused_on_arrival=store.num_refused(round_id))
        parameters = engine.aggregate(before.parameters, screened).parameters
    except RuleError:
        return None
    if hashlib.sha256(parameters.astype("<f4").tobytes()).hexdigest() != sha256:
        engine.load_state(state)
        return None
    store.mend_checkpoint(run, Checkpoint(before.number, parameters, engine.saved_state()))
    return parameters


def _give_up_if_hopeless(abandoned: int, reason: str) -> None:
    if abandoned >= MOST_ABANDONED:
        raise RunError(
            f"{abandoned} rounds in a row were abandoned ({reason})",
            "look at the devices; started again, the run goes on after its newest checkpoint",
        )


def _lines(number: int, rounds: int, result: RoundResult) -> list[str]:
    used = sum(verdict.status == ACCEPTED for verdict in result.verdicts)
    losses = [offer.metrics["training_loss"] for offer in result.offers.values() if "training_loss" in offer.metrics]
    loss = f", median training loss {np.median(losses):.4f}" if losses else ""
    head = f"round {number}/{rounds} {result.outcome}: {used} of {len(result.verdicts)} updates{loss}"
    reasons = [f"  {v.device_id} {v.status}: {v.reason}" for v in result.verdicts if v.status != ACCEPTED]
    return [f"{head}{_byzantine_left(result)}{f' ({result.reason})' if result.reason else ''}", *reasons]


def _byzantine_left(result: RoundResult) -> str:
    """What became of num_byzantine where devices at fault were refused (docs/adr/0014)."""
    told, left = (result.measurements.get(name, 0.0) for name in ("num_byzantine", "num_byzantine_left"))
    return f", num_byzantine_left {left:.0f} of {told:.0f}" if left < told else ""
