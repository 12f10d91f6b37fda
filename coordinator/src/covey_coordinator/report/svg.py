"""The primitives of a report's drawings: inline SVG, put together from escaped pieces.

Everything is `Markup`; texts and numbers that enter are escaped here. The classes named are those of the style sheet in
templates/style.css.jinja.
"""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from covey_coordinator.report.summary import percent, printable

LINE_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56a0d8")
DASHES = ("", "8 3", "2 3", "10 3 2 3", "5 5", "1 4", "14 4")

END = Markup("</svg>")


def formatted(template: str, *values: object) -> Markup:
    # the templates are literals of the drawing modules; Markup.format escapes every value
    return Markup(template).format(*values)  # noqa: S704


def opening(width: float, height: float, spoken: str, kind: str = "plot") -> Markup:
    """The start of a drawing. spoken: what a screen reader says of it."""
    tag = '<svg class="{}" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">'
    size = number(width), number(height)
    return formatted(tag, kind, spoken, *size, *size)


def text(
    across: float, down: float, content: str | Markup, anchor: str, kind: str = "tick", colour: str = ""
) -> Markup:
    """content: plain text is made printable."""
    fill = formatted(' style="fill:{}"', colour) if colour else Markup("")
    content = content if isinstance(content, Markup) else printable(content)
    template = '<text class="{}" x="{}" y="{}" text-anchor="{}"{}>{}</text>'
    return formatted(template, kind, number(across), number(down), anchor, fill, content)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    ends = (number(value) for value in (x1, y1, x2, y2))
    return formatted('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', kind, *ends)


def number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def stroke(index: int) -> Markup:
    """How line number `index` is drawn: lines differ in dashes, too."""
    colour, dash = LINE_COLOURS[index % len(LINE_COLOURS)], DASHES[index % len(DASHES)]
    return formatted('fill="none" stroke="{}" stroke-width="2.4" stroke-dasharray="{}"', colour, dash or "none")


def gridline(left: float, right: float, down: float, level: float) -> Markup:
    """A line across a plot of shares, with its percentage to the left."""
    label = text(left - 8, down + 4, percent(level, 0), "end")
    return line(left, down, right, down, "gridline") + label


def levels(floor: float) -> list[float]:
    """The shares from 1 down to floor at which a plot has a line."""
    step = 0.1 if floor >= 0.45 else 0.2
    return [level for level in np.round(np.arange(1.0, floor - 1e-9, -step), 3).tolist() if level >= floor - 1e-9]


def ticks(first: int, last: int) -> list[int]:
    """The rounds that are written under a plot, at most about twenty."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if (last - first) / step <= 20)
    return [place for place in range(first, last + 1) if place % step == 0 or place == first]


def spread(labels: list[tuple[float, int, str]], least: float) -> list[tuple[float, int, str]]:
    """Labels moved down just enough that none covers another."""
    placed: list[tuple[float, int, str]] = []
    for height, index, label in sorted(labels):
        floor = placed[-1][0] + least if placed else height
        placed.append((max(height, floor), index, label))
    return placed


def shortened(name: str, letters: int) -> str:
    shown = printable(name)
    return shown if len(shown) <= letters else shown[: letters - 1] + "…"
