"""Parity of every lowering, op by op: forward and gradient, in TFLite builtins on the device's interpreter.

What TensorFlow ops the Keras layers, activations and losses, tf.nn, tf.math, tf.image and plain array code make was
enumerated by tracing them; the cases below are that list. Several ops share a case where an error of one shows beside
the others.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import numpy as np
import pytest
from parity import UPDATES, Case, between, errors, in_tflite, indices, normal, of_layer, op_types, together, traced

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering import LOWERINGS, lower
from covey_protocol.errors import BundleError

tf = import_tensorflow()
layers = tf.keras.layers

TABLE, IMAGES, VOLUMES = (4, 6), (2, 8, 8, 4), (2, 5, 6, 4, 3)


def each(*functions: Any) -> Any:
    """One function that gives what all of these give."""
    return lambda *inputs: [function(*inputs) for function in functions]


def resized(op: str, align_corners: bool, half_pixel_centers: bool) -> Any:
    def resize(images: Any) -> Any:
        return getattr(tf.raw_ops, op)(
            images=images, size=[5, 11], align_corners=align_corners, half_pixel_centers=half_pixel_centers
        )

    return resize


def einsums(*equations: str) -> Any:
    return each(*[functools.partial(tf.einsum, equation) for equation in equations])


def losses(*names: str, **arguments: Any) -> Any:
    made = [getattr(tf.keras.losses, name)(**arguments) for name in names]
    return lambda outputs, labels: [loss(labels, outputs) for loss in made]


def fixed(function: Any, *shape: int) -> Any:
    """A function whose output has this shape, which TensorFlow itself does not know."""
    return lambda *inputs: tf.ensure_shape(function(*inputs), shape)


def segments(name: str) -> Any:
    return fixed(lambda x: getattr(tf.math, f"segment_{name}")(x, [0, 0, 2, 2]), 3, 6)


def attention(x: Any, **arguments: Any) -> Any:
    return _multi_head()(x, x, **arguments)


@functools.lru_cache(maxsize=1)
def _multi_head() -> Any:
    with tf.init_scope():
        tf.keras.utils.set_random_seed(1)
        layer = layers.MultiHeadAttention(2, 4)
        layer(tf.zeros((2, 5, 8)), tf.zeros((2, 5, 8)))
        return layer


def recurrent(cell: str, **arguments: Any) -> Case:
    return of_layer(lambda: getattr(layers, cell)(5, unroll=True, **arguments), (2, 4, 3))


def masked_words() -> Any:
    words = [
        layers.InputLayer((7,), dtype="int32"),
        layers.Embedding(20, 6, mask_zero=True),
        layers.LSTM(5, unroll=True),
    ]
    return tf.keras.Sequential(words)


def asserted_and_printed(x: Any) -> Any:
    tf.debugging.assert_greater(x, -100.0)
    tf.print("x is", x, output_stream=sys.stderr)
    return tf.raw_ops.Print(input=2.0 * x, data=[x])


def strided(x: Any) -> list[Any]:
    return [x[:, ::2, 1::3, :], x[:, ::-1, 6:1:-2, :], x[..., tf.newaxis, ::2, -1], x[:, -5:-2, ::-3]]


def patches(images: Any) -> Any:
    return tf.image.extract_patches(images, [1, 3, 3, 1], [1, 2, 2, 1], [1, 2, 2, 1], "SAME")


def sparse(dense: Any, values: Any) -> list[Any]:
    matrix = tf.SparseTensor([[0, 1], [2, 0], [2, 3]], values, [3, 4])
    return [
        tf.sparse.sparse_dense_matmul(matrix, dense),
        tf.sparse.sparse_dense_matmul(matrix, dense[:3], adjoint_a=True),
        tf.sparse.sparse_dense_matmul(matrix, dense, adjoint_b=False),
    ]


def sparse_as_dense(dense: Any, values: Any) -> list[Any]:
    """For TensorFlow itself: its 2.14 now and then corrupts memory and dies of running `sparse` thousands of times."""
    matrix = tf.scatter_nd([[0, 1], [2, 0], [2, 3]], values, [3, 4])
    return [matrix @ dense, tf.transpose(matrix) @ dense[:3], matrix @ dense]


def partitioned(x: Any) -> list[Any]:
    first, second = tf.dynamic_partition(x, [0, 1, 0, 1], 2)
    first, second = tf.ensure_shape(first, (2, 6)), tf.ensure_shape(second, (2, 6))
    return [first, tf.dynamic_stitch([[0, 3], [2, 1]], [second, first])]


def scattered(x: Any, rows: Any) -> list[Any]:
    return [
        tf.scatter_nd([[1], [4], [0], [1]], rows, [7, 6]),
        tf.tensor_scatter_nd_add(x, [[1], [3], [1], [0]], rows),
        tf.tensor_scatter_nd_update(x, [[1], [3]], rows[:2]),
        tf.math.unsorted_segment_sum(x, [0, 2, 1, 0], 3),
        tf.math.unsorted_segment_mean(x, [0, 2, 1, 0], 3),
        tf.math.unsorted_segment_max(x, [0, 2, 1, 0], 3),
    ]


def comparisons(a: Any, b: Any) -> list[Any]:
    compared = [tf.greater, tf.greater_equal, tf.less, tf.less_equal, tf.equal, tf.not_equal]
    joined = [tf.logical_and(a > 0, b > 0), tf.logical_or(a > 0, b > 0), tf.math.logical_xor(a > 0, b > 0)]
    return [tf.cast(op(a, b), tf.float32) * a for op in compared] + [tf.where(one, a, b) for one in joined]


def rounded(x: Any, low: Any, high: Any, lows: Any, highs: Any) -> list[Any]:
    return [
        tf.quantization.fake_quant_with_min_max_args(x, -1.0, 1.3),
        tf.quantization.fake_quant_with_min_max_vars(x, low, high),
        tf.quantization.fake_quant_with_min_max_vars(x, low, high, 4, True),
        tf.quantization.fake_quant_with_min_max_vars_per_channel(x, lows, highs),
    ]


def bounds() -> list[Any]:
    return [np.array(values, np.float32) for values in (-1.0, 1.3, [-1.0, -0.5, -2.0], [1.0, 0.7, 0.1])]


def first_layout(name: str, shape: tuple[int, ...], *arguments: Any, **named: Any) -> Case:
    """A layer with the channels first; TensorFlow computes it with the channels last.

    Without oneDNN, as on processors without AVX-512, TensorFlow runs no convolutions with the channels first.
    """
    kind = getattr(layers, name)
    first = of_layer(lambda: kind(*arguments, **named, data_format="channels_first"), shape, by_shape=True)
    last = of_layer(lambda: kind(*arguments, **named), (shape[0], *shape[2:], shape[1]), by_shape=True)
    rank = len(shape)

    def in_last_layout(x: Any) -> Any:
        return tf.transpose(last.function(tf.transpose(x, [0, *range(2, rank), 1])), [0, rank - 1, *range(1, rank - 1)])

    return dataclasses.replace(first, in_tensorflow=in_last_layout)


TRANSFORMS = np.array(
    [[0.9, 0.1, 0.3, -0.2, 1.1, 0.4, 0, 0], [1.2, -0.3, -2.3, 0.2, 0.8, 3.4, 0.01, -0.02]], np.float32
)


def transformed(mode: str, interpolation: str = "BILINEAR") -> Any:
    """Images turned, sheared and moved partly out of sight."""
    return lambda x, t: tf.raw_ops.ImageProjectiveTransformV3(
        images=x, transforms=t, output_shape=[7, 9], fill_value=0.3, interpolation=interpolation, fill_mode=mode
    )


POOLS_3D = {
    f"{kind} pools of volumes, {padding}, stride {stride}": of_layer(
        lambda kind=kind, padding=padding, stride=stride: getattr(layers, f"{kind}Pooling3D")(2, stride, padding),
        VOLUMES,
    )
    for kind in ("Max", "Average")
    for padding, stride in (("valid", 1), ("same", 2), ("same", 3))
}
CONVOLUTIONS_3D = {  # TensorFlow itself sums the bias' gradient, thousands of numbers, less precisely
    f"{kind} convolution of volumes, {padding}, stride {stride}": of_layer(
        lambda kind=kind, padding=padding, stride=stride: getattr(layers, kind)(3, 3, stride, padding),
        VOLUMES,
        tolerance=4e-6,
    )
    for kind in ("Conv3D", "Conv3DTranspose")
    for padding, stride in (("valid", 1), ("same", 2), ("valid", 3))
}
RESIZES = {
    f"{op} with align_corners={align} and half_pixel_centers={half}": Case(resized(op, align, half), normal(IMAGES))
    for op in ("ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic")
    for align, half in ((False, True), (True, False), (False, False))
}

CASES: dict[str, Case] = {
    # elementwise
    "hyperbolic functions": Case(each(tf.sinh, tf.cosh, tf.tanh, tf.asinh), normal(TABLE)),
    "angles": Case(each(tf.sin, tf.cos, tf.atan), normal(TABLE)),
    "inverse functions on (-1, 1)": Case(
        each(tf.tan, tf.asin, tf.acos, tf.atanh, tf.math.erfinv), between(-0.9, 0.9, TABLE)
    ),
    "the inverse hyperbolic cosine": Case(tf.acosh, between(1.1, 4.0, TABLE)),
    "atan2 broadcasts": Case(tf.atan2, normal(TABLE, (1, 6))),
    "error functions": Case(each(tf.math.erf, tf.math.erfc, tf.nn.gelu), normal(TABLE)),
    "normal quantiles": Case(tf.math.ndtri, between(0.1, 0.9, TABLE), tolerance=5e-6),
    "the gamma function's logarithm and its derivatives": Case(
        each(tf.math.lgamma, tf.math.digamma), between(0.1, 5.0, TABLE), tolerance=5e-6
    ),
    "exponentials and logarithms": Case(
        each(tf.exp, tf.math.expm1, tf.math.log, tf.math.log1p, tf.math.log_sigmoid), between(0.1, 3.0, TABLE)
    ),
    "roots and powers": Case(
        each(tf.sqrt, tf.math.rsqrt, tf.math.reciprocal, tf.square, lambda x: x**1.5, lambda x: 2.0**x),
        between(0.3, 3.0, TABLE),
    ),
    "powers with trained exponents": Case(tf.pow, together(between(0.3, 2.0, TABLE), normal((6,)))),
    "ops that only older programs make": Case(
        each(
            lambda x, y: tf.raw_ops.Inv(x=x),
            lambda x, y: tf.raw_ops.InvGrad(y=x, dy=y),
            lambda x, y: tf.raw_ops.SoftplusGrad(gradients=y, features=x),
            lambda x, y: tf.raw_ops.Snapshot(input=x),
            lambda x, y: tf.raw_ops.PreventGradient(input=x),
            lambda x, y: tf.raw_ops.BatchMatMul(x=x[tf.newaxis], y=y[tf.newaxis], adj_y=True),
            lambda x, y: tf.raw_ops.InTopK(predictions=x, targets=[0, 1, 2, 3], k=2),
        ),
        between(0.3, 3.0, TABLE, TABLE),
        differentiate=False,
    ),
    "quotients that are 0 or a multiple where they would be NaN": Case(
        each(tf.math.divide_no_nan, tf.math.xdivy, tf.math.xlogy, tf.math.xlog1py, tf.math.multiply_no_nan),
        between(0.2, 2.0, TABLE, TABLE),
    ),
    "quotients of zeros": Case(
        each(tf.math.divide_no_nan, tf.math.xdivy, tf.math.xlogy, tf.math.multiply_no_nan),
        lambda: [np.array([0, 0, 3], np.float32), np.array([0, 2, 1.5], np.float32)],
        differentiate=False,
    ),
    "modulo and whole quotients": Case(each(tf.math.floormod, tf.math.floordiv), normal(TABLE, TABLE)),
    "modulo of integers below zero": Case(
        each(tf.math.floormod, tf.math.floordiv),
        lambda: [np.array([-7, 7, -7, 6], np.int32), np.array([3, -3, -3, 4], np.int32)],
        differentiate=False,
    ),
    "maxima, minima and differences that broadcast": Case(
        each(tf.maximum, tf.minimum, tf.math.squared_difference, tf.subtract), normal(TABLE, (1, 6))
    ),
    "ties of maxima and minima": Case(
        each(tf.maximum, tf.minimum), lambda: [np.array([1, 2, 3], np.float32), np.array([1, 3, 2], np.float32)]
    ),
    "rounding": Case(
        each(tf.round, tf.floor, tf.math.ceil, tf.sign, tf.math.rint),
        lambda: [np.array([-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 0.7], np.float32)],
        differentiate=False,
    ),
    "NaN and infinity are told": Case(
        each(tf.math.is_nan, tf.math.is_finite, tf.math.is_inf),
        lambda: [np.array([1, np.nan, np.inf, -np.inf, 0], np.float32)],
        differentiate=False,
    ),
    "comparisons and logic": Case(comparisons, normal(TABLE, TABLE)),
    "selection with broadcasting": Case(
        each(lambda x, y: tf.where(y > 0, x, 0.0), lambda x, y: tf.where(x > 0.5, x * x, y)), normal(TABLE, (1, 6))
    ),
    "selection of rows": Case(lambda x, y: tf.compat.v1.where(x[:, 0] > 0, x, y), normal(TABLE, TABLE)),
    "clipping": Case(
        each(
            lambda x: tf.clip_by_value(x, -0.5, 0.5),
            lambda x: tf.clip_by_norm(x, 1.0, axes=[1]),
            lambda x: tf.clip_by_global_norm([x, 2.0 * x], 1.0)[0],
        ),
        normal(TABLE),
    ),
    "numbers that are checked, asserted and printed": Case(
        each(lambda x: tf.debugging.check_numerics(x, "finite"), asserted_and_printed), normal(TABLE)
    ),
    "gradients of one's own, stopped gradients": Case(
        each(tf.custom_gradient(lambda x: (tf.round(x), lambda dy: dy)), lambda x: x * tf.stop_gradient(x)),
        normal(TABLE),
    ),
    # activations and losses
    "every Keras activation": Case(
        each(
            *[
                tf.keras.activations.get(name)
                for name in (
                    "elu",
                    "exponential",
                    "gelu",
                    "hard_sigmoid",
                    "mish",
                    "relu",
                    "selu",
                    "sigmoid",
                    "softmax",
                    "softplus",
                    "softsign",
                    "swish",
                    "tanh",
                )
            ]
        ),
        normal(TABLE),
    ),
    "activations of tf.nn": Case(
        each(tf.nn.relu6, tf.nn.leaky_relu, tf.nn.crelu, tf.nn.log_softmax, lambda x: tf.nn.gelu(x, True)),
        normal(TABLE),
    ),
    "softmax along another axis": Case(
        each(lambda x: tf.nn.softmax(x, 1), lambda x: tf.nn.log_softmax(x, 1)), normal(IMAGES)
    ),
    "PReLU and thresholds": of_layer(
        lambda: tf.keras.Sequential([layers.PReLU(), layers.ThresholdedReLU(0.1), layers.ReLU(3.0, 0.1, 0.2)]), IMAGES
    ),
    "Keras losses of probabilities": Case(
        losses(
            "BinaryCrossentropy",
            "BinaryFocalCrossentropy",
            "CategoricalCrossentropy",
            "CategoricalFocalCrossentropy",
            "KLDivergence",
            "Poisson",
        ),
        between(0.05, 0.95, (4, 5), (4, 5)),
    ),
    "Keras losses of values": Case(
        losses(
            "CosineSimilarity",
            "Huber",
            "LogCosh",
            "MeanAbsoluteError",
            "MeanAbsolutePercentageError",
            "MeanSquaredError",
            "MeanSquaredLogarithmicError",
            "CategoricalHinge",
        ),
        between(0.05, 0.95, (4, 5), (4, 5)),
    ),
    "Keras losses of logits": Case(
        losses("BinaryCrossentropy", "CategoricalCrossentropy", from_logits=True, label_smoothing=0.1),
        together(normal((4, 5)), between(0.05, 0.95, (4, 5))),
    ),
    "Keras losses of class numbers": Case(
        losses("SparseCategoricalCrossentropy", from_logits=True), together(normal((4, 5)), indices(5, 4))
    ),
    "class numbers of pixels": Case(
        losses("SparseCategoricalCrossentropy", from_logits=True), together(normal((2, 3, 3, 5)), indices(5, 2, 3, 3))
    ),
    "losses of tf.nn": Case(
        each(
            lambda x, y: tf.nn.sigmoid_cross_entropy_with_logits(labels=y, logits=x),
            lambda x, y: tf.nn.weighted_cross_entropy_with_logits(y, x, 2.0),
            lambda x, y: tf.nn.log_poisson_loss(y + 1.5, x, True),
            lambda x, y: tf.nn.l2_loss(x),
            lambda x, y: tf.raw_ops.SoftmaxCrossEntropyWithLogits(
                features=x, labels=tf.constant([[0.1, 0.2, 0.3, 0.4, 0.0]])
            )[0],
        ),
        together(normal((4, 5)), between(0.05, 0.95, (4, 5))),
        tolerance=4e-6,
    ),
    # reductions
    "reductions along one axis": Case(
        each(
            *[
                lambda x, name=name: getattr(tf, f"reduce_{name}")(x, 1)
                for name in ("sum", "mean", "max", "min", "prod", "logsumexp")
            ]
        ),
        normal(TABLE),
    ),
    "reductions of everything, and of outer axes": Case(
        each(
            tf.reduce_max,
            tf.reduce_prod,
            tf.math.reduce_std,
            tf.math.reduce_variance,
            tf.math.reduce_euclidean_norm,
            lambda x: tf.math.reduce_euclidean_norm(x, [0, 2], keepdims=True),
            lambda x: tf.reduce_max(x, [0, 2], keepdims=True),
        ),
        normal((3, 4, 5)),
    ),
    "maxima that come twice": Case(
        each(lambda x: tf.reduce_max(x, 1), lambda x: tf.reduce_min(x, 0)),
        lambda: [np.array([[1, 3, 3], [1, 1, 0]], np.float32)],
    ),
    "norms and moments": Case(
        each(lambda x: tf.norm(x, axis=1), lambda x: tf.norm(x, 1, axis=1), lambda x: tf.math.l2_normalize(x, 1)),
        normal(TABLE),
    ),
    "running sums": Case(
        each(lambda x: tf.cumsum(x, 1), lambda x: tf.cumsum(x, 2, exclusive=True, reverse=True)), normal((2, 3, 4))
    ),
    "running products": Case(
        each(
            lambda x: tf.math.cumprod(x, 1),
            lambda x: tf.math.cumprod(x, 0, exclusive=True, reverse=True),
            lambda x: tf.math.cumprod(x, 1, exclusive=True),
        ),
        between(0.3, 2.0, TABLE),
    ),
    "running log-sum-exps": Case(
        each(lambda x: tf.math.cumulative_logsumexp(x, 1), lambda x: tf.math.cumulative_logsumexp(x, 0, reverse=True)),
        normal(TABLE),
    ),
    "positions and orders": Case(
        each(
            lambda x: tf.argmax(x, 1, output_type=tf.int32),
            lambda x: tf.argmin(x, 0, output_type=tf.int32),
            lambda x: tf.argsort(x, 1),
            lambda x: tf.math.top_k(x, 3),
            lambda x: tf.sort(x, 1, "DESCENDING"),
        ),
        normal(TABLE),
    ),
    "whether the target is among the k largest": Case(
        lambda x, targets: tf.math.in_top_k(targets, x, 2), together(normal(TABLE), indices(6, 4)), differentiate=False
    ),
    "counts of bins": Case(
        each(
            fixed(lambda values: tf.math.bincount(values, minlength=5, maxlength=5), 5),
            fixed(lambda values: tf.math.bincount(values, minlength=5, maxlength=5, axis=0, binary_output=True), 5),
        ),
        indices(5, 9),
        differentiate=False,
    ),
    "category encodings": Case(
        each(layers.CategoryEncoding(6, "multi_hot"), layers.CategoryEncoding(6, "count")),
        indices(6, 4, 3),
        differentiate=False,
    ),
    "positions in a sorted row": Case(
        each(
            lambda x: tf.searchsorted([-1.0, 0.0, 1.0], x),
            lambda x: tf.searchsorted([-1.0, 0.0, 1.0], x, "right"),
            layers.Discretization([-1.0, 0.0, 1.0]),
        ),
        lambda: [np.array([-2, -1, -0.5, 0, 1, 3], np.float32)],
        differentiate=False,
    ),
    # shapes
    "slices with steps": Case(strided, normal(IMAGES)),
    "slices and paddings": Case(
        each(
            lambda x: tf.slice(x, [0, 1, 2, 0], [2, 3, 4, -1]),
            lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 3], [0, 0]], constant_values=1.5),
            lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 3], [0, 0]], "REFLECT"),
            lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 3], [1, 0]], "SYMMETRIC"),
        ),
        normal(IMAGES),
    ),
    "a row and an image that the data choose": Case(
        each(lambda x, i: x[i[0]], lambda x, i: x[:, i[1], ::2]),
        together(normal((4, 3, 6)), lambda: [np.array([2, 1], np.int32)]),
    ),
    "a position that the data count from the end": Case(
        lambda x, i: x[i[0]], together(normal(TABLE), lambda: [np.array([-1], np.int32)])
    ),
    "reversals of one axis, two and three": Case(
        each(*[lambda x, axes=axes: tf.reverse(x, axes) for axes in ([1], [1, 2], [0, 1, 3])]), normal(IMAGES)
    ),
    "turns, rolls and sequences reversed": Case(
        each(
            lambda x: tf.roll(x, [1, -2], [1, 2]),
            lambda x: tf.transpose(x, [3, 1, 0, 2]),
            lambda x: tf.reverse_sequence(x, [2, 5], 1, 0),
            lambda x: tf.image.flip_left_right(x),
        ),
        normal(IMAGES),
    ),
    "copies": Case(
        each(
            lambda x: tf.tile(x, [2, 3]),
            lambda x: tf.broadcast_to(x, [5, 4, 6]),
            lambda x: tf.repeat(x, 3, 1),
            lambda x: tf.stack(tf.unstack(x, axis=1)[::2]),
            lambda x: tf.concat(tf.split(x, [1, 2, 3], 1)[::-1], 1),
        ),
        normal(TABLE),
    ),
    "blocks, depth and space": Case(
        each(
            lambda x: tf.nn.space_to_depth(x, 2),
            lambda x: tf.nn.depth_to_space(x, 2),
            lambda x: tf.space_to_batch(x, [2, 2], [[0, 0], [2, 0]]),
            lambda x: tf.raw_ops.BatchToSpaceND(input=x, block_shape=[2, 1], crops=[[1, 0], [0, 0]]),
        ),
        normal(IMAGES),
    ),
    "blocks of volumes": Case(
        lambda x: tf.space_to_batch(x, [2, 2, 3], [[1, 0], [0, 0], [1, 1]]), normal((2, 3, 4, 4, 3))
    ),
    "numbers of other kinds": Case(
        each(lambda x: tf.cast(tf.cast(x, tf.int32), tf.float32), lambda x: tf.cast(x > 0, tf.float32) * x),
        normal(TABLE),
    ),
    "one-hot rows": Case(
        each(
            lambda i: tf.one_hot(i, 5, 2.0, -1.0), lambda i: tf.one_hot(i, 5, axis=0), lambda i: tf.sequence_mask(i, 5)
        ),
        indices(6, 3, 4),
        differentiate=False,
    ),
    # gathers
    "gathers by constants": Case(
        each(
            lambda x: tf.gather(x, [2, 0, 2], axis=0),
            lambda x: tf.gather(x, [[2, 0], [2, 5]], axis=1),
            lambda x: tf.gather_nd(x, [[0, 1], [2, 3], [0, 1]]),
        ),
        normal((4, 6, 3)),
    ),
    "gathers by data": Case(
        each(tf.gather, lambda x, i: tf.gather(x, i, axis=1), lambda x, i: tf.gather_nd(x, i)),
        together(normal((4, 4, 3)), indices(4, 5, 2)),
    ),
    "gathers per example": Case(
        lambda x, i: tf.gather(x, i, axis=1, batch_dims=1), together(normal((4, 6, 3)), indices(6, 4, 5))
    ),
    "embeddings": of_layer(lambda: layers.Embedding(20, 6), inputs=indices(20, 4, 7)),
    "masked embeddings into an LSTM": of_layer(masked_words, inputs=indices(3, 4, 7)),
    "scatters and unsorted segments": Case(scattered, normal(TABLE, TABLE)),
    "unsorted segments that the data name": Case(
        lambda x, i: tf.math.unsorted_segment_sum(x, i, 3), together(normal(TABLE), indices(3, 4))
    ),
    "sums and means of segments": Case(each(segments("sum"), segments("mean")), normal(TABLE)),
    "largest and smallest of segments": Case(each(segments("max"), segments("min")), normal(TABLE)),
    "products of segments": Case(segments("prod"), normal(TABLE), differentiate=False),
    "parts and stitches": Case(partitioned, normal(TABLE)),
    "stitches of parts in parallel": Case(
        lambda x: tf.raw_ops.ParallelDynamicStitch(indices=[[0, 3], [2, 1]], data=[x[:2], x[2:]]),
        normal(TABLE),
        differentiate=False,
    ),
    "sparse matrices": Case(sparse, normal((4, 5), (3,)), in_tensorflow=sparse_as_dense),
    "patches of images": Case(patches, normal(IMAGES)),
    "diagonals": Case(
        each(
            tf.linalg.diag,
            lambda x: tf.linalg.diag_part(x, k=(-1, 1), padding_value=2.0),
            tf.linalg.diag_part,
            lambda x: tf.linalg.diag(x[:, :2], k=(-1, 0), num_rows=5),
            lambda x: tf.linalg.set_diag(x, x[:, 0, :4], k=1),
            lambda x: tf.linalg.set_diag(x, 2.0 * x[:, 1, :4]),
            tf.linalg.trace,
            lambda x: tf.linalg.band_part(x, -1, 0),
        ),
        normal((2, 4, 5)),
    ),
    "diagonals of tensors": Case(
        each(tf.linalg.tensor_diag, lambda x: tf.linalg.tensor_diag_part(x[:, :4])), normal((4, 5))
    ),
    "cross products": Case(tf.linalg.cross, normal((2, 3), (2, 3))),
    # products
    "products of matrices": Case(
        each(tf.matmul, lambda a, b: tf.matmul(b, a, transpose_a=True, transpose_b=True)), normal((4, 6), (6, 3))
    ),
    "batch products of any rank": Case(
        each(
            tf.matmul,
            lambda a, b: tf.matmul(b, a, transpose_a=True, transpose_b=True),
            lambda a, b: tf.matmul(a, tf.transpose(b, [0, 1, 2, 4, 3]), transpose_b=True),
            lambda a, b: tf.matmul(a[0, 0], b[0, 0, 0]),
        ),
        normal((2, 1, 3, 4, 5), (2, 2, 3, 5, 3)),
    ),
    "products with vectors, dots over axes": Case(
        each(tf.linalg.matvec, lambda a, b: tf.tensordot(a, b, [[0, 2], [0, 1]])), normal((2, 4, 5), (2, 5))
    ),
    "Einstein sums of matrices": Case(
        einsums("ij,jk->ik", "ij,jk->k", "ij,jk->", "ij,jk->ijk"), normal((3, 4), (4, 5))
    ),
    "Einstein sums of equals": Case(einsums("ij,ij->i", "ij,ij->", "ij,kj->ik", "ij,kl->ikjl"), normal((3, 4), (3, 4))),
    "Einstein sums of batches": Case(
        einsums("bij,bjk->bik", "bij,bjk->bki", "bij,bjk->ik"), normal((2, 3, 4), (2, 4, 5))
    ),
    "Einstein sums with an ellipsis": Case(
        einsums("...ij,...jk->...ik", "...ij,...jk->...k"), normal((2, 1, 3, 4), (5, 4, 2))
    ),
    "Einstein sums with vectors": Case(einsums("abc,b->ac", "abc,b->c", "abc,b->cba"), normal((2, 3, 4), (3,))),
    "Einstein sums of diagonals": Case(einsums("iij,jk->ik", "iij,jk->k"), normal((3, 3, 4), (4, 5))),
    "Einstein sums of one tensor": Case(einsums("ii->i", "ii->", "ij->ji", "ij->j"), normal((3, 3))),
    "Einstein sums of three tensors": Case(
        lambda a, b, c: tf.einsum("ij,jk,kl->il", a, b, c), normal((3, 4), (4, 5), (5, 2))
    ),
    "multi-head attention": Case(
        each(attention, functools.partial(attention, use_causal_mask=True)), normal((2, 5, 8))
    ),
    "attention layers": of_layer(lambda: layers.Attention(use_scale=True, score_mode="concat"), (2, 5, 8), (2, 4, 8)),
    "additive attention": of_layer(lambda: layers.AdditiveAttention(), (2, 5, 8), (2, 4, 8)),
    "EinsumDense": of_layer(lambda: layers.EinsumDense("...x,xy->...y", 4, bias_axes="y"), (2, 5, 8)),
    "dots of layers": of_layer(lambda: layers.Dot(1, normalize=True), (2, 5), (2, 5)),
    # images
    **RESIZES,
    "UpSampling2D bilinear": of_layer(lambda: layers.UpSampling2D((2, 3), interpolation="bilinear"), IMAGES),
    "UpSampling2D by whole factors": of_layer(lambda: layers.UpSampling2D((2, 3)), IMAGES),
    "Resizing with the Lanczos kernel": of_layer(lambda: layers.Resizing(5, 11, interpolation="lanczos3"), IMAGES),
    "resizing that is antialiased": Case(
        each(
            *[
                lambda x, kind=kind: tf.image.resize(x, (5, 11), kind, antialias=True)
                for kind in ("bilinear", "bicubic", "gaussian", "mitchellcubic")
            ]
        ),
        normal(IMAGES),
    ),
    "resizing by area, before what is trained": Case(
        lambda x: tf.image.resize(x, (5, 11), "area"), normal(IMAGES), differentiate=False
    ),
    "local responses": Case(
        each(tf.nn.local_response_normalization, lambda x: tf.nn.local_response_normalization(x, 1, 1.5, 0.5, 0.6)),
        normal(IMAGES),
    ),
    "max pools with explicit padding": Case(
        lambda x: tf.nn.max_pool2d(x, 3, 2, [[0, 0], [1, 1], [0, 1], [0, 0]]), normal(IMAGES)
    ),
    "spectra before what is trained": Case(
        lambda x: tf.abs(tf.signal.stft(x, 8, 4)), normal((2, 32)), differentiate=False
    ),
    "images turned and moved": Case(
        each(
            *[transformed(mode) for mode in ("REFLECT", "WRAP", "CONSTANT", "NEAREST")],
            *[transformed(mode, "NEAREST") for mode in ("REFLECT", "WRAP", "CONSTANT", "NEAREST")],
        ),
        together(normal((2, 8, 10, 3)), lambda: [TRANSFORMS]),
        differentiate=False,
    ),
    "contrasts, before what is trained": Case(
        lambda x: tf.image.adjust_contrast(x, 1.3), normal(IMAGES), differentiate=False
    ),
    # convolutions
    "convolutions of images": of_layer(
        lambda: tf.keras.Sequential(
            [layers.Conv2D(4, 3, 2, "same"), layers.Conv2DTranspose(4, 3, 2), layers.DepthwiseConv2D(3, padding="same")]
        ),
        IMAGES,
    ),
    "atrous and explicitly padded convolutions": Case(
        each(
            lambda x, k: tf.nn.atrous_conv2d(x, k, 2, "SAME"),
            lambda x, k: tf.nn.conv2d(x, k, 2, [[0, 0], [1, 2], [0, 1], [0, 0]]),
            lambda x, k: tf.nn.depthwise_conv2d(x, k, [1, 1, 1, 1], [[0, 0], [1, 2], [0, 1], [0, 0]]),
        ),
        normal(IMAGES, (3, 3, 4, 2)),
    ),
    "causal and separable convolutions of sequences": of_layer(
        lambda: tf.keras.Sequential(
            [
                layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
                layers.SeparableConv1D(3, 3),
                layers.Conv1DTranspose(3, 3, 2),
                layers.MaxPooling1D(2),
                layers.AveragePooling1D(2),
            ]
        ),
        (2, 12, 4),
    ),
    **{
        f"locally connected layers, implementation {number}": of_layer(
            lambda number=number: layers.LocallyConnected2D(3, 3, implementation=number), (2, 6, 6, 2)
        )
        for number in (1, 2, 3)
    },
    **CONVOLUTIONS_3D,
    "dilated convolutions of volumes": of_layer(lambda: layers.Conv3D(3, 2, dilation_rate=2), VOLUMES),
    "grouped convolutions of volumes": of_layer(lambda: layers.Conv3D(4, 3, groups=2), (2, 4, 4, 4, 2)),
    **POOLS_3D,
    "volumes enlarged, cropped and padded": of_layer(
        lambda: tf.keras.Sequential(
            [layers.UpSampling3D(2), layers.Cropping3D(1), layers.ZeroPadding3D(1), layers.GlobalMaxPooling3D()]
        ),
        VOLUMES,
    ),
    "channels-first convolutions": first_layout("Conv2D", (2, 4, 8, 8), 3, 3, strides=2, padding="same"),
    "channels-first depthwise convolutions": first_layout("DepthwiseConv2D", (2, 4, 8, 8), 3, padding="same"),
    "channels-first transposed convolutions": first_layout("Conv2DTranspose", (2, 4, 8, 8), 3, 3, strides=2),
    "channels-first convolutions of volumes": first_layout("Conv3D", (2, 3, 5, 6, 4), 3, 3, padding="same"),
    "channels-first pools of volumes": first_layout("MaxPooling3D", (2, 3, 5, 6, 4)),
    # normalisation, recurrence, the rest
    "batch norm of volumes": of_layer(lambda: layers.BatchNormalization(), VOLUMES, training=True),
    "batch norm along the first axis": of_layer(lambda: layers.BatchNormalization(axis=1), IMAGES, training=True),
    "layer norm over two axes": of_layer(lambda: layers.LayerNormalization(axis=[1, 2]), IMAGES),
    "an unrolled LSTM": recurrent("LSTM", return_sequences=True, go_backwards=True),
    "an unrolled GRU": recurrent("GRU"),
    "an unrolled GRU that resets before": recurrent("GRU", reset_after=False),
    "an unrolled SimpleRNN": recurrent("SimpleRNN"),
    "a bidirectional LSTM": of_layer(
        lambda: layers.Bidirectional(layers.LSTM(4, unroll=True, return_sequences=True)), (2, 4, 3)
    ),
    "stacked recurrent cells": of_layer(
        lambda: layers.RNN([layers.LSTMCell(4), layers.GRUCell(3)], unroll=True), (2, 4, 3)
    ),
    "layers for every time step": of_layer(lambda: layers.TimeDistributed(layers.Conv2D(3, 3)), (2, 3, 6, 6, 2)),
    "merging layers": Case(
        lambda a, b: [
            getattr(layers, name)()([a, b])
            for name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate")
        ],
        normal((2, 5), (2, 5)),
    ),
    "numbers rounded as int8 will round them": Case(rounded, together(normal((5, 3)), bounds)),
    "a vectorised map": Case(lambda x: tf.vectorized_map(lambda row: row * tf.reduce_sum(row), x), normal(TABLE)),
    "differences of neighbouring pixels": Case(
        each(tf.image.total_variation, tf.image.sobel_edges), normal((2, 6, 6, 3))
    ),
    "structural similarity": Case(
        lambda a, b: tf.image.ssim(a, b, 1.0, 5), between(0.0, 1.0, (2, 12, 12, 1), (2, 12, 12, 1)), tolerance=1e-5
    ),
}


@functools.cache
def traced_case(name: str) -> Any:
    return traced(CASES[name])


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient_equal_tensorflow(case: str) -> None:
    worst = errors(CASES[case], traced_case(case))
    assert max(worst.values()) < CASES[case].tolerance, worst


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_read_back_equals_the_interpreter(case: str) -> None:
    worst = errors(CASES[case], traced_case(case), read_back=True)
    assert max(worst.values()) < CASES[case].tolerance, worst


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_channels_first_pools_equal_numpy(kind: str) -> None:
    """Not TensorFlow: oneDNN in 2.14 gives wrong pools beside transposes of the same shape."""
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    pool = getattr(tf.nn, f"{kind}_pool2d")
    case = Case(lambda images: tf.square(pool(images, 2, 2, "VALID", data_format="NCHW")), lambda: [x])
    computed = in_tflite(traced(case))(x0=x)
    windows = x.reshape(2, 4, 4, 2, 4, 2).transpose(0, 1, 2, 4, 3, 5).reshape(2, 4, 4, 4, 4)
    pooled = windows.max(-1) if kind == "max" else windows.mean(-1)
    share = np.eye(4)[windows.argmax(-1)] if kind == "max" else np.full(windows.shape, 0.25)
    weights = np.random.default_rng(100).uniform(0.5, 1.5, pooled.shape).astype(np.float32)
    gradient = (2.0 * weights * pooled)[..., None] * share
    gradient = gradient.reshape(2, 4, 4, 4, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(x.shape)
    np.testing.assert_allclose(computed["y0"], pooled**2, atol=1e-6)
    np.testing.assert_allclose(computed["g0"], gradient, atol=2e-6)


def test_every_lowering_has_a_case() -> None:
    seen = {op for name in CASES for op in op_types(traced_case(name).graph)}
    wanted = {op for op in LOWERINGS if not op.startswith(UPDATES)}  # those have cases beside the optimizers
    assert wanted <= seen, wanted - seen


REFUSED: dict[str, Case] = {
    "CTC": Case(
        lambda x: tf.compat.v1.nn.ctc_loss(tf.SparseTensor([[0, 0], [1, 0]], [1, 2], [2, 1]), x, [4, 4]),
        normal((4, 2, 5)),
    ),
    "morphology": Case(
        lambda x, k: tf.nn.dilation2d(x, k, [1, 1, 1, 1], "SAME", "NHWC", [1, 1, 1, 1]), normal(IMAGES, (3, 3, 4))
    ),
    "inverse matrices": Case(tf.linalg.inv, normal((2, 3, 3))),
    "trained spectra": Case(lambda x: tf.abs(tf.signal.rfft(x)), normal((2, 8))),
    "calls of Python": Case(
        lambda x: x * fixed(lambda y: tf.py_function(tf.sin, [y], tf.float32), 2, 8)(x), normal((2, 8))
    ),
    "random pools": Case(lambda x: tf.nn.fractional_max_pool(x, 1.5, seed=1)[0], normal(IMAGES)),
    "unique numbers": Case(
        lambda x, i: tf.math.unsorted_segment_sum(x, tf.unique_with_counts(i)[1], 4),
        together(normal(TABLE), indices(3, 4)),
    ),
    "a second polygamma function": Case(lambda x: tf.math.polygamma(2.0, x), between(0.5, 2.0, TABLE), False),
    "as many bins as the data say": Case(
        lambda i: tf.reduce_sum(tf.math.bincount(i)), indices(5, 9), differentiate=False
    ),
    "a slice whose length the data choose": Case(
        lambda x, i: tf.reduce_sum(x[: i[0]]), together(normal(TABLE), indices(3, 1))
    ),
    "segments that the data name": Case(
        lambda x, i: tf.reduce_sum(tf.math.segment_max(x, i)), together(normal(TABLE), indices(1, 4)), False
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_with_a_remedy(case: str) -> None:
    with pytest.raises(BundleError) as refused:
        lower(traced(REFUSED[case]))
    assert refused.value.what.startswith("the op ")
    assert len(refused.value.remedy) > 10
