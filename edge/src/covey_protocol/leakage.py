"""What one update says about the examples behind it, read analytically: the input of a dense layer, and labels.

Pure NumPy, no search. The coordinator's inversion checks use the readings; a device, which knows the truth, holds them
against its own examples before the update leaves it (`leak_check`); a coordinator, which does not, says how much there
is to read (`readability`). docs/privacy-gate.md.

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

For a batch of several examples h is a mixture of their inputs. `candidates` pulls apart what can be pulled apart
without a search: units that one example alone has moved (a ReLU that was silent for the others) hold that example's
input, and so does the difference of two units that differ by one example, as in a layer that was made for it (Fowl et
al. 2022, arXiv:2110.13057, "Robbing the Fed").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import UsageError
from covey_protocol.parameters import ParameterSpec, offsets

Vector = npt.NDArray[np.float64]
Numbers = npt.NDArray[Any]
POWER_STEPS = 50  # noise below the signal converges in a handful; above it there is nothing to converge to
MOST_PRODUCTS = 2e9  # multiplications of one comparison: some seconds on a Raspberry Pi 3
MOST_UNITS, MOST_READ = 512, 8_000_000  # units of a layer that are read, and numbers of them: 64 MB
MOST_PSNR_DB = 200.0  # told in place of infinity; float32 ends near 140
ALIKE = 1e-3  # relative distance below which two readings are one and the same example's
UNCLIPPED = (1.0, 3.0, 10.0, 30.0, 100.0)  # by which factor clipping may have shortened what an attacker sees
CLASS_LOSSES = ("sparse_categorical_crossentropy", "categorical_crossentropy", "binary_crossentropy")


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
) -> Optional[DenseInput]:
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
    mean_prediction: Optional[npt.NDArray[Any]] = None,
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


# --- all that a layer says of a batch


def candidates(layer: DenseLayer, update: Numbers, parameters: Numbers) -> Vector:
    """(m, inputs): every input of this layer that the update may state openly; among them wrong ones.

    update, parameters: (d,). One reading is of the whole layer (`recover_input`), one of each unit alone, and one of
    each pair of units that are neighbours in the order of their biases. Of more units than `_strongest` gives, those
    are read.
    """
    kernel, bias = layer.gradients(update)
    found = []
    whole = recover_input(kernel, bias, POWER_STEPS)
    if whole is not None:
        found.append(whole.values[None, :])
    read = _strongest(kernel, bias)
    ordered = read[np.argsort(parameters[layer.bias_place][read], kind="stable")]
    found.append(_ratios(kernel[:, ordered], bias[ordered]))
    found.append(_ratios(np.diff(kernel[:, ordered], axis=1), np.diff(bias[ordered])))
    return np.concatenate(found)


def _strongest(kernel: Vector, bias: Vector) -> npt.NDArray[np.int64]:
    """The units with the largest bias gradients: all, up to MOST_UNITS and to what MOST_READ leaves of them."""
    most = min(MOST_UNITS, max(1, MOST_READ // len(kernel)))
    found: npt.NDArray[np.int64] = np.argsort(-np.abs(bias), kind="stable")[:most]
    return found


def _ratios(kernel: Vector, bias: Vector) -> Vector:
    """(m, inputs): kernel (inputs, units) by bias (units,), of the units whose bias gradient is not 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rows = (kernel / bias).T
    rows = rows[np.isfinite(rows).all(axis=1)]
    stated: Vector = rows[(np.abs(rows) < 1e30).all(axis=1)]  # squares stay finite
    return stated


class Closest(NamedTuple):
    """The reading that is closest to a true input, in units of the range. example: which true input that is."""

    psnr_db: float
    reading: Vector
    example: int


def closest(readings: Vector, truth: Numbers, span: tuple[float, float]) -> Optional[Closest]:
    """truth: (n, inputs). span: smallest and largest value that an input can have; readings are cut off there, as an
    attacker does. None where there is nothing to compare. Of many examples as many are compared as MOST_PRODUCTS bears,
    evenly spread: the result is then at most too small.
    """
    width = span[1] - span[0]
    if not len(readings) or not len(truth) or not (math.isfinite(width) and width > 0):
        return None
    readings = np.clip(readings, *span)
    most = max(1, int(MOST_PRODUCTS / readings.size))
    rows = np.arange(len(truth)) if len(truth) <= most else np.linspace(0, len(truth) - 1, most).astype(int)
    compared = truth[rows].astype(np.float64)
    square = (readings**2).sum(1)[:, None] - 2 * readings @ compared.T + (compared**2).sum(1)[None, :]
    reading, row = np.unravel_index(int(np.argmin(square)), square.shape)
    error = float(np.mean((readings[reading] - compared[row]) ** 2))  # the expansion above cancels where they agree
    psnr = MOST_PSNR_DB if error == 0 else min(MOST_PSNR_DB, 10 * math.log10(width**2 / error))
    return Closest(psnr, readings[reading], int(rows[row]))


class Readability(NamedTuple):
    """What can be read off one layer, without the truth.

    rank_one: the share of the gradient's energy in its best rank-one part, 1 where it is one example's (or all have the
    same input), 0 without a gradient. separable: how many different inputs two or more units state alike: each is the
    input of one example.
    """

    rank_one: float
    separable: int


