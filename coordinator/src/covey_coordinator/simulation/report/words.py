"""The sentences at the top of an experiment's report, and its honest notes: plain words, every number measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from covey_coordinator.report.summary import Detection, percent
from covey_coordinator.simulation.report.axes import Axis, Layout, label
from covey_coordinator.simulation.report.points import Gathered, Point, added

NOTHING_FOUND = Detection(0, 0, 0, 0)


def sentences(found: Gathered, layout: Layout) -> list[str]:
    """What was done, what came best and worst, who held in the worst case, who was turned away."""
    said = [
        _done(found, layout),
        _extremes(found.points, layout),
        _worst_case(layout),
        _told_apart(layout, found.points),
    ]
    return [sentence for sentence in (*said, _seeds(found)) if sentence]


def counted(number: int, thing: str) -> str:
    """1 seed, 2 seeds, 1,000 runs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _done(found: Gathered, layout: Layout) -> str:
    if not found.points:
        return "No run of this experiment has finished a round, so there is nothing to show yet."
    devices = _range([point.num_devices for point in found.points])
    rounds = _range([point.num_rounds for point in found.points])
    seeds = _range([len(point.seeds) for point in found.points])
    who = f"each trains one model on {devices} simulated devices for up to {rounds} rounds"
    if not layout.axes:
        return f"This experiment is one setting with {seeds} random seed(s): {who}."
    varied = " and ".join(f"{len(axis.values)} values of “{axis.name}”" for axis in layout.axes)
    return (
        f"This experiment compares {varied}: {counted(len(found.points), 'combination')} with {seeds} random "
        f"seed{'' if seeds == '1' else 's'} each, {counted(found.num_runs, 'run')} in all; {who}."
    )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _extremes(points: Sequence[Point], layout: Layout) -> str:
    known = sorted((point for point in points if math.isfinite(point.accuracy)), key=lambda point: point.accuracy)
    if not known:
        return "No accuracy was measured."
    worst, best = known[0], known[-1]
    if len(known) == 1:
        return f"At the end the model got {_measured(best)} of the test examples right."
    return (
        f"The best combination got {_measured(best)} of the test examples right ({layout.title(best.varied)}), the "
        f"worst {_measured(worst)} ({layout.title(worst.varied)})."
    )


def _measured(point: Point) -> str:
    low, high = point.spread
    seeds = len(point.final())
    return percent(point.accuracy) + (
        f" (mean of {seeds} seeds, {percent(low)} to {percent(high)})" if seeds > 1 else ""
    )


def worst_of_line(layout: Layout, axis: Axis) -> list[tuple[str, float, Point]]:
    """For each value of the axis: label, least accuracy over all else, and where; the steadiest first."""
    found = []
    for value, name in zip(axis.values, axis.labels):
        points = [layout.point(**{**panel, axis.key: value}) for panel in layout.panels(axis)]
        known = [point for point in points if point is not None and math.isfinite(point.accuracy)]
        if known:
            worst = min(known, key=lambda point: point.accuracy)
            found.append((name, worst.accuracy, worst))
    return sorted(found, key=lambda one: -one[1])


def _worst_case(layout: Layout) -> str:
    line = layout.lines()
    if line is None or len(layout.axes) < 2:
        return ""
    ranked = worst_of_line(layout, line)
    if len(ranked) < 2:
        return ""
    (best, least, point), (poorest, fell, other) = ranked[0], ranked[-1]
    return (
        f"Judged by its worst case, {line.name} “{best}” held best: never below {percent(least)}, "
        f"{_where(layout, line, point)}. “{poorest}” fell to {percent(fell)}, {_where(layout, line, other)}."
    )


def _where(layout: Layout, line: Axis, point: Point) -> str:
    rest = {axis.key: point.varied.get(axis.key) for axis in layout.others(line)}
    return f"at {layout.title(rest)}"


def _told_apart(layout: Layout, points: Sequence[Point]) -> str:
    """Which line's verdicts hit the corrupted devices best, by the harmonic mean of precision and recall."""
    if not any(point.num_corrupted for point in points):
        return "No device was corrupted in any run."
    line = layout.lines()
    ranked = sorted(detections(layout, line, points), key=lambda one: -_harmonic(one[1]))
    name, found = ranked[0]
    if not found.rejected:
        return "Some devices were corrupted; no rule turned any device away in more than half of its rounds."
    who = f"{line.name} “{name}”" if line is not None else "the rule"
    wrong = found.rejected - found.rejected_corrupted
    return (
        f"Corrupted devices were told from healthy ones best by {who}: over all its runs it turned away "
        f"{found.rejected_corrupted:,} of {counted(found.judged_corrupted, 'corrupted device')} in more than half of "
        f"their rounds, and {counted(wrong, 'healthy one')}."
    )


def detections(layout: Layout, line: Axis | None, points: Sequence[Point]) -> list[tuple[str, Detection]]:
    """By the values of the line's axis: who was turned away, over all points with corrupted devices."""
    names = line.labels if line is not None else ["all"]
    sums = dict.fromkeys(names, NOTHING_FOUND)
    for point in points:
        if point.num_corrupted:
            name = label(point.varied.get(line.key)) if line is not None else "all"
            sums[name] = added(sums[name], point.devices)
    return list(sums.items())


def _harmonic(found: Detection) -> float:
    if not found.rejected_corrupted:
        return 0.0
    return 2 * found.precision * found.recall / (found.precision + found.recall)


def _seeds(found: Gathered) -> str:
    fewest = min((len(point.seeds) for point in found.points), default=0)
    if fewest == 1:
        return "At least one combination has a single seed: differences of a few points may be chance."
    return ""


def notes(found: Gathered, failed: dict[str, str], expected: int | None) -> list[str]:
    """What a reader should know before trusting a number."""
    said = []
    missing = (expected or found.num_runs) - found.num_runs
    if missing > 0:
        said.append(f"{counted(missing, 'run')} of {expected:,} left no result; nothing on this page counts them.")
    if found.unfinished:
        said.append(
            f"{counted(len(found.unfinished), 'run')} ended before the first round: {_few(found.unfinished)}. Why is "
            "among the notes of the runs, below."
        )
    seeds = {len(point.seeds) for point in found.points}
    if len(seeds) > 1:
        short = sum(len(point.seeds) < max(seeds) for point in found.points)
        said.append(
            f"{counted(short, 'combination')} of {len(found.points):,} have fewer seeds than the {max(seeds)} of the "
            "others; their means are over those that there are."
        )
    uneven = [point for point in found.points if _stopped_early(point)]
    if uneven:
        said.append(
            f"In {counted(len(uneven), 'combination')} some run was last evaluated in an earlier round than others; "
            "its last measured value counts as its final one."
        )
    said += [f"Run {key} failed: {reason}" for key, reason in list(failed.items())[:20]]
    if len(failed) > 20:
        said.append(f"{len(failed) - 20:,} more runs failed.")
    return said


def _stopped_early(point: Point) -> bool:
    lasts = {max(curve) for curve in point.curves.get("accuracy", ()) if curve}
    return len(lasts) > 1


def _few(keys: Sequence[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
