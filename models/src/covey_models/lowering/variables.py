"""Variables: TFLite knows READ_VARIABLE and ASSIGN_VARIABLE only; optimizer ops become arithmetic between the two.

Order is kept by TensorFlow's automatic control dependencies, which see the same reads and writes in the same order.
"""

from __future__ import annotations

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()


def read(handle: Tensor, like: Tensor) -> Tensor:
    return tf.raw_ops.ReadVariableOp(resource=handle, dtype=like.dtype)


def assign(handle: Tensor, value: Tensor) -> list[Tensor]:
    tf.raw_ops.AssignVariableOp(resource=handle, value=value)
    return []


@lowers("AssignAddVariableOp")
def assign_add(node: Node, handle: Tensor, value: Tensor) -> list[Tensor]:
    return assign(handle, read(handle, value) + value)


@lowers("AssignSubVariableOp")
def assign_sub(node: Node, handle: Tensor, value: Tensor) -> list[Tensor]:
    return assign(handle, read(handle, value) - value)


@lowers("ResourceApplyGradientDescent")
def gradient_descent(node: Node, handle: Tensor, learning_rate: Tensor, gradient: Tensor) -> list[Tensor]:
    return assign(handle, read(handle, gradient) - learning_rate * gradient)
