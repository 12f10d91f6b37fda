"""Activations and elementwise mathematics that TFLite 2.14 lacks, and the gradients of those it has."""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import absolute, is_positive, minus, size
from covey_models.lowering.pooling import is_masked_where_pooled
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

SELU_SCALE = 1.0507009873554805
SELU_ALPHA = 1.6732632423543772


@lowers("ReluGrad")
def relu_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    upstream = node.op.inputs[0].op
    if upstream.type == "MaxPoolGrad" and is_masked_where_pooled(upstream):
        return dy
    # TensorFlow hands over the output of Relu; only an op of unknown origin can be negative.
    return dy * is_positive(y if node.op.inputs[1].op.type == "Relu" else tf.nn.relu(y))


@lowers("Relu6Grad")
def relu6_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    if node.op.inputs[1].op.type != "Relu6":
        y = tf.nn.relu6(y)
    return dy * is_positive(y * minus(6.0, y))


@lowers("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    return tf.nn.relu(x) + -node.attribute("alpha") * tf.nn.relu(-1.0 * x)


@lowers("LeakyReluGrad")
def leaky_relu_gradient(node: Node, dy: Tensor, x: Tensor) -> Tensor:
    alpha = node.attribute("alpha")
    return dy * (alpha + (1.0 - alpha) * is_positive(tf.nn.relu(x)))


@lowers("EluGrad")
def elu_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    return dy * minus(1.0, tf.nn.relu(-y))


@lowers("Selu")
def selu(node: Node, x: Tensor) -> Tensor:
    return SELU_SCALE * (tf.nn.relu(x) + SELU_ALPHA * (tf.exp(-tf.nn.relu(-x)) + -1.0))


@lowers("SeluGrad")
def selu_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    positive = is_positive(tf.nn.relu(y))
    return dy * (positive * SELU_SCALE + minus(1.0, positive) * (y + SELU_SCALE * SELU_ALPHA))


@lowers("TanhGrad")
def tanh_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    return dy * minus(1.0, y * y)


@lowers("SigmoidGrad")
def sigmoid_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    return dy * y * minus(1.0, y)


@lowers("Softplus")
def softplus(node: Node, x: Tensor) -> Tensor:
    return tf.nn.relu(x) + tf.math.log(1.0 + tf.exp(-1.0 * absolute(x)))


@lowers("SoftplusGrad")
def softplus_gradient(node: Node, dy: Tensor, x: Tensor) -> Tensor:
    return dy * tf.sigmoid(x)


@lowers("Softsign")
def softsign(node: Node, x: Tensor) -> Tensor:
    return x / (1.0 + absolute(x))


@lowers("SoftsignGrad")
def softsign_gradient(node: Node, dy: Tensor, x: Tensor) -> Tensor:
    below = 1.0 + absolute(x)
    return dy / (below * below)


@lowers("SqrtGrad")
def sqrt_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    return dy * 0.5 / y


@lowers("RsqrtGrad")
def rsqrt_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    return dy * -0.5 * y * y * y


@lowers("Reciprocal", "Inv")
def reciprocal(node: Node, x: Tensor) -> Tensor:
    return 1.0 / x


@lowers("ReciprocalGrad", "InvGrad")
def reciprocal_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    return -dy * y * y


@lowers("Log1p")
def log1p(node: Node, x: Tensor) -> Tensor:
    """Absolute error up to 6e-8; TensorFlow's own is relative. Losses add it to numbers of size one."""
    return tf.math.log(1.0 + x)


@lowers("Expm1")
def expm1(node: Node, x: Tensor) -> Tensor:
    return tf.exp(x) + -1.0


@lowers("DivNoNan")
def divide_no_nan(node: Node, a: Tensor, b: Tensor) -> Tensor:
    is_zero = minus(1.0, absolute(tf.sign(b)))
    return a * minus(1.0, is_zero) / (b + is_zero)


@lowers("Erf")
def erf(node: Node, x: Tensor) -> Tensor:
    """Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7."""
    distance = absolute(x)
    below = 1.0 + 0.3275911 * distance
    t = tf.sign(below) / below  # 1 / below, without a broadcast
    series = ((((1.061405429 * t - 1.453152027) * t) + 1.421413741) * t - 0.284496736) * t + 0.254829592
    return tf.sign(x) * minus(1.0, series * t * tf.exp(-1.0 * distance * distance))


@lowers("Sub")
def subtract(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return minus(a, b) if a.dtype.is_floating else a - b


@lowers("Square")
def square(node: Node, x: Tensor) -> Tensor:
    return x * x


@lowers("SquaredDifference")
def squared_difference(node: Node, a: Tensor, b: Tensor) -> Tensor:
    difference = subtract(node, a, b)
    return difference * difference


@lowers("Abs")
def absolute_value(node: Node, x: Tensor) -> Tensor:
    return absolute(x) if x.dtype.is_floating else tf.abs(x)


@lowers("RealDiv")
def divide(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Dividing by a broadcast tensor is 30 times slower in TFLite 2.14 than multiplying by its reciprocal."""
    return a * (1.0 / b) if a.dtype.is_floating and size(b) < size(a) else a / b
