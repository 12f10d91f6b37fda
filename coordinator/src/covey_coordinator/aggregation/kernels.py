"""TensorFlow primitives of the rules, whose results do not depend on the TensorFlow that runs them.

The direct engine runs in this Python's TensorFlow (oneDNN, AVX-512), TFF in its own C++ worker, which has other
kernels, other vector lengths and maybe another number of threads. A float sum therefore may not be left to
`tf.reduce_sum` or `tf.matmul`: their order of summation is the kernel's business. What is used instead:

- comparisons and sorting, which do not round; element-wise float64 arithmetic, which IEEE 754 fixes; additions in
  an order that this file fixes (`sum_rows`);
- sums of whole numbers small enough that float64 holds every partial sum exactly, so that any order and any fused
  multiply-add give the same bits (`gram`, `square_norms`);
- multiplication by a reciprocal where a division by n is meant: the graph optimiser turns a division by a constant
  into that multiplication, and n is a constant in one runtime and not in the other.

Everything works on column blocks, so memory beyond the updates stays small at n = 500, d = 1e6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

GRAM_COLUMNS = 4096  # 2^12 products of 2^40 at most: partial sums stay within float64's 2^53 whole numbers
QUANTUM_BITS = 19  # values become whole numbers up to 2^20, a relative rounding of 2^-21 of the row's largest
EXPONENT_MASK = 0x7FF0000000000000  # the exponent bits of a float64: what remains is the power of two below
BLOCK_VALUES = 1 << 18  # numbers in one column block of the order statistics: 1 MB, stays in the cache
FLOAT32_MAX = 3.4028234e38


def sum_rows(rows: Any) -> Any:
    """(n, b) float64 -> (b,): sum over rows by pairwise halving, always in the same order. n >= 1."""

    def halve(x: Any) -> tuple[Any]:
        n = tf.shape(x)[0]
        half = (n + 1) // 2
        return (tf.concat([x[: n - half] + x[half:], x[n - half : half]], axis=0),)

    (total,) = tf.while_loop(
        lambda x: tf.shape(x)[0] > 1,
        halve,
        (rows,),
        shape_invariants=(tf.TensorShape([None, rows.shape[1]]),),
    )
    return total[0]


def mean_rows(rows: Any) -> Any:
    """(n, b) float32 -> (b,) float32: mean over rows, summed in float64. Equal rows give exactly that row."""
    reciprocal = 1.0 / tf.cast(tf.shape(rows)[0], tf.float64)
    return tf.cast(sum_rows(tf.cast(rows, tf.float64)) * reciprocal, tf.float32)


def over_columns(
    matrix: Any, columns: Any, per_block: Callable[[Any, Any], tuple[Any, Any]], carry: Any
) -> tuple[Any, Any]:
    """Run per_block(block, carry) -> (values (b,) float32, carry) over blocks of columns from left to right.

    Returns the values of all blocks as one vector (d,) and the last carry. columns: the width of a block.
    """
    d = tf.shape(matrix)[1]
    num_blocks = (d + columns - 1) // columns
    results = tf.TensorArray(tf.float32, size=num_blocks, infer_shape=False, element_shape=[None])

    def body(index: Any, results: Any, carry: Any) -> tuple[Any, Any, Any]:
        start = index * columns
        values, carry = per_block(matrix[:, start : tf.minimum(start + columns, d)], carry)
        return index + 1, results.write(index, values), carry

    _, results, carry = tf.while_loop(lambda index, *_: index < num_blocks, body, (0, results, carry))
    return tf.reshape(results.concat(), [d]), carry


def block_columns(matrix: Any) -> Any:
    """Width of a block of about BLOCK_VALUES numbers. Column-wise results do not depend on it."""
    return tf.maximum(BLOCK_VALUES // tf.maximum(tf.shape(matrix)[0], 1), 1024)


def column_mean(matrix: Any, rows: Any = None) -> Any:
    """(n, d) float32 -> (d,) float32, the plain mean of all rows, or of those with the indices `rows`."""

    def mean_of(block: Any, carry: Any) -> tuple[Any, Any]:
        return mean_rows(block if rows is None else tf.gather(block, rows)), carry

    mean, _ = over_columns(matrix, block_columns(matrix), mean_of, ())
    return mean


def without_negative_zero(values: Any) -> Any:
    """-0.0 becomes 0.0: sorting does not say which of the two comes first."""
    return tf.where(tf.equal(values, 0.0), tf.zeros_like(values), values)


def quantised(rows: Any) -> tuple[Any, Any]:
    """(n, b) float64 -> whole numbers (n, b) of at most 2^20 and the unit (n, 1) of each row, a power of two."""
    peak = tf.reduce_max(tf.abs(rows), axis=1, keepdims=True)
    bits = tf.bitwise.bitwise_and(tf.bitcast(peak, tf.int64), tf.constant(EXPONENT_MASK, tf.int64))
    power = tf.bitcast(bits, tf.float64)
    unit = tf.where(power > 0.0, power, tf.ones_like(power)) * (2.0**-QUANTUM_BITS)
    return tf.round(rows / unit), unit


def gram(matrix: Any, centre: Any) -> Any:
    """(n, d) float32, (d,) float32 -> (n, n) float64: inner products of the rows after subtracting centre.

    Rounding: of each entry to 2^-21 of the largest in its row and block; nothing else rounds within a block.
    """
    n, d = tf.shape(matrix)[0], tf.shape(matrix)[1]

    def body(start: Any, total: Any) -> tuple[Any, Any]:
        stop = tf.minimum(start + GRAM_COLUMNS, d)
        rows = tf.cast(matrix[:, start:stop], tf.float64) - tf.cast(centre[start:stop], tf.float64)
        numbers, unit = quantised(rows)
        return stop, total + tf.matmul(numbers, numbers, transpose_b=True) * (unit * tf.transpose(unit))

    zeros = tf.zeros([n, n], tf.float64)
    _, total = tf.while_loop(lambda start, _: start < d, body, (0, zeros))
    return total


def square_norms(matrix: Any, centre: Any) -> Any:
    """(n, d) float32, (d,) float32 -> (n,) float64: squared distance of each row from centre. Rounds as `gram`."""
    n, d = tf.shape(matrix)[0], tf.shape(matrix)[1]

    def body(start: Any, total: Any) -> tuple[Any, Any]:
        stop = tf.minimum(start + GRAM_COLUMNS, d)
        rows = tf.cast(matrix[:, start:stop], tf.float64) - tf.cast(centre[start:stop], tf.float64)
        numbers, unit = quantised(rows)
        return stop, total + tf.reduce_sum(numbers * numbers, axis=1) * (unit * unit)[:, 0]

    _, total = tf.while_loop(lambda start, _: start < d, body, (0, tf.zeros([n], tf.float64)))
    return total


def square_distances(inner_products: Any) -> Any:
    """(n, n) Gram matrix -> (n, n) squared distances between the rows, not negative."""
    squares = tf.linalg.diag_part(inner_products)
    return tf.maximum((squares[:, None] + squares[None, :]) - 2.0 * inner_products, 0.0)


def median_of(values: Any) -> Any:
    """(n,) -> scalar: the median; the mean of the two middle values for even n."""
    ordered = tf.sort(values)
    n = tf.shape(values)[0]
    return (ordered[(n - 1) // 2] + ordered[n // 2]) * 0.5


def as_scores(values: Any) -> Any:
    """(n,) float64 -> (n,) float32, cut at the largest finite float32."""
    return tf.cast(tf.minimum(values, tf.constant(FLOAT32_MAX, tf.float64)), tf.float32)
