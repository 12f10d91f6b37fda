"""How the points of a sweep are laid out: what makes a line, what a panel, what an axis. Labels for values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from covey_coordinator.simulation.report.points import Point, canonical

LINE_WORDS = ("rule", "aggregation", "algorithm")  # what people compare: the first key of such a name makes the lines
COLUMN_WORDS = ("attack", "corruption", "fault")
NAMING_KEYS = ("label", "name", "rule", "attack", "kind", "step")  # of a table: the entry that says what it is
MAX_LABEL = 48


@dataclass(frozen=True)
class Axis:
    """One key that was varied. values: in order, numbers by size, others as they came. labels: of the values."""

    key: str
    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        return [label(value) for value in self.values]

    @property
    def is_numeric(self) -> bool:
        return all(is_number(value) for value in self.values)


class Layout:
    """Which points there are, by the values of the keys that were varied with more than one value."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.axes = _axes(points)
        self._points = {self._place(point.varied): point for point in points}

    def _place(self, varied: dict[str, Any]) -> tuple[str, ...]:
        return tuple(canonical(varied.get(axis.key)) for axis in self.axes)

    def point(self, **values: Any) -> Point | None:
        """values: one for every axis, by key (as keyword arguments from a dict)."""
        return self._points.get(self._place(values))

    def lines(self) -> Axis | None:
        """The axis that makes the lines of a plot; None where nothing was varied."""
        return _named(self.axes, LINE_WORDS) or _fewest(self.axes)

    def columns(self) -> Axis | None:
        """The axis across the heat map, lines being down; None with less than two axes."""
        others = self.others(self.lines())
        return _named(others, COLUMN_WORDS) or (max(others, key=lambda axis: len(axis.values)) if others else None)

    def others(self, *taken: Axis | None) -> list[Axis]:
        return [axis for axis in self.axes if axis not in taken]

    def panels(self, *taken: Axis | None) -> list[dict[str, Any]]:
        """Every combination of the axes that are not taken, of which there are points."""
        axes = self.others(*taken)
        combinations = [dict(zip([axis.key for axis in axes], values)) for values in product(*(a.values for a in axes))]
        held = {self._part(point.varied, axes) for point in self._points.values()}
        return [one for one in combinations if self._part(one, axes) in held]

    def _part(self, varied: dict[str, Any], axes: Sequence[Axis]) -> tuple[str, ...]:
        return tuple(canonical(varied.get(axis.key)) for axis in axes)

    def title(self, values: dict[str, Any], most: int = 0) -> str:
        """attack alie, fraction 0.2. most: of characters per value, 0 for the usual."""
        return ", ".join(
            f"{axis.name} {label(values[axis.key], most or MAX_LABEL)}" for axis in self.axes if axis.key in values
        )


def _axes(points: Sequence[Point]) -> list[Axis]:
    found: dict[str, dict[str, Any]] = {}
    for point in points:
        for key in point.varied:
            found.setdefault(key, {})
    for point in points:
        for key, values in found.items():
            values.setdefault(canonical(point.varied.get(key)), point.varied.get(key))
    varied = {key: list(values.values()) for key, values in found.items() if len(values) > 1}
    names = short_names(list(varied))
    return [Axis(key, names[key], tuple(_ordered(values))) for key, values in varied.items()]


def _ordered(values: list[Any]) -> list[Any]:
    return sorted(values) if all(map(is_number, values)) else values


def _named(axes: Sequence[Axis], words: Sequence[str]) -> Axis | None:
    return next((axis for axis in axes if any(word in axis.key.lower() for word in words)), None)


def _fewest(axes: Sequence[Axis]) -> Axis | None:
    """Names before numbers (which make good axes), then the fewest values."""
    return min(axes, key=lambda axis: (axis.is_numeric, len(axis.values)), default=None)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of a dotted key, where no other key ends so."""
    last = [key.split(".")[-1] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last)}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def label(value: Any, most: int = MAX_LABEL) -> str:
    """A value of a sweep in a few letters: multi-krum num_byzantine=2; 0.3; label-flip + noise; none."""
    text = _label(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _label(value: Any) -> str:
    if value is None or value in ("", [], {}, ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        name = next((key for key in NAMING_KEYS if isinstance(value.get(key), str)), None)
        others = [f"{key}={_label(one)}" for key, one in value.items() if key != name]
        return " ".join([*([value[name]] if name else []), *others])
    if isinstance(value, (list, tuple)):
        return " + ".join(map(_label, value))
    return str(value)
