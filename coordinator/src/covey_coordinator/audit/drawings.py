"""The drawings of an audit's report, as inline SVG: what leaks and what is left of accuracy, over one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from covey_coordinator.report import svg
from covey_coordinator.report.summary import percent
from covey_coordinator.simulation.report.frame import BOTTOM, Frame

SIZE = (508.0, 250.0)
SQUARE = (508.0, 330.0)
MARGIN = 34.0


@dataclass(frozen=True)
class Line:
    """values: one per value of the setting, None where nothing was measured. number: of its colour and dashes."""

    number: int
    name: str
    values: Sequence[float | None]


def over_setting(setting: str, at: Sequence[float], lines: Sequence[Line], *, shares: bool) -> Markup:
    """Lines over the setting's values, which stand at equal distances. shares: in percent, else in dB."""
    known = [value for line in lines for value in line.values if value is not None]
    if not known or len(at) < 2:
        return Markup("")
    limits = (0.0, 1.0) if shares else (min(0.0, *known), max(*known, 10.0) * 1.05)
    frame = Frame(*SIZE, (0.0, float(len(at) - 1)), limits, shares=shares, right=MARGIN)
    unit = "share" if shares else "dB"
    spoken = "; ".join(f"{line.name}: {_told(line, at, shares)}" for line in lines)
    parts = [svg.opening(*SIZE, f"In {unit} over {setting}. {spoken}"), frame.drawn(setting, ())]
    for place, value in enumerate(at):
        across, _ = frame.place(place, limits[0])
        parts.append(svg.text(across, SIZE[1] - BOTTOM + 17, f"{value:g}", "middle"))
    for line in lines:
        parts += _drawn(frame, line)
    return Markup("").join(parts) + svg.END


def _drawn(frame: Frame, line: Line) -> list[Markup]:
    places = [frame.place(place, value) for place, value in enumerate(line.values) if value is not None]
    path = "".join(f"{'M' if not n else 'L'}{svg.number(x)} {svg.number(y)}" for n, (x, y) in enumerate(places))
    return [svg.formatted('<path d="{}" {}/>', path, svg.stroke(line.number)), *_dots(places, line.number)]


def _dots(places: Sequence[tuple[float, float]], number: int) -> list[Markup]:
    colour = svg.LINE_COLOURS[number % len(svg.LINE_COLOURS)]
    dot = '<circle cx="{}" cy="{}" r="3.4" fill="{}"/>'
    return [svg.formatted(dot, svg.number(x), svg.number(y), colour) for x, y in places]


def _told(line: Line, at: Sequence[float], shares: bool) -> str:
    known = [(place, value) for place, value in zip(at, line.values) if value is not None]
    return ", ".join(f"{percent(value) if shares else f'{value:.1f} dB'} at {place:g}" for place, value in known)


def trade_off(
    groups: Sequence[tuple[int, str, Sequence[tuple[float, float, float]]]], guess_db: float | None
) -> Markup:
    """Accuracy to the right, leakage up: the lower right corner is where one wants to be.

    groups: (number of the colour, setting, [(its value, accuracy, PSNR in dB)]). guess_db: without any update.
    """
    points = [point for _, _, group in groups for point in group]
    if len(points) < 2:
        return Markup("")
    accuracies, leaks = [one[1] for one in points], [one[2] for one in points]
    low, high = max(0.0, min(accuracies) - 0.05), min(1.0, max(accuracies) + 0.05)
    frame = Frame(*SQUARE, (low, high), (min(0.0, *leaks), max(*leaks, 10.0) * 1.08), shares=False, x_shares=True)
    spoken = "; ".join(
        f"{name} {at:g}: accuracy {percent(a)}, {leak:.1f} dB" for _, name, g in groups for at, a, leak in g
    )
    ticks = [low + (high - low) * step / 4 for step in range(5)]
    parts = [svg.opening(*SQUARE, f"Leakage over accuracy. {spoken}"), frame.drawn("accuracy of the model", ticks)]
    if guess_db is not None:
        (left, down), (right, _) = frame.place(low, guess_db), frame.place(high, guess_db)
        parts.append(svg.line(left, down, right, down, "axisline"))
        parts.append(svg.text(right - 4, down - 5, "a guess without any update", "end", "tick"))
    for number, _, group in groups:
        places = [frame.place(accuracy, leak) for _, accuracy, leak in group]
        parts += _dots(places, number)
        colour = svg.LINE_COLOURS[number % len(svg.LINE_COLOURS)]
        for (at, _, _), (x, y) in zip(group, places):
            parts.append(svg.text(x + 6, y - 5, f"{at:g}", "start", "end", colour))
    return Markup("").join(parts) + svg.END
