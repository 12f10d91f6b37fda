"""Runs rounds: performs a round machine's effects on a fleet, a store and an aggregation engine.

Who is waited for is decided by the machine (covey_protocol.round), what enters the model by the engine (aggregation).
Nothing a device says ends a round early or raises here: it is logged and counted. An effect that fails (a full disk)
keeps those after it from happening; what is durable then is what `resume_round` goes on from.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from covey_coordinator import records
from covey_coordinator.aggregation.evaluating import evaluated, metrics_fault
from covey_coordinator.aggregation.rules import Trusted
from covey_coordinator.aggregation.screening import Arrivals, Screened, number_fault, shares_fault
from covey_coordinator.aggregation.staleness import weighted
from covey_coordinator.fleet import POLL_S, FromFleet
from covey_coordinator.inversion.round_checks import RoundLeakage
from covey_coordinator.store import Checkpoint, RunStore
from covey_coordinator.uploads import UploadGate
from covey_coordinator.watching import events
from covey_protocol import round as rounds
from covey_protocol.bundle import check_plan, read_bundle
from covey_protocol.device import needed_capabilities
from covey_protocol.encryption import Entropy, KeyPair
from covey_protocol.errors import PeerError, RuleError, RunError
from covey_protocol.messages import (
    MAX_STALENESS,
    TRAIN,
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
    run_of,
)
from covey_protocol.round import Phase, Progress, RoundFacts, RoundMachine, RoundSettings
from covey_protocol.works import CORRECT, CYCLIC, FEATURES, TEACH

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
    @property
    def num_byzantine(self) -> int: ...
    @property
    def expects_copies(self) -> bool: ...


class Devices(Protocol):
    """See fleet.Fleet."""

    def known(self) -> list[str]: ...
    def online(self) -> list[str]: ...
    def capabilities(self, device_id: str) -> Sequence[str]: ...
    def send(self, device_id: str, message: FromCoordinator) -> None: ...
    def publish_round(self, message: Invitation | RoundClosed, in_use: Collection[bytes] = ()) -> None: ...
    def publish_blob(self, data: bytes) -> BlobRef: ...
    def clear_blob(self, sha256: bytes) -> None: ...
    def next(self, timeout_s: float) -> FromFleet | None: ...


class OwnTraining(Protocol):
    """What a rule needs of the coordinator's own data, made round by round: see trusted_training."""

    def begin(self, round_id: str, parameters: Floats, plan: TrainingPlan) -> None: ...
    def is_ready(self) -> bool: ...
    def given(self) -> Trusted: ...
    def stop(self) -> None: ...


class NoTraining:
    """For rules that need nothing."""

    def begin(self, round_id: str, parameters: Floats, plan: TrainingPlan) -> None:
        pass

    def is_ready(self) -> bool:
        return True

    def given(self) -> Trusted:
        return Trusted()

    def stop(self) -> None:
        pass


NO_TRAINING = NoTraining()


