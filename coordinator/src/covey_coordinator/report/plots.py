"""The drawings of a report, as inline SVG and small PNG pictures: no plotting library, no script, nothing to load.

Every text that enters a drawing goes through `markupsafe` (and `printable`), so hostile names stay text. Colours
are Okabe and Ito's, which the common kinds of colour blindness keep apart; lines differ in dashes and cells in
marks too, so nothing rests on colour alone.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from covey_coordinator.records import ACCEPTED, MISSING, REJECTED, InversionRecord, RoundRecord, RunRecord
from covey_coordinator.report import svg
from covey_coordinator.report.summary import percent, printable
from covey_edge.png import png

# Paul Tol's "light" and "muted" tones in an order where neighbours differ in lightness too
CLASS_COLOURS = (
    "#77aadd",
    "#ee8866",
    "#44bb99",
    "#eedd88",
    "#ffaabb",
    "#99ddff",
    "#bbcc33",
    "#cc99bb",
    "#aaaa00",
    "#dddddd",
)
STATUS_COLOURS = {ACCEPTED: "#cfe3f1", REJECTED: "#d55e00", MISSING: "#ececec"}
MAX_CELLS_ACROSS = 400  # rounds drawn in a verdict grid; a cell is one unit wide then
MAX_FEATURES = 60
PICTURE_PIXELS = 176  # shown edge length of a picture


def swatch(index: int) -> Markup:
    """A piece of the line of run number `index`, for legends and tables."""
    line = svg.formatted('<line x1="1" y1="7" x2="33" y2="7" {}/>', svg.stroke(index))
    return Markup('<svg class="swatch" width="34" height="14" viewBox="0 0 34 14" aria-hidden="true">') + line + svg.END


def accuracy_curves(runs: Sequence[RunRecord]) -> Markup:
    """Accuracy per round, every run a line; rounds without a measured accuracy leave a gap. Empty where none was."""
    measured = [r.accuracy for run in runs for r in run.rounds if math.isfinite(r.accuracy)]
    if not measured:
        return Markup("")
    width, height, left, right, top, bottom = 1040, 360, 56, 64, 14, 46
    numbers = [finished.number for run in runs for finished in run.rounds]
    first, last = min(numbers), max(max(numbers), min(numbers) + 1)
    floor = max(0.0, math.floor(10 * min(measured) - 0.5) / 10)

    def place(number: float, accuracy: float) -> tuple[float, float]:
        across = left + (number - first) / (last - first) * (width - left - right)
        return across, top + (1 - (accuracy - floor) / (1 - floor)) * (height - top - bottom)

    parts = [
        svg.opening(width, height, "Accuracy on the test set after every round, one line per run. " + _spoken(runs))
    ]
    parts += [svg.gridline(left, width - right, place(first, level)[1], level) for level in svg.levels(floor)]
    for number in svg.ticks(first, last):
        across = place(number, floor)[0]
        parts.append(svg.text(across, height - bottom + 20, str(number), "middle"))
    parts.append(svg.text((left + width - right) / 2, height - 6, "round", "middle", "axis"))
    ends: list[tuple[float, int, str]] = []
    for index, run in enumerate(runs):
        parts.append(_curve(index, run.rounds, place))
        if run.rounds and math.isfinite(run.final_accuracy):
            ends.append((place(last, run.final_accuracy)[1], index, percent(run.final_accuracy)))
    for height_of_label, index, label in svg.spread(ends, 15.0):
        colour = svg.LINE_COLOURS[index % len(svg.LINE_COLOURS)]
        parts.append(svg.text(width - right + 8, height_of_label + 4, label, "start", "end", colour))
    return Markup("").join(parts) + svg.END


def verdict_grid(run: RunRecord, grid: dict[str, list[str]]) -> Markup:
    """One row per device, one cell per round: accepted (dot), rejected (cross), missing (dash), not invited (empty).

    grid: `summary.statuses`. Truly corrupted devices have a triangle before their name. Only the last
    MAX_CELLS_ACROSS rounds are drawn.
    """
    rounds = [finished.number for finished in run.rounds][-MAX_CELLS_ACROSS:]
    if not rounds or not grid:
        return Markup("")
    cell = max(2.0, min(22.0, 330 / len(rounds)))
    row, left, top = 22.0, 158, 22
    width, height = left + cell * len(rounds) + 4, top + row * len(grid) + 2
    parts = [svg.opening(width, height, _grid_spoken(run, grid), "grid")]
    step = max(1, math.ceil((12 + 9 * len(str(max(rounds)))) / cell))
    for column, number in enumerate(rounds):
        if column % step == 0:
            parts.append(svg.text(left + (column + 0.5) * cell, 14, str(number), "middle", "tick"))
    corrupted = set(run.corrupted)
    for line, (device, cells) in enumerate(grid.items()):
        across, down = float(left), top + line * row
        marked = device in corrupted
        if marked:
            parts.append(svg.formatted('<path class="mark" d="M4 {}l6 -10l6 10z"/>', svg.number(down + 16)))
        label = svg.formatted("<title>{}</title>{}", printable(device), svg.shortened(device, 16))
        parts.append(svg.text(22, down + 15, label, "start", "corrupted" if marked else "device"))
        parts += _cells(cells[-MAX_CELLS_ACROSS:], across, down, cell, row)
    return Markup("").join(parts) + svg.END


def class_bars(shards: dict[str, Sequence[int]], devices: Sequence[str], class_names: Sequence[str]) -> Markup:
    """Examples per class of every device as stacked bars, widths to one scale. Empty where nobody has any."""
    rows = [(device, [max(0, int(count)) for count in shards[device]]) for device in devices if device in shards]
    most = max((sum(counts) for _, counts in rows), default=0)
    if most == 0:
        return Markup("")
    width, left, right, row = 1040, 158, 60, 24
    parts = [
        svg.opening(width, row * len(rows) + 4, "Stacked bars: how many examples of each class every device holds.")
    ]
    for line, (device, counts) in enumerate(rows):
        across, down = float(left), line * row + 2
        label = svg.formatted("<title>{}</title>{}", printable(device), svg.shortened(device, 18))
        parts.append(svg.text(4, down + 15, label, "start", "device"))
        for index, count in enumerate(counts):
            wide = count / most * (width - left - right)
            name = class_name(class_names, index)
            parts.append(_segment(across, down, wide, row - 4, index, f"{name}: {count}", name))
            across += wide
        parts.append(svg.text(across + 6, down + 15, str(sum(counts)), "start", "tick"))
    return Markup("").join(parts) + svg.END


def class_swatch(index: int) -> Markup:
    colour = CLASS_COLOURS[index % len(CLASS_COLOURS)]
    box = svg.formatted('<rect x="0.5" y="0.5" width="13" height="13" fill="{}" stroke="#555"/>', colour)
    return Markup('<svg class="swatch" width="14" height="14" aria-hidden="true">') + box + svg.END


def class_name(class_names: Sequence[str], index: int | None) -> str:
    """The name of a class, its number where it has none, a dash where there is no class."""
    if index is None:
        return "–"
    return printable(class_names[index]) if 0 <= index < len(class_names) else str(index)


def is_picture(shape: Sequence[int]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))


def picture(image: npt.NDArray[Any], input_range: tuple[float, float]) -> Markup:
    """A data address of a PNG: pixels repeated (nearest) to about PICTURE_PIXELS; the input range is black to white.

    image: (H, W), (H, W, 1) or (H, W, 3). NaN becomes the middle of the range.
    """
    low, high = input_range
    values = np.nan_to_num(np.asarray(image, np.float64), nan=(low + high) / 2, posinf=high, neginf=low)
    grey = np.clip(np.rint((values - low) / (high - low) * 255), 0, 255).astype(np.uint8)
    if grey.ndim == 2:
        grey = grey[:, :, None]
    times = max(1, PICTURE_PIXELS // max(grey.shape[:2]))
    return Markup("data:image/png;base64,") + base64.b64encode(png(grey.repeat(times, 0).repeat(times, 1))).decode()


def feature_bars(inversion: InversionRecord) -> Markup:
    """For tables: every feature's true value (bar) against the recovered one (line and dot), a column per attempt."""
    truth = inversion.truth.astype(np.float64).reshape(-1)[:MAX_FEATURES]
    attempts = inversion.reconstructions
    low, high = _shown_range(inversion, truth)
    left, row, top = 190, 16, 40
    column = (1040 - left) / max(1, len(attempts))
    parts = [
        svg.opening(
            1040, top + row * truth.size + 6, "True and recovered value of every feature, a column per attempt."
        )
    ]

    def place(value: float, start: float) -> float:
        clipped = min(max(value, low), high) if math.isfinite(value) else (low + high) / 2
        return start + (clipped - low) / (high - low) * (column - 24)

    for line in range(truth.size):
        name = inversion.feature_names[line] if line < len(inversion.feature_names) else f"feature {line}"
        label = svg.formatted("<title>{}</title>{}", printable(name), svg.shortened(name, 26))
        parts.append(svg.text(left - 10, top + line * row + 12, label, "end", "small"))
    for index, attempt in enumerate(attempts):
        start = left + index * column + 12
        words = attempt.title.split(", ", 1)
        for line, words_of_line in enumerate(words):
            parts.append(svg.text(start, 14 + 14 * line, svg.shortened(words_of_line, 26), "start", "small"))
        recovered = attempt.image.astype(np.float64).reshape(-1)[:MAX_FEATURES]
        zero = place(0.0, start)
        parts.append(svg.line(zero, top, zero, top + row * truth.size, "axisline"))
        for line, (true, found) in enumerate(zip(truth, recovered)):
            down, tip, dot = top + line * row + 8, place(float(true), start), place(float(found), start)
            bar = '<rect class="truth" x="{}" y="{}" width="{}" height="9"/>'
            parts.append(
                svg.formatted(
                    bar, svg.number(min(zero, tip)), svg.number(down - 4.5), svg.number(max(1.0, abs(tip - zero)))
                )
            )
            parts.append(svg.line(tip, down, dot, down, "miss"))
            parts.append(
                svg.formatted('<circle class="found" cx="{}" cy="{}" r="3"/>', svg.number(dot), svg.number(down))
            )
    return Markup("").join(parts) + svg.END


