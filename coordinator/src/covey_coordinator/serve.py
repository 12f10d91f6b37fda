"""`covey serve`: a coordinator for a real fleet, from one TOML file. docs/coordinator.md lists every setting.

Runs until the asked number of rounds is published and keeps a checkpoint of each; started again, it goes on in the
round that was under way, else after the newest readable checkpoint. An abandoned round is repeated. Several tasks take
turns: each is a run of its own, and one round is under way at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct, field
from rich.console import Console

from covey_coordinator.aggregation.registry import rule_from_table
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.aggregation.trimmed_mean import Median
from covey_coordinator.algorithms.coded_settings import CodingSettings, check_coded, coded_of, coding_plan
from covey_coordinator.algorithms.engines import asked_by
from covey_coordinator.algorithms.making import check_algorithm, make_algorithm_engine
from covey_coordinator.algorithms.settings import FEDAVG, Algorithm
from covey_coordinator.algorithms.teaching_settings import TeachingSettings, teaching_of, teaching_plan
from covey_coordinator.backup.restoring import refuse_unfinished
from covey_coordinator.coding.conditions import check_equal_updates
from covey_coordinator.coordinator import (
    NO_TRAINING,
    Common,
    Coordinator,
    Engine,
    OwnTraining,
    RoundResult,
    Timing,
    arrivals_of,
    refuses_copies,
    shuffle_seed,
)
from covey_coordinator.eligibility import Eligible, eligible, meant, sampled
from covey_coordinator.fleet import MIN_CHUNK_BYTES, POLL_S, Fleet
from covey_coordinator.inversion.plan_gate import PrivacyPolicy, refuse_leaks
from covey_coordinator.inversion.round_checks import RoundChecks
from covey_coordinator.model_rollout import RolloutSettings, check_gate, check_rollout
from covey_coordinator.orders import MAX_REASON, Orders, Revocations
from covey_coordinator.records import ACCEPTED
from covey_coordinator.retained import RetainedNote
from covey_coordinator.roster import Roster, RosterFile
from covey_coordinator.store import Checkpoint, RunStore, only_one
from covey_coordinator.tasks import Turns, read_tasks
from covey_coordinator.trusted_training import TrustedSettings, TrustedTraining, check_needs
from covey_coordinator.watching import events
from covey_coordinator.watching.board import Board
from covey_coordinator.watching.display import evaluation_text, live_status, printable
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
from covey_edge.config import BrokerSettings, NotNegative, Positive, read_broker, read_file, roster_from
from covey_edge.mqtt import Broker
from covey_edge.outbox import NumberFile
from covey_edge.retired import RetiredKeys
from covey_edge.runtime import Model
from covey_protocol.bundle import METRICS, Bundle, Manifest, check_plan, read_bundle
from covey_protocol.codec import Sequence
from covey_protocol.device import needed_capabilities
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
from covey_protocol.forms import NONE, WITHHOLDING
from covey_protocol.messages import (
    DEFAULT_CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    MAX_DURATION_MS,
    MAX_EPOCHS,
    MAX_GRADIENT_NORM,
    MAX_LEARNING_RATE,
    MAX_PROXIMAL_WEIGHT,
    MAX_STALENESS,
    MAX_STEPS,
    TRAIN,
    TrainingPlan,
)
from covey_protocol.round import Phase
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import check_name
from covey_protocol.works import CORRECT

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
    algorithm: str = FEDAVG
    local_steps: Annotated[int, Meta(ge=0, le=MAX_STEPS)] = 0
    feature_scaling: bool = True


class WireSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """compression, kept_fraction: as in the training plan. encryption: of updates, to a key of each round."""

    compression: str = "none"
    kept_fraction: Annotated[float, Meta(ge=0, le=1)] = 0.0
    encryption: bool = False


class RoundSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """devices: how many that may be invited must be online before a round starts. quorum: fewest updates that may be
    aggregated. sample: how many of them are invited, 0 for all. only, exclude: who is meant; see eligibility.
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
    sample: Annotated[int, Meta(ge=0)] = 0
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class EvaluationSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """every: how many rounds lie between two evaluations, 0 for none. metrics: in the order in which they travel.
    devices, quorum, duration_s: as in RoundSettings, 0 for those of the training rounds.
    """

    every: Annotated[int, Meta(ge=0)] = 0
    metrics: Annotated[tuple[str, ...], Meta(min_length=1)] = METRICS
    devices: Annotated[int, Meta(ge=0)] = 0
    quorum: Annotated[int, Meta(ge=0)] = 0
    duration_s: Annotated[float, Meta(ge=0, le=MAX_DURATION_MS / 1000)] = 0.0


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
    evaluation: EvaluationSettings = EvaluationSettings()
    trusted: TrustedSettings | None = None
    task: str = ""
    teaching: TeachingSettings | None = None
    coding: CodingSettings | None = None
    privacy: PrivacyPolicy | None = None
    metrics: MetricsSettings | None = None
    runs_dir: str = "runs"
    bundle_key: str | None = None  # whose seal the bundle has, where that is not key_file's
    chunk_bytes: Annotated[int, Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)] = DEFAULT_CHUNK_BYTES
    rule: Any = None  # what [aggregation] was called; kept to refuse it in words
    rollout: RolloutSettings | None = None


