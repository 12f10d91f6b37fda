"""Variables: TFLite knows READ_VARIABLE and ASSIGN_VARIABLE only; everything else is arithmetic between the two.

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
    """w += value."""
    return assign(handle, read(handle, value) + value)


@lowers("AssignSubVariableOp")
def assign_sub(node: Node, handle: Tensor, value: Tensor) -> list[Tensor]:
    """w -= value."""
    return assign(handle, read(handle, value) - value)


def _spread(indices: Tensor, updates: Tensor, shape: Tensor) -> Tensor:
    """Zeros of this shape, with every row of the updates added at its index."""
    rows = tf.reshape(updates, [*indices.shape, *shape[1:]])
    return tf.scatter_nd(indices[..., tf.newaxis], rows, shape)


@lowers("ResourceScatterAdd")
def scatter_add(node: Node, handle: Tensor, indices: Tensor, updates: Tensor) -> list[Tensor]:
    """w[index] += row, for every index and row; an index that comes twice adds twice. SCATTER_ND and ADD."""
    value = read(handle, updates)
    return assign(handle, value + _spread(indices, updates, value.shape))


@lowers("ResourceScatterSub")
def scatter_sub(node: Node, handle: Tensor, indices: Tensor, updates: Tensor) -> list[Tensor]:
    """w[index] -= row, for every index and row; an index that comes twice subtracts twice."""
    value = read(handle, updates)
    return assign(handle, value - _spread(indices, updates, value.shape))


@lowers("ResourceScatterUpdate")
def scatter_update(node: Node, handle: Tensor, indices: Tensor, updates: Tensor) -> list[Tensor]:
    """w[index] = row, for every index and row. Which row stays of an index that comes twice is not defined."""
    value = read(handle, updates)
    rows = tf.reshape(updates, [*indices.shape, *value.shape[1:]])
    return assign(handle, tf.tensor_scatter_nd_update(value, indices[..., tf.newaxis], rows))


@lowers("ResourceScatterNdAdd")
def scatter_nd_add(node: Node, handle: Tensor, indices: Tensor, updates: Tensor) -> list[Tensor]:
    """w[index...] += part, for every index of several axes and its part."""
    value = read(handle, updates)
    return assign(handle, value + tf.scatter_nd(indices, updates, value.shape))


@lowers("ResourceScatterNdSub")
def scatter_nd_sub(node: Node, handle: Tensor, indices: Tensor, updates: Tensor) -> list[Tensor]:
    """w[index...] -= part, for every index of several axes and its part."""
    value = read(handle, updates)
    return assign(handle, value - tf.scatter_nd(indices, updates, value.shape))


@lowers("ResourceScatterNdUpdate")
def scatter_nd_update(node: Node, handle: Tensor, indices: Tensor, updates: Tensor) -> list[Tensor]:
    """w[index...] = part, for every index of several axes and its part."""
    return assign(handle, tf.tensor_scatter_nd_update(read(handle, updates), indices, updates))
