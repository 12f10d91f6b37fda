"""Reductions, running reductions and counts that TFLite 2.14 lacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.constants import constant, value_of
from covey_models.lowering.formulations import static
from covey_models.lowering.mathematics import log_of_one_plus
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

LOWEST = float(np.finfo(np.float32).min)  # what TensorFlow takes for the logarithm of zero here


@lowers("EuclideanNorm")
def euclidean_norm(node: Node, x: Tensor, axes: Tensor) -> Tensor:
    """y = sqrt(sum of x^2 over the axes)."""
    return tf.sqrt(tf.reduce_sum(x * x, static(axes), keepdims=node.attribute("keep_dims")))


def _running(
    node: Node, x: Tensor, axis: Tensor, combine: Callable[[Tensor, Tensor], Tensor], neutral: float
) -> Tensor:
    """A running reduction of n numbers along an axis in ceil(log2 n) steps, each over all numbers at once.

    Step k combines every number with the one 2^k places before (Hillis and Steele 1986).
    """
    along = static(axis)[0] % x.shape.rank
    length = x.shape[along]
    backwards = np.arange(length, dtype=np.int32)[::-1].copy()

    def later(values: Tensor, by: int) -> Tensor:
        begin, sizes = [0] * x.shape.rank, list(x.shape)
        sizes[along] = length - by
        pads = np.zeros((x.shape.rank, 2), np.int32)
        pads[along, 0] = by
        kept = tf.slice(values, begin, sizes)
        return tf.raw_ops.PadV2(input=kept, paddings=pads, constant_values=np.float32(neutral))

    values = tf.gather(x, backwards, axis=along) if node.attribute("reverse") else x
    if node.attribute("exclusive"):
        values = later(values, 1) if length > 1 else tf.fill(x.shape, np.float32(neutral))
    by = 1
    while by < length:
        values = combine(later(values, by), values)
        by *= 2
    return tf.gather(values, backwards, axis=along) if node.attribute("reverse") else values


@lowers("Cumprod")
def running_product(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    """y_i = x_1 x_2 ... x_i along the axis, in log2(n) steps."""
    return _running(node, x, axis, lambda before, values: before * values, 1.0)


@lowers("CumulativeLogsumexp")
def running_logsumexp(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    """y_i = log(exp(x_1) + ... + exp(x_i)) along the axis, by log(e^a + e^b) = max + log1p(e^-|a - b|)."""

    def combine(a: Tensor, b: Tensor) -> Tensor:
        return tf.maximum(a, b) + log_of_one_plus(tf.exp(-tf.abs(a - b)))

    return _running(node, x, axis, combine, LOWEST)


@lowers("InTopK", "InTopKV2")
def in_top_k(node: Node, predictions: Tensor, targets: Tensor, k: Tensor = None) -> Tensor:
    """Whether fewer than k predictions of a row are larger than the target's; false for a target outside the row."""
    count = static(k)[0] if k is not None else node.attribute("k")
    chosen = tf.one_hot(tf.cast(targets, tf.int32), predictions.shape[1])
    value = tf.reduce_sum(predictions * chosen, 1, keepdims=True)
    larger = tf.reduce_sum(tf.cast(predictions > value, tf.float32), 1)
    return tf.logical_and(larger < float(count), tf.reduce_sum(chosen, 1) > 0.0)


def _bins(size: Tensor) -> int:
    """The number of bins: a constant, or min(c, max(d, what the data says)) with d >= c, which is c."""
    known = value_of(size)
    if known is None and size.op.type == "Minimum":
        for limit, other in (size.op.inputs, reversed(size.op.inputs)):
            most = value_of(limit)
            floors = [value_of(part) for part in other.op.inputs] if other.op.type == "Maximum" else []
            if most is not None and any(floor is not None and floor >= most for floor in floors):
                return int(most)
    return int(constant(size, "the number of bins"))


@lowers("Bincount", "DenseBincount")
def bin_count(node: Node, values: Tensor, size: Tensor, weights: Tensor) -> Tensor:
    """y[b] = sum of the weights (1 without any) of the values that are b, per row; binary_output gives 1 for some.

    As sums of one-hot rows. Values outside 0 ... size - 1 are not counted.
    """
    bins = _bins(size)
    rows = values if node.op.type == "DenseBincount" and values.shape.rank == 2 else tf.reshape(values, [1, -1])
    hot = tf.one_hot(tf.cast(rows, tf.int32), bins)
    weighted = 0 not in weights.shape
    if weighted and not (node.has("binary_output") and node.attribute("binary_output")):
        hot = hot * tf.reshape(tf.cast(weights, tf.float32), [*rows.shape, 1])
    counts = tf.reduce_sum(hot, 1)
    if node.has("binary_output") and node.attribute("binary_output"):
        counts = tf.sign(counts)
    shape = [bins] if rows is not values else [rows.shape[0], bins]
    return tf.cast(tf.reshape(counts, shape), node.op.outputs[0].dtype)


@lowers("LowerBound", "UpperBound")
def search_sorted(node: Node, rows: Tensor, values: Tensor) -> Tensor:
    """How many numbers of a sorted row are smaller than a value (LowerBound), or not larger (UpperBound)."""
    compare = tf.less if node.op.type == "LowerBound" else tf.less_equal
    smaller = compare(rows[:, tf.newaxis, :], values[:, :, tf.newaxis])
    return tf.cast(tf.reduce_sum(tf.cast(smaller, tf.float32), 2), node.op.outputs[0].dtype)