def _curve(index: int, rounds: Sequence[RoundRecord], place: Any) -> Markup:
    path, drawing, dots = "", False, Markup("")
    colour = svg.LINE_COLOURS[index % len(svg.LINE_COLOURS)]
    for finished in rounds:
        if not math.isfinite(finished.accuracy):
            drawing = False
            continue
        across, down = (svg.number(value) for value in place(finished.number, finished.accuracy))
        path += f"{'L' if drawing else 'M'}{across} {down}"
        drawing = True
        if len(rounds) <= 60:
            hollow = finished.outcome == "abandoned"
            dot = '<circle cx="{}" cy="{}" r="3" fill="{}" stroke="{}" stroke-width="1.5"/>'
            dots += svg.formatted(dot, across, down, "#fff" if hollow else colour, colour)
    return svg.formatted('<path d="{}" {}/>', path, svg.stroke(index)) + dots


def _spoken(runs: Sequence[RunRecord]) -> str:
    return " ".join(f"{printable(run.title)}: {percent(run.final_accuracy)} at the end." for run in runs)


def _grid_spoken(run: RunRecord, grid: dict[str, list[str]]) -> str:
    counted = [
        f"{printable(device)}{' (corrupted)' if device in run.corrupted else ''}: "
        + ", ".join(f"{cells.count(status)} {status}" for status in (ACCEPTED, REJECTED, MISSING))
        for device, cells in grid.items()
    ]
    return f"Verdicts per device and round of {printable(run.title)}. " + "; ".join(counted)


