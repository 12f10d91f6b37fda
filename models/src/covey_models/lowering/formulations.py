"""The forms of matrix products, sums and masks that TFLite's kernels compute fast and precisely.

Rates below are of tflite_runtime 2.14 on one x86-64 core. FULLY_CONNECTED, CONV_2D with weights that are not constant,
and BATCH_MATMUL with adj_y run at 13 to 20 GFLOPS there; BATCH_MATMUL without adj_y runs at 30 to 120. All tensors
need static shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.geometry import Table
from covey_models.lowering.registry import Tensor

tf = import_tensorflow()

SHORT = 16  # terms of a sum that gains nothing from two stages


def size(tensor: Tensor) -> int:
    return int(math.prod(tensor.shape))


def static(tensor: Tensor) -> tuple[int, ...]:
    """The numbers of a tensor that is a constant of the graph, such as a shape."""
    return tuple(int(number) for number in np.ravel(tf.get_static_value(tensor)))


def transpose(matrix: Tensor) -> Tensor:
    """The transpose, written so that the converter does not fold it into a slow FULLY_CONNECTED or adj_y."""
    rows, columns = matrix.shape
    return tf.reshape(tf.transpose(tf.reshape(matrix, [1, rows, columns]), [2, 0, 1]), [columns, rows])


def matmul(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """a @ b of two matrices, either transposed, as BATCH_MATMUL without adj_y; only the smaller operand is turned."""
    if transpose_a and transpose_b:
        return transpose(matmul(b, a))
    if transpose_b:
        rows, columns = a.shape[0], b.shape[0]
        if size(b) > size(a) + rows * columns:
            return transpose(_batch_matmul(b, transpose(a)))
        return _batch_matmul(a, transpose(b))
    if transpose_a and a.shape[1] * b.shape[1] < size(b) < size(a):  # a sum over many rows, such as a kernel's gradient
        return transpose(_batch_matmul(b, a, adjoint_a=True))
    return _batch_matmul(a, b, adjoint_a=transpose_a)


def _batch_matmul(a: Tensor, b: Tensor, adjoint_a: bool = False) -> Tensor:
    rows = a.shape[1] if adjoint_a else a.shape[0]
    if rows == 1:  # the converter folds the reshapes of a single row into a BATCH_MATMUL of impossible rank
        return tf.reshape(column_sum(tf.reshape(a, [-1, 1]) * b), [1, b.shape[1]])
    product = tf.raw_ops.BatchMatMulV2(
        x=tf.reshape(a, [1, *a.shape]), y=tf.reshape(b, [1, *b.shape]), adj_x=adjoint_a, adj_y=False
    )
    return tf.reshape(product, [rows, b.shape[1]])


def column_sum(matrix: Tensor) -> Tensor:
    """(n, c) -> (c,), summed in two stages of about sqrt(n) terms.

    TFLite adds along axis 0 one row after the other in float32; two stages lose less than TensorFlow's own sums do
    and cost no measurable time.
    """
    rows, columns = matrix.shape
    if rows < SHORT:
        return tf.reduce_sum(matrix, 0)
    inner = _divisor_near_root(rows)
    if inner < 4:
        inner = math.isqrt(rows)
        matrix = tf.pad(matrix, [[0, -rows % inner], [0, 0]])  # a row more changes no sum
    partial = tf.reduce_sum(tf.reshape(matrix, [-(-rows // inner), inner * columns]), 0)
    return tf.reduce_sum(tf.reshape(partial, [inner, columns]), 0)


def middle_sum(block: Tensor) -> Tensor:
    """(a, n, c) -> (a, c), in two stages as `column_sum` where n is long and has a middling divisor."""
    outer, rows, columns = block.shape
    if outer == 1:
        return tf.reshape(column_sum(tf.reshape(block, [rows, columns])), [1, columns])
    inner = _divisor_near_root(rows)
    if rows < SHORT or inner < 4:
        return tf.reduce_sum(block, 1)
    partial = tf.reduce_sum(tf.reshape(block, [outer, rows // inner, inner * columns]), 1)
    return tf.reduce_sum(tf.reshape(partial, [outer, inner, columns]), 1)


def _divisor_near_root(number: int) -> int:
    return next(divisor for divisor in range(math.isqrt(number), 0, -1) if number % divisor == 0)


def is_positive(tensor: Tensor) -> Tensor:
    """1.0 where a tensor that is never negative is positive, else 0.0.

    SIGN, because comparing with a scalar takes TFLite's reference path (6 ns per number) and two casts.
    """
    return tf.sign(tensor)


def minus(a: Tensor, b: Tensor) -> Tensor:
    """a - b. Where a shape is broadcast, TFLite 2.14 computes SUB 20 times slower than ADD; -1 * b is exact."""
    if isinstance(a, float) or a.shape != b.shape:
        return a + -1.0 * b
    return a - b


def absolute(x: Tensor) -> Tensor:
    """|x|, 50 times faster than ABS in TFLite 2.14."""
    return tf.nn.relu(x) + tf.nn.relu(-1.0 * x)


def padded_rows(rows: Tensor, table: Table, padding: float = 0.0) -> Tensor:
    """(n, r, c), with one more row full of `padding` where the table names row r."""
    if not bool((table == rows.shape[1]).any()):
        return rows
    return tf.raw_ops.PadV2(input=rows, paddings=[[0, 0], [0, 1], [0, 0]], constant_values=np.float32(padding))


def gather_rows(rows: Tensor, table: Table, padding: float = 0.0) -> Tensor:
    """(n, r, c) gathered along axis 1 by a flat table; index r is a row full of `padding`."""
    return tf.gather(padded_rows(rows, table, padding), np.ravel(table), axis=1)


def sum_touching(entries: Tensor, table: Table, image: Sequence[int]) -> Tensor:
    """The inverse of taking patches: every pixel sums the entries (n, e, c) that the table (pixels, touches) names."""
    batch, height, width, channels = image
    gathered = gather_rows(entries, table.T)  # touch by touch: SUM adds whole images, twice as fast as pixel by pixel
    images = tf.reshape(gathered, [batch, table.shape[1], height * width * channels])
    return tf.reshape(tf.reduce_sum(images, 1) if table.shape[1] > 1 else images, image)