Say = Callable[[str], None]
T = TypeVar("T")


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
    read = read_tasks(path, CoordinatorConfig)
    config, folder = read[0][0], path.parent  # what is of the fleet is the same in all
    refuse_unfinished(folder, folder / config.runs_dir)
    if config.metrics is not None:
        parse_listen(config.metrics.listen)
    key = SealingKey.from_pem(read_file(folder / config.key_file), config.key_file)
    planned = [_planned(path, one, weight, key) for one, weight in read]
    for one in planned:
        _warn_of_sparse_rows(one.config, say)
        for line in one.warnings:
            say(line)
        if one.config.trusted is not None and one.config.teaching is None and not one.rule.needs_trusted:
            say(f"warning: [trusted] is not used: {one.rule.name} needs no trusted data")
    keys, broker = roster_from(config.devices), read_broker(config.broker, folder)
    runs = folder / config.runs_dir
    with contextlib.ExitStack() as stack:
        stores = {one.config.run: _opened_store(stack, runs / one.config.run) for one in planned}
        roster = Roster(keys, RetiredKeys(runs / f"{config.fleet}.retired.json"))
        board, keepers = Board(list(config.devices)), [PresenceKeeper(store) for store in stores.values()]
        watch = events.all_of(board, *keepers, *([EventLog()] if log_events else []))
        tasks: list[Task] = []
        stack.enter_context(_noted(stores, planned, tasks, watch))

        def check_and_keep() -> None:
            check()
            for keeper in keepers:
                keeper.keep()
            file.renew(roster)

        if terminal is not None:
            say = stack.enter_context(live_status(board, terminal))
        engines = {one.config.run: _made_engine(stack, one, folder) for one in planned}
        own = {one.config.run: _own_training(stack, one, folder, key) for one in planned}
        check()  # making an engine takes seconds
        fleet = _fleet(config, broker, roster, key, runs, check_and_keep)
        if config.metrics is not None:
            say(f"metrics: {_serve_metrics(stack, config.metrics, board, fleet, list(stores.values()))}")
        fleet.connect()
        stack.callback(fleet.close)
        say(f"{config.fleet}: connected to {fleet.broker}")
        common, revoked = Common(stores), Revocations(runs, config.fleet).reasons
        for one in planned:
            run = one.config.run
            orders = Orders(runs / run)
            coordinator = Coordinator(
                fleet,
                stores[run],
                leave_open=True,
                watch=watch,
                aborted=orders.abort_reason,
                revoked=revoked,
                common=common,
                own=own[run],
                checks=RoundChecks(one.bundle.manifest, one.config.privacy or PrivacyPolicy()),
            )
            model = Model(one.bundle).parameters()
            told = _named(say, one.config.task) if len(planned) > 1 else say
            work = Work(one.config, one.data, model, one.weight)
            tasks.append(Task(coordinator, engines[run], work, told, orders, watch))
        run_tasks(tasks)
    for one in planned:
        say(f"checkpoints: {stores[one.config.run].checkpoints(one.config.run)}")


class Planned(NamedTuple):
    """A task that was checked as far as that is possible without devices. data: the bundle's bytes. warnings: for the
    operator.

    config.rounds counts exchanges with the devices, as everything after this does (algorithms.settings).
    """

    config: CoordinatorConfig
    weight: float
    data: bytes
    bundle: Bundle
    rule: Rule
    warnings: tuple[str, ...] = ()


