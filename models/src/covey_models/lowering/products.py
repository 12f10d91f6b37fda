"""Products of stacks of matrices, and Einstein sums: diagonals, sums, transposes and one product per batch entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Union

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.constants import moved
from covey_models.lowering.formulations import matmul
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

Label = Union[str, int]  # a letter, or the number of an axis of "...", counted from the right


@lowers("BatchMatMulV2", "BatchMatMul")
def batch_matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """y[i...] = a[i...] @ b[i...], either transposed, for any number of axes; BATCH_MATMUL of rank 3, without adj_y."""
    batch = tf.broadcast_static_shape(a.shape[:-2], b.shape[:-2]).as_list()
    a, b = _stacked(a, batch, node.attribute("adj_x")), _stacked(b, batch, node.attribute("adj_y"))
    return tf.reshape(_matrices(a, b), [*batch, a.shape[1], b.shape[2]])


def _stacked(x: Tensor, batch: list[int], turned: bool) -> Tensor:
    """(batch, rows, columns), broadcast to this batch."""
    rows, columns = x.shape[-2:]
    if x.shape[:-2] != batch:
        x = tf.broadcast_to(x, [*batch, rows, columns])
    x = tf.reshape(x, [math.prod(batch), rows, columns])
    return tf.transpose(x, [0, 2, 1]) if turned else x


@lowers("Einsum")
def einsum(node: Node, *operands: Tensor) -> Tensor:
    """y[output] = sum over the labels that are not in the output of the product of the operands.

    Two operands: both are brought to (batch, left, summed) and (batch, summed, right) and multiplied as matrices. A
    label that is repeated within an operand is a diagonal; "..." broadcasts.
    """
    terms, output = _labels(node.attribute("equation"), [operand.shape.rank for operand in operands])
    parts = []
    for index, (operand, labels) in enumerate(zip(operands, terms)):
        needed = {label for other, term in enumerate(terms) if other != index for label in term} | set(output)
        parts.append(_reduced(operand, labels, needed))
    first, *others = parts
    x, labels = _product(first, others[0], output) if others else first
    return _arranged(x, labels, output)


def _labels(equation: str, ranks: Sequence[int]) -> tuple[list[list[Label]], list[Label]]:
    """The axes of every operand and of the output."""
    inputs, output = equation.replace(" ", "").split("->")
    widest = 0
    terms = []
    for text, rank in zip(inputs.split(","), ranks):
        hidden = rank - len(text.replace("...", ""))
        widest = max(widest, hidden if "..." in text else 0)
        terms.append(_spelled(text, hidden))
    return terms, _spelled(output, widest)


def _spelled(text: str, hidden: int) -> list[Label]:
    before, dots, after = text.partition("...")
    return [*before, *(range(hidden, 0, -1) if dots else ()), *after]


def _reduced(x: Tensor, labels: list[Label], needed: set[Label]) -> tuple[Tensor, list[Label]]:
    """x with its repeated labels taken as diagonals and its needless axes summed."""
    kept = list(dict.fromkeys(labels))
    if len(kept) < len(labels):
        numbers = {label: kept.index(label) for label in kept}
        positions = np.arange(math.prod(x.shape), dtype=np.int32).reshape(tuple(x.shape))
        diagonal = np.einsum(positions, [numbers[label] for label in labels], list(range(len(kept))))
        x = moved(x, diagonal)
    summed = [axis for axis, label in enumerate(kept) if label not in needed]
    if summed:
        x = tf.reduce_sum(x, summed)
    return x, [label for label in kept if label in needed]


def _product(
    left: tuple[Tensor, list[Label]], right: tuple[Tensor, list[Label]], output: list[Label]
) -> tuple[Tensor, list[Label]]:
    """The product of two operands; its axes are the common ones of the output, the left's own, the right's own."""
    (a, a_labels), (b, b_labels) = left, right
    sizes: dict[Label, int] = {}
    for label, size in [*zip(a_labels, a.shape), *zip(b_labels, b.shape)]:
        sizes[label] = max(size, sizes.get(label, 1))
    a, b = (
        tf.broadcast_to(x, [sizes[label] for label in labels]) if [sizes[label] for label in labels] != x.shape else x
        for x, labels in (left, right)
    )
    common = [label for label in a_labels if label in b_labels and label in output]
    summed = [label for label in a_labels if label in b_labels and label not in output]
    of_a = [label for label in a_labels if label not in b_labels]
    of_b = [label for label in b_labels if label not in a_labels]
    batch, rows, inner, columns = (math.prod(sizes[one] for one in group) for group in (common, of_a, summed, of_b))
    a = tf.reshape(_transposed(a, a_labels, [*common, *of_a, *summed]), [batch, rows, inner])
    b = tf.reshape(_transposed(b, b_labels, [*common, *summed, *of_b]), [batch, inner, columns])
    labels = [*common, *of_a, *of_b]
    return tf.reshape(_matrices(a, b), [sizes[label] for label in labels]), labels


def _matrices(a: Tensor, b: Tensor) -> Tensor:
    """(batch, rows, inner) times (batch, inner, columns); as products and a sum where one side is a vector.

    The converter folds the reshapes around a single row into a BATCH_MATMUL of impossible rank.
    """
    batch, rows, inner = a.shape
    columns = b.shape[2]
    if inner == 1:
        return a * b
    if rows == 1:
        return tf.reduce_sum(tf.reshape(a, [batch, inner, 1]) * b, 1, keepdims=True)
    if columns == 1:
        return tf.reduce_sum(a * tf.reshape(b, [batch, 1, inner]), 2, keepdims=True)
    if batch == 1:
        return matmul(tf.reshape(a, [rows, inner]), tf.reshape(b, [inner, columns]))
    return tf.raw_ops.BatchMatMulV2(x=a, y=b, adj_x=False, adj_y=False)


def _transposed(x: Tensor, labels: list[Label], wanted: list[Label]) -> Tensor:
    return x if labels == wanted else tf.transpose(x, [labels.index(label) for label in wanted])


def _arranged(x: Tensor, labels: list[Label], output: list[Label]) -> Tensor:
    """x in the order of the output; a label that the output repeats becomes a diagonal of a tensor of zeros."""
    once = list(dict.fromkeys(output))
    x = _transposed(x, labels, once)
    if len(once) == len(output):
        return x
    shape = [x.shape[once.index(label)] for label in output]
    table = np.full(shape, -1, np.int32)
    positions = np.arange(math.prod(x.shape), dtype=np.int32).reshape(tuple(x.shape))
    numbers = [once.index(label) for label in output]
    np.einsum(table, numbers, list(range(len(once))))[...] = positions  # a view of the diagonal
    return moved(x, table)
