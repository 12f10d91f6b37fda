"""Runs rounds: performs a round machine's effects on a fleet, a store and an aggregation engine.

Who is waited for is decided by the machine (covey_protocol.round), what enters the model by the engine (aggregation).
Nothing a device says ends a round early or raises here: it is logged and counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from covey_coordinator import records
from covey_coordinator.aggregation.screening import Arrivals, Screened
from covey_coordinator.fleet import POLL_S, Fleet, FromFleet
from covey_coordinator.store import RunStore
from covey_protocol import round as rounds
from covey_protocol.bundle import check_plan, read_bundle
from covey_protocol.device import needed_capabilities
from covey_protocol.errors import PeerError, RuleError, RunError
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    Invitation,
    Offer,
    Presence,
    TrainingPlan,
)
from covey_protocol.round import Progress, RoundMachine, RoundSettings

log = logging.getLogger("covey.coordinator")

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
    """What one round in progress gathers."""

    machine: RoundMachine
    parameters: Floats
    result: Floats
    engine: Engine | None
    arrivals: Arrivals
    verdicts: list[records.DeviceVerdict] = field(default_factory=list)
    measurements: Mapping[str, float] = field(default_factory=dict)
    offers: dict[str, Offer] = field(default_factory=dict)
    finished: rounds.Finished | None = None


class Coordinator:
    """Rounds of one fleet, one at a time.

    on_progress: called with every device's progress, a few times a second and whenever something came in.
    """

    def __init__(
        self,
        fleet: Fleet,
        store: RunStore,
        *,
        on_progress: Callable[[dict[str, Progress]], None] = lambda progress: None,
    ) -> None:
        self.fleet = fleet
        self.store = store
        self._on_progress = on_progress

    def wait_for(
        self, count: int, timeout_s: float, on_progress: Callable[[int], None] = lambda online: None
    ) -> list[str]:
        """Wait until `count` devices are online; their ids. RunError when they do not come."""
        end = time.monotonic() + timeout_s
        while len(self.fleet.online()) < count:
            on_progress(len(self.fleet.online()))
            if time.monotonic() > end:
                online = self.fleet.online()
                raise RunError(
                    f"only {len(online)} of {count} devices came online within {timeout_s:g} s"
                    + (f" ({', '.join(online)})" if online else ""),
                    "look at the agents' logs, or ask for fewer devices",
                )
            self.fleet.next(POLL_S)
        on_progress(len(self.fleet.online()))
        return self.fleet.online()

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
        Returns the new parameters, or the old ones with outcome "abandoned". The updates lie in the store before their
        devices are told so; rows reach the engine sorted by device id, so the order of arrival changes no bit.
        """
        started = time.monotonic()
        manifest = read_bundle(bundle).manifest
        check_plan(manifest, plan)
        arrivals = Arrivals(device_ids, len(parameters))
        bundle_ref = self.fleet.publish_blob(bundle)
        parameters_ref = self.fleet.publish_blob(parameters.astype("<f4").tobytes())
        requires = needed_capabilities(manifest, plan)
        invitation = _invitation(run_id, number, bundle_ref, parameters_ref, plan, device_ids, requires, timing)
        settings = RoundSettings(quorum, timing.answer_s, timing.grace_s, parameters_ref.size)
        machine = RoundMachine(invitation, device_ids, settings)
        state = _Round(machine, parameters, parameters, engine, arrivals)
        try:
            self._handle(state, rounds.Opened())
            while state.finished is None:
                received = self.fleet.next(POLL_S)
                self._handle(state, _event(received) if received is not None else rounds.Tick())
                self._on_progress(state.machine.progress())
        finally:
            if state.finished is None:  # an error or Ctrl-C: devices must not go on working for nothing
                self._handle(state, rounds.Aborted("the coordinator stopped"))
            if parameters_ref.sha256 != bundle_ref.sha256:
                self.fleet.clear_blob(parameters_ref.sha256)
        finished = state.finished
        missing = [
            records.DeviceVerdict(device_id, records.MISSING, reason)
            for device_id, reason in sorted(finished.missing.items())
        ]
        verdicts = sorted([*state.verdicts, *missing], key=lambda verdict: verdict.device_id)
        seconds = time.monotonic() - started
        return RoundResult(
            state.result, finished.outcome, finished.reason, verdicts, state.offers, seconds, state.measurements
        )

    def _handle(self, state: _Round, event: rounds.Event) -> None:
        try:
            effects = state.machine.handle(event, time.monotonic())
        except PeerError as exc:
            log.warning("ignored a message: %s", exc)
            return
        for effect in effects:
            if isinstance(effect, rounds.PublishRound):
                self.fleet.publish_round(effect.message)
            elif isinstance(effect, rounds.SendTo):
                self.fleet.send(effect.device_id, effect.message)
            elif isinstance(effect, rounds.Store):
                self.store.store_update(effect.offer.round_id, effect.device_id, effect.data)
                state.offers[effect.device_id] = effect.offer
                update = np.frombuffer(effect.data, "<f4")
                state.arrivals.add(effect.device_id, update, effect.offer.num_examples)
                self._handle(state, rounds.Stored(effect.device_id))
            elif isinstance(effect, rounds.Aggregate):
                self._handle(state, self._aggregate(state, effect.device_ids))
            elif isinstance(effect, rounds.Finished):
                state.finished = effect

    def _aggregate(self, state: _Round, device_ids: tuple[str, ...]) -> rounds.Event:
        if state.engine is None:
            state.verdicts = [records.DeviceVerdict(device_id, records.ACCEPTED) for device_id in device_ids]
            return rounds.Aggregated({})
        refused = sum(progress is Progress.REFUSED for progress in state.machine.progress().values())
        screened = state.arrivals.screened(device_ids, refused_on_arrival=refused)
        try:
            outcome = state.engine.aggregate(state.parameters, screened)
        except RuleError as exc:
            return rounds.AggregationRefused(str(exc))
        state.result = outcome.parameters
        state.verdicts, state.measurements = list(outcome.verdicts), outcome.measurements
        reasons = {
            v.device_id: "" if v.status == records.ACCEPTED else v.reason or "rejected" for v in outcome.verdicts
        }
        return rounds.Aggregated(reasons)


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
) -> Invitation:
    now_ms = time.time_ns() // 1_000_000
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
