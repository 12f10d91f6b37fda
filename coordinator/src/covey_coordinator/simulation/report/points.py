"""What the runs of an experiment come to: one point per combination of what was varied, over its seeds.

Every run is looked at once and reduced at once, so that a thousand runs of a hundred devices fit in memory. Pure NumPy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_coordinator.report.summary import Detection
from covey_coordinator.simulation.results import RunResult

Floats = npt.NDArray[np.float64]
SEED_KEYS = ("seed", "seeds")  # a sweep over seeds varies nothing else
MAX_NOTES = 200
MAX_HELD = 3  # runs whose devices' data are drawn: they differ with seeds, and a few show how
ROUND_METRICS = ("accuracy", "loss")  # of the central test data


class Band(NamedTuple):
    """A curve over seeds: at each of the rounds the mean, the lowest and the highest of the seeds measured there."""

    rounds: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Suspicion(NamedTuple):
    """One device of one run. rank: mean over its rounds of its score's place in the cohort, 0 (least) to 1 (most)."""

    corrupted: bool
    rank: float


@dataclass
class Point:
    """All runs with the same values of what was varied.

    varied: without the seed. curves: metric -> one {round: value} per seed; "training loss" is the devices' own.
    updates, devices: who was turned away, counted by updates and by devices. device_accuracies: of the healthy devices
    on their own data, one array per seed. measurements: of the last round, one dict per seed. first: the key of its
    first run with a round.
    """

    varied: dict[str, Any]
    seeds: list[int] = field(default_factory=list)
    first: str = ""
    curves: dict[str, list[dict[int, float]]] = field(default_factory=dict)
    updates: Detection = field(default_factory=lambda: Detection(0, 0, 0, 0))
    devices: Detection = field(default_factory=lambda: Detection(0, 0, 0, 0))
    suspicions: list[Suspicion] = field(default_factory=list)
    device_accuracies: list[Floats] = field(default_factory=list)
    measurements: list[dict[str, float]] = field(default_factory=list)
    num_devices: int = 0
    num_corrupted: int = 0
    num_rounds: int = 0

    def final(self, metric: str = "accuracy") -> Floats:
        """(seeds,): the last measured value of each run that has one."""
        return np.array([curve[max(curve)] for curve in self.curves.get(metric, ()) if curve], np.float64)

    @property
    def accuracy(self) -> float:
        """Mean over seeds of the last measured accuracy; NaN where there is none."""
        return float(np.mean(values)) if len(values := self.final()) else math.nan

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest final accuracy of the seeds."""
        values = self.final()
        return (float(values.min()), float(values.max())) if len(values) else (math.nan, math.nan)

    def band(self, metric: str, most: int) -> Band:
        """The metric over rounds, at most `most` of them, evenly spread; the last is always among them."""
        curves = [curve for curve in self.curves.get(metric, ()) if curve]
        rounds = thinned(sorted({number for curve in curves for number in curve}), most)
        columns = [[curve[number] for curve in curves if number in curve] for number in rounds]
        return Band(rounds, [float(np.mean(column)) for column in columns], [*map(min, columns)], [*map(max, columns)])

    def auc(self) -> float:
        return area_under_roc(self.suspicions)


class Held(NamedTuple):
    """What the devices of one run hold: examples per class, and what is wrong with whom."""

    key: str
    counts: dict[str, tuple[int, ...]]
    faults: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Gathered:
    """points: in the order of the runs. unfinished: keys of runs without a round. notes: run's key, what it noted.

    data: the first runs whose devices hold different data.
    """

    points: list[Point]
    num_runs: int
    unfinished: list[str]
    notes: list[tuple[str, str]]
    data: list[Held]
    seconds: float


def gathered(results: Iterable[RunResult]) -> Gathered:
    """One pass over the runs."""
    points: dict[str, Point] = {}
    unfinished: list[str] = []
    notes: list[tuple[str, str]] = []
    data: list[Held] = []
    number, seconds = 0, 0.0
    for result in results:
        number += 1
        seconds += result.seconds
        notes += [(result.key, note) for note in result.notes][: MAX_NOTES - len(notes)]
        if not result.rounds:
            unfinished.append(result.key)
            continue
        varied = {name: value for name, value in result.varied.items() if name.split(".")[-1] not in SEED_KEYS}
        _add(points.setdefault(canonical(varied), Point(varied)), result)
        if result.counts and len(data) < MAX_HELD and all(result.counts != held.counts for held in data):
            data.append(Held(result.key, result.counts, result.faults))
    return Gathered(list(points.values()), number, unfinished, notes, data, seconds)


def canonical(value: Any) -> str:
    """Equal values give equal text, and other values other text."""
    return json.dumps(value, sort_keys=True, default=str)


def _add(point: Point, result: RunResult) -> None:
    point.seeds.append(result.seed)
    point.first = point.first or result.key
    for metric in ROUND_METRICS:
        values = {record.number: record.evaluation.get(metric, math.nan) for record in result.rounds}
        _add_curve(point, metric, values)
    losses = {record.number: math.nan if record.loss is None else record.loss for record in result.rounds}
    _add_curve(point, "training loss", losses)
    told = _verdicts(result)
    point.updates, point.devices = added(point.updates, _updates(told)), added(point.devices, _devices(told))
    point.suspicions += _suspicions(told)
    corrupted = corrupted_devices(result)
    own = {device_id: evaluated.get("accuracy", math.nan) for device_id, evaluated in result.devices.items()}
    accuracies = [value for one, value in own.items() if one not in corrupted and math.isfinite(value)]
    if accuracies:
        point.device_accuracies.append(np.array(accuracies, np.float64))
    point.measurements.append(result.rounds[-1].measurements)
    point.num_devices = max(point.num_devices, len(result.faults), len(told.ids))
    point.num_corrupted = max(point.num_corrupted, len(corrupted))
    point.num_rounds = max(point.num_rounds, max(record.number for record in result.rounds))


def _add_curve(point: Point, metric: str, values: dict[int, float]) -> None:
    point.curves.setdefault(metric, []).append({number: v for number, v in values.items() if math.isfinite(v)})


def corrupted_devices(result: RunResult) -> set[str]:
    """Those that have a fault: the truth."""
    return {device_id for device_id, faults in result.faults.items() if faults}


class _Verdicts(NamedTuple):
    """All verdicts of a run, one entry each. ids: of the devices, sorted. device: places in ids. corrupted: of ids."""

    ids: list[str]
    corrupted: npt.NDArray[np.bool_]
    device: npt.NDArray[np.int64]
    round: npt.NDArray[np.int64]
    accepted: npt.NDArray[np.bool_]
    score: Floats


def _verdicts(result: RunResult) -> _Verdicts:
    ids = sorted({device_id for record in result.rounds for device_id in record.verdicts})
    places, corrupted = {device_id: place for place, device_id in enumerate(ids)}, corrupted_devices(result)
    told = [
        (places[device_id], number, one.accepted, one.score)
        for number, record in enumerate(result.rounds)
        for device_id, one in record.verdicts.items()
    ]
    columns = zip(*told) if told else ((), (), (), ())
    types = (np.int64, np.int64, np.bool_, np.float64)
    arrays: Any = [np.array(column, kind) for column, kind in zip(columns, types)]
    return _Verdicts(ids, np.array([device_id in corrupted for device_id in ids], bool), *arrays)


def _updates(told: _Verdicts) -> Detection:
    corrupted = told.corrupted[told.device]
    return Detection(int((~told.accepted).sum()), int((~told.accepted & corrupted).sum()), int(corrupted.sum()), 0)


def _devices(told: _Verdicts) -> Detection:
    """A device counts as rejected when more than half of its updates were."""
    judged = np.bincount(told.device, minlength=len(told.ids))
    rejected = 2 * np.bincount(told.device[~told.accepted], minlength=len(told.ids)) > judged
    return Detection(int(rejected.sum()), int((rejected & told.corrupted).sum()), int(told.corrupted.sum()), 0)


def added(one: Detection, other: Detection) -> Detection:
    return Detection(
        one.rejected + other.rejected,
        one.rejected_corrupted + other.rejected_corrupted,
        one.judged_corrupted + other.judged_corrupted,
        one.missing + other.missing,
    )


def _suspicions(told: _Verdicts) -> list[Suspicion]:
    """Scores of different rounds have different scales, so their places are averaged; equal scores share theirs."""
    known = np.isfinite(told.score)
    order = np.lexsort((told.score[known], told.round[known]))
    device, number, score = (column[known][order] for column in (told.device, told.round, told.score))
    if not len(score):
        return []
    _, start, size = np.unique(number, return_index=True, return_counts=True)
    same = np.concatenate([[0], np.cumsum((np.diff(number) != 0) | (np.diff(score) != 0))])  # equal scores of a round
    place = np.arange(len(score)) - np.repeat(start, size)
    shared = (np.bincount(same, place) / np.bincount(same))[same]
    others = np.repeat(size - 1, size)
    rank, judged = shared[others > 0] / others[others > 0], device[others > 0]
    total, count = np.bincount(judged, rank, len(told.ids)), np.bincount(judged, minlength=len(told.ids))
    return [Suspicion(bool(told.corrupted[one]), float(total[one] / count[one])) for one in np.flatnonzero(count)]


def roc(suspicions: Sequence[Suspicion]) -> list[tuple[float, float]]:
    """(share of healthy devices accused, share of corrupted ones found) as the threshold falls; empty without both."""
    ranks = np.array([one.rank for one in suspicions])
    corrupted = np.array([one.corrupted for one in suspicions], bool)
    if not corrupted.any() or corrupted.all():
        return []
    curve = [(0.0, 0.0)]
    for threshold in np.unique(ranks)[::-1]:
        accused = ranks >= threshold
        curve.append((float(accused[~corrupted].mean()), float(accused[corrupted].mean())))
    return curve


def area_under_roc(suspicions: Sequence[Suspicion]) -> float:
    """The chance that a corrupted device looks more suspicious than a healthy one; NaN without both kinds."""
    curve = roc(suspicions)
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(curve, curve[1:])) if curve else math.nan


def thinned(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly spread, the last among them."""
    step = max(1, math.ceil(len(values) / most))
    return list(values[::-1][::step][::-1])
