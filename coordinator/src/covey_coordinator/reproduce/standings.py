"""Experiments on mostly corrupted devices as reproductions: a case is a world and a method; tables and dots of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from covey_coordinator.reproduce import contestants, majority
from covey_coordinator.reproduce.contract import Case, Measured, Outcome, Values
from covey_coordinator.reproduce.pictures import STYLES, new_figure, plain, png
from covey_coordinator.teaching.fitting import score

CLEAN = "nothing corrupted"
TRUSTED, COMT = "trusted only", contestants.COMT
LEAST_SHOWN = -0.25  # of R2, in figures: what is below lies on the edge
BY = {"validation": "", "trusted": " (own validation)", "nothing": " (untuned)"}


class Place(NamedTuple):
    """A world of the experiment. name: in labels. settings: of `majority.drawn`. published: method -> number."""

    name: str
    settings: dict[str, Any]
    published: dict[str, float]


def place(name: str, data: str, corruption: str, trusted: float, published: Any = None, **more: Any) -> Place:
    shape = {"data": data, "devices": 5, "trusted": trusted, "corruption": corruption, "corrupted": 1.0, "fourier": 0}
    return Place(name, {**shape, **more}, published or {})


def label(where: str, method: str, by: str = "validation") -> str:
    return f"{where}: {method}{BY[by]}"


def case(where: Place, method: str, budget: int, by: str = "validation") -> Case:
    settings = {"world": where.settings, "method": method, "by": by, "budget": budget}
    published = where.published.get(method) if by != "trusted" else None
    return Case(label(where.name, method, by), settings, published)


def fits(where: Place, method: str) -> bool:
    """Whether the method is for this kind of problem."""
    kind = majority.KINDS[where.settings["data"]]
    return method == CLEAN or kind in contestants.METHODS[method].kinds


def run(settings: dict[str, Any], seed: int, folder: Path | None) -> Outcome:
    """score: R2 or AUC on the test instances. chosen: the settings that tuning chose."""
    started = time.process_time()
    world = majority.drawn(settings["world"], seed, folder)
    method = settings["method"]
    if method == CLEAN:
        world, method = world._replace(problem=world.clean), "trusted + noisy"
    theta, chosen = contestants.tuned(method, world, settings["by"], settings["budget"])
    found = score(world.problem.kind, world.test.y, world.test.x @ theta)
    return {"score": found, "chosen": chosen, "seconds": round(time.process_time() - started, 2)}


def value(outcome: Outcome) -> float:
    return float(outcome["score"])


def matrix(measured: Measured) -> str:
    """Markdown: a line per method, a column per world, means over seeds."""
    cells = {tuple(name.split(": ", 1)): measured.mean(name) for name in measured.outcomes}
    columns, lines = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    head = "| | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns) + "\n"
    rows = []
    for line in lines:
        numbers = (f"{cells[column, line]:.3f}" if (column, line) in cells else "" for column in columns)
        rows.append(f"| {line} | " + " | ".join(numbers) + " |\n")
    return head + "".join(rows)


class Pair(NamedTuple):
    """One method above another, seed by seed: mean and standard deviation of the differences, in how many it wins."""

    mean: float
    spread: float
    wins: int
    seeds: int

    @property
    def beyond_spread(self) -> bool:
        return self.mean > self.spread


def paired(measured: Measured, ours: str, theirs: str) -> Pair:
    gaps = [a - b for a, b in zip(measured.values(ours), measured.values(theirs))]
    spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    return Pair(statistics.fmean(gaps), spread, sum(gap > 0 for gap in gaps), len(gaps))


def gaps(measured: Measured, by: str = "validation") -> str:
    """Markdown: per world what CoMT has above tuned trusted-only, paired, and who is best."""
    lines = [
        "| | CoMT - trusted only: mean, spread | CoMT ahead in | best method | best - CoMT: mean, spread |\n",
        "|---|---:|---:|---|---:|\n",
    ]
    for where in dict.fromkeys(name.split(": ", 1)[0] for name in measured.outcomes):
        mine, base = label(where, COMT, by), label(where, TRUSTED, by)
        if mine not in measured.outcomes or base not in measured.outcomes:
            continue
        gap, best = paired(measured, mine, base), best_method(measured.means(), where, by)
        ahead = paired(measured, label(where, best, by), mine)
        told = "" if best == COMT else f"{ahead.mean:+.3f}, {ahead.spread:.3f}"
        lines.append(f"| {where} | {gap.mean:+.3f}, {gap.spread:.3f} | {gap.wins} of {gap.seeds} | {best} | {told} |\n")
    return "".join(lines)


def best_method(values: Values, where: str, by: str = "validation") -> str:
    """The method with the largest mean in this world, tuned so; without the bound that corrupts nothing."""
    names = {name: label(where, name, by) for name in contestants.METHODS if label(where, name, by) in values}
    return max(names, key=lambda name: values[names[name]])


def everywhere(places: Sequence[Place], holds: Callable[[Callable[[str], float]], bool]) -> Callable[[Values], bool]:
    """A claim's test: in each of these worlds `holds(of)`, of(method) being its number there."""

    def tested(values: Values) -> bool:
        there = [one for one in places if label(one.name, COMT) in values]
        if not there:
            raise KeyError("none of these worlds ran")
        return all(holds(lambda method, one=one: values[label(one.name, method)]) for one in there)  # type: ignore[misc]

    return tested


def dots(panels: Sequence[tuple[str, Sequence[str]]], measured: Measured, across: str) -> bytes:
    """A panel per title: methods down, numbers across, a colour per world of the panel, whiskers least to most."""
    panels = [(title, [w for w in worlds if _methods(measured, w)]) for title, worlds in panels]
    panels = [(title, worlds) for title, worlds in panels if worlds]
    figure, axes = new_figure(min(3, len(panels)), -(-len(panels) // 3), size=(4.6, 4.4))
    for one in list(axes.flat)[len(panels) :]:
        one.set_visible(False)
    for (title, worlds), one in zip(panels, axes.flat):
        _draw(one, worlds, measured)
        one.set_title(title, fontsize=10, loc="left", weight="bold")
        one.set_xlabel(across, fontsize=9)
    return png(figure)


def _methods(measured: Measured, where: str) -> list[str]:
    return [name.split(": ", 1)[1] for name in measured.outcomes if name.split(": ", 1)[0] == where]


def _draw(axes: Any, worlds: Sequence[str], measured: Measured) -> None:
    methods = list(dict.fromkeys(method for where in worlds for method in _methods(measured, where)))
    for number, where in enumerate(worlds):
        colour = STYLES[number + 1][0]
        for line, method in enumerate(methods):
            if f"{where}: {method}" not in measured.outcomes:
                continue
            low, high = measured.range(f"{where}: {method}")
            middle = measured.mean(f"{where}: {method}")
            height = len(methods) - line + 0.22 * (number - (len(worlds) - 1) / 2)
            axes.plot([max(low, LEAST_SHOWN), max(high, LEAST_SHOWN)], [height, height], color=colour, linewidth=1)
            marker = "o" if middle >= LEAST_SHOWN else "<"
            axes.plot(
                max(middle, LEAST_SHOWN), height, marker, color=colour, markersize=5, label=where if not line else None
            )
    axes.set_yticks(range(len(methods), 0, -1), methods, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(left=LEAST_SHOWN - 0.02, right=1.02)
    axes.legend(fontsize=7.5, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.06), borderaxespad=0)
    plain(axes)