def _planned(path: Path, config: CoordinatorConfig, weight: float, key: SealingKey) -> Planned:
    check_name(config.run, "run")
    _check_devices(path, config)
    _check_goal(path, config.round)
    _check_algorithm(path, config)
    data = read_file(path.parent / config.bundle)
    bundle = read_bundle(data, PublicKey.from_hex(config.bundle_key) if config.bundle_key else key.public)
    _check_plan(path, config, bundle.manifest)
    rule = _rule(path, config)
    rule.check(config.round.quorum)
    check_rollout(
        path,
        config.rollout,
        meant=_meant(config),
        devices=max(config.round.devices, config.evaluation.devices),
        rounds=config.rounds,
        evaluates=(config.evaluation.every, config.evaluation.metrics),
        simple=_algorithm(config).exchanges(config.rounds) == config.rounds,
    )
    check_needs(path, rule, config.trusted, config.training.algorithm, config.round.max_staleness)
    _check_copies(path, config, rule)
    if config.evaluation.every:
        try:
            Median(rule.num_byzantine).check(config.evaluation.quorum or config.round.quorum)
        except RuleError as exc:  # as aggregation.evaluating would say of every round
            raise RuleError(f"{path}: [evaluation]: {exc.what}", "raise its quorum, or lower num_byzantine") from exc
    exchanges = _algorithm(config).exchanges(config.rounds)
    warnings = _refuse_leaks(path, config, data, bundle.manifest)
    return Planned(msgspec.structs.replace(config, rounds=exchanges), weight, data, bundle, rule, warnings)


def _check_devices(path: Path, config: CoordinatorConfig) -> None:
    """That there can be as many devices as the file asks for."""
    asked = config.round
    evaluation = config.evaluation
    most = asked.sample or asked.devices
    if asked.quorum > min(most, asked.devices):
        raise ConfigError(
            f"{path}: a quorum of {asked.quorum} needs round.devices of as many, and round.sample where there is one",
            "lower the quorum",
        )
    if (evaluation.quorum or asked.quorum) > (evaluation.devices or asked.devices):
        raise ConfigError(
            f"{path}: [evaluation] asks for {evaluation.quorum or asked.quorum} updates of "
            f"{evaluation.devices or asked.devices} devices",
            "lower its quorum, or raise its devices",
        )
    if 0 < evaluation.duration_s < 1:
        raise ConfigError(f"{path}: [evaluation] duration_s = {evaluation.duration_s:g}", "give it 1 s or more")
    strangers = [name for name in (*asked.only, *asked.exclude) if name not in config.devices]
    if strangers:
        raise ConfigError(f"{path}: [round] names {strangers[0]}, which [devices] does not", "correct the name")
    possible = meant(config.devices, asked.only, asked.exclude)
    if max(asked.devices, evaluation.devices if evaluation.every else 0) > len(possible):
        raise ConfigError(
            f"{path}: round.devices = {asked.devices}, but [devices] holds {len(possible)} keys"
            + (" of devices that may be invited" if len(possible) < len(config.devices) else ""),
            "add the missing devices' keys or lower round.devices",
        )


def _opened_store(stack: contextlib.ExitStack, folder: Path) -> RunStore:
    stack.enter_context(only_one(folder))
    store = RunStore(folder)
    stack.callback(store.close)
    return store


def _made_engine(stack: contextlib.ExitStack, planned: Planned, folder: Path) -> Engine:
    config, server = planned.config, planned.config.server
    algorithm, teaching = _algorithm(config), None
    if algorithm.teaching is not None and config.teaching is not None:
        teaching = teaching_of(config.teaching, algorithm.teaching, config.trusted, planned.bundle, folder)
    coded = coded_of(config.coding, algorithm.coding) if config.coding is not None else None
    engine = make_algorithm_engine(
        algorithm,
        server.engine,
        planned.rule,
        planned.bundle.manifest.parameters,
        server.optimizer,
        server.learning_rate,
        rate=config.training.learning_rate,
        devices=len(_meant(config)),
        teaching=teaching,
        coded=coded,
        device_ids=_meant(config) if planned.rule.expects_copies else (),
    )
    stack.callback(engine.close)
    return engine


def _own_training(stack: contextlib.ExitStack, planned: Planned, folder: Path, key: SealingKey) -> OwnTraining:
    """For a rule that needs trusted data: what makes the coordinator's own update, after a look at the data."""
    config, needs = planned.config, planned.rule.needs_trusted
    if config.trusted is None or not needs:
        return NO_TRAINING
    sealed_by = config.bundle_key or key.public.hex()
    own = TrustedTraining(needs, config.trusted, folder / config.trusted.path, planned.data, sealed_by)
    stack.callback(own.close)
    own.check()
    return own


