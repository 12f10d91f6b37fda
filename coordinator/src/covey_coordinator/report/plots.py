"""The drawings of a report, as inline SVG and small PNG pictures: no plotting library, no script, nothing to load.

Every text that enters a drawing goes through `markupsafe` (and `printable`), so hostile names stay text. Colours
are Okabe and Ito's, which the common kinds of colour blindness keep apart; lines differ in dashes and cells in
marks too, so nothing rests on colour alone.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from covey_coordinator.records import ACCEPTED, MISSING, REJECTED, InversionRecord, RoundRecord, RunRecord
from covey_coordinator.report.summary import percent, printable

LINE_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56a0d8")
DASHES = ("", "8 3", "2 3", "10 3 2 3", "5 5", "1 4", "14 4")
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
    line = _format('<line x1="1" y1="7" x2="33" y2="7" {}/>', _stroke(index))
    return Markup('<svg class="swatch" width="34" height="14" viewBox="0 0 34 14" aria-hidden="true">') + line + _END


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

    parts = [_svg(width, height, "Accuracy on the test set after every round, one line per run. " + _spoken(runs))]
    parts += [_gridline(left, width - right, place(first, level)[1], level) for level in _levels(floor)]
    for number in _ticks(first, last):
        across = place(number, floor)[0]
        parts.append(_text(across, height - bottom + 20, str(number), "middle"))
    parts.append(_text((left + width - right) / 2, height - 6, "round", "middle", "axis"))
    ends: list[tuple[float, int, str]] = []
    for index, run in enumerate(runs):
        parts.append(_curve(index, run.rounds, place))
        if run.rounds and math.isfinite(run.final_accuracy):
            ends.append((place(last, run.final_accuracy)[1], index, percent(run.final_accuracy)))
    for height_of_label, index, label in _spread(ends, 15.0):
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        parts.append(_text(width - right + 8, height_of_label + 4, label, "start", "end", colour))
    return Markup("").join(parts) + _END


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
    parts = [_svg(width, height, _grid_spoken(run, grid), "grid")]
    step = max(1, math.ceil((12 + 9 * len(str(max(rounds)))) / cell))
    for column, number in enumerate(rounds):
        if column % step == 0:
            parts.append(_text(left + (column + 0.5) * cell, 14, str(number), "middle", "tick"))
    corrupted = set(run.corrupted)
    for line, (device, cells) in enumerate(grid.items()):
        across, down = float(left), top + line * row
        marked = device in corrupted
        if marked:
            parts.append(_format('<path class="mark" d="M4 {}l6 -10l6 10z"/>', _number(down + 16)))
        label = _format("<title>{}</title>{}", printable(device), _shortened(device, 16))
        parts.append(_text(22, down + 15, label, "start", "corrupted" if marked else "device"))
        parts += _cells(cells[-MAX_CELLS_ACROSS:], across, down, cell, row)
    return Markup("").join(parts) + _END


def class_bars(shards: dict[str, Sequence[int]], devices: Sequence[str], class_names: Sequence[str]) -> Markup:
    """Examples per class of every device as stacked bars, widths to one scale. Empty where nobody has any."""
    rows = [(device, [max(0, int(count)) for count in shards[device]]) for device in devices if device in shards]
    most = max((sum(counts) for _, counts in rows), default=0)
    if most == 0:
        return Markup("")
    width, left, right, row = 1040, 158, 60, 24
    parts = [_svg(width, row * len(rows) + 4, "Stacked bars: how many examples of each class every device holds.")]
    for line, (device, counts) in enumerate(rows):
        across, down = float(left), line * row + 2
        label = _format("<title>{}</title>{}", printable(device), _shortened(device, 18))
        parts.append(_text(4, down + 15, label, "start", "device"))
        for index, count in enumerate(counts):
            wide = count / most * (width - left - right)
            name = class_name(class_names, index)
            parts.append(_segment(across, down, wide, row - 4, index, f"{name}: {count}", name))
            across += wide
        parts.append(_text(across + 6, down + 15, str(sum(counts)), "start", "tick"))
    return Markup("").join(parts) + _END


def class_swatch(index: int) -> Markup:
    colour = CLASS_COLOURS[index % len(CLASS_COLOURS)]
    box = _format('<rect x="0.5" y="0.5" width="13" height="13" fill="{}" stroke="#555"/>', colour)
    return Markup('<svg class="swatch" width="14" height="14" aria-hidden="true">') + box + _END


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
    return Markup("data:image/png;base64,") + base64.b64encode(_png(grey.repeat(times, 0).repeat(times, 1))).decode()


def feature_bars(inversion: InversionRecord) -> Markup:
    """For tables: every feature's true value (bar) against the recovered one (line and dot), a column per attempt."""
    truth = inversion.truth.astype(np.float64).reshape(-1)[:MAX_FEATURES]
    attempts = inversion.reconstructions
    low, high = _shown_range(inversion, truth)
    left, row, top = 190, 16, 40
    column = (1040 - left) / max(1, len(attempts))
    parts = [_svg(1040, top + row * truth.size + 6, "True and recovered value of every feature, a column per attempt.")]

    def place(value: float, start: float) -> float:
        clipped = min(max(value, low), high) if math.isfinite(value) else (low + high) / 2
        return start + (clipped - low) / (high - low) * (column - 24)

    for line in range(truth.size):
        name = inversion.feature_names[line] if line < len(inversion.feature_names) else f"feature {line}"
        label = _format("<title>{}</title>{}", printable(name), _shortened(name, 26))
        parts.append(_text(left - 10, top + line * row + 12, label, "end", "small"))
    for index, attempt in enumerate(attempts):
        start = left + index * column + 12
        words = attempt.title.split(", ", 1)
        for line, words_of_line in enumerate(words):
            parts.append(_text(start, 14 + 14 * line, _shortened(words_of_line, 26), "start", "small"))
        recovered = attempt.image.astype(np.float64).reshape(-1)[:MAX_FEATURES]
        zero = place(0.0, start)
        parts.append(_line(zero, top, zero, top + row * truth.size, "axisline"))
        for line, (true, found) in enumerate(zip(truth, recovered)):
            down, tip, dot = top + line * row + 8, place(float(true), start), place(float(found), start)
            bar = '<rect class="truth" x="{}" y="{}" width="{}" height="9"/>'
            parts.append(_format(bar, _number(min(zero, tip)), _number(down - 4.5), _number(max(1.0, abs(tip - zero)))))
            parts.append(_line(tip, down, dot, down, "miss"))
            parts.append(_format('<circle class="found" cx="{}" cy="{}" r="3"/>', _number(dot), _number(down)))
    return Markup("").join(parts) + _END


