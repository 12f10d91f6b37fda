"""Quantisation-aware training: numbers rounded to the grid that int8 inference will use later.

The grid has the step s = (max - min) / (q - p) with p = 0 (1 for narrow_range) and q = 2^num_bits - 1. It is moved so
that 0 lies on it: low = (p - z) s, high = (q - z) s with z = round(clip(p - min / s, p, q)).
"""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import column_sum
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()


def _grid(node: Node, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lowest, highest, step) of the grid, in the shape of the bounds."""
    first = 1.0 if node.attribute("narrow_range") else 0.0
    last = 2.0 ** node.attribute("num_bits") - 1.0
    step = (high - low) / (last - first)
    zero = tf.floor(tf.clip_by_value(first - low / step, first, last) + 0.5)
    return (first - zero) * step, (last - zero) * step, step


def _rounded(x: Tensor, grid: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    lowest, highest, step = grid
    inside = tf.minimum(tf.maximum(x, lowest), highest) - lowest
    return tf.floor(inside * (1.0 / step) + 0.5) * step + lowest


def _shares(dy: Tensor, x: Tensor, grid: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dy where x is inside the grid, below it, and above it; 0 elsewhere."""
    lowest, highest, _ = grid
    below = tf.cast(x < tf.broadcast_to(lowest, x.shape), tf.float32)
    above = tf.cast(x > tf.broadcast_to(highest, x.shape), tf.float32)
    return dy * (1.0 - below - above), dy * below, dy * above


def _fixed_bounds(node: Node) -> tuple[Tensor, Tensor]:
    return tf.constant(node.attribute("min")), tf.constant(node.attribute("max"))


@lowers("FakeQuantWithMinMaxArgs")
def rounded_to_fixed_grid(node: Node, x: Tensor) -> Tensor:
    """y = floor((clip(x, low, high) - low) / s + 1/2) s + low, on the grid of the attributes min and max."""
    return _rounded(x, _grid(node, *_fixed_bounds(node)))


@lowers("FakeQuantWithMinMaxArgsGradient")
def rounded_to_fixed_grid_gradient(node: Node, dy: Tensor, x: Tensor) -> Tensor:
    """dx = dy where low <= x <= high, else 0 (straight through the rounding)."""
    return _shares(dy, x, _grid(node, *_fixed_bounds(node)))[0]


@lowers("FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxVarsPerChannel")
def rounded_to_grid(node: Node, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """y = floor((clip(x, low, high) - low) / s + 1/2) s + low, for one grid or one per channel (last axis)."""
    return _rounded(x, _grid(node, low, high))


@lowers("FakeQuantWithMinMaxVarsGradient")
def rounded_to_grid_gradient(node: Node, dy: Tensor, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    """dx = dy inside the grid; dmin = sum of dy below it; dmax = sum of dy above it."""
    inside, below, above = _shares(dy, x, _grid(node, low, high))
    return inside, tf.reduce_sum(below), tf.reduce_sum(above)


@lowers("FakeQuantWithMinMaxVarsPerChannelGradient")
def rounded_to_channel_grids_gradient(
    node: Node, dy: Tensor, x: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, ...]:
    """dx = dy inside the channel's grid; dmin = sum of dy below it; dmax = sum of dy above it, per channel."""
    inside, below, above = _shares(dy, x, _grid(node, low, high))
    channels = x.shape[-1]
    return inside, column_sum(tf.reshape(below, [-1, channels])), column_sum(tf.reshape(above, [-1, channels]))
