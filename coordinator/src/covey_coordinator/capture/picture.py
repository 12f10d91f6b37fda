"""The true examples of a device beside what an attack made of its update, as a PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.grading import MISSING, Grade
from covey_coordinator.report.plots import is_picture

SHOWN = 8


def beside(
    inputs: npt.NDArray[Any],
    input_range: tuple[float, float],
    title: str,
    truth: npt.NDArray[Any] | None = None,
    graded: Grade | None = None,
) -> bytes:
    """PNG of the examples that came out best, the truth above, or of the first found ones where nothing is known.

    inputs: (m, *shape), truth: (n, *shape). Inputs that are no pictures are drawn as curves over their numbers.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    pairs = _pairs(inputs, truth, graded)
    rows = 1 if truth is None else 2
    figure, axes = plt.subplots(rows, len(pairs), figsize=(1.4 * len(pairs) + 0.4, 1.5 * rows + 0.6), squeeze=False)
    for column, (true, found, told) in enumerate(pairs):
        for row, image in enumerate([found] if true is None else [true, found]):
            _draw(axes[row, column], image, input_range)
        axes[rows - 1, column].set_xlabel(told, fontsize=8)
    if truth is not None:
        for row, word in enumerate(("true", "found")):
            axes[row, 0].set_ylabel(word)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _pairs(inputs: Any, truth: Any, graded: Grade | None) -> list[tuple[Any, Any, str]]:
    if truth is None or graded is None:
        return [(None, one, "") for one in inputs[:SHOWN]]
    there = [place for place in np.argsort(graded.mse) if graded.matched[place] != MISSING][:SHOWN]
    return [(truth[place], inputs[graded.matched[place]], f"{graded.psnr_db[place]:.1f} dB") for place in there]


def _draw(axis: Any, image: Any, input_range: tuple[float, float]) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    if is_picture(image.shape):
        low, high = input_range
        shown = np.clip((image.squeeze() - low) / (high - low), 0.0, 1.0)
        axis.imshow(shown, cmap="gray", vmin=0.0, vmax=1.0)
    else:
        axis.plot(np.ravel(image), linewidth=0.8)
        axis.set_ylim(*input_range)
