"""Gradients of slicing, and ops that only pass tensors through.

Shape arithmetic has no lowering: shapes are static, so the rewriter computes it while it traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.formulations import static
from covey_models.lowering.registry import Node, Tensor, lowers
from covey_protocol.errors import BundleError

tf = import_tensorflow()


@lowers("CheckNumerics")
def unchecked(node: Node, x: Tensor) -> Tensor:
    """y = x. Nothing is checked here: devices check the loss and the parameters of every round."""
    return x


@lowers("PrintV2", "Print")
def unprinted(node: Node, *inputs: Tensor) -> list[Tensor]:
    """Nothing is printed on a device; Print (of version 1) passes its first input on."""
    return list(inputs[: len(node.op.outputs)])


@lowers("StringFormat")
def unformatted(node: Node, *inputs: Tensor) -> Tensor:
    """An empty text: only tf.print reads it."""
    return tf.constant("")


@dataclass(frozen=True)
class Taken:
    """What a slice takes along one axis: `count` positions from `start` in steps of `step`.

    single: a tensor that holds the only position taken, where it depends on the data.
    """

    start: int
    count: int
    step: int
    single: Any = None


@lowers("StridedSliceGrad")
def strided_slice_gradient(
    node: Node, shape: Tensor, begin: Tensor, end: Tensor, strides: Tensor, dy: Tensor
) -> Tensor:
    """dx = dy at the positions that x[a:b:s, ..., c] took, else 0.

    Per axis: PAD for steps of 1, GATHER by a table for others, a product with a one-hot vector for one position that
    depends on the data.
    """
    full = static(shape)
    axes = _axes(node, full, _numbers(begin), _numbers(end), static(strides), begin)
    dx = tf.reshape(dy, [axis.count for axis in axes])
    for number, (axis, size) in enumerate(zip(axes, full)):
        dx = _put_back(dx, number, axis, size)
    return dx


def _numbers(tensor: Tensor) -> list[Any]:
    """The numbers of an integer vector; None for those that depend on the data."""
    value = tf.get_static_value(tensor, partial=True)
    return [None] * int(tensor.shape[0]) if value is None else list(np.ravel(value))


def _put_back(dx: Tensor, number: int, axis: Taken, size: int) -> Tensor:
    if axis.single is not None:
        shape = [1] * dx.shape.rank
        shape[number] = size
        return dx * tf.reshape(tf.one_hot(axis.single, size), shape)
    if axis.step == 1:
        pads = [[0, 0]] * dx.shape.rank
        pads[number] = [axis.start, size - axis.start - axis.count]
        return dx if axis.count == size else tf.pad(dx, pads)
    source = np.full(size, axis.count, np.int32)
    source[axis.start + axis.step * np.arange(axis.count)] = np.arange(axis.count, dtype=np.int32)
    return tf.gather(tf.pad(dx, [[0, int(other == number)] for other in range(dx.shape.rank)]), source, axis=number)


def _axes(
    node: Node, full: tuple[int, ...], begin: list[Any], end: list[Any], strides: tuple[int, ...], positions: Tensor
) -> list[Taken]:
    """What the slice takes per axis, after TensorFlow's five bit masks."""
    masks = {name: node.attribute(f"{name}_mask") for name in ("begin", "end", "shrink_axis", "new_axis", "ellipsis")}

    def marked(name: str, position: int) -> bool:
        return bool(masks[name] >> position & 1)

    consuming = sum(not marked("new_axis", i) and not marked("ellipsis", i) for i in range(len(begin)))
    axes: list[Taken] = []
    for i, step in enumerate(strides):
        if marked("ellipsis", i):
            axes += [Taken(0, size, 1) for size in full[len(axes) : len(axes) + len(full) - consuming]]
        elif not marked("new_axis", i):
            size = full[len(axes)]
            if marked("shrink_axis", i):
                single = None if begin[i] is not None else _from_start(positions[i], size)
                axes.append(Taken(int(begin[i] or 0) % size, 1, 1, single))
            else:
                first = None if marked("begin", i) else _known(begin[i])
                last = None if marked("end", i) else _known(end[i])
                taken = range(*slice(first, last, step).indices(size))
                axes.append(Taken(taken.start, len(taken), step) if len(taken) != 1 else Taken(taken.start, 1, 1))
    return axes + [Taken(0, size, 1) for size in full[len(axes) :]]


def _from_start(position: Tensor, size: int) -> Tensor:
    """A position that may be counted from the end."""
    return tf.where(position < 0, position + size, position)


def _known(position: Any) -> int:
    if position is None:
        raise BundleError("a slice whose bounds depend on the data has no static shape", "take tf.gather with indices")
    return int(position)
