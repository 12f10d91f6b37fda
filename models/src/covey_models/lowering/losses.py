"""Fused losses of TensorFlow: each op returns the loss per example and its gradient with respect to the logits."""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import column_sum
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()


@lowers("SparseSoftmaxCrossEntropyWithLogits")
def sparse_cross_entropy(node: Node, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """loss = -log softmax(x)[label]; d loss / dx = softmax(x) - onehot(label).

    A label outside the classes gives loss 0 here and an error in TensorFlow: devices check labels first.
    """
    return cross_entropy(node, logits, tf.one_hot(tf.cast(labels, tf.int32), logits.shape[-1]))


@lowers("SoftmaxCrossEntropyWithLogits")
def cross_entropy(node: Node, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """loss = -sum of p log softmax(x); d loss / dx = softmax(x) sum(p) - p, for labels p that sum to 1: softmax(x) - p.

    TensorFlow's op leaves out sum(p) too.
    """
    loss = -tf.reduce_sum(labels * tf.nn.log_softmax(logits), -1)
    return loss, tf.nn.softmax(logits) - labels


@lowers("L2Loss")
def half_squared_norm(node: Node, x: Tensor) -> Tensor:
    """y = (sum of x^2) / 2."""
    return 0.5 * tf.reshape(column_sum(tf.reshape(x * x, [-1, 1])), [])
