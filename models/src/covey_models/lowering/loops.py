"""Control flow, run while tracing: loops of a known length are unrolled, tensor lists become Python lists.

Recurrent layers, `tf.scan`, `tf.map_fn` and hand-written loops reach the graph as While ops; their gradients are While
ops too, which hand intermediate values over in tensor lists. All shapes are static, so the loop counters are constants
and nothing of this needs to reach the device. A condition that depends on data cannot be unrolled and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Union

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import static
from covey_models.lowering.registry import LOOPS, Node, Tensor, lowers
from covey_protocol.errors import BundleError

tf = import_tensorflow()

MOST_TURNS = 2_000  # a longer loop would give a model of a hundred thousand ops


@dataclass(frozen=True)
class TensorList:
    """A tensor list of known length; items nobody has set are None and read as zeros of `shape`."""

    items: tuple[Any, ...]
    dtype: Any
    shape: Optional[tuple[int, ...]] = None

    def item_shape(self) -> tuple[int, ...]:
        shapes = [tuple(item.shape) for item in self.items if item is not None]
        if not shapes and self.shape is None:
            raise BundleError("a tensor list of unknown shape is read before it is written", "give it an element shape")
        return shapes[0] if shapes else self.shape or ()

    def item(self, index: int) -> Any:
        held = self.items[index]
        return tf.zeros(self.item_shape(), self.dtype) if held is None else held

    def all_items(self) -> list[Any]:
        return [self.item(index) for index in range(len(self.items))]

    def with_item(self, index: int, item: Any) -> TensorList:
        items = (*self.items[:index], item, *self.items[index + 1 :])
        return TensorList(items, item.dtype, self.shape)


Value = Union[Tensor, TensorList]


@lowers("Identity", "IdentityN", "StopGradient", "PreventGradient", "Snapshot", table=LOOPS)
def pass_through(node: Node, *values: Value) -> list[Value]:
    """The value itself."""
    return list(values)


@lowers("While", "StatelessWhile", table=LOOPS)
def while_loop(node: Node, *state: Value) -> list[Value]:
    """state = body(state) while cond(state), turn by turn. Refused where cond is not a constant."""
    condition, body = node.graph("cond"), node.graph("body")
    values = list(state)
    for _ in range(MOST_TURNS):
        goes_on = tf.get_static_value(node.run(condition, values)[0])
        if goes_on is None:
            raise BundleError("its length depends on the data", "loop a fixed number of times")
        if not goes_on:
            return values
        values = node.run(body, values)
    raise BundleError(f"it runs more than {MOST_TURNS} times", "shorten the sequence")


@lowers("If", "StatelessIf", table=LOOPS)
def branch(node: Node, condition: Tensor, *inputs: Value) -> list[Value]:
    """The branch a constant condition names; else both, and SELECT, where neither has side effects."""
    known = tf.get_static_value(condition)
    if known is None and _only_asserts(node.graph("else_branch")):
        known = True  # assertions are left out, here as everywhere
    if known is not None:
        return node.run(node.graph("then_branch" if known else "else_branch"), inputs)
    if node.op.type == "If":
        raise BundleError("its branches change variables and its condition depends on the data", "use tf.where")
    chosen, other = (node.run(node.graph(name), inputs) for name in ("then_branch", "else_branch"))
    if any(isinstance(value, TensorList) for value in (*chosen, *other)):
        raise BundleError("its branches hand over lists and its condition depends on the data", "use tf.where")
    return [tf.where(condition, one, two) for one, two in zip(chosen, other)]


def _only_asserts(graph: Any) -> bool:
    types = {op.type for op in graph.get_operations()}
    return "Assert" in types and types <= {"Assert", "Const", "Identity", "NoOp", "Placeholder"}


def _shape(node: Node, element_shape: Tensor) -> Optional[tuple[int, ...]]:
    sizes = static(element_shape)
    return None if any(size < 0 for size in sizes) else sizes


@lowers("EmptyTensorList", table=LOOPS)
def empty_list(node: Node, element_shape: Tensor, most_items: Tensor) -> TensorList:
    """A Python list without items."""
    return TensorList((), node.attribute("element_dtype"), _shape(node, element_shape))


@lowers("TensorListReserve", table=LOOPS)
def reserved_list(node: Node, element_shape: Tensor, count: Tensor) -> TensorList:
    """A Python list of `count` items that nobody has set."""
    return TensorList((None,) * static(count)[0], node.attribute("element_dtype"), _shape(node, element_shape))


@lowers("TensorListFromTensor", table=LOOPS)
def list_of_rows(node: Node, tensor: Tensor, element_shape: Tensor) -> TensorList:
    """The slices of a tensor along its first axis."""
    return TensorList(tuple(tf.unstack(tensor)), tensor.dtype, tuple(tensor.shape[1:]))


@lowers("TensorListStack", table=LOOPS)
def stacked(node: Node, rows: TensorList, element_shape: Tensor) -> Tensor:
    """The items as one tensor, along a new first axis."""
    return tf.stack(_shaped(node, rows, element_shape).all_items())


def _shaped(node: Node, rows: TensorList, element_shape: Tensor) -> TensorList:
    """The list, with the element shape that its reader states if it knows none itself."""
    return TensorList(rows.items, rows.dtype, rows.shape if rows.shape is not None else _shape(node, element_shape))


@lowers("TensorListConcatV2", table=LOOPS)
def concatenated(node: Node, rows: TensorList, element_shape: Tensor, leading: Tensor) -> list[Tensor]:
    """The items joined along their first axis, and how long each was."""
    items = rows.all_items()
    return [tf.concat(items, 0), tf.constant([int(item.shape[0]) for item in items], tf.int64)]


@lowers("TensorListGetItem", table=LOOPS)
def item(node: Node, rows: TensorList, index: Tensor, element_shape: Tensor) -> Value:
    """Item `index`, a constant; zeros where nobody has set it."""
    return _shaped(node, rows, element_shape).item(_index(index))


@lowers("TensorListSetItem", table=LOOPS)
def with_item(node: Node, rows: TensorList, index: Tensor, value: Value) -> TensorList:
    """The list with item `index`, a constant, replaced."""
    return rows.with_item(_index(index), value)


def _index(index: Tensor) -> int:
    known = tf.get_static_value(index)
    if known is None:
        raise BundleError("it indexes a tensor list by data", "gather from a tensor instead")
    return int(known)


@lowers("TensorListPushBack", table=LOOPS)
def pushed(node: Node, rows: TensorList, value: Value) -> TensorList:
    """The list with one more item at its end."""
    return TensorList((*rows.items, value), value.dtype, rows.shape)


@lowers("TensorListPopBack", table=LOOPS)
def popped(node: Node, rows: TensorList, element_shape: Tensor) -> list[Value]:
    """The list without its last item, and that item."""
    return [TensorList(rows.items[:-1], rows.dtype, rows.shape), rows.item(len(rows.items) - 1)]


@lowers("TensorListLength", table=LOOPS)
def length(node: Node, rows: TensorList) -> Tensor:
    """How many items the list holds."""
    return tf.constant(len(rows.items), tf.int32)


@lowers("TensorListElementShape", table=LOOPS)
def element_shape(node: Node, rows: TensorList) -> Tensor:
    """The shape of one item."""
    return tf.constant(rows.item_shape(), node.attribute("shape_type"))


@lowers("TensorListResize", table=LOOPS)
def resized(node: Node, rows: TensorList, count: Tensor) -> TensorList:
    """The list cut or filled up to `count` items."""
    size = static(count)[0]
    return TensorList((*rows.items, *(None,) * size)[:size], rows.dtype, rows.shape)


@lowers("AddN", table=LOOPS)
def total(node: Node, *values: Value) -> Value:
    """A sum of tensors, or of tensor lists item by item."""
    if not isinstance(values[0], TensorList):
        return tf.add_n(list(values))
    columns = zip(*(rows.items for rows in values))
    held = [[value for value in column if value is not None] for column in columns]
    items = tuple((tf.add_n(column) if len(column) > 1 else column[0]) if column else None for column in held)
    dtypes = [value.dtype for value in items if value is not None]
    return TensorList(items, dtypes[0] if dtypes else values[0].dtype, values[0].shape)


@lowers("ZerosLike", table=LOOPS)
def zeros_like(node: Node, value: Value) -> Value:
    """Zeros of the same shape, or a list of items that nobody has set."""
    if isinstance(value, TensorList):
        return TensorList((None,) * len(value.items), value.dtype, value.item_shape() if value.items else value.shape)
    return tf.zeros(value.shape, value.dtype) if value.shape.is_fully_defined() else tf.zeros_like(value)
