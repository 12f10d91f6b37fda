"""The drawings of an experiment's report: inline SVG in the manner of `covey_coordinator.report.plots`.

Colours: Okabe and Ito's for lines, which differ in dashes too; viridis for shares, whose numbers are written in the
cells. What a drawing leaves out (rounds, devices) its caller says in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from markupsafe import Markup

from covey_coordinator.grid.picture import DARK_BELOW, REFUSED
from covey_coordinator.report import svg
from covey_coordinator.report.summary import percent, printable
from covey_coordinator.simulation.report.frame import LEFT, TOP, Frame, nice_levels, share_floor
from covey_coordinator.simulation.report.points import Band, Suspicion, roc

PANEL = (508.0, 262.0)  # width and height of one of two panels in a row
LOG_RATIO = 30.0  # of the largest to the smallest loss, above which the axis is logarithmic
HIGHEST_LOSS = 1e6  # attacked models lose without bound; more is drawn at the edge


class Line(NamedTuple):
    """number: of its colour and dashes."""

    number: int
    name: str
    band: Band


def curves(lines: Sequence[Line], metric: str, limits: tuple[float, float], log: bool = False) -> Markup:
    """A metric over rounds with the band of the seeds. limits: lowest and highest value of all panels.

    "accuracy" is written in percent. log: the axis is logarithmic.
    """
    lines = [line for line in lines if line.band.rounds]
    if not lines:
        return Markup("")
    first, last = min(one.band.rounds[0] for one in lines), max(one.band.rounds[-1] for one in lines)
    shares = metric == "accuracy"
    frame = Frame(*PANEL, (first, max(last, first + 1)), limits, shares=shares, log=log, right=56 if shares else 14)
    spoken = f"{metric} over rounds. " + " ".join(
        f"{printable(one.name)}: {_value(metric, one.band.mean[-1])} at the end." for one in lines
    )
    parts = [svg.opening(*PANEL, spoken), frame.drawn("round", _round_ticks(first, last))]
    parts += [_band(frame, one) for one in lines]
    parts += [_curve(frame, one) for one in lines]
    ends = [(frame.place(last, one.band.mean[-1])[1], one.number, _value(metric, one.band.mean[-1])) for one in lines]
    if shares:
        parts += _end_labels(PANEL[0] - 52, ends, PANEL[1])
    return Markup("").join(parts) + svg.END


def _end_labels(across: float, ends: list[tuple[float, int, str]], height: float) -> list[Markup]:
    """Beside the ends of lines; moved apart, and up where they would leave the drawing."""
    placed = svg.spread(ends, 13.0)
    excess = max(0.0, placed[-1][0] - (height - 46)) if placed else 0.0
    return [
        svg.text(across, down + 4 - excess, words, "start", "end", svg.LINE_COLOURS[index % len(svg.LINE_COLOURS)])
        for down, index, words in placed
    ]


def _value(metric: str, value: float) -> str:
    return percent(value) if metric == "accuracy" else f"{value:.3g}"


def loss_limits(values: Sequence[float]) -> tuple[tuple[float, float], bool]:
    """Lowest and highest loss to show, and whether the axis is logarithmic."""
    low, high = min(*values, HIGHEST_LOSS), min(max(values), HIGHEST_LOSS)
    if low > 0 and high / low > LOG_RATIO:
        return whole_powers(low, high), True
    return (min(0.0, low), high if high > min(0.0, low) else low + 1.0), False


def whole_powers(low: float, high: float) -> tuple[float, float]:
    """The powers of ten below and above two positive numbers."""
    first = math.floor(math.log10(low))
    return 10.0**first, 10.0 ** max(math.ceil(math.log10(high)), first + 1)


def _round_ticks(first: int, last: int) -> list[float]:
    return [level for level in nice_levels(first, max(last, first + 1), 8) if level == int(level)]


def _band(frame: Frame, line: Line) -> Markup:
    """Between the lowest and the highest seed; nothing where they agree everywhere, as with one seed."""
    band = line.band
    if band.low == band.high:
        return Markup("")
    there = [frame.place(x, y) for x, y in zip(band.rounds, band.high)]
    back = [frame.place(x, y) for x, y in zip(band.rounds, band.low)][::-1]
    colour = svg.LINE_COLOURS[line.number % len(svg.LINE_COLOURS)]
    return svg.formatted('<path class="band" fill="{}" d="{}z"/>', colour, _path([*there, *back]))


def _curve(frame: Frame, line: Line) -> Markup:
    placed = [frame.place(x, y) for x, y in zip(line.band.rounds, line.band.mean)]
    drawn = svg.formatted('<path d="{}" {}/>', _path(placed), svg.stroke(line.number))
    return drawn + (_dots(placed, line.number) if len(placed) <= 12 else Markup(""))


def _dots(placed: Sequence[tuple[float, float]], index: int) -> Markup:
    colour = svg.LINE_COLOURS[index % len(svg.LINE_COLOURS)]
    return Markup("").join(
        svg.formatted('<circle cx="{}" cy="{}" r="3" fill="{}"/>', svg.number(x), svg.number(y), colour)
        for x, y in placed
    )


def _path(placed: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{svg.number(x)} {svg.number(y)}" for x, y in placed)


# --- final accuracy over a number that was varied


class Trend(NamedTuple):
    """values: (x, mean, lowest, highest) of one line."""

    number: int
    name: str
    values: list[tuple[float, float, float, float]]


def breakdown(trends: Sequence[Trend], title: str, floor: float) -> Markup:
    """Final accuracy over a numeric key, a line per rule, a whisker over the seeds. floor: the lowest share shown."""
    xs = sorted({x for trend in trends for x, *_ in trend.values})
    x_shares = title.lower().endswith(("fraction", "share")) and xs[0] >= 0 and xs[-1] <= 1
    ends = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 1, xs[0] + 1)
    frame = Frame(*PANEL, ends, (floor, 1.0), x_shares=x_shares, right=56)
    spoken = f"Final accuracy over {printable(title)}. " + " ".join(
        f"{printable(trend.name)}: {percent(trend.values[0][1])} to {percent(trend.values[-1][1])}." for trend in trends
    )
    parts = [svg.opening(*PANEL, spoken), frame.drawn(title, xs if len(xs) <= 9 else nice_levels(xs[0], xs[-1]))]
    for trend in trends:
        for x, _, low, high in trend.values:
            (across, top), bottom = frame.place(x, high), frame.place(x, low)[1]
            if bottom - top > 1:
                parts.append(_whisker(across + 2.0 * (trend.number % 7 - 3), top, bottom, trend.number))
        placed = [frame.place(x, mean) for x, mean, *_ in trend.values]
        parts.append(svg.formatted('<path d="{}" {}/>', _path(placed), svg.stroke(trend.number)))
        parts.append(_dots(placed, trend.number))
    lasts = [(frame.place(t.values[-1][0], t.values[-1][1])[1], t.number, percent(t.values[-1][1])) for t in trends]
    parts += _end_labels(PANEL[0] - 52, lasts, PANEL[1])
    return Markup("").join(parts) + svg.END


def _whisker(across: float, top: float, bottom: float, index: int) -> Markup:
    """Beside its neighbours', so that none hides another."""
    colour = svg.LINE_COLOURS[index % len(svg.LINE_COLOURS)]
    ends = svg.number(across), svg.number(top), svg.number(bottom)
    return svg.formatted('<path class="whisker" stroke="{}" d="M{} {}V{}"/>', colour, *ends)