class LeakChecks(Protocol):
    """What looks at every round's updates and at what was made of them: see inversion.round_checks."""

    def measure(
        self, updates: Floats, device_ids: Sequence[str], examples: Sequence[int], plan: TrainingPlan
    ) -> RoundLeakage | None: ...
    def with_aggregate(self, leakage: RoundLeakage, change: Floats) -> RoundLeakage: ...


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
    at fault were refused. Empty without an aggregation. number, evaluates: of the round, as in its invitation.
    evaluation: what a published evaluation round gave. work: as in the round's plan. leaks: what the privacy policy
    wants told of its updates. postponed: how many devices declined for now, and had not joined when it ended.
    """

    parameters: Floats
    outcome: str
    reason: str
    verdicts: Sequence[records.DeviceVerdict]
    offers: dict[str, Offer] = field(default_factory=dict)
    seconds: float = 0.0
    measurements: Mapping[str, float] = field(default_factory=dict)
    number: int = 0
    evaluates: Sequence[str] = ()
    evaluation: Sequence[records.FleetMetric] = ()
    work: str = TRAIN
    leaks: Sequence[str] = ()
    postponed: int = 0


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
    evaluation: Sequence[records.FleetMetric] = ()
    leakage: RoundLeakage | None = None
    offers: dict[str, Offer] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)  # of whom the machine has heard
    due: tuple[str, ...] = ()  # whose updates are to be aggregated
    finished: rounds.Finished | None = None
    kept_time_at: float = 0.0
    tell_at: float = float("-inf")


@dataclass
class Common:
    """What the coordinators of a fleet's tasks know together. Devices speak of all rounds, whichever is under way.

    stores: by run. windows: by run, the rounds that are over and whose updates a later one may take. models: by run,
    the hashes of those of ended rounds for which devices may still work, the oldest first. revoked: the devices of
    which nothing is taken, as it was last looked at. refused: how many messages of each were ignored.
    """

    stores: Mapping[str, RunStore]
    windows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    models: dict[str, list[bytes]] = field(default_factory=dict)
    revoked: Mapping[str, str] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)


class Coordinator:
    """Rounds of one fleet, one at a time.

    leave_open: an error or Ctrl-C leaves the round as it is, for `resume_round` after a restart; else it is abandoned.
    on_progress: called with every device's progress, a few times a second and at the end.
    watch: told what happens, see watching.events.
    aborted: looked at as often; the reason why an operator ends the round, None as long as nobody does.
    revoked: looked at as often; the devices of which nothing is taken, and why.
    entropy: of the keys of encrypted rounds.
    common: what it knows together with the coordinators of the fleet's other tasks.
    own: makes what the rule needs of trusted data, while the devices work; the rule waits for it.
    checks: says how much can be read off each round's updates; None looks at nothing.
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
        revoked: Callable[[], Mapping[str, str]] = dict,
        entropy: Entropy = os.urandom,
        common: Common | None = None,
        own: OwnTraining = NO_TRAINING,
        checks: LeakChecks | None = None,
    ) -> None:
        self.fleet = fleet
        self._checks = checks
        self.store = store
        self._leave_open = leave_open
        self._clock = clock
        self._on_progress = on_progress
        self._watch = watch
        self._aborted = aborted
        self._most_models = 0
        self._revoked = revoked
        self._entropy = entropy
        self._common = common if common is not None else Common({})
        self.own = own
        self._unsaid: list[tuple[str, FromCoordinator]] = []  # may be said after the next commit
        self._gate = UploadGate()

    def now_s(self) -> float:
        """Monotonic time."""
        return self._clock.monotonic_s()

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
            online = len(self.online())
            on_progress(online)
            return online >= count or unless()

        if not self.attend(timeout_s, enough):
            online = self.online()
            raise RunError(
                f"only {len(online)} of {count} devices came online within {timeout_s:g} s"
                + (f" ({', '.join(online)})" if online else ""),
                "look at the agents' logs, or ask for fewer devices",
            )
        return self.online()

    def online(self) -> list[str]:
        """The ids of the devices that are connected now and not revoked, sorted."""
        revoked = self._look()
        return [device_id for device_id in self.fleet.online() if device_id not in revoked]

    def capabilities(self, device_id: str) -> Sequence[str]:
        """As its newest presence names them."""
        return self.fleet.capabilities(device_id)

    def admitted(self) -> list[str]:
        """The ids of the devices of the roster that are not revoked, sorted."""
        revoked = self._look()
        return [device_id for device_id in self.fleet.known() if device_id not in revoked]

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
        goal: int = 0,
        max_staleness: int = 0,
        encrypt: bool = False,
        vectors: Sequence[Floats] = (),
    ) -> RoundResult:
        """One round with these devices. engine None collects the updates and leaves the model as it is (for audits).

        encrypt: updates come encrypted to a key pair that is this round's alone. goal: the round ends when so many
        updates are stored (over-selection, where more devices are invited); 0 waits for everyone. max_staleness: above
        0, the round is one filling of a buffer of `goal` updates (FedBuff): it takes updates for rounds that are behind
        by at most so many models, and later rounds take what comes too late for it.

        A plan with metrics makes it an evaluation round: number is that of the round whose model it evaluates.
        vectors: what the plan's work needs beside the parameters, (d,) each.

        Raises, before anything is published, TrainingError for a plan that the bundle cannot follow and RuleError where
        the updates of so many devices would not fit.
        Returns the new parameters, or the old ones with outcome "abandoned". What a device is told is durable before;
        rows reach the engine sorted by device id, so the order of arrival changes no bit. The checkpoint of a published
        round is in the store when this returns.
        """
        manifest = read_bundle(bundle).manifest
        check_plan(manifest, plan)
        arrivals = arrivals_of(device_ids, plan, len(parameters))
        refs = self._publish(bundle, parameters, *vectors)
        requires = needed_capabilities(manifest, plan, encrypt=encrypt, late=max_staleness > 0)
        now_ms, key = self._clock.unix_ms(), KeyPair.made(self._entropy) if encrypt else None
        invitation = _invitation(run_id, number, refs, plan, device_ids, requires, timing, now_ms, max_staleness, key)
        invitation = self._with_earlier(run_id, invitation)
        earlier = self.store.earlier(invitation)
        settings = RoundSettings.of(invitation, quorum, timing.answer_s, timing.grace_s, goal, earlier)
        machine = RoundMachine(invitation, device_ids, settings)
        self.store.open_round(run_id, invitation, settings, now_ms, key)
        now = self._clock.monotonic_s()
        state = _Round(machine, parameters, parameters, engine, arrivals, now, kept_time_at=now)
        self._await_late_ones(run_id, invitation)
        self._tell_opened(state, now, resumed=False)
        self._begin_own(state)
        return self._collect(state, machine.handle(rounds.Opened(), now))

    def resume_round(
        self,
        *,
        run_id: str,
        bundle: bytes,
        parameters: Floats,
        engine: Engine | None,
        vectors: Callable[[TrainingPlan], Sequence[Floats]] = lambda plan: (),
    ) -> RoundResult | None:
        """Go on with the round that was under way when the last coordinator of this run ended; None if none was.

        Its deadline is what it was. It is abandoned where bundle or parameters are not what it was opened with, or the
        key that opens its updates is gone. The engine must be in the state of the checkpoint that holds these
        parameters. vectors: what a round of this plan needs beside the parameters, in that state.
        """
        facts = self._unfinished(run_id)
        if facts is None:
            return None
        facts = replace(facts, elapsed_s=self._elapsed_s(facts))
        invitation, now = facts.invitation, self._clock.monotonic_s()
        self.store.keep_time(invitation.round_id, int(facts.elapsed_s * 1000))
        refs = self._publish(bundle, parameters, *vectors(invitation.plan))
        machine = RoundMachine.restored(facts, now)
        arrivals = arrivals_of(facts.devices, invitation.plan, len(parameters))
        opened_at = now - facts.elapsed_s
        state = _Round(machine, parameters, parameters, engine, arrivals, opened_at, kept_time_at=now)
        self._await_late_ones(run_id, invitation)
        self._tell_opened(state, now, resumed=True)
        reason = self._aborted()
        if reason is None and refs != invitation.blobs:
            reason = "the bundle, the model or chunk_bytes is not what the round was opened with"
        if reason is None and not self.store.has_key(invitation):
            reason = "the key that opens the round's updates cannot be read any more"
        if reason is not None:
            return self._collect(state, machine.handle(rounds.Aborted(reason), now))
        self._reload(state, facts)
        self._begin_own(state)
        log.info(
            "round %s goes on: %d of %d updates are here", invitation.round_id, len(state.offers), len(facts.devices)
        )
        return self._collect(state, machine.resume(now))

    def announce(self, run_id: str) -> None:
        """After a start: say again how the newest round ended, and the verdicts on it that no device has read."""
        self._common.windows[run_id] = self.store.next_window(run_id)
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
        """Before the end: until every device that is online has read its verdicts, or LINGER_S.

        There is no later round that could take an update.
        """
        self.no_more_rounds(run_id)
        self.attend(LINGER_S, lambda: self.store.untold_devices(run_id).isdisjoint(self.online()))

    def no_more_rounds(self, run_id: str) -> None:
        """Of this run: what devices still offer is too late, and its models are not needed any more."""
        self._common.windows[run_id] = ()
        self._clear_all_but(0, run_id)

    # --- revoked devices

    def _look(self) -> Mapping[str, str]:
        """The revoked devices, after telling who watches what is different."""
        known, now = self._common.revoked, self._revoked()
        if now == known:
            return known
        self._common.revoked = dict(now)
        for device_id in sorted(now.keys() - known.keys()):
            log.warning("%s is %s: nothing of it is taken", device_id, now[device_id])
            self._watch(events.DeviceRevoked(device_id, now[device_id]))
        for device_id in sorted(known.keys() - now.keys()):
            log.warning(
                "%s is readmitted; %d of its messages were ignored", device_id, self._common.refused.pop(device_id, 0)
            )
            self._watch(events.DeviceReadmitted(device_id, device_id in self.fleet.online()))
        return self._common.revoked

    def _unfinished(self, run_id: str) -> RoundFacts | None:
        """The facts of the round under way, after what was revoked meanwhile is among them."""
        facts = self.store.unfinished(run_id)
        if facts is None:
            return None
        devices = dict(facts.devices)
        for device_id, reason in self._look().items():
            known = devices.get(device_id)
            if known is not None and rounds.is_revocable(known.progress):
                self.store.record(facts.invitation.round_id, device_id, Progress.REVOKED, reason)
                devices[device_id] = replace(known, progress=Progress.REVOKED, reason=reason)
        return replace(facts, devices=devices)

    def _revoke(self, state: _Round) -> None:
        for device_id, reason in self._look().items():
            if device_id not in state.revoked and state.finished is None:
                state.revoked.add(device_id)
                state.offers.pop(device_id, None)
                self._handle(state, rounds.Revoked(device_id, reason))

    # --- one round

    def _with_earlier(self, run_id: str, invitation: Invitation) -> Invitation:
        """With the ended rounds that devices may go on working for: their updates are taken by this round, or by a
        later one of this task or another."""
        windows = self._common.windows
        if not invitation.plan.evaluate:
            windows[run_id] = self.store.window(invitation, run_id, invitation.max_staleness)
        others = [round_id for run, window in windows.items() if run != run_id for round_id in window]
        earlier = (*windows.get(run_id, ()), *others)[:MAX_STALENESS]
        return msgspec.structs.replace(invitation, earlier=earlier)

    def _await_late_ones(self, run_id: str, invitation: Invitation) -> None:
        if invitation.max_staleness:
            self._common.windows[run_id] = (invitation.round_id, *self._common.windows.get(run_id, ()))

    def _models_in_use(self, message: Invitation | RoundClosed) -> list[bytes]:
        """Of earlier rounds, which a coordinator that was killed may have left on the broker."""
        earlier = message.earlier if isinstance(message, Invitation) else ()
        return [self._store_of(round_id).invitation(round_id).parameters.sha256 for round_id in earlier]

    def _clear_models(self, invitation: Invitation) -> None:
        """Take off the broker what no device works with any more."""
        own = self._common.models.setdefault(run_of(invitation.round_id), [])
        sha256 = invitation.parameters.sha256
        if sha256 != invitation.bundle.sha256 and sha256 not in own:
            own.append(sha256)
        if not invitation.plan.evaluate:
            self._most_models = invitation.max_staleness
        for sha256 in dict.fromkeys(ref.sha256 for ref in invitation.vectors):
            self._clear_unless_model(sha256)
        self._clear_all_but(self._most_models, run_of(invitation.round_id))

    def _clear_all_but(self, newest: int, run_id: str) -> None:
        own = self._common.models.get(run_id, [])
        while len(own) > newest:
            self._clear_unless_model(own.pop(0))

    def _clear_unless_model(self, sha256: bytes) -> None:
        """Of tasks that began alike, or as a vector of zeros is of a model that began with zeros."""
        if not any(sha256 in models for models in self._common.models.values()):
            self.fleet.clear_blob(sha256)

    def _publish(self, bundle: bytes, *numbers: Floats) -> tuple[BlobRef, ...]:
        """The bundle, the parameters, and what there is beside them."""
        return tuple(
            self.fleet.publish_blob(data) for data in (bundle, *(one.astype("<f4").tobytes() for one in numbers))
        )

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
                if state.due:
                    with self._together():
                        self._run_rule_if_ready(state)
                self._keep_time(state)
                self._tell_progress(state)
        finally:
            self.own.stop()
            if state.finished is None and not self._leave_open:  # devices must not go on working for nothing
                with self._together():
                    self._handle(state, rounds.Aborted("the coordinator stopped"))
        self._gate.clear()
        invitation, finished = state.machine.invitation, state.finished
        self._clear_models(invitation)
        verdicts = sorted(state.verdicts, key=lambda verdict: verdict.device_id)
        seconds = self._clock.monotonic_s() - started
        metrics = {device_id: offer.metrics for device_id, offer in state.offers.items()}
        outcome, reason = finished.outcome, finished.reason
        kind = invitation.plan.evaluate, state.evaluation
        self._watch(
            events.RoundEnded(
                invitation.round_id, invitation.number, outcome, reason, verdicts, metrics, seconds, *kind
            )
        )
        ended = state.result, outcome, reason, verdicts, state.offers, seconds, state.measurements
        leaks = state.leakage.told if state.leakage is not None else ()
        postponed = sum(progress is Progress.POSTPONED for progress in state.machine.progress().values())
        return RoundResult(*ended, invitation.number, *kind, invitation.plan.work, leaks, postponed)

    def _end_if_aborted(self, state: _Round) -> None:
        reason = self._aborted()
        if reason is not None and state.finished is None:
            with self._together():
                self._handle(state, rounds.Aborted(reason))

    def _begin_own(self, state: _Round) -> None:
        """Where a rule will run: not for evaluations, whose metrics no rule judges."""
        invitation = state.machine.invitation
        if state.engine is not None and not invitation.plan.evaluate:
            self.own.begin(invitation.round_id, state.parameters, invitation.plan)

    def _run_rule_if_ready(self, state: _Round) -> None:
        """It may have to wait for the coordinator's own update; the loop goes on meanwhile."""
        if state.due and state.finished is None and self.own.is_ready():
            device_ids, state.due = state.due, ()
            self._handle(state, self._aggregate(state, device_ids))

    def _tell_opened(self, state: _Round, now: float, resumed: bool) -> None:
        machine, invitation = state.machine, state.machine.invitation
        left_s = invitation.duration_ms / 1000 - (now - state.opened_at)
        devices, quorum, evaluates = invitation.devices, machine.settings.quorum, invitation.plan.evaluate
        self._watch(
            events.RoundOpened(
                invitation.round_id, invitation.number, devices, quorum, max(0.0, left_s), resumed, evaluates
            )
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
            if state is not None:
                self._revoke(state)
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
        """One message, or that none came. One of a revoked device is counted as none."""
        if received is not None and received.device_id in self._look():
            self._common.refused[received.device_id] += 1
            received = None
        message = received.message if received is not None else None
        if received is not None:
            online = message.online if isinstance(message, Presence) else None
            self._watch(events.MessageCame(received.device_id, type(message).__name__, online))
        if received is not None and isinstance(message, Seen):
            self._store_of(message.round_id).seen(message.round_id, received.device_id)
        elif state is not None and state.finished is None:
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
                self.fleet.publish_round(effect.message, self._models_in_use(effect.message))
            elif isinstance(effect, rounds.SendTo) and isinstance(effect.message, Need):
                update = state.machine.offer_of(effect.device_id).update
                self._gate.add(effect.device_id, effect.message, update, self._clock.monotonic_s())
            elif isinstance(effect, rounds.SendTo):
                self._unsaid.append((effect.device_id, effect.message))
            elif isinstance(effect, rounds.Record):
                round_id = state.machine.invitation.round_id
                self.store.record(round_id, effect.device_id, effect.progress, effect.reason)
            elif isinstance(effect, rounds.SaveChunk):
                taker = state.machine.invitation.round_id
                self.store.save_chunk(effect.device_id, effect.offer, effect.index, effect.data, taken_by=taker)
            elif isinstance(effect, rounds.Recall):
                self._recall(effect.device_id, effect.offer)
            elif isinstance(effect, rounds.Store):
                self._store(state, effect)
            elif isinstance(effect, rounds.Aggregate):
                self.store.decided(state.machine.invitation.round_id)
                self._commit()
                state.due = effect.device_ids
                self._run_rule_if_ready(state)
            elif isinstance(effect, rounds.Finished):
                self._conclude(state, effect)
                state.finished = effect

    def _store(self, state: _Round, effect: rounds.Store) -> None:
        try:
            asked = self._asked(state.machine.invitation, effect.offer)
            offer, update = self.store.opened(asked, effect.device_id, effect.offer, effect.data)
        except PeerError as exc:
            self._handle(state, rounds.Malformed(effect.device_id, str(exc)))
            return
        taker, staleness = state.machine.invitation.round_id, effect.staleness
        self.store.store_update(effect.device_id, offer, effect.data, taken_by=taker, staleness=staleness)
        state.offers[effect.device_id] = offer
        state.arrivals.add(effect.device_id, weighted(update, staleness), offer.num_examples)
        self._handle(state, rounds.Stored(effect.device_id))

    def _asked(self, invitation: Invitation, offer: Offer) -> Invitation:
        """To the round that the update was trained for."""
        return invitation if offer.round_id == invitation.round_id else self.store.invitation(offer.round_id)

    def _recall(self, device_id: str, offer: Offer) -> None:
        """An offer of a round that is not open: its device has not heard what became of it."""
        store, window = self._store_of(offer.round_id), self._common.windows.get(run_of(offer.round_id), ())
        if offer.round_id in window and device_id not in store.taken(offer.round_id):
            return  # a later round takes it, when the device offers it again
        verdict = store.verdict(offer.round_id, device_id, offer.update.sha256)
        over = Receipt(offer.round_id, offer.update.sha256, False, "that round is over")
        self._unsaid.append((device_id, verdict if verdict is not None else over))

    def _store_of(self, round_id: str) -> RunStore:
        return self._common.stores.get(run_of(round_id), self.store)

    def _aggregate(self, state: _Round, device_ids: tuple[str, ...]) -> rounds.Event:
        if state.engine is None:
            state.verdicts = [records.DeviceVerdict(device_id, records.ACCEPTED) for device_id in device_ids]
            return rounds.Aggregated(dict.fromkeys(device_ids, ""))
        refused = sum(progress is Progress.REFUSED for progress in state.machine.progress().values())
        names, engine = state.machine.invitation.plan.evaluate, state.engine
        copies = refuses_copies(state.machine.invitation.plan, engine)
        screened = state.arrivals.screened(device_ids, refuse_copies=copies, refused_on_arrival=refused)
        outcome: StepOutcome
        try:
            if names:
                outcome = found = evaluated(names, state.parameters, screened, engine.num_byzantine)
                state.evaluation = _with_held_out(found.metrics, screened.device_ids, state.offers)
            else:
                state.leakage = self._measured(state, screened)
                outcome = engine.aggregate(state.parameters, replace(screened, trusted=self.own.given()))
        except RuleError as exc:
            return rounds.AggregationRefused(str(exc))
        if state.leakage is not None and self._checks is not None:
            state.leakage = self._checks.with_aggregate(state.leakage, outcome.parameters - state.parameters)
            self._watch(events.LeakageMeasured(state.machine.invitation.round_id, dict(state.leakage.fleet)))
        if not names:
            self._watch(events.RuleRan(state.machine.invitation.round_id, dict(outcome.measurements)))
        state.result = outcome.parameters
        state.verdicts, state.measurements = list(outcome.verdicts), outcome.measurements
        reasons = {
            v.device_id: "" if v.status == records.ACCEPTED else v.reason or "rejected" for v in outcome.verdicts
        }
        return rounds.Aggregated(reasons)

    def _measured(self, state: _Round, screened: Screened) -> RoundLeakage | None:
        """Before the rule, which may use the matrix for its own ends."""
        if self._checks is None:
            return None
        examples = [state.offers[device_id].num_examples for device_id in screened.device_ids]
        return self._checks.measure(screened.updates, screened.device_ids, examples, state.machine.invitation.plan)

    def _conclude(self, state: _Round, end: rounds.Finished) -> None:
        """Outcome, verdicts and model, durable in one step."""
        invitation, judged = state.machine.invitation, {verdict.device_id for verdict in state.verdicts}
        rejected = {name: why for name, why in end.rejected.items() if name not in judged}
        missing = {name: why for name, why in end.missing.items() if name not in rejected}
        state.verdicts += [records.DeviceVerdict(name, records.REJECTED, why) for name, why in rejected.items()]
        state.verdicts += [records.DeviceVerdict(name, records.MISSING, why) for name, why in missing.items()]
        checkpoint = None
        if end.outcome == Phase.PUBLISHED.value and state.engine is not None and not invitation.plan.evaluate:
            checkpoint = Checkpoint(invitation.number, state.result, state.engine.saved_state())
        outcome = Phase(end.outcome)
        leakage = state.leakage.rows() if state.leakage is not None and checkpoint is not None else ()
        self.store.conclude(
            invitation.round_id, outcome, end.reason, state.verdicts, checkpoint, state.evaluation, leakage
        )


def arrivals_of(device_ids: Iterable[str], plan: TrainingPlan, d: int) -> Arrivals:
    """With what screening asks of the numbers of this plan."""
    names = plan.evaluate
    if names:
        return Arrivals(device_ids, len(names), metrics_fault(names))
    if plan.coding is not UNSET:
        return Arrivals(device_ids, plan.coding.row_numbers(d), dtype=np.float64)
    # a teacher may have no use for any of its data, and send zeros
    faults = {FEATURES: shares_fault, TEACH: number_fault, CORRECT: number_fault}
    return Arrivals(device_ids, d, faults.get(plan.work))


def refuses_copies(plan: TrainingPlan, engine: Engine) -> bool:
    """Metrics and shares of two honest devices may agree in every bit, and so may what two teachers have no use for,
    and updates where the rule counts on it. A copied row of a code is a lie like others."""
    return not plan.evaluate and plan.work not in (FEATURES, TEACH, CORRECT, CYCLIC) and not engine.expects_copies


def _with_held_out(
    metrics: Sequence[records.FleetMetric], device_ids: Sequence[str], offers: Mapping[str, Offer]
) -> tuple[records.FleetMetric, ...]:
    """With the number of those that say that they evaluated on data kept for it."""
    held_out = sum(offers[device_id].metrics.get("held_out") == 1.0 for device_id in device_ids)
    return tuple(replace(one, held_out=held_out) for one in metrics)


def shuffle_seed(seed: int, number: int) -> int:
    """The plan's shuffle_seed for one round of a run: another order every round, the same for the same seed."""
    return seed * 1_000_003 + number


def _invitation(
    run_id: str,
    number: int,
    refs: tuple[BlobRef, ...],
    plan: TrainingPlan,
    device_ids: Sequence[str],
    requires: tuple[str, ...],
    timing: Timing,
    now_ms: int,
    max_staleness: int,
    key: KeyPair | None,
) -> Invitation:
    return Invitation(
        # the time keeps a restarted run's rounds apart from earlier ones
        round_id=f"{run_id}.{'e' if plan.evaluate else ''}{number}.{now_ms:x}",
        number=number,
        issued_at_ms=now_ms,
        duration_ms=int(timing.duration_s * 1000),
        bundle=refs[0],
        parameters=refs[1],
        plan=plan,
        devices=tuple(sorted(device_ids)),
        requires=requires,
        max_staleness=max_staleness,
        encryption_key=key.public if key is not None else UNSET,
        vectors=refs[2:],
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
