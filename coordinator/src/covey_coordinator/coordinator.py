"""Runs rounds: performs a round machine's effects on a fleet, a store and an aggregation engine.

Who is waited for is decided by the machine (covey_protocol.round), what enters the model by the engine (aggregation).
Nothing a device says ends a round early or raises here: it is logged and counted. An effect that fails (a full disk)
keeps those after it from happening; what is durable then is what `resume_round` goes on from.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from covey_coordinator import records
from covey_coordinator.aggregation.screening import Arrivals, Screened
from covey_coordinator.fleet import POLL_S, FromFleet
from covey_coordinator.store import Checkpoint, RunStore, decoded
from covey_coordinator.uploads import UploadGate
from covey_coordinator.watching import events
from covey_protocol import round as rounds
from covey_protocol.bundle import check_plan, read_bundle
from covey_protocol.device import needed_capabilities
from covey_protocol.errors import PeerError, RuleError, RunError
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    FromCoordinator,
    Invitation,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    Seen,
    TrainingPlan,
)
from covey_protocol.round import Phase, Progress, RoundFacts, RoundMachine, RoundSettings

log = logging.getLogger("covey.coordinator")

KEEP_TIME_S = 5.0  # how often a round's elapsed time is made durable: at most so much longer if the clock jumps back
RESTART_COST_S = 1.0  # of the round's time, so that it ends also where the coordinator only ever restarts
# messages that are taken before what they led to is made durable and said, in one go: each sync takes milliseconds
MOST_TOGETHER, TOGETHER_S = 256, 0.2
TELL_RATIO = 30.0  # time between two tellings of every device's progress, in times of what one takes
LINGER_S = 5.0  # at the end of a run: how long devices that are online have to read their verdicts

Floats = npt.NDArray[np.float32]


class StepOutcome(Protocol):
    """What an engine's step gives: see aggregation.engines.StepResult."""

    @property
    def parameters(self) -> Floats: ...
    @property
    def verdicts(self) -> Sequence[records.DeviceVerdict]: ...
    @property
    def measurements(self) -> Mapping[str, float]: ...


class Engine(Protocol):
    """See aggregation.engines."""

    def aggregate(self, parameters: Floats, screened: Screened) -> StepOutcome: ...
    def saved_state(self) -> bytes: ...
    def load_state(self, data: bytes) -> bool: ...


class Devices(Protocol):
    """See fleet.Fleet."""

    def online(self) -> list[str]: ...
    def send(self, device_id: str, message: FromCoordinator) -> None: ...
    def publish_round(self, message: Invitation | RoundClosed) -> None: ...
    def publish_blob(self, data: bytes) -> BlobRef: ...
    def clear_blob(self, sha256: bytes) -> None: ...
    def next(self, timeout_s: float) -> FromFleet | None: ...


class Clock:
    """Time of this machine. Unix time may jump, also backwards; monotonic time means nothing after a restart."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000


CLOCK = Clock()


@dataclass(frozen=True)
class Timing:
    """Seconds. duration_s: the round's deadline. answer_s: for answers to the invitation. grace_s: for lost devices."""

    duration_s: float = 600.0
    answer_s: float = 20.0
    grace_s: float = 3.0


@dataclass(frozen=True)
class RoundResult:
    """parameters: of the new global model (the old ones when the round was abandoned).

    measurements: the engine's numbers to log, among them num_byzantine_left, what the rule was run with after devices
    at fault were refused. Empty without an aggregation.
    """

    parameters: Floats
    outcome: str
    reason: str
    verdicts: Sequence[records.DeviceVerdict]
    offers: dict[str, Offer] = field(default_factory=dict)
    seconds: float = 0.0
    measurements: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Round:
    """What one round in progress gathers. opened_at: in monotonic time, also where that was before this start."""

    machine: RoundMachine
    parameters: Floats
    result: Floats
    engine: Engine | None
    arrivals: Arrivals
    opened_at: float
    verdicts: list[records.DeviceVerdict] = field(default_factory=list)
    measurements: Mapping[str, float] = field(default_factory=dict)
    offers: dict[str, Offer] = field(default_factory=dict)
    finished: rounds.Finished | None = None
    kept_time_at: float = 0.0
    tell_at: float = float("-inf")