# --- heat map


class Cell(NamedTuple):
    """accuracy: NaN where there is no run. spoken: what the pointer shows."""

    accuracy: float
    spoken: str


def heat_map(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]], worst: bool) -> Markup:
    """Accuracies in percent, rows down, columns across; worst: one more column with the least of every row."""
    longest = max(map(len, rows), default=1)
    left, head = min(40 + 7.6 * min(longest, 34), 300), 16 + 4.4 * min(max(map(len, columns), default=1), 30)
    wide, high = min(64.0, max(30.0, (1030 - left) / (len(columns) + 2))), 27.0
    width, height = left + wide * (len(columns) + (1.4 if worst else 0)) + 70, head + high * len(rows) + 6
    parts = [svg.opening(width, height, _heat_spoken(rows, columns, cells), "heat")]
    for column, name in enumerate(columns):
        parts.append(_slanted(left + (column + 0.5) * wide, head - 8, svg.shortened(name, 32)))
    if worst:
        parts.append(_slanted(left + (len(columns) + 0.9) * wide, head - 8, "worst"))
    for line, name in enumerate(rows):
        down = head + line * high
        label = svg.formatted("<title>{}</title>{}", printable(name), svg.shortened(name, 34))
        parts.append(svg.text(left - 10, down + 18, label, "end", "device"))
        for column, cell in enumerate(cells[line]):
            parts.append(_heat_cell(left + column * wide, down, wide - 2, high - 2, cell))
        if worst:
            known = [cell.accuracy for cell in cells[line] if math.isfinite(cell.accuracy)]
            least = Cell(min(known), f"{name}: the least of its row") if known else Cell(math.nan, "nothing measured")
            parts.append(_heat_cell(left + (len(columns) + 0.4) * wide, down, wide - 2, high - 2, least))
    return Markup("").join(parts) + svg.END


def _slanted(across: float, down: float, words: str) -> Markup:
    template = '<text class="small" x="{0}" y="{1}" transform="rotate(-40 {0} {1})">{2}</text>'
    return svg.formatted(template, svg.number(across), svg.number(down), words)


