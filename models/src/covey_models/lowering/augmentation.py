"""Augmentation layers inside a model: rotation, zoom, translation and contrast, forward only.

They stand before everything that is trained, so their gradients are not needed; those of images are refused.
"""

from __future__ import annotations

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import static
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()


@lowers("AdjustContrastv2")
def contrast(node: Node, images: Tensor, factor: Tensor) -> Tensor:
    """y = (x - m) factor + m, m the mean of an image's channel."""
    mean = tf.reduce_mean(images, [-3, -2], keepdims=True)
    return (images - mean) * factor + mean


@lowers("ImageProjectiveTransformV3")
def projective_transform(node: Node, images: Tensor, transforms: Tensor, size: Tensor, fill: Tensor) -> Tensor:
    """y[n, i, j] = x[n, v, u], (u, v) = (a0 j + a1 i + a2, b0 j + b1 i + b2) / (c0 j + c1 i + 1), interpolated.

    Bilinear: four GATHERs, weighted. Nearest: one. A pixel outside the image is the fill value, after the fill mode has
    brought u and v back inside (reflect, wrap, nearest) or left them (constant).
    """
    batch, height, width, channels = images.shape
    rows, columns = static(size)
    i, j = (grid.reshape(1, -1).astype(np.float32) for grid in np.mgrid[:rows, :columns])
    a0, a1, a2, b0, b1, b2, c0, c1 = (transforms[:, k : k + 1] for k in range(8))
    below = c0 * j + c1 * i + 1.0
    mode = node.attribute("fill_mode")
    u = _inside((a0 * j + a1 * i + a2) / below, width, mode) + tf.zeros([batch, 1])
    v = _inside((b0 * j + b1 * i + b2) / below, height, mode) + tf.zeros([batch, 1])
    flat = tf.reshape(images, [batch, height * width, channels])
    if node.attribute("interpolation") == "NEAREST":
        pixels = _pixels(flat, _rounded(u), _rounded(v), height, width, fill)
    else:
        pixels = _bilinear(flat, u, v, height, width, fill)
    return tf.reshape(pixels, [batch, rows, columns, channels])


def _inside(position: Tensor, length: int, mode: str) -> Tensor:
    """Positions along an axis of this length, after the fill mode."""
    last = float(length - 1)
    if mode == "CONSTANT":
        return position
    if mode == "REFLECT":
        period = 2.0 * length
        position = position - period * tf.floor(position / period)
        position = tf.where(position < length * tf.ones_like(position), position, period - 1.0 - position)
    elif mode == "WRAP":
        turns = tf.floor(tf.abs(position) / max(last, 1.0))
        before = tf.cast(position < tf.zeros_like(position), tf.float32)
        after = tf.cast(position > last * tf.ones_like(position), tf.float32)
        position = position + length * (before * (turns + 1.0) - after * turns)
    return tf.clip_by_value(position, 0.0, last)


def _rounded(position: Tensor) -> Tensor:
    """To the nearest whole number, halves away from zero."""
    return tf.sign(position) * tf.floor(tf.abs(position) + 0.5)


def _bilinear(flat: Tensor, u: Tensor, v: Tensor, height: int, width: int, fill: Tensor) -> Tensor:
    left, top = tf.floor(u), tf.floor(v)
    right_share, bottom_share = u - left, v - top
    parts = []
    for y, y_share in ((top, 1.0 - bottom_share), (top + 1.0, bottom_share)):
        for x, x_share in ((left, 1.0 - right_share), (left + 1.0, right_share)):
            parts.append(_pixels(flat, x, y, height, width, fill) * (x_share * y_share)[..., tf.newaxis])
    return tf.add_n(parts)


def _pixels(flat: Tensor, x: Tensor, y: Tensor, height: int, width: int, fill: Tensor) -> Tensor:
    """The pixels (n, k, c) at whole positions (n, k); `fill` outside."""
    near_x, near_y = tf.clip_by_value(x, 0.0, width - 1.0), tf.clip_by_value(y, 0.0, height - 1.0)
    outside = tf.sign(tf.abs(x - near_x) + tf.abs(y - near_y))[..., tf.newaxis]
    found = tf.gather(flat, tf.cast(near_y * float(width) + near_x, tf.int32), batch_dims=1)
    return found * (1.0 - outside) + fill * outside
