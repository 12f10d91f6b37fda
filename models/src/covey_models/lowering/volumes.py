"""Three-dimensional convolutions and pools, by the same index tables as the two-dimensional ones.

Layout is NDHWC; TensorFlow on a CPU has no other. Kernels are (depth, height, width, channels in, channels out).
"""

from __future__ import annotations

import math

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import gather_rows, is_positive, matmul, static
from covey_models.lowering.geometry import Table, Window
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

BELOW_ALL = -3e38  # padding that no number of a max pool window can lose against


def window_of(node: Node, kernel: tuple[int, ...]) -> Window:
    """The sliding window of a three-dimensional convolution or pooling op."""
    strides = tuple(node.attribute("strides")[1:4])
    dilations = tuple(node.attribute("dilations")[1:4]) if node.has("dilations") else (1, 1, 1)
    return Window(kernel, strides, dilations, node.attribute("padding"))


def _patches(node: Node, volumes: Tensor, window: Window) -> Tensor:
    """(batch * outputs, taps * channels); made once per tensor and window, forward and backward."""
    key = ("volume patches", volumes.ref(), window)
    if key not in node.shared:
        batch, *size, channels = volumes.shape
        rows = tf.reshape(volumes, [batch, math.prod(size), channels])
        if not window.is_every_pixel_once(*size):
            rows = gather_rows(rows, window.inputs_of_outputs(*size))
        node.shared[key] = tf.reshape(rows, [-1, window.taps * channels])
    return node.shared[key]


def _sum_touching(entries: Tensor, table: Table, shape: tuple[int, ...]) -> Tensor:
    """Every voxel of a volume of this shape sums the entries (n, e, c) that the table (voxels, touches) names."""
    batch, *size, channels = shape
    gathered = gather_rows(entries, np.ascontiguousarray(table.T))  # touch by touch: SUM adds whole volumes
    gathered = tf.reshape(gathered, [batch, table.shape[1], math.prod(size) * channels])
    return tf.reshape(tf.reduce_sum(gathered, 1), shape)


def _groups(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor] if count == 1 else tf.split(tensor, count, axis=-1)