_END = Markup("</svg>")


def _format(template: str, *values: object) -> Markup:
    # the templates are literals of this file; Markup.format escapes every value
    return Markup(template).format(*values)  # noqa: S704


def _svg(width: float, height: float, spoken: str, kind: str = "plot") -> Markup:
    opening = '<svg class="{}" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">'
    size = _number(width), _number(height)
    return _format(opening, kind, spoken, *size, *size)


def _text(
    across: float, down: float, content: str | Markup, anchor: str, kind: str = "tick", colour: str = ""
) -> Markup:
    fill = _format(' style="fill:{}"', colour) if colour else Markup("")
    template = '<text class="{}" x="{}" y="{}" text-anchor="{}"{}>{}</text>'
    return _format(template, kind, _number(across), _number(down), anchor, fill, content)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    ends = (_number(value) for value in (x1, y1, x2, y2))
    return _format('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', kind, *ends)


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _stroke(index: int) -> Markup:
    colour, dash = LINE_COLOURS[index % len(LINE_COLOURS)], DASHES[index % len(DASHES)]
    return _format('fill="none" stroke="{}" stroke-width="2.4" stroke-dasharray="{}"', colour, dash or "none")


def _gridline(left: float, right: float, down: float, level: float) -> Markup:
    label = _text(left - 8, down + 4, percent(level, 0), "end")
    return _line(left, down, right, down, "gridline") + label


