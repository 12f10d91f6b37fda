"""What a coordinator tells whoever watches: plain values, without payloads or keys.

A watcher is a function of one event. It is called in the coordinator's thread, between two steps of a round, so it must
be quick and must not raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

from covey_coordinator.records import DeviceVerdict, FleetMetric


@dataclass(frozen=True)
class RunStarted:
    """done: rounds that are published already."""

    fleet: str
    run: str
    rounds: int
    done: int


@dataclass(frozen=True)
class Waits:
    """No round is under way, and why: for devices, for an operator."""

    reason: str


@dataclass(frozen=True)
class RoundOpened:
    """left_s: until the deadline. resumed: it was under way when the last coordinator ended.

    evaluates: the metrics of an evaluation round, whose number is that of the round whose model it evaluates.
    """

    round: str
    number: int
    devices: Sequence[str]
    quorum: int
    left_s: float
    resumed: bool
    evaluates: Sequence[str] = ()


@dataclass(frozen=True)
class PhaseBegan:
    round: str
    phase: str


@dataclass(frozen=True)
class DevicesMoved:
    """How far every invited device is, in the words of covey_protocol.round.Progress; bytes (received, expected) of the
    updates that were offered. Told a few times a second and at the end, also when nothing changed."""

    round: str
    progress: Mapping[str, str]
    received: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class MessageCame:
    """A message whose seal was right. kind: its type's name. online: what a Presence says, else None."""

    device: str
    kind: str
    online: bool | None


@dataclass(frozen=True)
class DeviceRevoked:
    """By the operator: nothing of it is taken. reason: for people."""

    device: str
    reason: str


@dataclass(frozen=True)
class DeviceReadmitted:
    """online: whether it is connected now."""

    device: str
    online: bool


@dataclass(frozen=True)
class RuleRan:
    """measurements: the rule's own numbers."""

    round: str
    measurements: Mapping[str, float]


@dataclass(frozen=True)
class LeakageMeasured:
    """measures: of the whole round, by name (inversion.round_checks)."""

    round: str
    measures: Mapping[str, float]


@dataclass(frozen=True)
class RoundEnded:
    """outcome: published or abandoned. metrics: device -> the numbers it reported with its update.

    evaluates: as in RoundOpened. evaluation: what a published evaluation round gave.
    """

    round: str
    number: int
    outcome: str
    reason: str
    verdicts: Sequence[DeviceVerdict]
    metrics: Mapping[str, Mapping[str, float]]
    seconds: float
    evaluates: Sequence[str] = ()
    evaluation: Sequence[FleetMetric] = ()


@dataclass(frozen=True)
class RunEnded:
    """code: the exit code. reason: empty where all rounds are published. run: where a fleet has several tasks."""

    code: int
    reason: str
    run: str = ""


Event = Union[
    RunStarted,
    Waits,
    RoundOpened,
    PhaseBegan,
    DevicesMoved,
    MessageCame,
    DeviceRevoked,
    DeviceReadmitted,
    RuleRan,
    LeakageMeasured,
    RoundEnded,
    RunEnded,
]
Watcher = Callable[[Event], None]


def unwatched(event: Event) -> None:
    """The watcher of a coordinator that nobody watches."""


def all_of(*watchers: Watcher) -> Watcher:
    def tell(event: Event) -> None:
        for watcher in watchers:
            watcher(event)

    return tell
