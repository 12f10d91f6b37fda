"""What the attacks by hostile parameters share: the layer that sees the input, and candidates that may be inputs.

The gradient of one ReLU unit (g_W, g_b) is a sum over the examples that switch it on; g_W / g_b is a mixture of these
examples, and is the example itself where there is only one. A hostile server chooses parameters for which many units,
or differences of units, see one example alone. Pure NumPy; no model is run, and any multiple of a gradient will do, so
an update is read as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Finding, Seen
from covey_coordinator.inversion.dense import DenseLayer, dense_layers
from covey_protocol.bundle import TensorSpec
from covey_protocol.errors import UsageError
from covey_protocol.parameters import ParameterSpec

Matrix = npt.NDArray[np.float64]

OUTSIDE = 0.02  # of the input's range: rounding moves a recovered number so far beyond it, a mixture moves it further
TWICE = 1e-3  # of the range, root mean square: two candidates closer than this are one example
SILENT = 1e-12  # of the largest bias gradient: a unit below it has seen no example


def layer_on_input(specs: Sequence[ParameterSpec], numbers: int) -> tuple[DenseLayer, DenseLayer | None]:
    """The dense layer on an input of so many numbers, and the one that its outputs go to (None where none follows).

    UsageError where the model has none: then a server must change the architecture first.
    """
    layers = dense_layers(specs)
    for place, layer in enumerate(layers):
        if layer.kernel.shape[0] == numbers:
            later = layers[place + 1] if place + 1 < len(layers) else None
            fits = later is not None and later.kernel.shape[0] == layer.kernel.shape[1]
            return layer, later if fits else None
    raise UsageError(f"the model has no dense layer on its {numbers} inputs", "put one in front (imprint.with_imprint)")


def read_units(kernel: npt.NDArray[Any], bias: npt.NDArray[Any]) -> tuple[Matrix, Matrix]:
    """What each unit says was its input: (candidates (m, inputs), their strength |g_b| (m,)), of units that saw any.

    kernel: (inputs, units), bias: (units,), of a gradient or an update.
    """
    strength = np.abs(bias).astype(np.float64)
    heard = strength > SILENT * strength.max(initial=0.0)
    return (kernel[:, heard].astype(np.float64) / bias[heard].astype(np.float64)).T, strength[heard]


def plausible(candidates: Matrix, strength: Matrix, spec: TensorSpec, most: int) -> Matrix:
    """At most `most` candidates that lie in the input's range, each once. Where there are more, corners of what the
    candidates span: a mixture with positive parts lies between the examples that are in it."""
    low, high = _range(candidates, spec)
    width = max(high - low, 1e-300)
    inside = np.all((candidates >= low - OUTSIDE * width) & (candidates <= high + OUTSIDE * width), axis=1)
    candidates, strength = candidates[inside], strength[inside]
    order = np.argsort(-strength, kind="stable")
    kept = _distinct(candidates[order], TWICE * width)
    return np.clip(kept if len(kept) <= most else kept[_corners(kept, most)], low, high)


def _corners(points: Matrix, most: int) -> list[int]:
    """Places of at most `most` points (m, n) of which the others are mixtures, as far as there are any such.

    Successive projection (Araujo et al. 2001): the point furthest from the span of those taken. After as many as there
    are dimensions nothing is left, and the first of the rest follow.
    """
    rest = np.hstack([points, np.ones((len(points), 1))])
    squares = np.einsum("ij,ij->i", rest, rest)
    least = 1e-9 * squares.max()
    taken: list[int] = []
    while len(taken) < most and squares.max() > least:
        taken.append(int(np.argmax(squares)))
        axis = rest[taken[-1]] / np.linalg.norm(rest[taken[-1]])
        rest = rest - np.outer(rest @ axis, axis)
        squares = np.einsum("ij,ij->i", rest, rest)
    return [*taken, *(place for place in range(len(points)) if place not in set(taken))][:most]


def _distinct(candidates: Matrix, distance: float) -> Matrix:
    """The first of every group of candidates that are the same example."""
    kept: list[int] = []
    squares = np.einsum("ij,ij->i", candidates, candidates)
    least = distance**2 * candidates.shape[1]
    for number, row in enumerate(candidates):
        if kept:
            apart = squares[kept] + squares[number] - 2 * candidates[kept] @ row
            if apart.min() <= max(least, 1e-9 * squares[number]):
                continue
        kept.append(number)
    return candidates[kept]


def _range(candidates: Matrix, spec: TensorSpec) -> tuple[float, float]:
    if spec.minimum is not None and spec.maximum is not None:
        return float(spec.minimum), float(spec.maximum)
    if not candidates.size:
        return 0.0, 1.0
    return float(candidates.min()), float(candidates.max())  # nothing is known: everything is plausible


def found(
    attack: str, sees: str, model: AttackedModel, seen: Seen, inputs: Matrix, started: float, notes: Sequence[str] = ()
) -> Finding:
    """started: time.monotonic() at the attack's start."""
    shaped = inputs.reshape(-1, *model.input.shape).astype(np.float32)
    seconds = time.monotonic() - started
    return Finding(attack, sees, shaped if len(shaped) else None, seconds=seconds, notes=tuple(notes))


def recovered_share(
    truth: npt.NDArray[Any], recovered: npt.NDArray[Any] | None, input_range: tuple[float, float], least_db: float
) -> float:
    """Which share of the examples (n, ...) has a recovered input (m, ...) with a PSNR of least_db or more."""
    if recovered is None or not len(recovered):
        return 0.0
    best = nearest_errors(truth, recovered)
    peak = (input_range[1] - input_range[0]) ** 2
    return float(np.mean(best <= peak * 10 ** (-least_db / 10)))


def nearest_errors(truth: npt.NDArray[Any], recovered: npt.NDArray[Any]) -> Matrix:
    """(n,): the mean squared error of each example to the recovered input that is nearest to it."""
    flat = recovered.reshape(len(recovered), -1).astype(np.float64)
    rows = truth.reshape(len(truth), -1).astype(np.float64)
    return np.array([np.min(np.mean((flat - row) ** 2, axis=1)) for row in rows])
