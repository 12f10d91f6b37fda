"""Gradients of pooling. The forward ops are builtins already.

TensorFlow gives the whole gradient of a max pool window to the first pixel (row by row) that holds the maximum. These
lowerings do exactly that: constant regions of an image make ties all the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.convolution import window_of
from covey_models.lowering.formulations import gather_rows, is_positive, static, sum_touching
from covey_models.lowering.geometry import Window
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

BELOW_ALL = -3e38  # padding that no pixel of a max pool window can lose against


@lowers("MaxPoolGrad")
def max_pool_gradient(node: Node, images: Tensor, pooled: Tensor, dy: Tensor) -> Tensor:
    """dx = dy at the first pixel of the window (row by row) that equals the maximum, else 0."""
    _, rows, columns, _ = node.attribute("ksize")
    window = window_of(node, (rows, columns))
    if is_masked_where_pooled(node.op):
        dy = dy * is_positive(pooled)
    if window.tiles(*images.shape[1:3]):
        return _tiled_max_pool_gradient(window, images, pooled, dy)
    return _overlapping_max_pool_gradient(window, images, pooled, dy)


def is_masked_where_pooled(op: Any) -> bool:
    """Whether a ReLU's gradient needs no mask of its own behind this MaxPoolGrad of that ReLU's output.

    The pixel that gets a window's gradient holds the pooled value, so the mask of the pooled values, a quarter of the
    size for 2x2 windows, does the same before the gradient is spread. Both lowerings ask here.
    """
    (gradient,), images = op.outputs, op.inputs[0]
    returned = any(output is gradient for output in op.graph.outputs)
    return (
        images.op.type == "Relu"
        and not returned
        and all(user.type == "ReluGrad" and user.inputs[1] is images for user in gradient.consumers())
    )


def _first_holders(pooled: Tensor, taps: list[Tensor], dy: Tensor) -> list[Tensor]:
    """dy, given to the first tap that equals the pooled value: what is not taken is passed on."""
    parts = []
    for tap in taps[:-1]:
        passed_on = dy * is_positive(pooled - tap)
        parts.append(dy - passed_on)
        dy = passed_on
    return [*parts, dy]


def _tiled_max_pool_gradient(window: Window, images: Tensor, pooled: Tensor, dy: Tensor) -> Tensor:
    """Windows side by side: taps are contiguous slices, which beats a gather."""
    batch, height, width, channels = images.shape
    _, rows, columns, _ = pooled.shape
    down, right = window.kernel
    bands = tf.reshape(images, [batch, rows, down, width * channels])
    taps = []
    for y in range(down):
        band = tf.slice(bands, [0, 0, y, 0], [batch, rows, 1, width * channels])
        band = tf.reshape(band, [batch, rows, columns, right * channels])
        taps += [tf.slice(band, [0, 0, 0, x * channels], pooled.shape) for x in range(right)]
    parts = _first_holders(pooled, taps, dy)
    lines = [
        tf.reshape(tf.concat(parts[y * right : (y + 1) * right], -1), [batch, rows, 1, width * channels])
        for y in range(down)
    ]
    return tf.reshape(tf.concat(lines, 2), [batch, height, width, channels])


def _overlapping_max_pool_gradient(window: Window, images: Tensor, pooled: Tensor, dy: Tensor) -> Tensor:
    batch, height, width, channels = images.shape
    outputs = pooled.shape[1] * pooled.shape[2]
    table = window.inputs_of_outputs(height, width)
    pixels = gather_rows(tf.reshape(images, [batch, height * width, channels]), table, BELOW_ALL)
    taps = tf.unstack(tf.reshape(pixels, [batch * outputs, window.taps, channels]), axis=1)
    flat = [batch * outputs, channels]
    parts = _first_holders(tf.reshape(pooled, flat), taps, tf.reshape(dy, flat))
    entries = tf.reshape(tf.concat(parts, -1), [batch, outputs * window.taps, channels])
    return sum_touching(entries, window.outputs_of_inputs(height, width), images.shape)


@lowers("AvgPoolGrad")
def average_pool_gradient(node: Node, image_shape: Tensor, dy: Tensor) -> Tensor:
    """dx = sum over the windows that hold a pixel of dy / (pixels of the image in that window)."""
    batch, height, width, channels = static(image_shape)
    _, rows, columns, _ = node.attribute("ksize")
    window = window_of(node, (rows, columns))
    inside = (window.inputs_of_outputs(height, width) < height * width).sum(1)  # padding is not averaged in
    shares = tf.reshape(dy, [batch, len(inside), channels]) * (1.0 / inside).astype(np.float32)[None, :, None]
    table = window.outputs_of_inputs(height, width) // window.taps
    return sum_touching(shares, table, (batch, height, width, channels))
