"""Matrix products, convolutions, pools and sums over axes."""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.importing.registry import Call, Tensor, activated, axes_of, imports
from covey_protocol.errors import BundleError

tf = import_tensorflow()
PADDINGS = ("SAME", "VALID")  # the schema's numbers


@imports("BATCH_MATMUL")
def batch_matmul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return tf.matmul(x, y, adjoint_a=bool(call.whole("AdjX")), adjoint_b=bool(call.whole("AdjY")))


@imports("FULLY_CONNECTED")
def fully_connected(call: Call, x: Tensor, weights: Tensor, bias: Tensor = None) -> Tensor:
    """x W' + b for weights (N, K); leading axes of x are rows."""
    if call.whole("WeightsFormat"):
        raise BundleError("a FULLY_CONNECTED in the model has shuffled weights", "export the model with covey")
    product = tf.matmul(tf.reshape(x, [-1, weights.shape[-1]]), weights, transpose_b=True)
    return tf.reshape(activated(call, _biased(product, bias)), call.shape)


def _biased(x: Tensor, bias: Tensor) -> Tensor:
    return x if bias is None else x + bias


def _window(call: Call, first: str, second: str) -> list[int]:
    return [call.whole(first, 1), call.whole(second, 1)]


def _padding(call: Call) -> str:
    number = call.whole("Padding")
    if number not in (0, 1):
        raise BundleError(f"a {call.name} in the model has a padding {number}", "export the model with covey")
    return PADDINGS[number]


@imports("CONV_2D")
def convolution(call: Call, x: Tensor, kernel: Tensor, bias: Tensor = None) -> Tensor:
    """The file's kernels are (output channels, height, width, channels)."""
    y = tf.nn.conv2d(
        x,
        tf.transpose(kernel, [1, 2, 3, 0]),
        _window(call, "StrideH", "StrideW"),
        _padding(call),
        dilations=_window(call, "DilationHFactor", "DilationWFactor"),
    )
    return activated(call, _biased(y, bias))


@imports("DEPTHWISE_CONV_2D")
def depthwise_convolution(call: Call, x: Tensor, kernel: Tensor, bias: Tensor = None) -> Tensor:
    """The file's kernels are (1, height, width, channels times multiplier)."""
    height, width, outputs = kernel.shape[1:]
    y = tf.nn.depthwise_conv2d(
        x,
        tf.reshape(kernel, [height, width, x.shape[-1], outputs // x.shape[-1]]),
        [1, *_window(call, "StrideH", "StrideW"), 1],
        _padding(call),
        dilations=_window(call, "DilationHFactor", "DilationWFactor"),
    )
    return activated(call, _biased(y, bias))


@imports("MAX_POOL_2D")
def max_pool(call: Call, x: Tensor) -> Tensor:
    """Of equal maxima TensorFlow gives the gradient to the first, as covey's own gradients do."""
    return activated(call, tf.nn.max_pool2d(x, *_pool(call), _padding(call)))


@imports("AVERAGE_POOL_2D")
def average_pool(call: Call, x: Tensor) -> Tensor:
    return activated(call, tf.nn.avg_pool2d(x, *_pool(call), _padding(call)))


def _pool(call: Call) -> tuple[list[int], list[int]]:
    return _window(call, "FilterHeight", "FilterWidth"), _window(call, "StrideH", "StrideW")


@imports("RFFT2D")
def real_fourier_transform(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    return tf.signal.rfft2d(x, lengths)


@imports("RESIZE_BILINEAR")
def resize_bilinear(call: Call, images: Tensor, size: Tensor) -> Tensor:
    """As two products with matrices of weights: TensorFlow's own op gives float32 whatever it gets."""
    height, width = (_interpolation(call, images.shape[axis], call.shape[axis]) for axis in (1, 2))
    return tf.einsum("ih,nhwc,jw->nijc", height, images, width)


def _interpolation(call: Call, before: int, after: int) -> Tensor:
    """(after, before): how much of each old row a new row takes."""
    centres = [min(max(_source(call, place, before, after), 0.0), before - 1.0) for place in range(after)]
    rows = [[max(0.0, 1.0 - abs(centre - old)) for old in range(before)] for centre in centres]
    return tf.constant(rows, call.real)


def _source(call: Call, place: int, before: int, after: int) -> float:
    if call.whole("AlignCorners") and after > 1:
        return place * (before - 1) / (after - 1)
    if call.whole("HalfPixelCenters"):
        return (place + 0.5) * before / after - 0.5
    return place * before / after


@imports("RESIZE_NEAREST_NEIGHBOR")
def resize_nearest(call: Call, images: Tensor, size: Tensor) -> Tensor:
    return tf.raw_ops.ResizeNearestNeighbor(
        images=images,
        size=size,
        align_corners=bool(call.whole("AlignCorners")),
        half_pixel_centers=bool(call.whole("HalfPixelCenters")),
    )


@imports("SUM", "MEAN", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ALL", "REDUCE_ANY")
def reduced(call: Call, x: Tensor, axes: Tensor) -> Tensor:
    reduce = {
        "SUM": tf.reduce_sum, "MEAN": tf.reduce_mean, "REDUCE_MAX": tf.reduce_max, "REDUCE_MIN": tf.reduce_min,
        "REDUCE_PROD": tf.reduce_prod, "REDUCE_ALL": tf.reduce_all, "REDUCE_ANY": tf.reduce_any,
    }[call.name]  # fmt: skip
    return tf.reshape(reduce(x, axes_of(call, axes)), call.shape)