@lowers("Conv3D")
def convolution_3d(node: Node, volumes: Tensor, kernel: Tensor) -> Tensor:
    """y = P(x) w: the patches P(x) (batch * outputs, taps * channels) times the kernel as a matrix; per group."""
    window = window_of(node, tuple(kernel.shape[:3]))
    groups = volumes.shape[4] // kernel.shape[3]
    shape = [volumes.shape[0], *window.output_size(*volumes.shape[1:4]), kernel.shape[4] // groups]
    products = [
        tf.reshape(matmul(_patches(node, part, window), tf.reshape(weights, [-1, weights.shape[4]])), shape)
        for part, weights in zip(_groups(volumes, groups), _groups(kernel, groups))
    ]
    return tf.concat(products, -1)


@lowers("Conv3DBackpropFilterV2")
def convolution_3d_filter_gradient(node: Node, volumes: Tensor, kernel_shape: Tensor, dy: Tensor) -> Tensor:
    """dw = P(x)^T dy, with the patches of the forward pass; per group."""
    shape = static(kernel_shape)
    window = window_of(node, shape[:3])
    groups = volumes.shape[4] // shape[3]
    products = []
    for part, gradient in zip(_groups(volumes, groups), _groups(dy, groups)):
        matrix = tf.reshape(gradient, [-1, gradient.shape[4]])
        product = matmul(_patches(node, part, window), matrix, transpose_a=True)
        products.append(tf.reshape(product, [*shape[:4], gradient.shape[4]]))
    return tf.concat(products, -1)


@lowers("Conv3DBackpropInputV2")
def convolution_3d_input_gradient(node: Node, volume_shape: Tensor, kernel: Tensor, dy: Tensor) -> Tensor:
    """dx = sum over the taps that read a voxel of dy w^T (col2im); the forward pass of a transposed convolution."""
    shape = static(volume_shape)
    window = window_of(node, tuple(kernel.shape[:3]))
    groups = shape[4] // kernel.shape[3]
    parts = zip(_groups(kernel, groups), _groups(dy, groups))
    return tf.concat([_input_gradient(window, shape[:4], weights, gradient) for weights, gradient in parts], -1)


def _input_gradient(window: Window, places: tuple[int, ...], kernel: Tensor, dy: Tensor) -> Tensor:
    channels, filters = kernel.shape[3:]
    outputs = math.prod(dy.shape[1:4])
    # One zero row of dy gives, for every tap, the zero entry that the inverse table points to.
    rows = tf.pad(tf.reshape(dy, [places[0], outputs, filters]), [[0, 0], [0, 1], [0, 0]])
    weights = tf.transpose(tf.reshape(kernel, [window.taps * channels, filters]))
    entries = matmul(tf.reshape(rows, [-1, filters]), weights)
    entries = tf.reshape(entries, [places[0], (outputs + 1) * window.taps, channels])
    return _sum_touching(entries, window.outputs_of_inputs(*places[1:]), (*places, channels))


@lowers("MaxPool3D")
def max_pool_3d(node: Node, volumes: Tensor) -> Tensor:
    """max over a box = max over depth of the max over height and width: two MAX_POOL_2D."""
    return _pooled(node, volumes, tf.nn.max_pool2d)


@lowers("AvgPool3D")
def average_pool_3d(node: Node, volumes: Tensor) -> Tensor:
    """mean over a box = mean over depth of the mean over height and width: two AVERAGE_POOL_2D.

    Padding is not averaged in: a box holds depth count * plane count numbers, so the two means are exact.
    """
    return _pooled(node, volumes, tf.nn.avg_pool2d)


def _pooled(node: Node, volumes: Tensor, pool: object) -> Tensor:
    assert callable(pool)
    batch, depth, height, width, channels = volumes.shape
    kernel, strides = node.attribute("ksize")[1:4], node.attribute("strides")[1:4]
    padding = node.attribute("padding")
    planes = tf.reshape(volumes, [batch * depth, height, width, channels])
    planes = pool(planes, kernel[1:], strides[1:], padding)
    _, rows, columns, _ = planes.shape
    columns_of_depth = tf.reshape(planes, [batch, depth, rows * columns, channels])
    pooled = pool(columns_of_depth, [kernel[0], 1], [strides[0], 1], padding)
    return tf.reshape(pooled, [batch, pooled.shape[1], rows, columns, channels])


@lowers("MaxPool3DGrad")
def max_pool_3d_gradient(node: Node, volumes: Tensor, pooled: Tensor, dy: Tensor) -> Tensor:
    """dx = dy at the first voxel of the window (depth, then row, then column) that equals the maximum, else 0."""
    batch, *size, channels = volumes.shape
    window = window_of(node, tuple(node.attribute("ksize")[1:4]))
    outputs = math.prod(pooled.shape[1:4])
    voxels = tf.reshape(volumes, [batch, math.prod(size), channels])
    seen = gather_rows(voxels, window.inputs_of_outputs(*size), BELOW_ALL)
    left, flat = tf.reshape(dy, [batch * outputs, channels]), tf.reshape(pooled, [batch * outputs, channels])
    parts = []
    for tap in tf.unstack(tf.reshape(seen, [batch * outputs, window.taps, channels]), axis=1):
        passed_on = left * is_positive(flat - tap)
        parts.append(left - passed_on)
        left = passed_on
    entries = tf.reshape(tf.concat(parts, -1), [batch, outputs * window.taps, channels])
    return _sum_touching(entries, window.outputs_of_inputs(*size), volumes.shape)


@lowers("AvgPool3DGrad")
def average_pool_3d_gradient(node: Node, volume_shape: Tensor, dy: Tensor) -> Tensor:
    """dx = sum over the windows that hold a voxel of dy / (numbers in that window)."""
    batch, *size, channels = shape = static(volume_shape)
    window = window_of(node, tuple(node.attribute("ksize")[1:4]))
    inside = (window.inputs_of_outputs(*size) < math.prod(size)).sum(1)  # padding is not averaged in
    shares = tf.reshape(dy, [batch, len(inside), channels]) * (1.0 / inside).astype(np.float32)[None, :, None]
    return _sum_touching(shares, window.outputs_of_inputs(*size) // window.taps, shape)
