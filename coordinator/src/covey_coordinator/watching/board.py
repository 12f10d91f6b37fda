"""What is going on now, and what was counted since the start: one value that the terminal and the metrics read.

The coordinator's thread writes, the terminal's and the metrics' threads read; every method holds the lock. Times are
seconds of time.monotonic. Nothing here is durable (see `history`).
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from covey_coordinator.records import ACCEPTED, REJECTED, FleetMetric
from covey_coordinator.watching import events
from covey_protocol.messages import run_of
from covey_protocol.round import Phase, Progress

LAST_ROUNDS = 5  # shown


@dataclass
class DeviceLine:
    """progress: in the round under way, "" outside one. received, expected: bytes of its update, 0 before an offer."""

    online: bool = False
    heard_at: float | None = None
    progress: str = ""
    received: int = 0
    expected: int = 0


@dataclass
class RoundLine:
    """losses: of training; accuracies: of the received model on a device's own data; both as devices reported them.
    refused: (device, status, reason) of those not used. evaluates, evaluation: as in events. run: where there are
    several."""

    number: int
    outcome: str
    reason: str
    used: int
    invited: int
    losses: list[float]
    accuracies: list[float]
    refused: list[tuple[str, str, str]]
    evaluates: bool = False
    evaluation: Sequence[FleetMetric] = ()
    run: str = ""


@dataclass
class RunLine:
    """How far one run is. evaluated, evaluation: the newest model that was evaluated, and what that gave."""

    rounds: int = 0
    done: int = 0
    evaluated: int = 0
    evaluation: Sequence[FleetMetric] = ()


@dataclass
class State:
    """run, rounds, done: of the run whose round is under way, or was last."""

    fleet: str = ""
    run: str = ""
    rounds: int = 0
    done: int = 0
    runs: dict[str, RunLine] = field(default_factory=dict)
    evaluates: bool = False
    waits: str = ""
    number: int = 0
    phase: str = ""  # of the round under way, "" outside one
    deadline_at: float = 0.0
    devices: dict[str, DeviceLine] = field(default_factory=dict)
    last: deque[RoundLine] = field(default_factory=lambda: deque(maxlen=LAST_ROUNDS))
    outcomes: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    phase_count: Counter[str] = field(default_factory=Counter)
    measurements: dict[str, float] = field(default_factory=dict)
    leakage: dict[str, float] = field(default_factory=dict)  # of the newest round that was measured
    max_score: float | None = None
    median_score: float | None = None


class Board:
    """A watcher that keeps a State. roster: the devices that are shown also before they were heard."""

    def __init__(self, roster: list[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._phase_at = 0.0
        self._just_opened = False  # what is stored then was acknowledged before, and not counted again
        self._state = State(devices={device_id: DeviceLine() for device_id in sorted(roster)})
        self._take: dict[type, Callable[..., None]] = {
            events.RunStarted: self._run_started,
            events.Waits: self._waits,
            events.RoundOpened: self._round_opened,
            events.PhaseBegan: self._phase_began,
            events.DevicesMoved: self._devices_moved,
            events.MessageCame: self._message_came,
            events.DeviceRevoked: self._device_revoked,
            events.DeviceReadmitted: self._device_readmitted,
            events.RuleRan: self._rule_ran,
            events.LeakageMeasured: self._leakage_measured,
            events.RoundEnded: self._round_ended,
        }

    def __call__(self, event: events.Event) -> None:
        take = self._take.get(type(event))
        if take is not None:
            with self._lock:
                take(event)

    def state(self) -> State:
        """A copy, for another thread."""
        with self._lock:
            devices = {device_id: copy.copy(line) for device_id, line in self._state.devices.items()}
            memo = {id(self._state.devices): devices}  # deepcopy would take ten times as long over many devices
            return copy.deepcopy(self._state, memo)

    def _run_started(self, event: events.RunStarted) -> None:
        state = self._state
        state.fleet, state.run, state.rounds, state.done = event.fleet, event.run, event.rounds, event.done
        state.runs[event.run] = RunLine(event.rounds, event.done)

    def _waits(self, event: events.Waits) -> None:
        self._state.waits = event.reason

    def _round_opened(self, event: events.RoundOpened) -> None:
        state = self._state
        state.number, state.waits, state.deadline_at = event.number, "", self._clock() + event.left_s
        state.evaluates = bool(event.evaluates)
        run = run_of(event.round)
        if run in state.runs:
            state.run, state.rounds, state.done = run, state.runs[run].rounds, state.runs[run].done
        self._just_opened = True
        for line in state.devices.values():
            line.progress, line.received, line.expected = "", 0, 0

    def _phase_began(self, event: events.PhaseBegan) -> None:
        self._end_phase()
        if event.phase not in (Phase.PUBLISHED.value, Phase.ABANDONED.value):
            self._state.phase = event.phase

    def _end_phase(self) -> None:
        state, now = self._state, self._clock()
        if state.phase:
            state.phase_seconds[state.phase] = state.phase_seconds.get(state.phase, 0.0) + now - self._phase_at
            state.phase_count[state.phase] += 1
        state.phase, self._phase_at = "", now

    def _devices_moved(self, event: events.DevicesMoved) -> None:
        state = self._state
        for device_id, word in event.progress.items():
            line = state.devices.setdefault(device_id, DeviceLine())
            if word == Progress.STORED.value and line.progress != word:
                state.acknowledged += not self._just_opened
            line.progress = word
            line.received, line.expected = event.received.get(device_id, (0, 0))
        self._just_opened = False

    def _message_came(self, event: events.MessageCame) -> None:
        line = self._state.devices.setdefault(event.device, DeviceLine())
        if event.online is not None:
            line.online = event.online
        if event.online is not False:  # the last will is the broker's word
            line.heard_at = self._clock()

    def _device_revoked(self, event: events.DeviceRevoked) -> None:
        self._state.devices.setdefault(event.device, DeviceLine()).online = False

    def _device_readmitted(self, event: events.DeviceReadmitted) -> None:
        self._state.devices.setdefault(event.device, DeviceLine()).online = event.online

    def _rule_ran(self, event: events.RuleRan) -> None:
        self._state.measurements = dict(event.measurements)

    def _leakage_measured(self, event: events.LeakageMeasured) -> None:
        self._state.leakage = dict(event.measures)

    def _round_ended(self, event: events.RoundEnded) -> None:
        self._end_phase()
        state = self._state
        published = event.outcome == Phase.PUBLISHED.value
        state.outcomes[event.outcome] += 1
        line = state.runs.setdefault(state.run, RunLine())
        if event.evaluation:
            line.evaluated, line.evaluation = event.number, event.evaluation
        line.done += published and not event.evaluates
        state.done = line.done
        for verdict in event.verdicts:
            device = state.devices.get(verdict.device_id)
            if verdict.status == REJECTED:
                by_rule = "rule" if verdict.score is not None else "screening"
                revoked = device is not None and device.progress == Progress.REVOKED.value
                state.rejected["revoked" if revoked else by_rule if published else "round_abandoned"] += 1
            elif verdict.status != ACCEPTED:
                state.missing[device.progress if device is not None and device.progress else "unknown"] += 1
        scores = [verdict.score for verdict in event.verdicts if verdict.score is not None]
        if scores:
            state.max_score, state.median_score = float(max(scores)), float(np.median(scores))
        state.last.append(_round_line(event, state.run if len(state.runs) > 1 else ""))


def _round_line(event: events.RoundEnded, run: str) -> RoundLine:
    reported = list(event.metrics.values())
    return RoundLine(
        event.number,
        event.outcome,
        event.reason,
        sum(verdict.status == ACCEPTED for verdict in event.verdicts),
        len(event.verdicts),
        [metrics["training_loss"] for metrics in reported if "training_loss" in metrics],
        [metrics["accuracy_before"] for metrics in reported if "accuracy_before" in metrics],
        [(v.device_id, v.status, v.reason) for v in event.verdicts if v.status != ACCEPTED],
        bool(event.evaluates),
        event.evaluation,
        run,
    )
