"""Batch normalisation (layer and group normalisation reach TensorFlow as the same op) and sums over examples."""

from __future__ import annotations

import math

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import SHORT, column_sum, middle_sum, minus, static
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()


@lowers("FusedBatchNormV3")
def batch_norm(
    node: Node, x: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, ...]:
    """Outputs: y, new moving mean, new moving variance, batch mean, batch variance, and one nobody reads."""
    epsilon = node.attribute("epsilon")
    if not node.attribute("is_training"):
        factor = scale * tf.math.rsqrt(variance + epsilon)
        return x * factor + minus(offset, mean * factor), mean, variance, mean, variance, mean
    rows = tf.reshape(x, [-1, x.shape[-1]])
    count = rows.shape[0]
    batch_mean = column_sum(rows) * (1.0 / count)
    centred = minus(rows, batch_mean)
    batch_variance = column_sum(centred * centred) * (1.0 / count)
    y = centred * (scale * tf.math.rsqrt(batch_variance + epsilon)) + offset
    unbiased = batch_variance * (count / max(count - 1, 1))
    new_mean, new_variance = _moved(node, mean, variance, batch_mean, unbiased)
    return tf.reshape(y, x.shape), new_mean, new_variance, batch_mean, batch_variance, batch_mean


def _moved(
    node: Node, mean: Tensor, variance: Tensor, batch_mean: Tensor, batch_variance: Tensor
) -> tuple[Tensor, Tensor]:
    share = node.attribute("exponential_avg_factor")
    if share == 1.0:
        return batch_mean, batch_variance
    return (1.0 - share) * mean + share * batch_mean, (1.0 - share) * variance + share * batch_variance


@lowers("FusedBatchNormGradV3")
def batch_norm_gradient(
    node: Node, dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, variance: Tensor, _unused: Tensor
) -> tuple[Tensor, ...]:
    """dx = g r (dy - mean(dy) - n mean(dy n)), dg = sum(dy n), db = sum(dy); n = (x - m) r, r = 1 / sqrt(v + epsilon).

    Not training: dx = g r dy, because m and v are constants then. All means and sums in two stages.
    """
    rows, slopes = (tf.reshape(tensor, [-1, x.shape[-1]]) for tensor in (x, dy))
    count = rows.shape[0]
    inverse = tf.math.rsqrt(variance + node.attribute("epsilon"))
    normalised = minus(rows, mean) * inverse
    d_offset = column_sum(slopes)
    d_scale = column_sum(slopes * normalised)
    if node.attribute("is_training"):
        slopes = slopes + d_offset * (-1.0 / count) + normalised * (d_scale * (-1.0 / count))
    return tf.reshape(slopes * (scale * inverse), x.shape), d_scale, d_offset, mean, mean


@lowers("Sum")
def sum_(node: Node, x: Tensor, axes: Tensor) -> Tensor:
    """y = sum of x over the axes; in two stages where adjoining axes of float numbers are summed."""
    summed = _positive(x, axes)
    if not _is_block(x, summed):
        return tf.reduce_sum(x, static(axes), keepdims=node.attribute("keep_dims"))
    before, after = x.shape[: summed[0]], x.shape[summed[-1] + 1 :]
    total = middle_sum(tf.reshape(x, [math.prod(before), _terms(x, summed), math.prod(after)]))
    ones = [1] * len(summed) if node.attribute("keep_dims") else []
    return tf.reshape(total, [*before, *ones, *after])


@lowers("Mean")
def mean_(node: Node, x: Tensor, axes: Tensor) -> Tensor:
    """y = mean of x over the axes; in two stages where adjoining axes of float numbers are averaged."""
    if not _is_block(x, _positive(x, axes)):
        return tf.reduce_mean(x, static(axes), keepdims=node.attribute("keep_dims"))
    return sum_(node, x, axes) * (1.0 / _terms(x, _positive(x, axes)))


def _positive(x: Tensor, axes: Tensor) -> list[int]:
    return sorted({axis % x.shape.rank for axis in static(axes)}) if x.shape.rank else []


def _terms(x: Tensor, axes: list[int]) -> int:
    return math.prod(int(x.shape[axis]) for axis in axes)


def _is_block(x: Tensor, axes: list[int]) -> bool:
    """Whether adjoining axes of float numbers are summed, over many terms: then two stages are more precise."""
    adjoining = bool(axes) and axes == list(range(axes[0], axes[-1] + 1))
    return x.dtype == tf.float32 and adjoining and _terms(x, axes) >= SHORT
