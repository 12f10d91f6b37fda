"""The heat map as a PNG: rules down, attacks across, one panel per share of corrupted devices, and a summary.

Colours: viridis for accuracy, Okabe and Ito's for the summary's dots, which also differ in shape. Every number is
written in its cell, so nothing rests on colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from covey_coordinator.grid.settings import Plan
from covey_coordinator.grid.summary import Panel

CELL_INCHES = (0.46, 0.3)
LEAST_LABEL_INCHES, HEAD_INCHES, FOOT_INCHES, GAP_INCHES = 1.75, 1.3, 0.8, 0.35
LETTER_INCHES = 0.078  # of a rule's name, on average
TITLE_INCHES = 0.75
SIDE_GAP = 0.45  # of a cell, between the attacks and the columns of worst cases
DOTS_INCHES = (5.2, 9.0)  # least and most
DPI = 100
DOT_STYLES = (
    ("#000000", "o"),
    ("#0072b2", "s"),
    ("#009e73", "^"),
    ("#e69f00", "D"),
    ("#d55e00", "v"),
    ("#aa4499", "P"),
    ("#56a0d8", "X"),
    ("#b8860b", "*"),
)
REFUSED = "#e4e4e4"
DARK_BELOW = 0.55  # of the colour scale: numbers are white there


def heat_map(plan: Plan, panels: Sequence[Panel]) -> bytes:
    """The PNG file's bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = _Layout(plan, panels)
    figure = Figure(figsize=(layout.width, layout.height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _title(figure, plan, layout)
    for panel, box in zip(panels, layout.boxes):
        _draw_panel(figure.add_axes(layout.fraction(box)), plan, panel)
    _draw_dots(figure.add_axes(layout.fraction(layout.dots)), plan, panels)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


class _Layout:
    """Where things lie, in inches from the lower left: (left, bottom, width, height) of each axes."""

    def __init__(self, plan: Plan, panels: Sequence[Panel]) -> None:
        high = CELL_INCHES[1] * len(plan.rules)
        label = max(LEAST_LABEL_INCHES, LETTER_INCHES * (max(map(len, plan.rules)) + 2))
        sizes = [CELL_INCHES[0] * _columns(panel) for panel in panels]
        first_is_narrow = len(panels[0].attacks) == 1 and len(panels) > 1
        # the panel without corrupted devices and the summary share the first line; two wide panels each of the others
        lines = [[0], *_pairs(list(range(1, len(panels))))] if first_is_narrow else [[], *_pairs([*range(len(panels))])]
        widths = [sum(label + sizes[index] + GAP_INCHES for index in line) for line in lines]
        room = max(widths) - widths[0] - label - GAP_INCHES
        dots_width = min(max(room, DOTS_INCHES[0]), DOTS_INCHES[1])
        widths[0] += label + dots_width + GAP_INCHES
        self.width = max(*widths, 9.0) + 0.1
        self.height = TITLE_INCHES + len(lines) * (HEAD_INCHES + high) + FOOT_INCHES
        self.boxes: list[tuple[float, float, float, float]] = []
        bottom = self.height - TITLE_INCHES
        for number, line in enumerate(lines):
            bottom -= HEAD_INCHES + high
            left = 0.0
            for index in line:
                self.boxes.append((left + label, bottom, sizes[index], high))
                left += label + sizes[index] + GAP_INCHES
            if number == 0:
                self.dots = (left + label, bottom, dots_width, high)

    def fraction(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        return box[0] / self.width, box[1] / self.height, box[2] / self.width, box[3] / self.height


def _pairs(numbers: list[int]) -> list[list[int]]:
    return [numbers[start : start + 2] for start in range(0, len(numbers), 2)]


def _columns(panel: Panel) -> float:
    """Width of a panel in cells: the attacks, a gap, and the worst cases."""
    extra = (1 if len(panel.attacks) > 1 else 0) + (1 if _has_backdoor(panel) else 0)
    return len(panel.attacks) + (SIDE_GAP + extra if extra else 0)


def _has_backdoor(panel: Panel) -> bool:
    return not bool(np.isnan(panel.backdoor).all())


def _title(figure: Any, plan: Plan, layout: _Layout) -> None:
    settings = plan.settings
    title = f"Rules against attacks: test accuracy on {settings.data} after {settings.rounds} rounds"
    momentum = f", momentum {settings.momentum:g}" if settings.momentum else ""
    seeds = f"mean of {settings.seeds} seeds" if settings.seeds > 1 else "one seed"
    detail = (
        f"{settings.model}, {settings.devices} devices (Dirichlet, alpha {settings.alpha:g}), {settings.steps} local "
        f"steps of batch {settings.batch} at rate {settings.learning_rate:g}{momentum}; {seeds}"
    )
    figure.text(0.15 / layout.width, 1 - 0.3 / layout.height, title, fontsize=13, weight="bold", va="center")
    figure.text(0.15 / layout.width, 1 - 0.57 / layout.height, detail, fontsize=9.5, color="#444444", va="center")
    notes = (
        "Hatched: the rule refuses so many corrupted devices (its precondition).  *: some rounds were refused, and the "
        "model stood still in these.\nworst: least accuracy over all attacks.  backdoor: how often the trigger turns "
        "an example into the attacker's class (low is good)."
    )
    figure.text(0.15 / layout.width, 0.3 / layout.height, notes, fontsize=8.5, color="#444444", va="center")


def _draw_panel(axes: Any, plan: Plan, panel: Panel) -> None:
    rows = len(plan.rules)
    names = list(panel.attacks)
    places = list(range(len(names)))
    columns = [(panel.accuracy[:, column], panel.refused[:, column], False) for column in places]
    marked = [panel.interrupted[:, column] for column in places]
    no_marks = np.zeros(rows, bool)
    everywhere = panel.refused.all(axis=1)
    if len(names) > 1:
        columns.append((panel.worst(), everywhere, False))
        names.append("worst")
    if _has_backdoor(panel):
        columns.append((panel.worst_backdoor(), everywhere, True))
        names.append("backdoor")
    lefts = [place + (SIDE_GAP if place >= len(panel.attacks) else 0.0) for place in range(len(names))]
    for column, (values, refused, is_backdoor) in enumerate(columns):
        marks = marked[column] if column < len(marked) else no_marks
        for row in range(rows):
            _cell(axes, lefts[column], row, values[row], bool(refused[row]), bool(marks[row]), is_backdoor)
    axes.set_xlim(0, lefts[-1] + 1)
    axes.set_ylim(rows, 0)
    axes.set_xticks([left + 0.5 for left in lefts], names, rotation=45, ha="left", rotation_mode="anchor", fontsize=8.5)
    axes.xaxis.tick_top()
    axes.set_yticks([row + 0.5 for row in range(rows)], list(plan.rules), fontsize=9)
    _plain_axes(axes)
    share = f"{panel.fraction:.0%} corrupted ({panel.num_hostile} of {plan.settings.devices})"
    axes.set_xlabel(share, fontsize=10, weight="bold", loc="left")


def _cell(axes: Any, left: float, row: int, value: float, refused: bool, marked: bool, is_backdoor: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    box = ((left + 0.02, row + 0.03), 0.96, 0.94)
    if np.isnan(value):
        if refused:
            axes.add_patch(Rectangle(*box, linewidth=0, facecolor=REFUSED, hatch="//////", edgecolor="#a8a8a8"))
        return
    shade = 1 - value if is_backdoor else value
    axes.add_patch(Rectangle(*box, linewidth=0, facecolor=colormaps["viridis"](shade)))
    colour = "white" if shade < DARK_BELOW else "black"
    text = f"{100 * value:.0f}{'*' if marked else ''}"
    axes.text(left + 0.5, row + 0.53, text, ha="center", va="center", fontsize=8, color=colour)


def _draw_dots(axes: Any, plan: Plan, panels: Sequence[Panel]) -> None:
    """The summary: worst accuracy of every rule, a mark per share of corrupted devices."""
    rows = np.arange(len(plan.rules)) + 0.5
    handles = []
    for number, panel in enumerate(panels):
        colour, shape = DOT_STYLES[number % len(DOT_STYLES)]
        handles += axes.plot(
            100 * panel.worst(),
            rows,
            shape,
            color=colour,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.7,
            label=f"{panel.fraction:.0%}",
            clip_on=False,
            zorder=3,
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(len(plan.rules), 0)
    axes.set_yticks(rows, list(plan.rules), fontsize=9)
    axes.set_xticks(range(0, 101, 20), [f"{level}%" for level in range(0, 101, 20)], fontsize=8.5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.hlines(rows, 0, 100, color="#eeeeee", linewidth=0.8, zorder=1)
    _plain_axes(axes)
    axes.legend(
        handles=handles,
        title="worst attack's accuracy, by share of corrupted devices",
        title_fontproperties={"size": 10, "weight": "bold"},
        alignment="left",
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        frameon=False,
        fontsize=9,
        handletextpad=0.1,
        columnspacing=1.2,
    )


def _plain_axes(axes: Any) -> None:
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
