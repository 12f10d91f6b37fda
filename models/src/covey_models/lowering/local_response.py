"""Local response normalisation over neighbouring channels. The forward op is a builtin already."""

from __future__ import annotations

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import matmul
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()


@lowers("LRNGrad")
def local_response_gradient(node: Node, dy: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """dx = dy s^-b - 2 a b x W(dy y / s), s = bias + a W(x^2); a = alpha, b = beta.

    W sums over the channels at most depth_radius away: a product with a constant band matrix.
    """
    radius, bias = node.attribute("depth_radius"), node.attribute("bias")
    alpha, beta = node.attribute("alpha"), node.attribute("beta")
    channel = np.arange(x.shape[3])
    band = (np.abs(channel[:, None] - channel[None, :]) <= radius).astype(np.float32)
    flat_x, flat_y, flat_dy = (tf.reshape(tensor, [-1, x.shape[3]]) for tensor in (x, y, dy))
    scale = bias + alpha * matmul(flat_x * flat_x, tf.constant(band))
    neighbours = matmul(flat_dy * flat_y / scale, tf.constant(band))
    dx = flat_dy * tf.exp(-beta * tf.math.log(scale)) - (2.0 * alpha * beta) * flat_x * neighbours
    return tf.reshape(dx, x.shape)
