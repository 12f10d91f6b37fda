"""Ops that move numbers or add up chosen rows, as GATHER by a constant table and SUM.

Tables are made by `geometry` or, for ops that only move numbers, by TensorFlow itself (`constants.places`). An index
that is out of range is an error in TensorFlow and in TFLite's GATHER alike: the step fails, no other row is read.
"""

from __future__ import annotations

import math

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.constants import Array, computed, constant, moved, places
from covey_models.lowering.formulations import gather_rows, static
from covey_models.lowering.geometry import Table, Window, inverse_table
from covey_models.lowering.registry import Node, Tensor, lowers

tf = import_tensorflow()

LARGEST = 3e38


@lowers("ReverseV2")
def reverse(node: Node, x: Tensor, axes: Tensor) -> Tensor:
    """y[i] = x[n - 1 - i] along each axis, one GATHER per axis.

    The builtin REVERSE_V2 over two axes gives wrong numbers in tflite_runtime 2.14, without an error.
    """
    for axis in static(axes):
        x = tf.gather(x, np.arange(x.shape[axis], dtype=np.int32)[::-1].copy(), axis=axis)
    return x


def _in_matrices(x: Tensor, rank: int, table: Table, padding: float = 0.0) -> Tensor:
    """Numbers moved within the last `rank` axes of x, alike for all axes before; -1 in the table gives `padding`."""
    batch, inner = list(x.shape[: x.shape.rank - rank]), math.prod(x.shape[x.shape.rank - rank :])
    rows = tf.reshape(x, [math.prod(batch), inner, 1])
    taken = gather_rows(rows, np.where(table < 0, inner, table).astype(np.int32).reshape(-1), padding)
    return tf.reshape(taken, [*batch, *table.shape])


@lowers("MatrixDiagPartV3")
def diagonals(node: Node, x: Tensor, k: Tensor, padding: Tensor) -> Tensor:
    """y[..., i] = x[..., i - min(k, 0), i + max(k, 0)]; several k give one row each, filled up with the padding."""
    table = places(node.op, x.shape[-2:], [np.array(static(k), np.int32), np.int64(0)])
    return _in_matrices(x, 2, table, float(constant(padding, "the padding of a diagonal")))


@lowers("MatrixDiagV3")
def from_diagonals(node: Node, x: Tensor, k: Tensor, rows: Tensor, columns: Tensor, padding: Tensor) -> Tensor:
    """The matrices whose diagonals k are x, and the padding elsewhere."""
    offsets = static(k)
    rank = 2 if len(set(offsets)) > 1 else 1
    sizes = [np.int32(static(size)[0]) for size in (rows, columns)]
    table = places(node.op, x.shape[-rank:], [np.array(offsets, np.int32), *sizes, np.int64(0)])
    return _in_matrices(x, rank, table, float(constant(padding, "the padding of a diagonal")))


@lowers("MatrixSetDiagV3")
def with_diagonals(node: Node, x: Tensor, diagonal: Tensor, k: Tensor) -> Tensor:
    """x with its diagonals k replaced: one GATHER from the numbers of both."""
    offsets = static(k)
    rank = 2 if len(set(offsets)) > 1 else 1
    batch, inner = list(x.shape[:-2]), math.prod(x.shape[-2:])
    numbers = math.prod(diagonal.shape[-rank:])
    old = np.arange(inner, dtype=np.int64).reshape(tuple(x.shape[-2:]))
    new = np.arange(inner, inner + numbers, dtype=np.int64).reshape(tuple(diagonal.shape[-rank:]))
    table = computed(node.op, [old, new, np.array(offsets, np.int32)], T=tf.int64)[0].astype(np.int32)
    both = tf.concat([tf.reshape(x, [*batch, inner]), tf.reshape(diagonal, [*batch, numbers])], -1)
    return _in_matrices(both, 1, table)


@lowers("Diag", "DiagPart")
def tensor_diagonal(node: Node, x: Tensor) -> Tensor:
    """Diag: y[i..., i...] = x[i...], 0 elsewhere. DiagPart: y[i...] = x[i..., i...]."""
    return moved(x, places(node.op, x.shape))