def _meant(config: CoordinatorConfig) -> list[str]:
    return meant(config.devices, config.round.only, config.round.exclude)


def _named(say: Say, task: str) -> Say:
    return lambda line: say(f"{task}: {line}")


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
    stack: contextlib.ExitStack, settings: MetricsSettings, board: Board, fleet: Fleet, stores: list[RunStore]
) -> str:
    """Until the stack ends; the address."""
    sizes = [StoreSize(store.folder) for store in stores]

    def page() -> str:
        stored = sum(size() for size in sizes)
        return exposition(board.state(), Traffic(fleet.received_bytes, fleet.sent_bytes, stored), time.monotonic())

    server = MetricsServer(settings.listen, page)
    stack.callback(server.close)
    return server.url


@contextlib.contextmanager
def _noted(
    stores: Mapping[str, RunStore], planned: list[Planned], tasks: list[Task], watch: events.Watcher
) -> Iterator[None]:
    """The stores say that the runs go on, and afterwards how they ended. tasks: may be filled in meanwhile."""
    for one in planned:
        stores[one.config.run].started(one.config.run, one.config.rounds, time.time_ns() // 1_000_000)
    error: BaseException | None = None
    try:
        yield
    except BaseException as exc:
        error = exc
        raise
    finally:
        noted = {task.config.run for task in tasks if task.noted}
        for run in [run for run in stores if run not in noted]:
            note_end(stores[run], run, error, watch, several=len(stores) > 1)


def note_end(store: RunStore, run: str, error: BaseException | None, watch: events.Watcher, several: bool) -> None:
    """Raises StorageError, unless there is an error that says more to the operator."""
    code, why = _ending(error) if error is not None else (EXIT_OK, "")
    with contextlib.suppress(*([StorageError] if error is not None else [])):
        store.ended(run, code, why, time.time_ns() // 1_000_000)
    watch(events.RunEnded(code, why, run if several else ""))


def _ending(error: BaseException) -> tuple[int, str]:
    if isinstance(error, CoveyError):
        return error.exit_code, error.what
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "stopped by a signal"
    return EXIT_BUG, type(error).__name__


class Work(NamedTuple):
    """What a task is. bundle: the file's bytes. initial: the parameters before its first round."""

    config: CoordinatorConfig
    bundle: bytes
    initial: npt.NDArray[np.float32]
    weight: float = 1.0


class Task:
    """One task under way: its run, its engine, how far it is. `failure`: why it ended without all its rounds."""

    def __init__(
        self,
        coordinator: Coordinator,
        engine: Engine,
        work: Work,
        say: Say,
        orders: Orders,
        watch: events.Watcher = events.unwatched,
    ) -> None:
        self.config, self.weight = work.config, work.weight
        self.coordinator = coordinator
        self.failure: CoveyError | None = None
        self.noted = False
        self._engine, self._work, self._say, self._orders, self._watch = engine, work, say, orders, watch
        self._algorithm = _algorithm(work.config)
        self._manifest = read_bundle(work.bundle).manifest
        self._parameters, self._done = work.initial, 0
        self._abandoned = 0
        self._hopeless = 0  # of these, those in which no device waited for its owner's conditions
        self._ring_told = -1  # the round with which a ring ended, and of which that was said
        self._left_out = -1  # the model whose evaluation is not waited for any more
        self._not_before = float("-inf")
        self._waits_since: float | None = None
        self._told = ""

    # --- life

    def begin(self) -> None:
        """Take up what the last start left, and what it may not have said any more."""
        config, store = self.config, self.coordinator.store
        own = self.coordinator.own
        self._parameters, self._done = _resume(store, self._engine, config.run, self._work.initial, self._say, own)
        self._watch(events.RunStarted(config.fleet, config.run, config.rounds, self._done))
        self.coordinator.announce(config.run)

    def resume(self) -> None:
        """End the round that was under way, if one was."""
        result = self.coordinator.resume_round(
            run_id=self.config.run,
            bundle=self._work.bundle,
            parameters=self._parameters,
            engine=self._engine,
            vectors=self._vectors,
        )
        if result is not None:
            self._take(result)

    def is_over(self) -> bool:
        return self.failure is not None or (self._done >= self.config.rounds and not self._evaluation_is_due())

    def end(self, several: bool) -> None:
        """Say so, once. The end of the only run is the program's, and said with it."""
        self.coordinator.no_more_rounds(self.config.run)
        if several and not self.noted:
            self._say(str(self.failure) if self.failure is not None else "all rounds are published")
            note_end(self.coordinator.store, self.config.run, self.failure, self._watch, several)
            self.noted = True

    # --- whether it can have a round

    def is_ready(self) -> bool:
        """Whether a round can be opened now; if not, say why. RunError where the task has to end."""
        self._end_if_aborted()
        paused, now = self._orders.paused(), self.coordinator.now_s()
        if paused is not None:
            self._wait(paused.told("paused by the operator"))
            self._waits_since = None
            return False
        if self._told.startswith("paused"):
            self._say("resumed by the operator")
            self._told = ""
        if now < self._not_before:
            return False
        if not self._evaluation_is_due():
            self._check_ring()
        if self._done >= self.config.rounds:
            return True  # for an evaluation, which waits for its devices itself
        plan = self._next_plan()
        found, needed = self._eligible(plan), self._round_of(plan).devices
        if len(found.devices) >= needed:
            self._waits_since, self._told = None, ""
            return True
        self._wait(f"waiting for {needed} devices" + (f"; not invited: {found.told()}" if found.others else ""))
        self._waits_since = now if self._waits_since is None else self._waits_since
        if now - self._waits_since >= self.config.round.wait_s:
            raise _too_few(found, needed, self.config.round.wait_s)
        return False

    def _end_if_aborted(self) -> None:
        aborted = self._orders.abort_reason()
        if aborted is not None:
            raise RunError(
                f"run {self.config.run} was {aborted}", "an abort is for good: give the next run another name"
            )

    def _wait(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._say(text)
            self._watch(events.Waits(f"{self.config.task}: {text}" if self.config.task else text))

    def _round_of(self, plan: TrainingPlan) -> RoundSettings:
        """Who is asked for this plan: for a correction the holders of trusted instances alone, and all of them."""
        settings, teaching = self._in_ring(plan), self.config.teaching
        if plan.work != CORRECT or teaching is None:
            return settings
        holders = teaching.holders
        quorum = min(settings.quorum, len(holders))
        return msgspec.structs.replace(settings, devices=len(holders), quorum=quorum, only=holders, sample=0, goal=0)

    def _in_ring(self, plan: TrainingPlan) -> RoundSettings:
        """[round], and of a model that is rolled out the ring that it has come to. A model is evaluated where it was
        trained."""
        settings, rollout = self.config.round, self.config.rollout
        if rollout is None:
            return settings
        number = self._done if plan.evaluate else self._done + 1
        return msgspec.structs.replace(settings, only=rollout.only(number, settings.only))

    def _check_ring(self) -> None:
        """RunError where a ring has ended with a model that is not to go further."""
        rollout, run, store = self.config.rollout, self.config.run, self.coordinator.store
        if rollout is None or self._ring_told == self._done or not rollout.is_gate(self._done):
            return
        self._say(check_gate(rollout, self._done, lambda number: store.evaluation_median(run, number, rollout.metric)))
        self._ring_told = self._done

    def _eligible(self, plan: TrainingPlan) -> Eligible:
        settings = self._round_of(plan)
        late = settings.max_staleness > 0 and not plan.evaluate
        requires = needed_capabilities(self._manifest, plan, encrypt=self.config.wire.encryption, late=late)
        return eligible(self.coordinator, requires, settings.only, settings.exclude)

    # --- rounds

    def turn(self) -> None:
        """An evaluation that is due, and a round; again an evaluation where that has made one due."""
        if self._evaluation_is_due():
            self._evaluate()
        if self._done >= self.config.rounds or self._orders.stand():
            return
        self._check_ring()
        plan = self._next_plan()
        found = self._eligible(plan)
        if len(found.devices) >= self._round_of(plan).devices:  # an evaluation takes time
            self._take(self._new_round(self._done + 1, found.devices))
        if self._evaluation_is_due() and not self._orders.stand():
            self._evaluate()

    def _next_plan(self) -> TrainingPlan:
        return self._algorithm.plan(_plan(self.config, self._done + 1), asked_by(self._engine)[0])

    def _vectors(self, plan: TrainingPlan) -> tuple[npt.NDArray[np.float32], ...]:
        work, vectors = asked_by(self._engine)
        return vectors if plan.work == work and not plan.evaluate else ()

    def _new_round(self, number: int, devices: list[str]) -> RoundResult:
        plan = self._next_plan()
        settings = self._round_of(plan)
        return self.coordinator.run_round(
            run_id=self.config.run,
            number=number,
            bundle=self._work.bundle,
            parameters=self._parameters,
            plan=plan,
            device_ids=self._invited(number, devices, settings),
            quorum=settings.quorum,
            engine=self._engine,
            timing=Timing(settings.duration_s, settings.answer_s, settings.grace_s),
            goal=settings.goal,
            max_staleness=settings.max_staleness,
            encrypt=self.config.wire.encryption,
            vectors=self._vectors(plan),
        )

    def _invited(self, number: int, devices: list[str], settings: RoundSettings) -> list[str]:
        """A sample of these devices; to an asynchronous round all, as who comes later may take part, too."""
        if settings.max_staleness:
            return meant(self.coordinator.admitted(), settings.only, settings.exclude)
        return sampled(devices, settings.sample, self.config.training.seed, self.config.run, number, self._abandoned)

    def _take(self, result: RoundResult) -> None:
        for line in _lines(result.number, self.config.rounds, result):
            self._say(printable(line))
        for line in result.leaks:
            self._say(printable(f"  privacy: {line}"))
        pauses = self.config.privacy is not None and self.config.privacy.pause
        if result.leaks and pauses and not self._orders.stand():
            self._orders.pause(f"privacy: {result.leaks[0]}"[:MAX_REASON])
        if not result.evaluates:
            self._count(result)
        self.coordinator.tidy(self.config.run)
        pause_s = self.config.round.pause_s if self._done < self.config.rounds else 0.0
        self._not_before = self.coordinator.now_s() + pause_s

    def _count(self, result: RoundResult) -> None:
        if result.outcome == Phase.PUBLISHED.value:
            self._parameters, self._done = result.parameters, result.number
            self._abandoned = self._hopeless = 0
        else:
            self._abandoned += 1
            self._hopeless += not result.postponed
            _give_up_if_hopeless(self._hopeless, result.reason)

    # --- evaluations

    def _evaluation_is_due(self) -> bool:
        every, done = self.config.evaluation.every, self._done
        if not every or not done or done == self._left_out or not self._algorithm.moves(done):
            return False
        last = done >= self.config.rounds
        is_one = last or self._algorithm.rounds(done) % every == 0
        return is_one and not self.coordinator.store.evaluated(self.config.run, done)

    def _evaluate(self) -> None:
        """One round, whatever comes of it: training does not wait for numbers."""
        settings, plan = self.config.evaluation, _evaluation_plan(self.config)
        needed = settings.devices or self.config.round.devices
        self.coordinator.attend(
            self.config.round.answer_s,
            lambda: len(self._eligible(plan).devices) >= needed or self._orders.stand(),
        )
        if self._orders.stand():
            return
        found = self._eligible(plan)
        if len(found.devices) < needed:
            told = f"{len(found.devices)} of {needed} devices are here" + (f", {found.told()}" if found.others else "")
            self._say(printable(f"evaluation of round {self._done} left out: {told}"))
            self._left_out = self._done
            return
        self._take(self._new_evaluation(plan, found.devices))

    def _new_evaluation(self, plan: TrainingPlan, devices: list[str]) -> RoundResult:
        rounds, own = self.config.round, self.config.evaluation
        return self.coordinator.run_round(
            run_id=self.config.run,
            number=self._done,
            bundle=self._work.bundle,
            parameters=self._parameters,
            plan=plan,
            device_ids=devices,
            quorum=own.quorum or rounds.quorum,
            engine=self._engine,
            timing=Timing(own.duration_s or rounds.duration_s, rounds.answer_s, rounds.grace_s),
            encrypt=self.config.wire.encryption,
        )


TASK_ERRORS = (RunError, RuleError, TrainingError)  # of one task; whatever else comes ends the program


def run_tasks(tasks: list[Task]) -> None:
    """Everything after the connection: take up what the last start left, then rounds in turn until all are published.

    A task that fails leaves the others running; its error is raised at the end.
    """
    several = len(tasks) > 1
    last_round = {task: task.coordinator.store.newest_opened_ms(task.config.run) for task in tasks}
    by_age = sorted(tasks, key=lambda task: last_round[task])  # how the newest round ended is said last, and so stays
    for task in by_age:
        task.begin()
    for task in by_age:
        _guarded(task, task.resume)
    turns = Turns({task: task.weight for task in tasks}, last_round)
    while True:
        for task in tasks:
            if task.is_over():
                task.end(several)
        left = [task for task in tasks if not task.is_over()]
        if not left:
            break
        ready = [task for task in left if _guarded(task, task.is_ready)]
        if ready:
            chosen = turns.choose(ready)
            _guarded(chosen, chosen.turn)
        else:
            left[0].coordinator.attend(POLL_S)
    for task in tasks:
        task.coordinator.linger(task.config.run)
    for task in tasks:
        if task.failure is not None:
            raise task.failure


def _guarded(task: Task, action: Callable[[], T]) -> T | None:
    try:
        return action()
    except TASK_ERRORS as exc:
        task.failure = exc
        return None


def _too_few(found: Eligible, needed: int, wait_s: float) -> RunError:
    return RunError(
        f"only {len(found.devices)} of {needed} devices came online within {wait_s:g} s"
        + (f" ({', '.join(found.devices)})" if found.devices else "")
        + (f"; not invited: {found.told()}" if found.others else ""),
        "look at the agents' logs, or ask for fewer devices",
    )


def _rule(path: Path, config: CoordinatorConfig) -> Rule:
    if config.rule is not None:
        raise ConfigError(
            f"{path}: there is no table [rule]",
            'write [aggregation] with rule = "...", num_byzantine, before and the rule\'s settings as its keys',
        )
    try:
        return rule_from_table(config.aggregation).for_fleet(_meant(config))
    except ConfigError as exc:
        raise ConfigError(f"{path}: [aggregation]: {exc.what}", exc.remedy) from exc


def _check_copies(path: Path, config: CoordinatorConfig, rule: Rule) -> None:
    """That a rule that counts on equal updates can get them (coding.conditions)."""
    settings, training, missing = config.round, config.training, "a group needs its devices in every round"
    unequal = {
        "round.sample": (settings.sample, missing),
        "round.goal": (settings.goal, missing),
        "round.max_staleness": (settings.max_staleness, "updates from different models are not equal"),
        "wire.compression": (config.wire.compression != NONE and config.wire.compression, "it draws per device"),
        "training.algorithm": (training.algorithm != FEDAVG and training.algorithm, "only fedavg is proven with it"),
    }
    try:
        check_equal_updates(rule, unequal)
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
        algorithm, plain = _algorithm(config), _plan(config, 1)
        for plan in (*(algorithm.plan(plain, work) for work in algorithm.works), _evaluation_plan(config)):
            check_plan(manifest, plan)
    except (ConfigError, TrainingError) as exc:
        raise ConfigError(f"{path}: {exc.what}", f"{exc.remedy}, or leave the setting out") from exc


def _refuse_leaks(path: Path, config: CoordinatorConfig, data: bytes, manifest: Manifest) -> tuple[str, ...]:
    if config.privacy is None:
        return ()
    algorithm, plain = _algorithm(config), _plan(config, 1)
    plans = [algorithm.plan(plain, work) for work in algorithm.works]
    return tuple(refuse_leaks(path, config.privacy, data, manifest, plans))


def _algorithm(config: CoordinatorConfig) -> Algorithm:
    training, teaching = config.training, None
    if config.teaching is not None:
        teaching = teaching_plan(config.teaching, _meant(config), config.trusted is not None)
    holders = config.teaching is not None and bool(config.teaching.holders)
    coding = coding_plan(config.coding, _meant(config)) if config.coding is not None else None
    return Algorithm(training.algorithm, training.local_steps, training.feature_scaling, teaching, holders, coding)


def _check_algorithm(path: Path, config: CoordinatorConfig) -> None:
    try:
        algorithm = _algorithm(config)
        check_algorithm(algorithm, config.server.optimizer)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.what}", exc.remedy) from exc
    if config.coding is not None:
        check_coded(path, config.coding, config.aggregation, config.round, config.wire.compression)
    if algorithm.name != FEDAVG and config.round.max_staleness:
        raise ConfigError(
            f"{path}: algorithm {algorithm.name!r} with round.max_staleness: its vectors belong to one model",
            "leave max_staleness out; round.goal alone does not wait for slow devices either",
        )


def _check_goal(path: Path, settings: RoundSettings) -> None:
    if settings.max_staleness and not settings.goal:
        raise ConfigError(
            f"{path}: round.max_staleness = {settings.max_staleness} without a round.goal",
            "say with round.goal how many updates are aggregated at once",
        )
    if settings.max_staleness and settings.sample:
        raise ConfigError(
            f"{path}: round.sample with round.max_staleness, where every device takes part at its own speed",
            "leave one of them out",
        )
    most = min(settings.sample or settings.devices, settings.devices)
    if settings.goal and not settings.quorum <= settings.goal <= most:
        raise ConfigError(
            f"{path}: round.goal = {settings.goal} is not between round.quorum = {settings.quorum} and the {most}"
            " devices of a round",
            "choose one between them",
        )


def _plan(config: CoordinatorConfig, number: int) -> TrainingPlan:
    return training_plan(config.training, config.wire, number, config.task)


def training_plan(training: TrainingSettings, wire: WireSettings, number: int, task: str = "") -> TrainingPlan:
    """What devices are asked in round `number` of plain training."""
    return TrainingPlan(
        epochs=training.epochs,
        learning_rate=training.learning_rate,
        shuffle_seed=shuffle_seed(training.seed, number),
        gradient_clip_norm=training.gradient_clip_norm,
        proximal_weight=training.proximal_weight,
        compression=wire.compression,
        kept_fraction=wire.kept_fraction,
        task=task,
    )


def _evaluation_plan(config: CoordinatorConfig) -> TrainingPlan:
    """What a plan must say beside the metrics has no effect."""
    rate = config.training.learning_rate
    return TrainingPlan(epochs=1, learning_rate=rate, evaluate=config.evaluation.metrics, task=config.task)


def _resume(
    store: RunStore,
    engine: Engine,
    run: str,
    initial: npt.NDArray[np.float32],
    say: Say,
    own: OwnTraining = NO_TRAINING,
) -> tuple[npt.NDArray[np.float32], int]:
    """The newest readable checkpoint's parameters, with its state in the engine, and its round; else initial and 0.

    Models of later rounds that cannot be read any more are computed again, as far as their updates are still here.
    """
    found = store.newest_checkpoint(run, len(initial))
    parameters, done = (found.parameters, found.number) if found is not None else (initial, 0)
    if found is not None and found.state and not engine.load_state(found.state):
        say("the rule or the server optimizer is another one now: its memory starts afresh")
    for round_id, number, *hashes in store.later_models(run, done):
        mended = _mended(store, engine, run, round_id, Checkpoint(number, parameters, b""), *hashes, own=own)
        if mended is None:
            say(f"the model of round {number} is damaged and cannot be computed again: its updates are lost")
            break
        say(f"the model of round {number} was damaged; it is computed again from the stored updates")
        parameters, done = mended, number
    if done:
        say(f"going on after round {done}")
    return parameters, done


def _mended(
    store: RunStore,
    engine: Engine,
    run: str,
    round_id: str,
    before: Checkpoint,
    sha256: str,
    state_sha256: str,
    *,
    own: OwnTraining = NO_TRAINING,
) -> npt.NDArray[np.float32] | None:
    """The parameters that the round made of those before it; None, and nothing changed, unless they have this hash.

    An exchange that leaves the model as it is (algorithms) has made what is in the engine's state: then that, too.
    """
    updates, state = store.kept_updates(round_id), engine.saved_state()
    plan = store.invitation(round_id).plan
    arrivals = arrivals_of(updates, plan, len(before.parameters))
    for device_id, (offer, update) in updates.items():
        arrivals.add(device_id, update, offer.num_examples)
    try:
        refused = store.num_refused(round_id)
        screened = arrivals.screened(updates, refuse_copies=refuses_copies(plan, engine), refused_on_arrival=refused)
        own.begin(round_id, before.parameters, plan)
        parameters = engine.aggregate(before.parameters, replace(screened, trusted=own.given())).parameters
    except RuleError:
        return None
    finally:
        own.stop()
    same = hashlib.sha256(parameters.astype("<f4").tobytes()).hexdigest() == sha256
    if plan.work != TRAIN:
        same = same and hashlib.sha256(engine.saved_state()).hexdigest() == state_sha256
    if not same:
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
    what = "evaluation of round" if result.evaluates else "round"
    work = f" ({result.work})" if result.work != TRAIN else ""
    metrics = f", {evaluation_text(result.evaluation)}" if result.evaluation else ""
    head = f"{what} {number}/{rounds}{work} {result.outcome}: {used} of {len(result.verdicts)} updates{loss}{metrics}"
    reasons = [f"  {v.device_id} {v.status}: {v.reason}" for v in result.verdicts if v.status != ACCEPTED]
    return [f"{head}{_byzantine_left(result)}{f' ({result.reason})' if result.reason else ''}", *reasons]


def _byzantine_left(result: RoundResult) -> str:
    """What became of num_byzantine where devices at fault were refused (docs/adr/0014)."""
    told, left = (result.measurements.get(name, 0.0) for name in ("num_byzantine", "num_byzantine_left"))
    return f", num_byzantine_left {left:.0f} of {told:.0f}" if left < told else ""
