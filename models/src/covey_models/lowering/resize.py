"""Resizing of images: every kind is a constant matrix over the rows and one over the columns.

The matrices are read off TensorFlow itself: the op is run on images that are 1 in one row and 0 elsewhere. So the
attributes (align_corners, half_pixel_centers, antialias, kernel) mean exactly what they mean there. Bilinear and
nearest forward stay the builtins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.constants import Array, computed, constant
from covey_models.lowering.formulations import matmul, static
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()


def _matrix(op: Any, length: int, others: list[Any]) -> Array:
    """(outputs, length): column i is what the op makes of a column of pixels that is 1 at i and 0 elsewhere."""
    units = np.eye(length, dtype=np.float32).reshape(1, length, 1, length)
    resized = computed(op, [units, *others])[0]
    return np.asarray(resized, np.float32).reshape(-1, length)


def _resized(images: Tensor, rows: Array, columns: Array) -> Tensor:
    """y[n, i, j, c] = sum over h, w of rows[i, h] columns[j, w] x[n, h, w, c]: two matrix products, three turns."""
    batch, height, width, channels = images.shape
    by_row = tf.reshape(tf.transpose(images, [1, 0, 2, 3]), [height, batch * width * channels])
    by_row = tf.reshape(matmul(tf.constant(rows), by_row), [len(rows), batch, width, channels])
    by_column = tf.reshape(tf.transpose(by_row, [2, 1, 0, 3]), [width, batch * len(rows) * channels])
    by_column = tf.reshape(matmul(tf.constant(columns), by_column), [len(columns), batch, len(rows), channels])
    return tf.transpose(by_column, [1, 2, 0, 3])


def _by_matrices(node: Node, images: Tensor, size: tuple[int, ...], others: Callable[[int, int], list[Any]]) -> Tensor:
    """others: axis (0 rows, 1 columns) and wanted length -> the op's inputs after the image."""
    _, height, width, _ = images.shape
    rows = _matrix(node.op, height, others(0, size[0]))
    columns = _matrix(node.op, width, others(1, size[1]))
    return _resized(images, rows, columns)


@lowers("ResizeBicubic", "ResizeArea")
def resize(node: Node, images: Tensor, size: Tensor) -> Tensor:
    """y = R x C^T per channel, with the op's own interpolation weights R (rows) and C (columns)."""
    return _by_matrices(node, images, static(size), lambda axis, length: [np.array([length, 1], np.int32)])


@lowers("ResizeBilinearGrad", "ResizeBicubicGrad")
def resize_gradient(node: Node, dy: Tensor, images: Tensor) -> Tensor:
    """dx = R^T dy C per channel, with the weights R and C of the forward op."""

    def original(axis: int, length: int) -> list[Any]:
        return [np.zeros((1, length, 1, 1), np.float32)]

    return _by_matrices(node, dy, tuple(images.shape[1:3]), original)


@lowers("ResizeNearestNeighborGrad")
def nearest_neighbour_gradient(node: Node, dy: Tensor, size: Tensor) -> Tensor:
    """dx = sum of dy over the pixels that a pixel was copied to: two sums for whole factors, else R^T dy C."""
    batch, height, width, channels = dy.shape
    rows, columns = static(size)
    if height % rows or width % columns or node.attribute("align_corners"):
        return _by_matrices(node, dy, (rows, columns), lambda axis, length: [np.array([length, 1], np.int32)])
    bands = tf.reduce_sum(tf.reshape(dy, [batch * rows, height // rows, width * channels]), 1)
    cells = tf.reduce_sum(tf.reshape(bands, [batch * rows * columns, width // columns, channels]), 1)
    return tf.reshape(cells, [batch, rows, columns, channels])


@lowers("ScaleAndTranslate")
def scale_and_translate(node: Node, images: Tensor, size: Tensor, scale: Tensor, translation: Tensor) -> Tensor:
    """y = R x C^T per channel: antialiased resizing, and the Lanczos, Gaussian and Mitchell kernels."""
    factors, offsets = constant(scale, "the scale of an image"), constant(translation, "the translation of an image")

    def placed(axis: int, length: int) -> list[Any]:
        return [np.array([length, 1], np.int32), *_along(axis, factors, offsets)]

    return _by_matrices(node, images, static(size), placed)


@lowers("ScaleAndTranslateGrad")
def scale_and_translate_gradient(node: Node, dy: Tensor, images: Tensor, scale: Tensor, translation: Tensor) -> Tensor:
    """dx = R^T dy C per channel, with the weights R and C of the forward op."""
    factors, offsets = constant(scale, "the scale of an image"), constant(translation, "the translation of an image")

    def placed(axis: int, length: int) -> list[Any]:
        return [np.zeros((1, length, 1, 1), np.float32), *_along(axis, factors, offsets)]

    return _by_matrices(node, dy, tuple(images.shape[1:3]), placed)


def _along(axis: int, factors: Array, offsets: Array) -> list[Array]:
    """Scale and translation of one axis, for an image that is one pixel wide."""
    return [np.array([factors[axis], 1.0], np.float32), np.array([offsets[axis], 0.0], np.float32)]