def _cells(cells: Sequence[str], left: float, down: float, cell: float, row: float) -> list[Markup]:
    gap = 1.5 if cell >= 8 else 0.3
    boxes: dict[str, str] = {}
    marks: dict[str, str] = {}
    for column, status in enumerate(cells):
        if status not in STATUS_COLOURS:
            continue
        x, y, w, h = left + column * cell, down + 1, cell - gap, row - 2.5
        boxes[status] = (
            boxes.get(status, "")
            + f"M{svg.number(x)} {svg.number(y)}h{svg.number(w)}v{svg.number(h)}h-{svg.number(w)}z"
        )
        marks[status] = marks.get(status, "") + _mark(status, x + w / 2, y + h / 2, min(4.0, w / 2 - 0.5))
    drawn = [svg.formatted('<path fill="{}" d="{}"/>', STATUS_COLOURS[status], path) for status, path in boxes.items()]
    if cell >= 5:
        drawn += [svg.formatted('<path class="{}" d="{}"/>', status, path) for status, path in marks.items()]
    return drawn


def _mark(status: str, x: float, y: float, reach: float) -> str:
    n = svg.number
    if status == REJECTED:
        return (
            f"M{n(x - reach)} {n(y - reach)}L{n(x + reach)} {n(y + reach)}"
            f"M{n(x - reach)} {n(y + reach)}L{n(x + reach)} {n(y - reach)}"
        )
    if status == MISSING:
        return f"M{n(x - reach)} {n(y)}h{n(2 * reach)}"
    return f"M{n(x)} {n(y)}h0.1"


def status_sample(status: str) -> Markup:
    """One cell of a verdict grid, for the legend."""
    opening = Markup('<svg class="swatch" width="20" height="20" viewBox="0 0 20 20" aria-hidden="true">')
    return opening + Markup("").join(_cells([status], 0, 0, 20, 20)) + svg.END


def _segment(across: float, down: float, wide: float, high: float, index: int, spoken: str, name: str) -> Markup:
    colour = CLASS_COLOURS[index % len(CLASS_COLOURS)]
    box = '<g><title>{}</title><rect class="segment" x="{}" y="{}" width="{}" height="{}" fill="{}"/>{}</g>'
    fits = len(name) * 7 + 6 <= wide
    label = svg.text(across + wide / 2, down + high - 5, name, "middle", "inside") if fits else Markup("")
    return svg.formatted(
        box, spoken, svg.number(across), svg.number(down), svg.number(wide), svg.number(high), colour, label
    )


def _shown_range(inversion: InversionRecord, truth: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The part of the input range that holds the true values and most recovered ones; wide ranges would hide them."""
    low, high = inversion.input_range
    reach = 1.6 * float(np.max(np.abs(np.nan_to_num(truth)))) if truth.size else 1.0
    shown = max(low, -reach), min(high, reach)
    return shown if shown[0] < shown[1] else (low, high)
