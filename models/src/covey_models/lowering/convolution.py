"""Convolutions and their gradients as patches (im2col) times a matrix, and the way back (col2im).

Layout is NHWC; TensorFlow on a CPU has no other. Kernels are (height, width, channels in, channels out).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import (
    column_sum,
    gather_rows,
    matmul,
    padded_rows,
    static,
    sum_touching,
    transpose,
)
from covey_models.lowering.geometry import Window
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

MOST_CHANNELS_FOR_SLICES = 4  # up to here copying lines beats copying pixels; at 8 channels they are level


def window_of(node: Node, kernel: tuple[int, int]) -> Window:
    """The sliding window of a convolution or pooling op."""
    _, down, right, _ = node.attribute("strides")
    _, dilation_y, dilation_x, _ = node.attribute("dilations") if node.has("dilations") else (1, 1, 1, 1)
    padding = node.attribute("padding")
    explicit = ((0, 0), (0, 0))
    if padding == "EXPLICIT":
        sides = node.attribute("explicit_paddings")
        explicit = ((sides[2], sides[3]), (sides[4], sides[5]))
    return Window(kernel, (down, right), (dilation_y, dilation_x), padding, explicit)


@dataclass(frozen=True)
class Patches:
    """What every output of a convolution sees.

    matrix: (batch * outputs, taps * channels), or its transpose where `turned`.
    """

    matrix: Tensor
    turned: bool = False

    def times(self, kernel: Tensor) -> Tensor:
        """The convolution with a (taps * channels, filters) matrix: (batch * outputs, filters)."""
        return matmul(self.matrix, kernel, transpose_a=self.turned)

    def kernel_gradient(self, dy: Tensor) -> Tensor:
        """(taps * channels, filters) from dy (batch * outputs, filters)."""
        return matmul(self.matrix, dy, transpose_a=not self.turned)


def patches(node: Node, images: Tensor, window: Window) -> Patches:
    """Made once per image tensor and window, for the forward and the backward pass."""
    key = ("patches", images.ref(), window)
    if key not in node.shared:
        node.shared[key] = _patches(images, window)
    found: Patches = node.shared[key]
    return found


def _patches(images: Tensor, window: Window) -> Patches:
    batch, height, width, channels = images.shape
    if window.is_every_pixel_once(height, width):
        return Patches(tf.reshape(images, [batch * height * width, channels]))
    if channels <= MOST_CHANNELS_FOR_SLICES:
        return Patches(_sliced_patches(images, window), turned=True)
    return Patches(_gathered_patches(images, window))


def _gathered_patches(images: Tensor, window: Window) -> Tensor:
    """(batch * outputs, taps * channels): whole pixels are copied."""
    batch, height, width, channels = images.shape
    table = window.inputs_of_outputs(height, width)
    pixels = tf.reshape(images, [batch, height * width, channels])
    return tf.reshape(gather_rows(pixels, table), [batch * len(table), window.taps * channels])


def _sliced_patches(images: Tensor, window: Window) -> Tensor:
    """(taps * channels, batch * outputs): every tap is one slice of the padded planes, so that whole lines are copied.

    With strides, the planes are first sorted by phase (the coordinate modulo the stride), which makes lines contiguous.
    """
    batch, height, width, channels = images.shape
    (down, right), (rows, columns) = window.strides, window.output_size(height, width)
    planes = tf.reshape(images if channels == 1 else transpose(tf.reshape(images, [-1, channels])), [-1, height, width])
    count = channels * batch
    padded, (lines, dots) = _padded_to_phases(planes, window)
    if (down, right) != (1, 1):
        padded = tf.transpose(tf.reshape(padded, [count * lines, down, dots, right]), [1, 3, 0, 2])
    phases = tf.reshape(padded, [down * right, count, lines, dots])
    taps = []
    for y, x in window.offsets():
        begin = [(y % down) * right + x % right, 0, y // down, x // right]
        taps.append(tf.reshape(tf.slice(phases, begin, [1, count, rows, columns]), [channels, batch * rows * columns]))
    return tf.concat(taps, 0)


def _padded_to_phases(planes: Tensor, window: Window) -> tuple[Tensor, tuple[int, int]]:
    """Planes (n, height, width) with the window's padding, and the size of one phase of them."""
    sides, phase = [[0, 0]], []
    for axis, size in enumerate(planes.shape[1:]):
        before, needed = window.reach(axis, size)
        stride = window.strides[axis]
        phase.append(-(-max(needed, before + size) // stride))
        sides.append([before, phase[-1] * stride - size - before])
    return tf.pad(planes, sides), (phase[0], phase[1])


def _groups(tensor: Tensor, count: int, axis: int = -1) -> list[Tensor]:
    return [tensor] if count == 1 else tf.split(tensor, count, axis=axis)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else tf.concat(parts, -1)


@lowers("Conv2D")
def convolution(node: Node, images: Tensor, kernel: Tensor) -> Tensor:
    """y = P(x) w: the patches P(x), (batch * outputs, taps * channels), times the kernel as a matrix; per group."""
    groups = images.shape[3] // kernel.shape[2]
    window = window_of(node, (kernel.shape[0], kernel.shape[1]))
    size = window.output_size(*images.shape[1:3])
    parts = []
    for part, weights in zip(_image_groups(node, images, groups), _groups(kernel, groups)):
        matrix = tf.reshape(weights, [-1, weights.shape[3]])
        product = patches(node, part, window).times(matrix)
        parts.append(tf.reshape(product, [images.shape[0], *size, weights.shape[3]]))
    return _joined(parts)


@lowers("Conv2DBackpropFilter")
def convolution_filter_gradient(node: Node, images: Tensor, kernel_shape: Tensor, dy: Tensor) -> Tensor:
    """dw = P(x)^T dy, with the patches of the forward pass; per group."""
    height, width, channels, _ = static(kernel_shape)
    groups = images.shape[3] // channels
    window = window_of(node, (height, width))
    parts = []
    for part, gradient in zip(_image_groups(node, images, groups), _groups(dy, groups)):
        matrix = tf.reshape(gradient, [-1, gradient.shape[3]])
        product = patches(node, part, window).kernel_gradient(matrix)
        parts.append(tf.reshape(product, [height, width, channels, gradient.shape[3]]))
    return _joined(parts)


@lowers("Conv2DBackpropInput")
def convolution_input_gradient(node: Node, image_shape: Tensor, kernel: Tensor, dy: Tensor) -> Tensor:
    """dx = sum over the taps that read a pixel of dy w^T (col2im); the forward pass of Conv2DTranspose."""
    batch, height, width, channels = static(image_shape)
    groups = channels // kernel.shape[2]
    shape = (batch, height, width, kernel.shape[2])
    window = window_of(node, (kernel.shape[0], kernel.shape[1]))
    parts = zip(_groups(kernel, groups), _groups(dy, groups))
    return _joined([_input_gradient(shape, weights, gradient, window) for weights, gradient in parts])


def _image_groups(node: Node, images: Tensor, count: int) -> list[Tensor]:
    """The channel groups of an image, split once so that forward and backward share their patches."""
    key = ("groups", images.ref(), count)
    if key not in node.shared:
        node.shared[key] = _groups(images, count)
    groups: list[Tensor] = node.shared[key]
    return groups


def _input_gradient(shape: tuple[int, int, int, int], kernel: Tensor, dy: Tensor, window: Window) -> Tensor:
    batch, height, width, channels = shape
    filters = kernel.shape[3]
    outputs = dy.shape[1] * dy.shape[2]
    if window.is_every_pixel_once(height, width):
        flat = matmul(tf.reshape(dy, [-1, filters]), tf.reshape(kernel, [channels, filters]), transpose_b=True)
        return tf.reshape(flat, shape)
    # One zero row of dy gives, for every tap, the zero entry that the inverse table points to.
    rows = tf.pad(tf.reshape(dy, [batch, outputs, filters]), [[0, 0], [0, 1], [0, 0]])
    weights = tf.transpose(tf.reshape(kernel, [window.taps * channels, filters]))
    entries = matmul(tf.reshape(rows, [-1, filters]), weights)
    entries = tf.reshape(entries, [batch, (outputs + 1) * window.taps, channels])
    return sum_touching(entries, window.outputs_of_inputs(height, width), shape)


@lowers("DepthwiseConv2dNativeBackpropFilter")
def depthwise_filter_gradient(node: Node, images: Tensor, kernel_shape: Tensor, dy: Tensor) -> Tensor:
    """dw[t, c, m] = sum over outputs of P(x)[t, c] dy[c, m], one tap after the other.

    All taps at once would take nine times the memory for a 3x3 kernel, and more time.
    """
    height, width, channels, multiplier = static(kernel_shape)
    window = window_of(node, (height, width))
    slopes = tf.reshape(dy, [-1, channels * multiplier])
    sums = []
    for seen in _seen_by_taps(images, window):
        rows = tf.reshape(seen, [-1, channels])
        if multiplier > 1:
            rows = tf.reshape(tf.tile(tf.reshape(rows, [-1, 1]), [1, multiplier]), [-1, channels * multiplier])
        sums.append(column_sum(rows * slopes))
    return tf.reshape(tf.concat(sums, 0), [height, width, channels, multiplier])


def _seen_by_taps(images: Tensor, window: Window) -> list[Tensor]:
    """What each tap of a window reads: one tensor with batch * outputs * channels numbers per tap, row by row."""
    batch, height, width, channels = images.shape
    if window.strides != (1, 1):
        table = window.inputs_of_outputs(height, width)
        pixels = padded_rows(tf.reshape(images, [batch, height * width, channels]), table)
        return [tf.gather(pixels, table[:, tap], axis=1) for tap in range(window.taps)]
    sides = [[0, 0]]
    for axis, size in enumerate((height, width)):
        before, needed = window.reach(axis, size)
        sides.append([before, max(0, needed - size - before)])
    padded = tf.pad(images, [*sides, [0, 0]])
    return [
        tf.slice(padded, [0, y, x, 0], [batch, *window.output_size(height, width), channels])
        for y, x in window.offsets()
    ]


@lowers("DepthwiseConv2dNativeBackpropInput")
def depthwise_input_gradient(node: Node, image_shape: Tensor, kernel: Tensor, dy: Tensor) -> Tensor:
    """dx = sum over the taps that read a pixel of the sum over m of dy[c, m] w[t, c, m]."""
    batch, height, width, channels = static(image_shape)
    multiplier = kernel.shape[3]
    window = window_of(node, (kernel.shape[0], kernel.shape[1]))
    if window.strides == (1, 1) and multiplier == 1:
        return _depthwise_of_turned_kernel((height, width), kernel, dy, window)
    outputs = dy.shape[1] * dy.shape[2]
    slopes = tf.reshape(dy, [batch * outputs, 1, channels * multiplier])
    products = slopes * tf.reshape(kernel, [1, window.taps, channels * multiplier])
    if multiplier > 1:
        products = tf.reduce_sum(tf.reshape(products, [-1, channels, multiplier]), 2)
    entries = tf.reshape(products, [batch, outputs * window.taps, channels])
    return sum_touching(entries, window.outputs_of_inputs(height, width), (batch, height, width, channels))


def _depthwise_of_turned_kernel(size: tuple[int, int], kernel: Tensor, dy: Tensor, window: Window) -> Tensor:
    """Without strides, the gradient of the images is itself a depthwise convolution: of dy, with the kernel turned
    by 180 degrees (by GATHER: REVERSE_V2 of two axes is wrong in TFLite 2.14)."""
    taps = tf.reshape(kernel, [window.taps, -1])
    turned = tf.reshape(tf.gather(taps, np.arange(window.taps, dtype=np.int32)[::-1]), kernel.shape)
    if window.padding == "SAME" and all(side % 2 for side in window.kernel):
        return tf.nn.depthwise_conv2d(dy, turned, [1, 1, 1, 1], "SAME", dilations=window.dilations)
    sides = [[0, 0]]
    for axis, (pixels, outputs) in enumerate(zip(size, dy.shape[1:3])):
        beyond = (window.kernel[axis] - 1) * window.dilations[axis]
        before = beyond - window.reach(axis, pixels)[0]
        sides.append([before, pixels + beyond - outputs - before])
    padded = tf.pad(dy, [*sides, [0, 0]])
    return tf.nn.depthwise_conv2d(padded, turned, [1, 1, 1, 1], "VALID", dilations=window.dilations)