@lowers("Cross")
def cross_product(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """y_i = a_j b_k - a_k b_j with (i, j, k) cyclic, along the last axis of three numbers."""

    def turned(x: Tensor, by: int) -> Tensor:
        return tf.gather(x, np.roll(np.arange(3, dtype=np.int32), -by), axis=-1)

    return turned(a, 1) * turned(b, 2) - turned(a, 2) * turned(b, 1)


@lowers("ExtractImagePatches")
def image_patches(node: Node, images: Tensor) -> Tensor:
    """y[n, i, j] = the pixels that window (i, j) reads, row by row, 0 outside the image: one GATHER."""
    sizes, strides, rates = (tuple(node.attribute(name)[1:3]) for name in ("ksizes", "strides", "rates"))
    window = Window(sizes, strides, rates, node.attribute("padding"))
    batch, height, width, channels = images.shape
    pixels = gather_rows(tf.reshape(images, [batch, height * width, channels]), window.inputs_of_outputs(height, width))
    return tf.reshape(pixels, [batch, *window.output_size(height, width), window.taps * channels])


@lowers("SpaceToBatchND")
def space_to_batch(node: Node, x: Tensor, block: Tensor, paddings: Tensor) -> Tensor:
    """Every block's corner becomes an image of the batch; the builtin up to two axes, else one GATHER of rows."""
    pads = np.array(static(paddings), np.int32).reshape(-1, 2)
    if len(pads) <= 2 and x.shape.rank <= 4:
        return tf.raw_ops.SpaceToBatchND(input=x, block_shape=block, paddings=paddings)
    return _rows_moved(node, x, len(pads), [np.array(static(block), np.int32), pads])


@lowers("BatchToSpaceND")
def batch_to_space(node: Node, x: Tensor, block: Tensor, crops: Tensor) -> Tensor:
    """The inverse of space_to_batch; the builtin up to two axes, else one GATHER of rows."""
    cut = np.array(static(crops), np.int32).reshape(-1, 2)
    if len(cut) <= 2 and x.shape.rank <= 4:
        return tf.raw_ops.BatchToSpaceND(input=x, block_shape=block, crops=crops)
    return _rows_moved(node, x, len(cut), [np.array(static(block), np.int32), cut])


def _rows_moved(node: Node, x: Tensor, axes: int, others: list[Array]) -> Tensor:
    """An op that moves whole rows: the batch and `axes` more axes say which row, the rest is the row."""
    outer, inner = x.shape[: axes + 1], x.shape[axes + 1 :]
    table = places(node.op, outer, others)
    count, length = math.prod(outer), math.prod(inner)
    rows = gather_rows(tf.reshape(x, [1, count, length]), np.where(table < 0, count, table).astype(np.int32))
    return tf.reshape(rows, [*table.shape, *inner])


@lowers("SparseTensorDenseMatMul")
def sparse_matmul(node: Node, indices: Tensor, values: Tensor, shape: Tensor, dense: Tensor) -> Tensor:
    """y[r] = sum over the entries (r, c, v) of v dense[c], for entries at constant places: GATHER, MUL, GATHER, SUM."""
    entries = constant(indices, "the places of a sparse matrix's entries").astype(np.int32).reshape(-1, 2)
    rows, columns = static(shape)
    if node.attribute("adjoint_a"):
        entries, rows, columns = entries[:, ::-1], columns, rows
    if node.attribute("adjoint_b"):
        dense = tf.transpose(dense)
    products = tf.gather(dense, entries[:, 1].copy()) * tf.reshape(values, [-1, 1])
    return _sums_of_rows(products, inverse_table(entries[:, 0], rows))


def _sums_of_rows(x: Tensor, table: Table) -> Tensor:
    """y[i] = sum over j of x[table[i, j]]; an index of len(x) adds nothing. x is (rows, numbers)."""
    picked = gather_rows(tf.reshape(x, [1, *x.shape]), table)
    return tf.reduce_sum(tf.reshape(picked, [*table.shape, x.shape[1]]), 1)


@lowers("DynamicPartition")
def partition(node: Node, x: Tensor, parts: Tensor) -> list[Tensor]:
    """Output p = the rows of x whose part is p, for constant parts: one GATHER per output."""
    of_row = constant(parts, "the parts of a dynamic partition")
    rows = tf.reshape(x, [of_row.size, *x.shape[of_row.ndim :]])
    chosen = [np.flatnonzero(of_row == part).astype(np.int32) for part in range(node.attribute("num_partitions"))]
    return [tf.gather(rows, row) for row in chosen]


@lowers("DynamicStitch", "ParallelDynamicStitch")
def stitch(node: Node, *inputs: Tensor) -> Tensor:
    """y[indices[k][i]] = data[k][i] for constant indices, the last one counts; a row that none names is 0."""
    half = len(inputs) // 2
    places_of = [constant(each, "the places of a dynamic stitch") for each in inputs[:half]]
    shape = inputs[half].shape[places_of[0].ndim :]
    rows = [tf.reshape(data, [at.size, math.prod(shape)]) for at, data in zip(places_of, inputs[half:])]
    taken = np.concatenate([at.reshape(-1) for at in places_of])
    source = np.full(int(taken.max()) + 1, len(taken), np.int32)
    source[taken] = np.arange(len(taken), dtype=np.int32)
    joined = tf.reshape(tf.concat(rows, 0), [1, len(taken), -1])
    return tf.reshape(gather_rows(joined, source), [len(source), *shape])


def _segments(x: Tensor, ids: Tensor, padding: float) -> tuple[Tensor, Array]:
    """(segments, longest, numbers): the rows of every segment, filled up with `padding`; and their counts."""
    known = constant(ids, "the segment of a row").astype(np.int32)
    count = int(known.max(initial=-1)) + 1
    table = inverse_table(known, count)
    picked = gather_rows(tf.reshape(x, [1, x.shape[0], math.prod(x.shape[1:])]), table, padding)
    return tf.reshape(picked, [*table.shape, -1]), np.bincount(known, minlength=count)


def _segmented(x: Tensor, rows: Tensor, counts: Array) -> Tensor:
    """The rows, 0 for segments without any, in the shape of x's rows."""
    if not counts.all():
        rows = rows * (counts > 0).astype(np.float32)[:, None]
    return tf.reshape(rows, [len(counts), *x.shape[1:]])


@lowers("SegmentSum")
def segment_sum(node: Node, x: Tensor, ids: Tensor) -> Tensor:
    """y[s] = sum of the rows of segment s, for constant segments: GATHER and SUM."""
    rows, counts = _segments(x, ids, 0.0)
    return _segmented(x, tf.reduce_sum(rows, 1), counts)


@lowers("SegmentMean")
def segment_mean(node: Node, x: Tensor, ids: Tensor) -> Tensor:
    """y[s] = mean of the rows of segment s, for constant segments."""
    rows, counts = _segments(x, ids, 0.0)
    shares = (1.0 / np.maximum(counts, 1)).astype(np.float32)[:, None]
    return _segmented(x, tf.reduce_sum(rows, 1) * shares, counts)


@lowers("SegmentMax")
def segment_max(node: Node, x: Tensor, ids: Tensor) -> Tensor:
    """y[s] = maximum of the rows of segment s, for constant segments; 0 for an empty one."""
    rows, counts = _segments(x, ids, -LARGEST)
    return _segmented(x, tf.reduce_max(rows, 1), counts)


@lowers("SegmentMin")
def segment_min(node: Node, x: Tensor, ids: Tensor) -> Tensor:
    """y[s] = minimum of the rows of segment s, for constant segments; 0 for an empty one."""
    rows, counts = _segments(x, ids, LARGEST)
    return _segmented(x, tf.reduce_min(rows, 1), counts)


@lowers("SegmentProd")
def segment_product(node: Node, x: Tensor, ids: Tensor) -> Tensor:
    """y[s] = product of the rows of segment s, for constant segments; 1 for an empty one."""
    rows, counts = _segments(x, ids, 1.0)
    return tf.reshape(tf.reduce_prod(rows, 1), [len(counts), *x.shape[1:]])
