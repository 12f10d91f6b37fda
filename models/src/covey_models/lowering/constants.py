"""What can be computed while the graph is rewritten: values that depend on constants alone, and tables of moves.

TensorFlow's own kernels do the computing, so a table made here means exactly what the op means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.geometry import Table
from covey_models.lowering.registry import Tensor
from covey_protocol.errors import BundleError

tf = import_tensorflow()
Array = np.ndarray[Any, Any]


def computed(op: Any, values: Sequence[Any], **attributes: Any) -> list[Array]:
    """The outputs of this kind of op, with its attributes, on these arrays, computed by TensorFlow now.

    attributes: overrides of the op's own, such as another dtype.
    """
    definition = {key: value for key, value in op.node_def.attr.items() if not key.startswith("_")}
    overrides = {key: tf.compat.v1.AttrValue(type=value.as_datatype_enum) for key, value in attributes.items()}
    with tf.Graph().as_default() as graph:
        inputs = [tf.constant(value) for value in values]
        again = graph.create_op(op.type, inputs, attrs={**definition, **overrides})
        with tf.compat.v1.Session(graph=graph) as session:
            return list(session.run(again.outputs))


def value_of(tensor: Tensor) -> Optional[Array]:
    """The value of a tensor that depends on constants alone; None if an input, a variable or chance is in it."""
    known = tf.get_static_value(tensor)
    if known is not None or tensor.dtype == tf.resource:
        return None if known is None else np.asarray(known)
    op = tensor.op
    if not op.inputs or op.op_def is None or op.op_def.is_stateful:
        return None
    values = [value_of(part) for part in op.inputs]
    return None if any(value is None for value in values) else np.asarray(computed(op, values)[tensor.value_index])


def constant(tensor: Tensor, what: str) -> Array:
    """`value_of`, for an input that has to be constant; `what` names it in the error."""
    value = value_of(tensor)
    if value is None:
        raise BundleError(f"{what} depends on the data or on a variable", "make it a constant of the model")
    return value


def places(op: Any, shape: Sequence[int], others: Sequence[Any] = (), before: Sequence[Any] = ()) -> Table:
    """Where each number of an op's output comes from, for an op that only moves numbers: flat positions in its input.

    The op is run on the image whose numbers are their own positions plus one; so 0, TensorFlow's filling, becomes -1.
    """
    count = math.prod(shape)
    positions = np.arange(1, count + 1, dtype=np.int64).reshape(tuple(shape))
    moved = computed(op, [*before, positions, *others], T=tf.int64)[0]
    return (moved - 1).astype(np.int32)


def moved(x: Tensor, table: Table) -> Tensor:
    """The numbers of x at the flat positions of the table, in the table's shape; -1 gives 0."""
    flat = tf.reshape(x, [-1])
    if bool((table < 0).any()):
        flat = tf.pad(flat, [[0, 1]])
        table = np.where(table < 0, math.prod(x.shape), table).astype(np.int32)
    return tf.reshape(tf.gather(flat, table.reshape(-1)), table.shape)
