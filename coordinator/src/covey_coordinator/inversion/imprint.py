"""Imprinting: a hostile server's layer that files every example of a batch in a bin of its own ("robbing the fed").

All units of a dense layer on the input measure the same number m = <v, x>, unit i with the threshold c_i, and all their
outputs are treated alike by what follows. Then unit i's gradient is the sum over the examples with m > c_i of
(g x, g), with one factor g for each example, and the difference of two neighbours is the sum over the examples between
two thresholds. An example alone in its bin is (g_W,i - g_W,i+1) / (g_b,i - g_b,i+1). With k bins that hold equal shares
of the data, an example of a batch of B is alone with probability (1 - 1/k)^(B-1).

*Sparse* imprinting is for updates of several local steps, over which g changes: a unit with a bounded activation
(ReLU6) whose slope lies in one bin alone sees the examples of that bin only, in every step, and needs no difference.

Source: Fowl et al. 2022 (arXiv:2110.13057), sections 4.1 and 4.3. Deviations: v is random and not an average, because
pictures of few grey levels often have equal means; thresholds are quantiles of the attacker's own examples; they also
take permuted and scaled rows, which the reader puts in order again by the parameters it sent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.dense import DenseLayer
from covey_coordinator.inversion.extraction import Matrix, found, layer_on_input, plausible, read_units
from covey_protocol.errors import UsageError
from covey_protocol.parameters import ParameterSpec

CEILING = 6.0  # of ReLU6


@dataclass(frozen=True)
class Disguise:
    """How a server hides an imprint from whoever looks at the parameters. All zero: not at all.

    noise: of this many times the direction's own size on every row. permuted: rows in no order. scales: every row times
    a random factor between 1 / (1 + scales) and 1 + scales, taken back behind the layer. share: of the units that
    imprint, the others stay as they are.
    """

    noise: float = 0.0
    permuted: bool = False
    scales: float = 0.0
    share: float = 1.0


OPEN = Disguise()


def imprinted(
    specs: Sequence[ParameterSpec],
    parameters: npt.NDArray[Any],
    auxiliary: npt.NDArray[Any],
    *,
    seed: int,
    sparse: bool = False,
    disguise: Disguise = OPEN,
) -> npt.NDArray[np.float32]:
    """The parameters (d,) with an imprint in the dense layer on the input; all but it and the kernel behind it stay.

    auxiliary: (m, ...) examples of the attacker's own, like those of the devices; they set the bins. sparse: for a
    layer with ReLU6. UsageError where the model has no such layer with a dense layer behind it.
    """
    rng = np.random.default_rng(seed)
    rows = auxiliary.reshape(len(auxiliary), -1).astype(np.float64)
    layer, behind = layer_on_input(specs, rows.shape[1])
    if behind is None:
        raise UsageError(f"no dense layer follows {layer.kernel.name}", "put an imprint in front (with_imprint)")
    numbers = np.array(parameters, np.float32)
    units = max(2, round(disguise.share * layer.bias.size))
    direction = rng.standard_normal(rows.shape[1])
    direction /= np.linalg.norm(direction)
    thresholds = _thresholds(rows @ direction, units)
    order = rng.permutation(layer.bias.size)[:units] if disguise.permuted else np.arange(units)
    scales = (1 + disguise.scales) ** rng.uniform(-1, 1, units)
    noise = disguise.noise / np.sqrt(rows.shape[1]) * rng.standard_normal((units, rows.shape[1]))
    slopes = CEILING / np.diff(thresholds) if sparse else np.ones(units)
    kernel = numbers[layer.kernel_place].reshape(layer.kernel.shape)
    kernel[:, order] = ((direction + noise) * (scales * slopes)[:, None]).T
    numbers[layer.bias_place][order] = -scales * slopes * thresholds[:-1]
    later = numbers[behind.kernel_place].reshape(behind.kernel.shape)
    later[order] = _behind(rows @ direction, thresholds, behind, rng, sparse) / scales[:, None]
    return numbers


def _thresholds(measured: Matrix, units: int) -> Matrix:
    """(units + 1,): the lower edges of bins that hold equal shares of the data, the first below all, and the last's
    upper edge, as far beyond all that nothing lies above it."""
    inner = np.quantile(measured, np.arange(1, units) / units)
    reach = measured.max() - measured.min()
    edges = np.concatenate([[measured.min() - reach], inner, [measured.max() + reach]])
    return np.asarray(np.maximum.accumulate(edges + 1e-9 * reach * np.arange(units + 1)))


def _behind(measured: Matrix, thresholds: Matrix, behind: DenseLayer, rng: np.random.Generator, sparse: bool) -> Matrix:
    """The rows of the kernel behind: one for all units, or, sparse, with alternating sign, so that units that have
    reached their ceiling cancel. So large that what the layer adds to the next one's outputs is about 1."""
    units = len(thresholds) - 1
    row = rng.standard_normal((1, behind.kernel.shape[1]))
    if sparse:
        return np.asarray(row / CEILING * (-1.0) ** np.arange(units)[:, None])
    return np.asarray(row / np.maximum(measured[:, None] - thresholds[:-1], 0.0).sum(1).mean()).repeat(units, 0)