class Coordinator:
    """Rounds of one fleet, one at a time.

    leave_open: an error or Ctrl-C leaves the round as it is, for `resume_round` after a restart; else it is abandoned.
    on_progress: called with every device's progress, a few times a second and at the end.
    watch: told what happens, see watching.events.
    aborted: looked at as often; the reason why an operator ends the round, None as long as nobody does.
    """

    def __init__(
        self,
        fleet: Devices,
        store: RunStore,
        *,
        leave_open: bool = False,
        clock: Clock = CLOCK,
        on_progress: Callable[[dict[str, Progress]], None] = lambda progress: None,
        watch: events.Watcher = events.unwatched,
        aborted: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.fleet = fleet
        self.store = store
        self._leave_open = leave_open
        self._clock = clock
        self._on_progress = on_progress
        self._watch = watch
        self._aborted = aborted
        self._unsaid: list[tuple[str, FromCoordinator]] = []  # may be said after the next commit
        self._gate = UploadGate()

    def wait_for(
        self,
        count: int,
        timeout_s: float,
        on_progress: Callable[[int], None] = lambda online: None,
        unless: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Wait until `count` devices are online, or `unless` holds; the ids of those online.

        RunError when neither comes in time.
        """

        def enough() -> bool:
            online = len(self.fleet.online())
            on_progress(online)
            return online >= count or unless()

        if not self.attend(timeout_s, enough):
            online = self.fleet.online()
            raise RunError(
                f"only {len(online)} of {count} devices came online within {timeout_s:g} s"
                + (f" ({', '.join(online)})" if online else ""),
                "look at the agents' logs, or ask for fewer devices",
            )
        return self.fleet.online()

    def attend(self, timeout_s: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Between rounds: answer devices, until the condition holds (True) or the time is over (False)."""
        end = self._clock.monotonic_s() + timeout_s
        while not until():
            left = end - self._clock.monotonic_s()
            if left <= 0:
                return False
            self._take_some(None, min(POLL_S, left))
        return True

    def run_round(
        self,
        *,
        run_id: str,
        number: int,
        bundle: bytes,
        parameters: Floats,
        plan: TrainingPlan,
        device_ids: Sequence[str],
        quorum: int,
        engine: Engine | None,
        timing: Timing = Timing(),
    ) -> RoundResult:
        """One round with these devices. engine None collects the updates and leaves the model as it is (for audits).

        Raises, before anything is published, TrainingError for a plan that the bundle cannot follow and RuleError where
        the updates of so many devices would not fit.
        Returns the new parameters, or the old ones with outcome "abandoned". What a device is told is durable before;
        rows reach the engine sorted by device id, so the order of arrival changes no bit. The checkpoint of a published
        round is in the store when this returns.
        """
        manifest = read_bundle(bundle).manifest
        check_plan(manifest, plan)
        arrivals = Arrivals(device_ids, len(parameters))
        refs = self._publish(bundle, parameters)
        requires = needed_capabilities(manifest, plan)
        now_ms = self._clock.unix_ms()
        invitation = _invitation(run_id, number, *refs, plan, device_ids, requires, timing, now_ms)
        settings = RoundSettings.of(invitation, quorum, timing.answer_s, timing.grace_s)
        machine = RoundMachine(invitation, device_ids, settings)
        self.store.open_round(run_id, invitation, settings, now_ms)
        now = self._clock.monotonic_s()
        state = _Round(machine, parameters, parameters, engine, arrivals, now, kept_time_at=now)
        self._tell_opened(state, now, resumed=False)
        return self._collect(state, machine.handle(rounds.Opened(), now))

    def resume_round(
        self, *, run_id: str, bundle: bytes, parameters: Floats, engine: Engine | None
    ) -> RoundResult | None:
        """Go on with the round that was under way when the last coordinator of this run ended; None if none was.

        Its deadline is what it was. It is abandoned where bundle or parameters are not what it was opened with. The
        engine must be in the state of the checkpoint that holds these parameters.
        """
        facts = self.store.unfinished(run_id)
        if facts is None:
            return None
        facts = replace(facts, elapsed_s=self._elapsed_s(facts))
        invitation, now = facts.invitation, self._clock.monotonic_s()
        self.store.keep_time(invitation.round_id, int(facts.elapsed_s * 1000))
        refs = self._publish(bundle, parameters)
        machine = RoundMachine.restored(facts, now)
        arrivals = Arrivals(facts.devices, len(parameters))
        opened_at = now - facts.elapsed_s
        state = _Round(machine, parameters, parameters, engine, arrivals, opened_at, kept_time_at=now)
        self._tell_opened(state, now, resumed=True)
        reason = self._aborted()
        if reason is None and refs != (invitation.bundle, invitation.parameters):
            reason = "the bundle, the model or chunk_bytes is not what the round was opened with"
        if reason is not None:
            return self._collect(state, machine.handle(rounds.Aborted(reason), now))
        self._reload(state, facts)
        log.info(
            "round %s goes on: %d of %d updates are here", invitation.round_id, len(state.offers), len(facts.devices)
        )
        return self._collect(state, machine.resume(now))

    def announce(self, run_id: str) -> None:
        """After a start: say again how the newest round ended, and the verdicts on it that no device has read."""
        closed = self.store.newest_end(run_id)
        if closed is None:
            return
        self.fleet.publish_round(closed)
        for device_id, verdict in self.store.untold(closed.round_id):
            self.fleet.send(device_id, verdict)

    def tidy(self, run_id: str) -> None:
        """Forget what is too old to be asked for."""
        self.store.prune(run_id, self._clock.unix_ms())

    def linger(self, run_id: str) -> None:
        """Before the end: until every device that is online has read its verdicts, or LINGER_S."""
        self.attend(LINGER_S, lambda: self.store.untold_devices(run_id).isdisjoint(self.fleet.online()))

    # --- one round

    def _publish(self, bundle: bytes, parameters: Floats) -> tuple[BlobRef, BlobRef]:
        return self.fleet.publish_blob(bundle), self.fleet.publish_blob(parameters.astype("<f4").tobytes())

    def _elapsed_s(self, facts: RoundFacts) -> float:
        """By the clock; by what was kept, where the clock says less."""
        by_clock = (self._clock.unix_ms() - facts.invitation.issued_at_ms) / 1000
        return max(by_clock, facts.elapsed_s + RESTART_COST_S)

    def _reload(self, state: _Round, facts: RoundFacts) -> None:
        for device_id, known in facts.devices.items():
            if known.progress is Progress.STORED and known.offer is not None:
                update = self.store.read_update(facts.invitation.round_id, device_id)
                state.arrivals.add(device_id, update, known.offer.num_examples)
                state.offers[device_id] = known.offer

    def _collect(self, state: _Round, effects: list[rounds.Effect]) -> RoundResult:
        started = self._clock.monotonic_s()
        try:
            with self._together():
                self._perform(state, effects)
            while state.finished is None:
                self._take_some(state, POLL_S)
                self._end_if_aborted(state)
                self._keep_time(state)
                self._tell_progress(state)
        finally:
            if state.finished is None and not self._leave_open:  # devices must not go on working for nothing
                with self._together():
                    self._handle(state, rounds.Aborted("the coordinator stopped"))
        self._gate.clear()
        invitation, finished = state.machine.invitation, state.finished
        if invitation.parameters.sha256 != invitation.bundle.sha256:
            self.fleet.clear_blob(invitation.parameters.sha256)
        verdicts = sorted(state.verdicts, key=lambda verdict: verdict.device_id)
        seconds = self._clock.monotonic_s() - started
        metrics = {device_id: offer.metrics for device_id, offer in state.offers.items()}
        outcome, reason = finished.outcome, finished.reason
        self._watch(
            events.RoundEnded(invitation.round_id, invitation.number, outcome, reason, verdicts, metrics, seconds)
        )
        return RoundResult(state.result, outcome, reason, verdicts, state.offers, seconds, state.measurements)

    def _end_if_aborted(self, state: _Round) -> None:
        reason = self._aborted()
        if reason is not None and state.finished is None:
            with self._together():
                self._handle(state, rounds.Aborted(reason))

    def _tell_opened(self, state: _Round, now: float, resumed: bool) -> None:
        machine, invitation = state.machine, state.machine.invitation
        left_s = invitation.duration_ms / 1000 - (now - state.opened_at)
        devices, quorum = invitation.devices, machine.settings.quorum
        self._watch(
            events.RoundOpened(invitation.round_id, invitation.number, devices, quorum, max(0.0, left_s), resumed)
        )
        self._watch(events.PhaseBegan(invitation.round_id, machine.phase.value))
        self._tell_moves(state, machine.progress())

    def _tell_progress(self, state: _Round) -> None:
        if state.finished is not None or self._clock.monotonic_s() >= state.tell_at:
            progress = state.machine.progress()
            self._on_progress(progress)
            self._tell_moves(state, progress)

    def _tell_moves(self, state: _Round, progress: dict[str, Progress]) -> None:
        """Not for every chunk of every device, and less often in a large fleet."""
        began = self._clock.monotonic_s()
        words = {device_id: how_far.value for device_id, how_far in progress.items()}
        self._watch(events.DevicesMoved(state.machine.invitation.round_id, words, state.machine.received()))
        now = self._clock.monotonic_s()
        state.tell_at = now + max(POLL_S, TELL_RATIO * (now - began))

    def _keep_time(self, state: _Round) -> None:
        now = self._clock.monotonic_s()
        if state.finished is None and now - state.kept_time_at >= KEEP_TIME_S:
            state.kept_time_at = now
            self.store.save_chunks()
            self.store.keep_time(state.machine.invitation.round_id, int((now - state.opened_at) * 1000))

    def _take_some(self, state: _Round | None, timeout_s: float) -> None:
        """What comes within timeout_s, and with it what has come already, up to a bound; then that time passed."""
        received = self.fleet.next(timeout_s)
        end = self._clock.monotonic_s() + TOGETHER_S
        with self._together():
            taken = 0
            while received is not None:
                self._take(state, received)
                taken += 1
                over = state is not None and state.finished is not None
                if over or taken == MOST_TOGETHER or self._clock.monotonic_s() >= end:
                    break
                received = self.fleet.next(0.0)
            self._take(state, None)
        for device_id, need in self._gate.let_go(self._clock.monotonic_s(), idle=received is None):
            self.fleet.send(device_id, need)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What is done in the with block becomes durable together; what it wants to say is said after that."""
        try:
            with self.store.together():
                yield
                self._commit()
        finally:
            self._unsaid.clear()

    def _commit(self) -> None:
        self.store.commit()
        unsaid, self._unsaid = self._unsaid, []
        for device_id, message in unsaid:
            self.fleet.send(device_id, message)

    def _take(self, state: _Round | None, received: FromFleet | None) -> None:
        """One message, or that none came."""
        message = received.message if received is not None else None
        if received is not None:
            online = message.online if isinstance(message, Presence) else None
            self._watch(events.MessageCame(received.device_id, type(message).__name__, online))
        if received is not None and isinstance(message, Seen):
            self.store.seen(message.round_id, received.device_id)
        elif state is not None:
            self._handle(state, _event(received) if received is not None else rounds.Tick())
        elif received is not None and isinstance(message, Offer):
            self._recall(received.device_id, message)

    def _handle(self, state: _Round, event: rounds.Event) -> None:
        phase = state.machine.phase
        try:
            effects = state.machine.handle(event, self._clock.monotonic_s())
        except PeerError as exc:
            log.warning("ignored a message: %s", exc)
            return
        if state.machine.phase is not phase:
            self._watch(events.PhaseBegan(state.machine.invitation.round_id, state.machine.phase.value))
        self._perform(state, effects)

    def _perform(self, state: _Round, effects: list[rounds.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, rounds.PublishRound):
                self._commit()
                self.fleet.publish_round(effect.message)
            elif isinstance(effect, rounds.SendTo) and isinstance(effect.message, Need):
                update = state.machine.offer_of(effect.device_id).update
                self._gate.add(effect.device_id, effect.message, update, self._clock.monotonic_s())
            elif isinstance(effect, rounds.SendTo):
                self._unsaid.append((effect.device_id, effect.message))
            elif isinstance(effect, rounds.Record):
                round_id = state.machine.invitation.round_id
                self.store.record(round_id, effect.device_id, effect.progress, effect.reason)
            elif isinstance(effect, rounds.SaveChunk):
                self.store.save_chunk(effect.device_id, effect.offer, effect.index, effect.data)
            elif isinstance(effect, rounds.Recall):
                self._recall(effect.device_id, effect.offer)
            elif isinstance(effect, rounds.Store):
                self._store(state, effect)
            elif isinstance(effect, rounds.Aggregate):
                self.store.decided(state.machine.invitation.round_id)
                self._commit()
                self._handle(state, self._aggregate(state, effect.device_ids))
            elif isinstance(effect, rounds.Finished):
                self._conclude(state, effect)
                state.finished = effect

    def _store(self, state: _Round, effect: rounds.Store) -> None:
        try:
            update = decoded(state.machine.invitation, effect.device_id, effect.data)
        except PeerError as exc:
            self._handle(state, rounds.Malformed(effect.device_id, str(exc)))
            return
        self.store.store_update(effect.device_id, effect.offer, effect.data)
        state.offers[effect.device_id] = effect.offer
        state.arrivals.add(effect.device_id, update, effect.offer.num_examples)
        self._handle(state, rounds.Stored(effect.device_id))

    def _recall(self, device_id: str, offer: Offer) -> None:
        """An offer of a round that is not open: its device has not heard what became of it."""
        verdict = self.store.verdict(offer.round_id, device_id, offer.update.sha256)
        over = Receipt(offer.round_id, offer.update.sha256, False, "that round is over")
        self._unsaid.append((device_id, verdict if verdict is not None else over))

    def _aggregate(self, state: _Round, device_ids: tuple[str, ...]) -> rounds.Event:
        if state.engine is None:
            state.verdicts = [records.DeviceVerdict(device_id, records.ACCEPTED) for device_id in device_ids]
            return rounds.Aggregated(dict.fromkeys(device_ids, ""))
        refused = sum(progress is Progress.REFUSED for progress in state.machine.progress().values())
        screened = state.arrivals.screened(device_ids, refused_on_arrival=refused)
        try:
            outcome = state.engine.aggregate(state.parameters, screened)
        except RuleError as exc:
            return rounds.AggregationRefused(str(exc))
        self._watch(events.RuleRan(state.machine.invitation.round_id, dict(outcome.measurements)))
        state.result = outcome.parameters
        state.verdicts, state.measurements = list(outcome.verdicts), outcome.measurements
        reasons = {
            v.device_id: "" if v.status == records.ACCEPTED else v.reason or "rejected" for v in outcome.verdicts
        }
        return rounds.Aggregated(reasons)

    def _conclude(self, state: _Round, end: rounds.Finished) -> None:
        """Outcome, verdicts and model, durable in one step."""
        invitation, judged = state.machine.invitation, {verdict.device_id for verdict in state.verdicts}
        rejected = {name: why for name, why in end.rejected.items() if name not in judged}
        missing = {name: why for name, why in end.missing.items() if name not in rejected}
        state.verdicts += [records.DeviceVerdict(name, records.REJECTED, why) for name, why in rejected.items()]
        state.verdicts += [records.DeviceVerdict(name, records.MISSING, why) for name, why in missing.items()]
        checkpoint = None
        if end.outcome == Phase.PUBLISHED.value and state.engine is not None:
            checkpoint = Checkpoint(invitation.number, state.result, state.engine.saved_state())
        self.store.conclude(invitation.round_id, Phase(end.outcome), end.reason, state.verdicts, checkpoint)


def shuffle_seed(seed: int, number: int) -> int:
    """The plan's shuffle_seed for one round of a run: another order every round, the same for the same seed."""
    return seed * 1_000_003 + number


def _invitation(
    run_id: str,
    number: int,
    bundle: BlobRef,
    parameters: BlobRef,
    plan: TrainingPlan,
    device_ids: Sequence[str],
    requires: tuple[str, ...],
    timing: Timing,
    now_ms: int,
) -> Invitation:
    return Invitation(
        round_id=f"{run_id}.{number}.{now_ms:x}",  # the time keeps a restarted run's rounds apart from earlier ones
        number=number,
        issued_at_ms=now_ms,
        duration_ms=int(timing.duration_s * 1000),
        bundle=bundle,
        parameters=parameters,
        plan=plan,
        devices=tuple(sorted(device_ids)),
        requires=requires,
    )


def _event(received: FromFleet) -> rounds.Event:
    device_id, message = received.device_id, received.message
    if isinstance(message, Answer):
        return rounds.Answered(device_id, message)
    if isinstance(message, Offer):
        return rounds.Offered(device_id, message)
    if isinstance(message, Chunk):
        return rounds.ChunkArrived(device_id, message)
    if isinstance(message, Failure):
        return rounds.Failed(device_id, message)
    assert isinstance(message, Presence)
    return rounds.PresenceChanged(device_id, message.online)
