"""What an exported model is held against where float32 TensorFlow is no judge: float64, and twins without kinks.

A ReLU whose pre-activation lies within rounding of 0 takes one side in one correct float32 program and the other in
another; in a deep net one such bit moves a step by a thousandth, in TensorFlow as in TFLite. So a net with kinks is
judged twice. Its *smooth twin*, the same graph with every kinked op replaced by a smooth one, must agree with float64
closely; and the net itself must be no further from float64 than TensorFlow's own float32 is (`covey_models.proof`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from covey_models._tensorflow import has_double_kernel, import_tensorflow
from covey_models.lowering import LOOPS, Node, all_ops, lowers, rewrite
from covey_models.lowering.registry import Table
from covey_models.lowering.rewriter import again, scope_of

tf = import_tensorflow()
Tensor = Any

SMOOTH: Table = {}
DOUBLE: Table = {}


# --- twins without kinks


def has_kinks(functions: Iterable[Any]) -> bool:
    return any(op.type in SMOOTH for function in functions for op in all_ops(function.graph))


def smooth_twin(function: Any) -> Any:
    """The same function with every kinked op replaced by a smooth one, forward and backward alike."""
    return rewrite(function, {**LOOPS, **SMOOTH}).function


@lowers("Relu", "Selu", table=SMOOTH)
def softplus(node: Node, x: Tensor) -> Tensor:
    """ln(1 + exp x)"""
    return tf.nn.softplus(x)


@lowers("ReluGrad", "SeluGrad", table=SMOOTH)
def softplus_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    """sigmoid(x) = 1 - exp(-y), from the output as for ReLU"""
    return dy * (1.0 - tf.exp(-tf.abs(y)))


@lowers("Relu6", table=SMOOTH)
def six_sigmoid(node: Node, x: Tensor) -> Tensor:
    """6 sigmoid((x - 3) / 1.5): slope 1 in the middle"""
    return 6.0 * tf.sigmoid((x - 3.0) / 1.5)


@lowers("Relu6Grad", table=SMOOTH)
def six_sigmoid_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    """y (6 - y) / 9"""
    return dy * y * (6.0 - y) / 9.0


@lowers("LeakyRelu", table=SMOOTH)
def leaky_softplus(node: Node, x: Tensor) -> Tensor:
    """alpha x + (1 - alpha) ln(1 + exp x)"""
    alpha = node.attribute("alpha")
    return alpha * x + (1.0 - alpha) * tf.nn.softplus(x)


@lowers("LeakyReluGrad", table=SMOOTH)
def leaky_softplus_gradient(node: Node, dy: Tensor, x: Tensor) -> Tensor:
    """alpha + (1 - alpha) sigmoid(x)"""
    alpha = node.attribute("alpha")
    return dy * (alpha + (1.0 - alpha) * tf.sigmoid(x))


@lowers("MaxPool", table=SMOOTH)
def average_pool(node: Node, x: Tensor) -> Tensor:
    return tf.raw_ops.AvgPool(value=x, **_pooling(node))


@lowers("MaxPoolGrad", table=SMOOTH)
def average_pool_gradient(node: Node, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    return tf.raw_ops.AvgPoolGrad(orig_input_shape=x.shape, grad=dy, **_pooling(node))


def _pooling(node: Node) -> dict[str, Any]:
    return {name: node.attribute(name) for name in ("ksize", "strides", "padding", "data_format")}


# --- float64


def in_double(function: Any, shadows: Mapping[int, Any], constants: Mapping[int, Any]) -> Any:
    """The same function in float64; its inputs stay as they are, its float outputs are float64.

    shadows: id of a variable's handle -> the variable to use in its place (see `shadow_of`). constants: the same for
    variables that are only read -> their values.
    """

    def captured(tensor: Tensor) -> Tensor:
        return shadows[id(tensor)].handle if id(tensor) in shadows else _as_double(tensor)

    doubled = {handle: _double_array(value) for handle, value in constants.items()}
    table = {**LOOPS, **DOUBLE}
    return rewrite(
        function, table, constants=doubled, copy=_again_in_double, captured=captured, argument=_as_double
    ).function


def shadow_of(variable: Any) -> Any:
    """A variable with the same value, in float64 if the original is a float."""
    dtype = tf.float64 if variable.dtype == tf.float32 else variable.dtype
    return tf.Variable(tf.cast(variable, dtype), dtype=dtype, trainable=False)


def _as_double(tensor: Tensor) -> Tensor:
    return tf.cast(tensor, tf.float64) if tensor.dtype == tf.float32 else tensor


def _double_array(value: Any) -> Any:
    return value.astype(np.float64) if value.dtype == np.float32 else value


def _again_in_double(op: Any, inputs: Sequence[Tensor], name: str) -> list[Tensor]:
    """The op with every float32 attribute turned to float64; in float32 between casts where there is no such kernel."""
    if op.type == "Const":
        return [tf.constant(_double_array(tf.make_ndarray(op.get_attr("value"))))]
    if not has_double_kernel(op.type):
        single = [tf.cast(value, tf.float32) if value.dtype == tf.float64 else value for value in inputs]
        return [_as_double(output) for output in again(op, single, name)]
    graph = tf.compat.v1.get_default_graph()
    attributes = {key: _typed(value) for key, value in op.node_def.attr.items() if not key.startswith("_")}
    dtypes = [tf.float64 if output.dtype == tf.float32 else output.dtype for output in op.outputs]
    return list(graph.create_op(op.type, list(inputs), dtypes, name=scope_of(name), attrs=attributes).outputs)


def _typed(attribute: Any) -> Any:
    single, double = tf.float32.as_datatype_enum, tf.float64.as_datatype_enum
    changed = type(attribute)()
    changed.CopyFrom(attribute)
    if changed.type == single:
        changed.type = double
    for position, dtype in enumerate(changed.list.type):
        if dtype == single:
            changed.list.type[position] = double
    return changed


@lowers("FusedBatchNormV3", table=DOUBLE)
def batch_norm(
    node: Node, x: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, ...]:
    """TensorFlow's fused op has no float64 kernel: the same from its moments and its batch_normalization."""
    axes, spread = _layout(node)
    if not node.attribute("is_training"):
        y = _normalised(node, x, spread(scale), spread(offset), spread(mean), spread(variance))
        return y, mean, variance, mean, variance, mean
    batch_mean, batch_variance = tf.nn.moments(x, axes)
    y = _normalised(node, x, spread(scale), spread(offset), spread(batch_mean), spread(batch_variance))
    count = float(np.prod([x.shape[axis] for axis in axes]))
    share = node.attribute("exponential_avg_factor")
    new_mean = mean + share * (batch_mean - mean) if share != 1.0 else batch_mean
    unbiased = batch_variance * (count / max(count - 1.0, 1.0))
    new_variance = variance + share * (unbiased - variance) if share != 1.0 else unbiased
    return y, new_mean, new_variance, batch_mean, batch_variance, batch_mean


