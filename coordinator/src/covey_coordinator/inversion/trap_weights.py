"""Trap weights: a hostile server's start of a dense layer whose units let almost every example fall through.

A ReLU unit that one example of a batch switches on, and no other does, holds that example in its gradient:
x = g_W / g_b. In an honest layer a unit is on for about half of a batch. Here half of a unit's weights are negative and
the other half are the same numbers, positive and made smaller by `scale`: on inputs that are not negative most units
are off, and those that are on differ from example to example.

Source: Boenisch et al. 2021 (arXiv:2112.02918), section 5.2 ("trap weights"), who search the scale for each data set;
so does `trapped`, on examples of the attacker's own. The same reading of an honest start is their passive attack.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.extraction import Matrix, found, layer_on_input, plausible, read_units
from covey_protocol.parameters import ParameterSpec

HALVINGS = 30  # of the interval the scale is searched in


def trapped(
    specs: Sequence[ParameterSpec],
    parameters: npt.NDArray[Any],
    auxiliary: npt.NDArray[Any],
    *,
    seed: int,
    on: float = 0.05,
    noise: float = 0.0,
) -> npt.NDArray[np.float32]:
    """The parameters (d,) with trap weights in the dense layer on the input, its biases 0; all else stays.

    auxiliary: (m, ...) examples of the attacker's own. on: the share of these that switch a unit on, on average; 1 / B
    is best for a batch of B. noise: on the positive half, so that it is no copy of the negative one; in units of the
    weights' size.
    """
    rows = auxiliary.reshape(len(auxiliary), -1).astype(np.float64)
    layer, _ = layer_on_input(specs, rows.shape[1])
    negative, positive = _halves(layer.kernel.shape, seed, noise)
    low, high = 0.0, 2.0
    for _ in range(HALVINGS):
        scale = (low + high) / 2
        share = np.mean(rows @ (negative + scale * positive) > 0)
        low, high = (scale, high) if share < on else (low, scale)
    kernel = negative + low * positive
    numbers = np.array(parameters, np.float32)
    size = np.linalg.norm(numbers[layer.kernel_place]) / np.linalg.norm(kernel)  # as long as the honest one
    numbers[layer.kernel_place] = (size * kernel).ravel()
    numbers[layer.bias_place] = 0.0
    return numbers


def _halves(shape: Sequence[int], seed: int, noise: float) -> tuple[Matrix, Matrix]:
    """The negative and the positive part of a kernel (inputs, units), each 0 where the other is not."""
    rng = np.random.default_rng(seed)
    inputs, units = shape
    negative, positive = np.zeros((inputs, units)), np.zeros((inputs, units))
    half = inputs // 2
    for unit in range(units):
        places = rng.permutation(inputs)
        drawn = np.abs(rng.standard_normal(half))
        negative[places[:half], unit] = -drawn
        positive[places[half : 2 * half], unit] = rng.permutation(drawn) + noise * rng.standard_normal(half)
    return negative, positive


@dataclass(frozen=True)
class UnitReading:
    """Reads g_W / g_b of every unit of the dense layer on the input: from trap weights, or from an honest start."""

    @property
    def name(self) -> str:
        return "trap weights"

    @property
    def sees(self) -> str:
        return "The update of one local step; more where this server chose the parameters, by data like theirs."

    def run(
        self, model: AttackedModel, seen: Seen, *, seed: int, stop: Stop | None = None, progress: Progress | None = None
    ) -> Finding:
        """Takes milliseconds and draws nothing, so seed, stop and progress are without effect."""
        started = time.monotonic()
        layer, _ = layer_on_input(model.specs, int(np.prod(model.input.shape)))
        candidates, strength = read_units(*layer.gradients(seen.update))
        inputs = plausible(candidates, strength, model.input, seen.examples)
        return found(self.name, self.sees, model, seen, inputs, started)


def alone(kernel: npt.NDArray[Any], bias: npt.NDArray[Any], x: npt.NDArray[Any]) -> float:
    """The share of these examples, one batch, that some ReLU unit sees alone. kernel (inputs, units), x (n, ...)."""
    on = x.reshape(len(x), -1) @ kernel + bias > 0
    single = on & (on.sum(0) == 1)
    return float(np.mean(single.any(1)))