@dataclass(frozen=True)
class Imprint:
    """Reads an update of a device that trained from imprinted parameters. sparse: as they were made."""

    sparse: bool = False

    @property
    def name(self) -> str:
        return "sparse imprint" if self.sparse else "imprint"

    @property
    def sees(self) -> str:
        what = "several local steps" if self.sparse else "one local step"
        return f"The update of {what} and the parameters, which this server chose; some data like the devices' own."

    def run(
        self, model: AttackedModel, seen: Seen, *, seed: int, stop: Stop | None = None, progress: Progress | None = None
    ) -> Finding:
        """Takes milliseconds and draws nothing, so seed, stop and progress are without effect."""
        started = time.monotonic()
        layer, behind = layer_on_input(model.specs, int(np.prod(model.input.shape)))
        kernel, bias = layer.gradients(seen.update)
        if not self.sparse:
            order, gains = order_of_units(seen.parameters, layer, behind)
            kernel = _differences(kernel[:, order] / gains)
            bias = _differences(bias[order] / gains)
        candidates, strength = read_units(kernel, bias)
        inputs = plausible(candidates, strength, model.input, seen.examples)
        return found(self.name, self.sees, model, seen, inputs, started)


def order_of_units(parameters: npt.NDArray[Any], layer: DenseLayer, behind: DenseLayer | None) -> tuple[Any, Matrix]:
    """The units by rising threshold, and the factor that each one's gradient has from the row behind it."""
    kernel, bias = layer.gradients(parameters)
    order = np.argsort(-bias / np.maximum(np.linalg.norm(kernel, axis=0), 1e-30), kind="stable")
    if behind is None:
        return order, np.ones(len(order))
    rows = behind.gradients(parameters)[0][order]
    gains = rows @ rows[0] / max(float(rows[0] @ rows[0]), 1e-300)
    return order, np.where(np.abs(gains) > 1e-12, gains, 1.0)


def _differences(values: Matrix) -> Matrix:
    """Each unit's minus the next one's, along the last axis; the last unit's own."""
    return np.concatenate([values[..., :-1] - values[..., 1:], values[..., -1:]], axis=-1)


def with_imprint(keras_model: Any, units: int, *, sparse: bool = False, seed: int = 0) -> Any:
    """A Keras model with a block in front of this one: dense with so many units, dense, added to the input.

    With fresh weights the block is an honest residual block; `imprinted` makes an imprint of it. Its two layers come
    first among the parameters. UsageError for a model whose input is not of real numbers.
    """
    from covey_models._tensorflow import import_tensorflow

    tf = import_tensorflow()
    if keras_model.inputs[0].dtype != tf.float32:
        raise UsageError(f"an imprint needs an input of real numbers, not {keras_model.inputs[0].dtype.name}")
    layers, shape = tf.keras.layers, tuple(keras_model.input_shape[1:])
    start = tf.keras.initializers.GlorotUniform
    inputs = tf.keras.Input(shape)
    flat = layers.Flatten(name="imprint_flat")(inputs)
    activation = "relu6" if sparse else "relu"
    hidden = layers.Dense(units, activation, kernel_initializer=start(seed), name="imprint")(flat)
    passed = layers.Dense(flat.shape[-1], kernel_initializer=start(seed + 1), name="imprint_out")(hidden)
    added = layers.Add(name="imprint_added")([inputs, layers.Reshape(shape, name="imprint_shape")(passed)])
    return tf.keras.Model(inputs, keras_model(added), name=keras_model.name)
