"""How data lie on the devices of a simulation, as inline SVG in the manner of the reports: one picture per partition.

Up to MAX_BARS devices and as many classes as there are colours: a stacked bar per device. Beyond: the devices' sizes
and their effective numbers of classes as sorted curves. Corrupted devices have a triangle under the bar, a stroke on
the curves, or a dashed curve of their own where they are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from covey_coordinator.report import svg
from covey_coordinator.report.plots import CLASS_COLOURS, class_name
from covey_coordinator.report.summary import printable

Array = npt.NDArray[Any]

MAX_BARS = 60
CORRUPTED_COLOUR = "#d55e00"
MAX_STROKES = 100  # more would cover the curve; the corrupted devices then have a curve of their own
MAX_POINTS = 500  # of a curve
LEFT, RIGHT, TOP, HIGH = 76, 30, 84, 250
GAP = 96  # between the two curves
CROWDED = 50  # largest over median from which a curve's scale is logarithmic
# For a picture that stands alone; a report's page has the same names, and these rules do not reach beyond the picture
STYLE = """
svg.partition { background: #fff; font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
svg.partition text { font-size: 13px; fill: #4b5863; }
svg.partition .title { font-size: 16.5px; font-weight: 650; fill: #14202b; }
svg.partition .axis { font-size: 13.5px; }
svg.partition .gridline { stroke: #e6ebef; }
svg.partition .axisline { stroke: #8b98a5; }
svg.partition .mark { fill: #d55e00; }
svg.partition .strokes { stroke: #d55e00; stroke-width: 1.6; }
svg.partition .curve { fill: none; stroke: #0072b2; stroke-width: 2.4; }
svg.partition .corrupted-curve { fill: none; stroke: #d55e00; stroke-width: 2.4; stroke-dasharray: 7 4; }
"""


def partition_plot(
    counts: Mapping[str, Sequence[int]],
    class_names: Sequence[str],
    faults: Mapping[str, Sequence[str]] | None = None,
    title: str = "How the examples lie on the devices",
    width: int = 1040,
) -> Markup:
    """counts: device id -> examples per class. faults: device id -> what is wrong with its data. width: pixels, 640 or
    more. Empty where there are no devices.
    """
    if not counts:
        return Markup("")
    matrix = np.array(list(counts.values()), np.int64).reshape(len(counts), -1)
    corrupted = np.array([bool((faults or {}).get(device)) for device in counts])
    if len(matrix) <= MAX_BARS and matrix.shape[1] <= len(CLASS_COLOURS):
        return _bars(matrix, list(counts), class_names, corrupted, title, width)
    return _curves(matrix, corrupted, title, width)


def standalone(picture: Markup) -> bytes:
    """The picture as a file of its own."""
    return str(picture).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).encode()


def effective_classes(counts: Array) -> Array:
    """(n,) exp of the entropy of each row's shares: c where c classes are equally frequent, 1 for a single class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    logarithms = np.log(np.where(shares > 0, shares, 1.0))
    return np.asarray(np.exp(-(shares * logarithms).sum(1)))


def _opened(width: int, height: float, title: str, matrix: Array, corrupted: Array) -> Markup:
    sizes, effective = matrix.sum(1), effective_classes(matrix)
    told = (
        f"{_whole(len(matrix))} devices; examples on each: {_whole(sizes.min())} to {_whole(sizes.max())}, median "
        f"{_whole(float(np.median(sizes)))}; effective classes: {effective.min():.1f} to {effective.max():.1f} of "
        f"{matrix.shape[1]}"
    )
    drawn = svg.opening(width, height, f"{title}. {told}; corrupted: {corrupted.sum()}", "partition")
    drawn += svg.formatted("<style>{}</style>", Markup(STYLE))  # noqa: S704 - our own text
    letters = int((width - LEFT) / 9)
    return (
        drawn + svg.text(LEFT, 20, svg.shortened(title, letters), "start", "title") + svg.text(LEFT, 41, told, "start")
    )


def _key(width: int, down: float, sign: str, corrupted: Array) -> Markup:
    """How corrupted devices are marked, and how many they are."""
    if not corrupted.any():
        return Markup("")
    words = f"{sign} corrupted devices: {_whole(int(corrupted.sum()))}"
    return svg.text(width - RIGHT, down, words, "end", "tick", CORRUPTED_COLOUR)


def _bars(
    matrix: Array, ids: list[str], class_names: Sequence[str], corrupted: Array, title: str, width: int
) -> Markup:
    most = max(int(matrix.sum(1).max()), 1)
    across = (width - LEFT - RIGHT) / len(matrix)
    wide = min(0.84 * across, 60.0)
    bottom = TOP + HIGH

    def level(value: float) -> float:
        return bottom - value / most * HIGH

    parts = [_opened(width, bottom + 62, title, matrix, corrupted), _legend(class_names, matrix.shape[1], width)]
    parts += [_level(LEFT, width - RIGHT, level(tick), _whole(tick)) for tick in _ticks(most)]
    step = math.ceil(len(matrix) / 30)
    for number, row in enumerate(matrix):
        middle = LEFT + (number + 0.5) * across
        parts.append(_bar(row, ids[number], class_names, middle - wide / 2, wide, level))
        if number % step == 0:
            parts.append(svg.text(middle, bottom + 34, str(number), "middle"))
        if corrupted[number]:
            parts.append(
                svg.formatted('<path class="mark" d="M{} {}l5.5 10h-11z"/>', svg.number(middle), svg.number(bottom + 6))
            )
    parts.append(svg.text((LEFT + width - RIGHT) / 2, bottom + 56, "number of the device", "middle", "axis"))
    parts.append(_upright(LEFT - 60, TOP + HIGH / 2, "examples"))
    parts.append(_key(width, bottom + 56, "▲", corrupted))
    return Markup("").join(parts) + svg.END


def _bar(
    row: Array, device: str, class_names: Sequence[str], left: float, wide: float, level: Callable[[float], float]
) -> Markup:
    drawn, below = Markup(""), 0
    for index, count in enumerate(row.tolist()):
        if count:
            box = '<rect x="{}" y="{}" width="{}" height="{}" fill="{}"><title>{}</title></rect>'
            place = svg.number(left), svg.number(level(below + count)), svg.number(wide)
            high = f"{level(below) - level(below + count):.2f}"
            spoken = f"{printable(device)}, {class_name(class_names, index)}: {count}"
            drawn += svg.formatted(box, *place, high, CLASS_COLOURS[index], spoken)
        below += count
    return drawn


def _legend(class_names: Sequence[str], classes: int, width: int) -> Markup:
    drawn, across = svg.text(LEFT, 68, "class", "start"), LEFT + 48.0
    room = (width - RIGHT - across) / classes
    for index in range(classes):
        name = svg.shortened(class_name(class_names, index), max(1, int((room - 28) / 8)))
        box = '<rect x="{}" y="57" width="13" height="13" fill="{}" stroke="#555"/>'
        drawn += svg.formatted(box, svg.number(across), CLASS_COLOURS[index]) + svg.text(across + 19, 68, name, "start")
        across += min(room, 34 + 8 * len(name))
    return drawn


def _curves(matrix: Array, corrupted: Array, title: str, width: int) -> Markup:
    wide = (width - LEFT - RIGHT - GAP) / 2
    bottom = TOP + HIGH
    parts = [_opened(width, bottom + 50, title, matrix, corrupted)]
    for left, values, name, least in (
        (float(LEFT), matrix.sum(1), "examples", 0.0),
        (LEFT + wide + GAP, effective_classes(matrix), "effective number of classes", 1.0),
    ):
        parts.append(_curve(np.asarray(values, np.float64), corrupted, left, wide, name, least))
    parts.append(_key(width, TOP - 20, "dashed:" if corrupted.sum() > MAX_STROKES else "strokes:", corrupted))
    return Markup("").join(parts) + svg.END


def _curve(values: Array, corrupted: Array, left: float, wide: float, name: str, least: float) -> Markup:
    """All devices by value, the largest first."""
    order = np.argsort(-values, kind="stable")
    ordered, bottom = values[order], TOP + HIGH
    scale, ticks, words = _scale(ordered, least)

    def level(value: float) -> float:
        return bottom - scale(value) * HIGH

    def along(position: float) -> float:
        return left + (position + 0.5) / len(values) * wide

    parts = [_level(left, left + wide, level(tick), _whole(tick)) for tick in ticks]
    parts.append(svg.formatted('<path class="curve" d="{}"/>', _path(ordered, left, wide, level)))
    marked = np.flatnonzero(corrupted[order])
    if len(marked) > MAX_STROKES:
        path = _path(ordered[marked], left, wide, level)
        parts.append(svg.formatted('<path class="corrupted-curve" d="{}"/>', path))
    else:
        strokes = (f"M{svg.number(along(place))} {svg.number(level(ordered[place]) - 6)}v12" for place in marked)
        parts.append(svg.formatted('<path class="strokes" d="{}"/>', "".join(strokes)))
    for position in (0, len(values) // 2, len(values) - 1):
        parts.append(svg.text(along(position), bottom + 18, _whole(position + 1), "middle"))
    parts.append(svg.text(left + wide / 2, bottom + 42, "devices, the largest first", "middle", "axis"))
    parts.append(_upright(left - 60, TOP + HIGH / 2, name + words))
    return Markup("").join(parts)


def _path(ordered: Array, left: float, wide: float, level: Callable[[float], float]) -> str:
    """The values at full width, some of them where they are more than MAX_POINTS."""
    shown = np.unique(np.linspace(0, len(ordered) - 1, MAX_POINTS).astype(np.int64))
    across = left + (shown + 0.5) / len(ordered) * wide
    return "M" + "L".join(f"{svg.number(x)} {svg.number(level(value))}" for x, value in zip(across, ordered[shown]))


def _scale(ordered: Array, least: float) -> tuple[Callable[[float], float], list[float], str]:
    """(value -> 0 .. 1, ticks, words for the axis); logarithmic where few devices would press all others flat."""
    largest = max(float(ordered[0]), least + 1.0)
    if least > 0 or largest < CROWDED * max(float(np.median(ordered)), 1.0):
        return lambda value: (value - least) / (largest - least), [t for t in _ticks(largest) if t >= least], ""
    first = math.floor(math.log10(max(float(ordered[-1]), 1.0)))
    decades = math.log10(largest) - first
    ticks = [10.0**power for power in range(first, int(first + decades) + 1)]
    return lambda value: (math.log10(max(value, 1.0)) - first) / decades, ticks, " (logarithmic)"


def _ticks(largest: float) -> list[float]:
    """0 and at most six round numbers up to the largest."""
    power = 10.0 ** math.floor(math.log10(largest)) / 10
    step = next(power * times for times in (1, 2, 5, 10, 20, 50) if largest / (power * times) <= 6)
    step = max(step, 1.0)
    return [step * number for number in range(int(largest / step + 1e-9) + 1)]


def _level(left: float, right: float, down: float, label: str) -> Markup:
    return svg.line(left, down, right, down, "gridline") + svg.text(left - 8, down + 4, label, "end")


def _upright(across: float, down: float, words: str) -> Markup:
    template = '<text class="axis" text-anchor="middle" transform="translate({} {}) rotate(-90)">{}</text>'
    return svg.formatted(template, svg.number(across), svg.number(down), words)


def _whole(value: float) -> str:
    return f"{value:,.0f}"
