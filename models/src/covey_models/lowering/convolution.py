"""Convolutions and their gradients as patches (im2col) times a matrix, and the way back (col2im).

Layout is NHWC; TensorFlow on a CPU has no other. Kernels are (height, width, channels in, channels out).
"""

from __future__ import annotations

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import column_sum, gather_rows, matmul, static, sum_touching
from covey_models.lowering.geometry import Window
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

MOST_CHANNELS_FOR_CONSTANT_FILTER = 2  # up to here a one-hot CONV_2D makes patches 4x faster than GATHER


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


def patches(node: Node, images: Tensor, window: Window) -> Tensor:
    """(batch * outputs, taps * channels); made once per image tensor and window, forward and backward."""
    key = ("patches", images.ref(), window)
    if key not in node.shared:
        node.shared[key] = _patches(images, window)
    return node.shared[key]


def _patches(images: Tensor, window: Window) -> Tensor:
    batch, height, width, channels = images.shape
    rows, columns = window.output_size(height, width)
    shape = [batch * rows * columns, window.taps * channels]
    if window.is_every_pixel_once(height, width):
        return tf.reshape(images, shape)
    if channels <= MOST_CHANNELS_FOR_CONSTANT_FILTER and window.padding != "EXPLICIT":
        one_hot = np.eye(window.taps * channels, dtype=np.float32).reshape(*window.kernel, channels, -1)
        spread = tf.nn.conv2d(images, one_hot, window.strides, window.padding, dilations=window.dilations)
        return tf.reshape(spread, shape)
    pixels = tf.reshape(images, [batch, height * width, channels])
    return tf.reshape(gather_rows(pixels, window.inputs_of_outputs(height, width)), shape)


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
        product = matmul(patches(node, part, window), matrix)
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
        product = matmul(patches(node, part, window), matrix, transpose_a=True)
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
    """dw[t, c, m] = sum over outputs of P(x)[t, c] dy[c, m]."""
    height, width, channels, multiplier = static(kernel_shape)
    window = window_of(node, (height, width))
    seen = patches(node, images, window)
    gradient = tf.reshape(dy, [-1, channels, multiplier])
    parts = []
    for index in range(multiplier):
        tiled = tf.tile(gradient[:, :, index], [1, window.taps])
        parts.append(tf.reshape(column_sum(seen * tiled), [height, width, channels, 1]))
    return _joined(parts)


@lowers("DepthwiseConv2dNativeBackpropInput")
def depthwise_input_gradient(node: Node, image_shape: Tensor, kernel: Tensor, dy: Tensor) -> Tensor:
    """dx = sum over the taps that read a pixel of the sum over m of dy[c, m] w[t, c, m]."""
    batch, height, width, channels = static(image_shape)
    multiplier = kernel.shape[3]
    window = window_of(node, (kernel.shape[0], kernel.shape[1]))
    outputs = dy.shape[1] * dy.shape[2]
    gradient = tf.reshape(dy, [batch * outputs, 1, channels, multiplier])
    weights = tf.reshape(kernel, [1, window.taps, channels, multiplier])
    products = [gradient[..., index] * weights[..., index] for index in range(multiplier)]
    entries = tf.reshape(tf.add_n(products), [batch, outputs * window.taps, channels])
    return sum_touching(entries, window.outputs_of_inputs(height, width), (batch, height, width, channels))
