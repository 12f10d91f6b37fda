"""The figures of reproductions as PNGs. Colours are Okabe and Ito's; lines differ in dashes too."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.reproduce.contract import Case, Measured

STYLES = (
    ("#000000", "-"),
    ("#0072b2", "--"),
    ("#d55e00", "-."),
    ("#009e73", ":"),
    ("#aa4499", (0, (5, 1))),
    ("#b8860b", (0, (3, 1, 1, 1))),
    ("#56a0d8", (0, (1, 1))),
    ("#666666", (0, (8, 3))),
)
PANEL_INCHES, DPI = (5.0, 3.6), 90


class Panel(NamedTuple):
    """Curves of these cases on common axes. names: in the legend, by case; the label itself where there is none."""

    title: str
    labels: Sequence[str]


def png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def new_figure(columns: int, lines: int = 1, size: tuple[float, float] = PANEL_INCHES) -> tuple[Any, Any]:
    """(figure, array (lines, columns) of axes)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = (size[0] * columns, size[1] * lines)
    figure = Figure(figsize=shape, dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False)


def plain(axes: Any) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def curves(
    panels: Sequence[Panel],
    measured: Measured,
    across: str = "round",
    up: str = "accuracy on the test set",
    shown: Callable[[Any], Any] = lambda values: values,
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> bytes:
    """A panel beside the other; the mean over seeds with a band from the least to the most. Each from "curve"."""
    panels = [panel for panel in panels if any(label in measured.outcomes for label in panel.labels)]
    figure, axes = new_figure(len(panels))
    for panel, one in zip(panels, axes[0]):
        for number, label in enumerate(label for label in panel.labels if label in measured.outcomes):
            _draw(one, label, measured.outcomes[label], number, shown)
        one.set_title(panel.title, fontsize=10, loc="left", weight="bold")
        one.set_xlabel(across, fontsize=9)
        one.set_ylabel(up, fontsize=9)
        one.tick_params(labelsize=8)
        if logarithmic:
            one.set_yscale("log")
        elif limits is not None:
            one.set_ylim(*limits)
        one.legend(fontsize=7.5, frameon=False)
        plain(one)
    return png(figure)


def _draw(axes: Any, label: str, outcomes: Sequence[dict[str, Any]], number: int, shown: Any) -> None:
    colour, dashes = STYLES[number % len(STYLES)]
    length = min(len(outcome["curve"]) for outcome in outcomes)  # a run may stop early, at its goal
    places = [place for place, _ in outcomes[0]["curve"][:length]]
    values = shown(np.array([[value for _, value in outcome["curve"][:length]] for outcome in outcomes], float))
    axes.plot(places, values.mean(0), color=colour, linestyle=dashes, linewidth=1.6, label=label)
    if len(outcomes) > 1:
        axes.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def bars(
    cases: Sequence[Case], measured: Measured, up: str, scale: float = 100.0, highest: float | None = None
) -> bytes:
    """Published beside measured, with a whisker from the least to the most over seeds."""
    figure, axes = new_figure(1, size=(max(6.0, 0.75 * len(cases) + 1.5), 4.2))
    one = axes[0][0]
    places = np.arange(len(cases))
    published = [np.nan if case.published is None else scale * case.published for case in cases]
    means = np.array([scale * measured.mean(case.label) for case in cases])
    spans = np.array([[scale * value for value in measured.range(case.label)] for case in cases]).T
    one.bar(places - 0.2, published, 0.38, color="#bbbbbb", label="published")
    whiskers = np.abs(np.stack([means - spans[0], spans[1] - means]))
    one.bar(places + 0.2, means, 0.38, color="#0072b2", label="measured", yerr=whiskers, capsize=2)
    one.set_xticks(places, [case.label for case in cases], rotation=35, ha="right", fontsize=8)
    one.set_ylabel(up, fontsize=9)
    if highest is not None:
        one.set_ylim(0, highest)
    one.legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    plain(one)
    return png(figure)