def readability(layer: DenseLayer, update: Numbers) -> Readability:
    kernel, bias = layer.gradients(update)
    stacked = np.vstack([kernel, bias[None, :]])
    energy = float((stacked**2).sum())
    if not (energy > 0 and math.isfinite(energy)):
        return Readability(0.0, 0)
    gram = stacked.T @ stacked if stacked.shape[1] <= stacked.shape[0] else stacked @ stacked.T
    direction = gram[:, int(np.argmax(np.diag(gram)))]
    for _ in range(POWER_STEPS):
        direction = direction / np.linalg.norm(direction)
        direction = gram @ direction
    largest = float(np.linalg.norm(direction))
    read = _strongest(kernel, bias)
    return Readability(min(1.0, largest / energy), _groups(_ratios(kernel[:, read], bias[read])))


def _groups(rows: Vector) -> int:
    """How many rows begin a group of two or more that are alike."""
    if len(rows) < 2:
        return 0
    lengths = (rows**2).sum(1)
    distances = lengths[:, None] - 2 * rows @ rows.T + lengths[None, :]
    alike = distances <= ALIKE**2 * np.maximum(lengths[:, None], lengths[None, :])
    count, free = 0, np.ones(len(rows), bool)
    for row in range(len(rows)):
        group = alike[row] & free
        if free[row] and group.sum() >= 2:
            count += 1
        free[row] = False
        free &= ~group
    return count


# --- labels


def label_place(specs: Sequence[ParameterSpec], loss: str, num_classes: Optional[int]) -> Optional[slice]:
    """Where the output layer's bias is, whose gradient tells labels; None where there is none, or the loss is another.

    One number of a binary loss, else one for each class.
    """
    last = next((spec for spec in reversed(specs) if spec.trainable), None)
    outputs = 1 if loss == "binary_crossentropy" else num_classes
    if last is None or loss not in CLASS_LOSSES or not outputs or last.shape != (outputs,):
        return None
    return offsets(specs)[last.name]


def label_shares(bias_update: Numbers, learning_rate: float, steps: int) -> Vector:
    """`label_proportions`, also of one sigmoid unit: (classes,), there (share of 0, share of 1)."""
    if bias_update.size > 1:
        return label_proportions(bias_update, learning_rate, steps)
    positive = 0.5 + float(bias_update.reshape(-1)[0]) / (learning_rate * steps)
    return np.array([1.0 - min(1.0, max(0.0, positive)), min(1.0, max(0.0, positive))])


def counts_of(shares: Vector, examples: int) -> npt.NDArray[np.int64]:
    """Whole numbers of `examples` in these shares, by largest remainder."""
    wanted = shares * examples
    counts: npt.NDArray[np.int64] = np.floor(wanted).astype(np.int64)
    order = np.argsort(-(wanted - counts), kind="stable")
    counts[order[: examples - int(counts.sum())]] += 1
    return counts


# --- what a device knows of its own update


class Leak(NamedTuple):
    """The worst of what an update says. None: it was not looked at, as the model does not have what it takes.

    psnr_db: of the closest reading to a true example, or to its features where the layer does not see the examples.
    label_recovery: the share of the examples' labels that the update tells, as a multiset. reading, truth: what psnr_db
    is of; example: whose. direct: whether these are examples and not features.
    """

    psnr_db: Optional[float] = None
    label_recovery: Optional[float] = None
    reading: Optional[Vector] = None
    truth: Optional[Vector] = None
    example: int = 0
    direct: bool = True


class Truth(NamedTuple):
    """What a device knows. inputs: (n, inputs) of the layer `layer`, whose values lie in span. labels: (n,) whole
    numbers of all the examples, None where they are none."""

    layer: Optional[DenseLayer]
    inputs: Numbers
    span: tuple[float, float]
    direct: bool
    labels: Optional[Numbers] = None


def leak_check(
    update: Numbers,
    parameters: Numbers,
    truth: Truth,
    place: Optional[slice],
    learning_rate: float,
    steps: int,
) -> Leak:
    """update: (d,), as it leaves. place: from `label_place`. steps: of training, each with this learning rate.

    The attacker is taken to know both, and by which of the factors UNCLIPPED the update was shortened: it is told the
    best. So labels are at worst overrated; inputs are underrated, as searches (gradient inversion) are not tried.
    """
    leak = Leak()
    if truth.layer is not None:
        found = closest(candidates(truth.layer, update, parameters), truth.inputs, truth.span)
        if found is not None:
            true = truth.inputs[found.example].astype(np.float64)
            leak = Leak(found.psnr_db, None, found.reading, true, found.example, truth.direct)
    if place is None or truth.labels is None or not len(truth.labels):
        return leak
    return leak._replace(label_recovery=labels_told(update[place], truth.labels, learning_rate, steps))


def labels_told(bias_update: Numbers, labels: Numbers, learning_rate: float, steps: int) -> float:
    """The share of these labels that the output bias tells, 0 to 1, by the best of the factors UNCLIPPED."""
    classes = max(2, bias_update.size)
    true = np.bincount(labels.astype(np.int64).reshape(-1), minlength=classes)
    told = (
        counts_of(label_shares(bias_update * factor, learning_rate, steps), int(true.sum())) for factor in UNCLIPPED
    )
    return max(float(np.minimum(counts, true).sum() / true.sum()) for counts in told)