@lowers("FusedBatchNormGradV3", table=DOUBLE)
def batch_norm_gradient(
    node: Node, dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, variance: Tensor, _unused: Tensor
) -> tuple[Tensor, ...]:
    """By differentiating the formula above, not by one written down."""
    axes, spread = _layout(node)
    offset = tf.zeros_like(scale)
    with tf.GradientTape() as tape:
        tape.watch([x, scale, offset])
        if node.attribute("is_training"):
            mean, variance = tf.nn.moments(x, axes)
        y = _normalised(node, x, spread(scale), spread(offset), spread(mean), spread(variance))
    dx, d_scale, d_offset = tape.gradient(y, [x, scale, offset], output_gradients=dy)
    return dx, d_scale, d_offset, mean, mean


def _layout(node: Node) -> tuple[list[int], Any]:
    """The axes that are averaged over, and how a vector of channels is laid along an image."""
    if node.attribute("data_format") == "NCHW":
        return [0, 2, 3], lambda vector: tf.reshape(vector, [1, -1, 1, 1])
    return [0, 1, 2], lambda vector: vector


def _normalised(node: Node, x: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    epsilon = tf.constant(node.attribute("epsilon"), x.dtype)
    return tf.nn.batch_normalization(x, mean, variance, offset, scale, epsilon)
