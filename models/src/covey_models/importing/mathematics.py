"""Operators that work number by number, on all types; and the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.importing.registry import Call, Tensor, activated, between_ones, imports

tf = import_tensorflow()


def _plain(name: str, function: Callable[..., Any]) -> None:
    imports(name)(lambda call, *inputs: function(*inputs))


for _name, _function in {
    "ABS": tf.abs, "NEG": tf.negative, "SIGN": tf.sign, "SQUARE": tf.square, "SQRT": tf.sqrt, "RSQRT": tf.math.rsqrt,
    "EXP": tf.exp, "LOG": tf.math.log, "SIN": tf.sin, "COS": tf.cos, "FLOOR": tf.floor, "CEIL": tf.math.ceil,
    "ROUND": tf.round, "LOGISTIC": tf.sigmoid, "TANH": tf.tanh, "RELU": tf.nn.relu, "RELU6": tf.nn.relu6,
    "ELU": tf.nn.elu, "RELU_N1_TO_1": between_ones, "MAXIMUM": tf.maximum, "MINIMUM": tf.minimum, "POW": tf.pow,
    "ATAN2": tf.math.atan2,    "FLOOR_DIV": tf.math.floordiv, "FLOOR_MOD": tf.math.floormod,
    "SQUARED_DIFFERENCE": tf.math.squared_difference,
    "EQUAL": tf.equal, "NOT_EQUAL": tf.not_equal, "LESS": tf.less, "LESS_EQUAL": tf.less_equal,
    "GREATER": tf.greater, "GREATER_EQUAL": tf.greater_equal, "LOGICAL_AND": tf.logical_and,
    "LOGICAL_OR": tf.logical_or, "LOGICAL_NOT": tf.logical_not, "BITWISE_XOR": tf.bitwise.bitwise_xor,
    "RIGHT_SHIFT": tf.bitwise.right_shift, "SELECT_V2": tf.where, "ZEROS_LIKE": tf.zeros_like,
    "LOG_SOFTMAX": tf.nn.log_softmax, "COMPLEX_ABS": tf.abs,
}.items():  # fmt: skip
    _plain(_name, _function)


def _fused(name: str, function: Callable[..., Any]) -> None:
    imports(name)(lambda call, x, y: activated(call, function(x, y)))


for _name, _function in {"ADD": tf.add, "SUB": tf.subtract, "MUL": tf.multiply, "DIV": tf.divide}.items():
    _fused(_name, _function)


@imports("ADD_N")
def sum_of_inputs(call: Call, *inputs: Tensor) -> Tensor:
    return tf.add_n([tf.convert_to_tensor(one) for one in inputs])


@imports("SELECT")
def select(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Where a condition has one axis, it chooses whole rows."""
    return tf.compat.v1.where(condition, x, y)


@imports("CAST")
def cast(call: Call, x: Tensor) -> Tensor:
    return tf.cast(x, call.type)


@imports("BUCKETIZE")
def bucketize(call: Call, x: Tensor) -> Tensor:
    return tf.raw_ops.Bucketize(input=x, boundaries=call.operator.settings["Boundaries"])


@imports("SOFTMAX")
def softmax(call: Call, x: Tensor) -> Tensor:
    return tf.nn.softmax(call.number("Beta", 1.0) * x)


@imports("LEAKY_RELU")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    return tf.nn.leaky_relu(x, call.number("Alpha", 0.0))


@imports("HARD_SWISH")
def hard_swish(call: Call, x: Tensor) -> Tensor:
    return x * tf.nn.relu6(x + 3.0) / 6.0


@imports("LOCAL_RESPONSE_NORMALIZATION")
def local_response_normalization(call: Call, x: Tensor) -> Tensor:
    """x / (bias + alpha s)^beta, s the sum of squares of the channels at most `radius` away."""
    channels = np.arange(x.shape[-1])
    near = np.abs(channels[:, None] - channels) <= call.whole("Radius")
    squares = tf.tensordot(x * x, tf.constant(near.astype(call.real.as_numpy_dtype)), 1)
    return x * tf.pow(call.number("Bias", 0.0) + call.number("Alpha", 0.0) * squares, -call.number("Beta", 0.0))
