"""Analytic recovery: what a dense layer's gradient says about its input and the label. Pure NumPy, no search.

The attacker sees the gradient of one example (an update of one SGD step divided by minus the learning rate,
or any multiple of it) and knows the architecture, so knows which numbers belong to which layer.

A dense layer computes z = W' h + b from its input h (n,), with W (n, units). For one example the chain rule
gives g_b = dL/dz and g_W = h g_b': every column of g_W is the input times a number that the bias gradient
states openly. That is one equation per unit for the same h, and least squares over the units,

    min_h |g_W - h g_b'|_F^2   gives   h = g_W g_b / |g_b|^2 = sum_c g_b[c] g_W[:, c] / sum_c g_b[c]^2,

exact where there is no noise. The single-unit form h = g_W[:, c] / g_b[c] is Phong et al. 2017's; weighting
all units avoids division by a small g_b[c]. A common factor cancels, so scaling the update (clipping) changes
nothing.

With noise of one size on every number g_b is as wrong as g_W, and the estimate of most likelihood is the best
rank-one fit of the stacked matrix G = [g_W; g_b'], which without noise is [h; 1] g_b'. The least-squares
solution above is one half-step of the power iteration for that fit started at g_b; `recover_input` goes on
with the iteration as often as asked.

For a batch of several examples h is a mixture of their inputs; nothing here pulls it apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import UsageError
from covey_protocol.parameters import ParameterSpec, offsets

Vector = npt.NDArray[np.float64]
POWER_STEPS = 50  # noise below the signal converges in a handful; above it there is nothing to converge to


@dataclass(frozen=True)
class DenseLayer:
    """A kernel (inputs, units) directly followed by its bias (units,) in the parameter sequence."""

    kernel: ParameterSpec
    bias: ParameterSpec
    kernel_place: slice
    bias_place: slice

    def gradients(self, flat: npt.NDArray[Any]) -> tuple[Vector, Vector]:
        """(kernel gradient (inputs, units), bias gradient (units,)) out of a flat gradient (d,), as float64."""
        kernel = flat[self.kernel_place].astype(np.float64).reshape(self.kernel.shape)
        return kernel, flat[self.bias_place].astype(np.float64)


@dataclass(frozen=True)
class DenseInput:
    """A recovered layer input. values: (inputs,). signal: |g_b|^2, the strength the estimate rests on."""

    values: Vector
    bias_gradient: Vector  # (units,), refined together with the values
    signal: float

    def variance_factor(self) -> float:
        """The mean variance of one recovered value for unit noise variance on every gradient number.

        To first order the error is (E g_b - h (e.g_b)) / |g_b|^2 for noise E on the kernel and e on the bias,
        hence the covariance (I + h h') / |g_b|^2 and the mean variance (1 + |h|^2 / n) / |g_b|^2.
        """
        return float((1.0 + np.mean(self.values**2)) / self.signal)


def dense_layers(specs: Sequence[ParameterSpec]) -> list[DenseLayer]:
    """Every trainable rank-2 kernel directly followed by a bias of its width, in the order of the parameters."""
    places = offsets(specs)
    return [
        DenseLayer(kernel, bias, places[kernel.name], places[bias.name])
        for kernel, bias in zip(specs, specs[1:])
        if kernel.trainable and bias.trainable and len(kernel.shape) == 2 and bias.shape == kernel.shape[1:]
    ]


def recover_input(
    kernel_gradient: npt.NDArray[Any], bias_gradient: npt.NDArray[Any], power_steps: int = 0
) -> DenseInput | None:
    """The input of a dense layer from its gradients of one example.

    kernel_gradient: (inputs, units); bias_gradient: (units,); both finite and scaled by the same unknown
    positive factor. power_steps: 0 is the least-squares form of this module's docstring; more move towards
    the best rank-one fit, which is better under noise and the same without.
    Returns None if the layer says nothing: every bias gradient is 0, or the fit sees no input behind it.
    """
    stacked = np.vstack([kernel_gradient, bias_gradient[None, :]]).astype(np.float64)
    units = np.asarray(bias_gradient, np.float64)
    if not np.all(np.isfinite(stacked)):
        raise UsageError("the gradient to invert holds NaN or infinity", "only finite updates reach this check")
    scale = np.linalg.norm(units)
    if scale == 0:
        return None
    direction = units / scale
    for _ in range(power_steps):
        following = stacked.T @ (stacked @ direction)
        direction = following / np.linalg.norm(following)
    image = stacked @ direction  # proportional to [h; 1]
    if image[-1] == 0:
        return None
    values = image[:-1] / image[-1]
    # with [h; 1] fixed, the bias gradient of least squared error
    refined = stacked.T @ np.append(values, 1.0) / (1.0 + values @ values)
    return DenseInput(values, refined if power_steps else units, float(refined @ refined))


def read_label(bias_gradient: npt.NDArray[Any]) -> int:
    """The label of one example, from the last dense layer's bias gradient (units,).

    Softmax with cross-entropy: the gradient is p - onehot(label), whose only negative entry is the label's;
    under noise the most negative one is taken. One sigmoid unit with binary cross-entropy: p - label,
    negative means 1.
    Source: iDLG, Zhao et al. 2020 (arXiv:2001.02610), there from the signs of the kernel's gradient; with a
    bias its own entries say the same. Wrong for losses whose gradient is not p - label (for example a squared
    error).
    """
    if bias_gradient.size == 1:
        return int(bias_gradient.reshape(-1)[0] < 0)
    return int(np.argmin(bias_gradient))


def label_proportions(
    bias_update: npt.NDArray[Any],
    learning_rate: float,
    steps: int,
    mean_prediction: npt.NDArray[Any] | None = None,
) -> Vector:
    """An *estimate* of the share of every class in an ordinary update of several steps and examples.

    bias_update: (classes,), trained minus received, of the last layer with softmax cross-entropy and plain
    SGD of `steps` steps: -bias_update / (learning_rate * steps) is the mean of p - onehot(label) over steps
    and examples, so the mean prediction p minus it is the mean of the labels. mean_prediction: (classes,),
    what the attacker takes for p; None means uniform, which fits a model that knows little yet. The
    predictions drift during the steps and differ from the guess, so negative shares are set to 0 and the rest
    is scaled to sum 1. Returns (classes,) float64.
    Source: the batch form of iDLG's argument, compare LLG (Wainakh et al. 2022), without its calibration
    runs.
    """
    if steps < 1 or not learning_rate > 0:
        raise UsageError(
            f"{steps} steps at learning rate {learning_rate}", "give at least one step and a positive rate"
        )
    classes = bias_update.size
    prediction = np.full(classes, 1.0 / classes) if mean_prediction is None else np.asarray(mean_prediction, np.float64)
    shares = np.maximum(prediction + bias_update.astype(np.float64) / (learning_rate * steps), 0.0)
    total = float(shares.sum())
    return shares / total if total > 0 else prediction
