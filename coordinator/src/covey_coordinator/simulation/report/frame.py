"""The axes of a plot: where a value lies on the drawing, and the lines and numbers around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from covey_coordinator.report import svg
from covey_coordinator.report.summary import percent

LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 12.0, 42.0


@dataclass(frozen=True)
class Frame:
    """x and y: lowest and highest value shown. shares: y (and with x_shares x) is written in percent. log: of y."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    shares: bool = True
    x_shares: bool = False
    log: bool = False
    right: float = RIGHT

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where (x, y) lies; what is beyond the axes is put on their ends."""
        across, up = _part(x, *self.x), _part(self._scaled(y), *(self._scaled(end) for end in self.y))
        return (
            LEFT + across * (self.width - LEFT - self.right),
            TOP + (1 - up) * (self.height - TOP - BOTTOM),
        )

    def _scaled(self, y: float) -> float:
        return math.log10(max(y, 1e-300)) if self.log else y

    def drawn(self, x_title: str, x_ticks: Sequence[float]) -> Markup:
        """Grid, numbers and titles."""
        parts, end = [], self.width - self.right
        for level in self._levels():
            down = self.place(self.x[0], level)[1]
            parts.append(svg.line(LEFT, down, end, down, "gridline"))
            parts.append(svg.text(LEFT - 8, down + 4, percent(level, 0) if self.shares else f"{level:.3g}", "end"))
        bottom = self.height - BOTTOM
        for tick in x_ticks:
            words = percent(tick, 0) if self.x_shares else f"{tick:.4g}"
            parts.append(svg.text(self.place(tick, self.y[0])[0], bottom + 17, words, "middle"))
        parts.append(svg.text((LEFT + end) / 2, self.height - 6, x_title, "middle", "axis"))
        return Markup("").join(parts)

    def _levels(self) -> list[float]:
        low, high = self.y
        if self.log:
            first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
            step = max(1, math.ceil((last - first) / 5))
            return [10.0**power for power in range(first, last + 1, step)]
        return nice_levels(low, high)


def _part(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def nice_levels(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most about `most`."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(times * size for times in (1, 2, 5, 10) if times * size >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def share_floor(values: Sequence[float]) -> float:
    """The lowest share a plot has to show, a tenth below the least of the values."""
    return max(0.0, math.floor(10 * min(values) - 0.3) / 10)