def _levels(floor: float) -> list[float]:
    step = 0.1 if floor >= 0.45 else 0.2
    return [level for level in np.round(np.arange(1.0, floor - 1e-9, -step), 3).tolist() if level >= floor - 1e-9]


def _ticks(first: int, last: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if (last - first) / step <= 20)
    return [number for number in range(first, last + 1) if number % step == 0 or number == first]


def _curve(index: int, rounds: Sequence[RoundRecord], place: Any) -> Markup:
    path, drawing, dots = "", False, Markup("")
    colour = LINE_COLOURS[index % len(LINE_COLOURS)]
    for finished in rounds:
        if not math.isfinite(finished.accuracy):
            drawing = False
            continue
        across, down = (_number(value) for value in place(finished.number, finished.accuracy))
        path += f"{'L' if drawing else 'M'}{across} {down}"
        drawing = True
        if len(rounds) <= 60:
            hollow = finished.outcome == "abandoned"
            dot = '<circle cx="{}" cy="{}" r="3" fill="{}" stroke="{}" stroke-width="1.5"/>'
            dots += _format(dot, across, down, "#fff" if hollow else colour, colour)
    return _format('<path d="{}" {}/>', path, _stroke(index)) + dots


def _spread(labels: list[tuple[float, int, str]], least: float) -> list[tuple[float, int, str]]:
    """Labels moved down just enough that none covers another."""
    placed: list[tuple[float, int, str]] = []
    for height, index, label in sorted(labels):
        floor = placed[-1][0] + least if placed else height
        placed.append((max(height, floor), index, label))
    return placed


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
        boxes[status] = boxes.get(status, "") + f"M{_number(x)} {_number(y)}h{_number(w)}v{_number(h)}h-{_number(w)}z"
        marks[status] = marks.get(status, "") + _mark(status, x + w / 2, y + h / 2, min(4.0, w / 2 - 0.5))
    drawn = [_format('<path fill="{}" d="{}"/>', STATUS_COLOURS[status], path) for status, path in boxes.items()]
    if cell >= 5:
        drawn += [_format('<path class="{}" d="{}"/>', status, path) for status, path in marks.items()]
    return drawn


def _mark(status: str, x: float, y: float, reach: float) -> str:
    n = _number
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
    return opening + Markup("").join(_cells([status], 0, 0, 20, 20)) + _END


def _segment(across: float, down: float, wide: float, high: float, index: int, spoken: str, name: str) -> Markup:
    colour = CLASS_COLOURS[index % len(CLASS_COLOURS)]
    box = '<g><title>{}</title><rect class="segment" x="{}" y="{}" width="{}" height="{}" fill="{}"/>{}</g>'
    fits = len(name) * 7 + 6 <= wide
    label = _text(across + wide / 2, down + high - 5, name, "middle", "inside") if fits else Markup("")
    return _format(box, spoken, _number(across), _number(down), _number(wide), _number(high), colour, label)


def _shortened(text: str, letters: int) -> str:
    shown = printable(text)
    return shown if len(shown) <= letters else shown[: letters - 1] + "…"


def _shown_range(inversion: InversionRecord, truth: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The part of the input range that holds the true values and most recovered ones; wide ranges would hide them."""
    low, high = inversion.input_range
    reach = 1.6 * float(np.max(np.abs(np.nan_to_num(truth)))) if truth.size else 1.0
    shown = max(low, -reach), min(high, reach)
    return shown if shown[0] < shown[1] else (low, high)


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """An 8-bit PNG of (H, W, 1) grey or (H, W, 3) colour. Source: ISO/IEC 15948 (PNG), sections 5 and 9."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    rows = np.hstack([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)])  # filter type 0 before each row
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