def _heat_cell(across: float, down: float, wide: float, high: float, cell: Cell) -> Markup:
    box = '<g><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" fill="{}"/>{}</g>'
    place = svg.number(across), svg.number(down), svg.number(wide), svg.number(high)
    if not math.isfinite(cell.accuracy):
        mark = svg.text(across + wide / 2, down + high / 2 + 4.5, "–", "middle", "inside")
        return svg.formatted(box, printable(cell.spoken), *place, REFUSED, mark)
    colour = "#fff" if cell.accuracy < DARK_BELOW else "#000"
    words = svg.text(across + wide / 2, down + high / 2 + 4.5, percent(cell.accuracy, 0)[:-1], "middle", "cell", colour)
    return svg.formatted(box, printable(cell.spoken), *place, shade(cell.accuracy), words)


@lru_cache(maxsize=256)
def shade(share: float) -> str:
    """viridis, as in the heat map of `covey grid`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return str(to_hex(colormaps["viridis"](min(max(share, 0.0), 1.0))))


def _heat_spoken(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]]) -> str:
    told = [
        f"{printable(row)}: "
        + ", ".join(f"{printable(c)} {percent(cell.accuracy, 0)}" for c, cell in zip(columns, line))
        for row, line in zip(rows, cells)
    ]
    return "Final accuracy, rows by columns. " + "; ".join(told)[:4000]


# --- devices


class Box(NamedTuple):
    """Of the devices' accuracies, each a mean over seeds of that statistic."""

    name: str
    worst: float
    lower: float
    median: float
    upper: float
    best: float


def boxes(drawn: Sequence[Box]) -> Markup:
    """How accuracies lie over devices: from worst to best a line, the middle half a box, the median a stroke."""
    if not drawn:
        return Markup("")
    width, left, right, row = 1040.0, 330.0, 60.0, 24.0
    floor = share_floor([box.worst for box in drawn])
    height = TOP + row * len(drawn) + 30

    def place(share: float) -> float:
        return left + (share - floor) / (1 - floor) * (width - left - right)

    parts = [svg.opening(width, height, "Accuracy over devices: " + "; ".join(map(_box_spoken, drawn))[:4000])]
    for level in nice_levels(floor, 1.0, 8):
        parts.append(svg.line(place(level), TOP, place(level), height - 24, "gridline"))
        parts.append(svg.text(place(level), height - 6, percent(level, 0), "middle"))
    template = (
        '<g><title>{}</title><path class="reach" d="M{} {}H{}"/>'
        '<rect class="half" x="{}" y="{}" width="{}" height="12"/><path class="median" d="M{} {}v16"/>'
        '<circle class="least" cx="{}" cy="{}" r="3.6"/></g>'
    )
    for number, box in enumerate(drawn):
        middle = TOP + row * (number + 0.5)
        worst, lower, median, upper, best = (place(value) for value in box[1:])
        parts.append(svg.text(left - 12, middle + 4.5, svg.shortened(box.name, 46), "end", "device"))
        values = worst, middle, best, lower, middle - 6, max(1.0, upper - lower), median, middle - 8, worst, middle
        parts.append(svg.formatted(template, _box_spoken(box), *map(svg.number, values)))
        parts.append(svg.text(width - right + 10, middle + 4.5, percent(box.worst), "start", "end"))
    return Markup("").join(parts) + svg.END


def _box_spoken(box: Box) -> str:
    return (
        f"{printable(box.name)}: worst {percent(box.worst)}, quarter {percent(box.lower)}, median "
        f"{percent(box.median)}, three quarters {percent(box.upper)}, best {percent(box.best)}"
    )


class Accused(NamedTuple):
    number: int
    name: str
    suspicions: list[Suspicion]


def roc_curves(lines: Sequence[Accused]) -> Markup:
    """Share of corrupted devices found over share of healthy ones accused; the diagonal is a coin."""
    width, height = 380.0, 330.0
    drawn = [(line, roc(line.suspicions)) for line in lines]
    drawn = [(line, curve) for line, curve in drawn if curve]
    if not drawn:
        return Markup("")
    frame = Frame(width, height, (0.0, 1.0), (0.0, 1.0), x_shares=True, right=26)
    names = ", ".join(printable(line.name) for line, _ in drawn)
    parts = [svg.opening(width, height, f"Corrupted devices found over healthy ones accused: {names}")]
    parts.append(frame.drawn("healthy devices accused", [0, 0.2, 0.4, 0.6, 0.8, 1]))
    parts.append(svg.line(*frame.place(0, 0), *frame.place(1, 1), "axisline"))
    for line, curve in drawn:
        parts.append(
            svg.formatted('<path d="{}" {}/>', _path([frame.place(*p) for p in curve]), svg.stroke(line.number))
        )
    parts.append(svg.text(LEFT, TOP - 1, "corrupted devices found", "start", "axis"))
    return Markup("").join(parts) + svg.END
