"""Dense layers: matrix products and biases."""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering import formulations
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()


@lowers("MatMul")
def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """y = a b, either transposed: BATCH_MATMUL of one matrix, without adj_y."""
    return formulations.matmul(a, b, node.attribute("transpose_a"), node.attribute("transpose_b"))


@lowers("BiasAdd")
def bias_add(node: Node, x: Tensor, bias: Tensor) -> Tensor:
    """y = x + b per channel."""
    if node.attribute("data_format") == "NHWC":
        return x + bias
    return x + tf.reshape(bias, [-1] + [1] * (x.shape.rank - 2))


@lowers("BiasAddGrad")
def bias_add_gradient(node: Node, dy: Tensor) -> Tensor:
    """db = sum of dy over all but the channels, in two stages."""
    if node.attribute("data_format") != "NHWC":
        dy = tf.transpose(dy, [0, *range(2, dy.shape.rank), 1])
    return formulations.column_sum(tf.reshape(dy, [-1, dy.shape[-1]]))
