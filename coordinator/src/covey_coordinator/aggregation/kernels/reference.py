"""The kernels in operations that TensorFlow traces: what TFF runs, and what the fast kernels are tested against.

TFF's C++ worker has other compiled operations than this Python's TensorFlow (oneDNN, AVX-512), other vector lengths and
maybe another number of threads, so `tf.reduce_sum` and `tf.matmul` of fractions are not used: their order of summation
is the operation's business. See the package's docstring. Everything works on blocks of columns, so memory beyond the
updates stays small at n = 500, d = 1e6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from covey_coordinator.aggregation.kernels import (
    BLOCK_VALUES,
    EXPONENT_BIAS,
    EXPONENT_MASK,
    GRAM_COLUMNS,
    GREATEST_EXPONENT,
    LEAST_BLOCK_COLUMNS,
    LEAST_PEAK,
    LOW_BITS,
    MANTISSA_BITS,
    MANTISSA_MASK,
    QUANTUM_BITS,
    SPLIT_MIX_LAST,
    SPLIT_MIX_ROUNDS,
    SPLIT_MIX_STEP,
    UPPER_ERROR,
    Kernels,
    Mixture,
    Stage,
    Updates,
)

RADIX = 2.0**LOW_BITS
RADIX_SQUARED = RADIX * RADIX
EXPONENT_OF_ONE = 127 << 23  # the bits of float32 1.0
EXPONENT_OF_GREATEST = EXPONENT_OF_ONE + (GREATEST_EXPONENT << 23)


class TensorFlowKernels(Kernels):
    """See `Kernels`. Traceable without AutoGraph; also runs eagerly, slowly."""

    # ---- on the updates

    def count(self, updates: Updates) -> Any:
        return tf.shape(updates.stages[-1][0] if updates.stages else updates.matrix)[0]

    def dimension(self, updates: Updates) -> Any:
        return tf.shape(updates.matrix)[1]

    def row(self, updates: Updates, index: Any) -> Any:
        if not updates.stages:
            return updates.matrix[index]
        values, _ = self.over_columns(updates, lambda block, carry: (block[index], carry))
        return values

    def columns(self, updates: Updates, indices: Any) -> Any:
        return _staged(tf.gather(updates.matrix, indices, axis=1), updates.stages)

    def ranked_means(self, updates: Updates, low: Any, high: Any, cut: Any) -> tuple[Any, Any]:
        n = self.count(updates)

        def per_block(block: Any, outside: Any) -> tuple[Any, Any]:
            ordered = tf.sort(block, axis=0)
            beyond = tf.logical_or(block < ordered[cut], block > ordered[n - 1 - cut])
            value = _without_negative_zero(_mean_rows(ordered[low:high]))
            return value, outside + tf.math.count_nonzero(beyond, axis=1, dtype=tf.int64)

        return self.over_columns(updates, per_block, tf.zeros([n], tf.int64))

    def nearest_means(self, updates: Updates, keep: Any) -> tuple[Any, Any]:
        n = self.count(updates)

        def per_block(block: Any, left_out: Any) -> tuple[Any, Any]:
            ordered = tf.sort(block, axis=0)
            exact = tf.cast(ordered, tf.float64)
            middle = (exact[(n - 1) // 2] + exact[n // 2]) * 0.5
            reach = tf.maximum(middle - exact[: n - keep + 1], exact[keep - 1 :] - middle)
            start = tf.argmin(reach, axis=0, output_type=tf.int32)
            kept = tf.gather(tf.transpose(ordered), start[:, None] + tf.range(keep)[None, :], batch_dims=1)
            kept = tf.transpose(kept)
            beyond = tf.logical_or(block < kept[0], block > kept[keep - 1])
            value = _without_negative_zero(_mean_rows(kept))
            return value, left_out + tf.math.count_nonzero(beyond, axis=1, dtype=tf.int64)

        return self.over_columns(updates, per_block, tf.zeros([n], tf.int64))

    def combination(self, updates: Updates, weights: Any, centre: Any = None) -> Any:
        def combined(rows: Any, middle: Any) -> Any:
            total = _sum_rows(rows * weights[:, None])
            return tf.cast(total if middle is None else middle + total, tf.float32)

        return self._centred_blocks(updates, centre, combined)

    def _centred_blocks(self, updates: Updates, centre: Any, combined: Callable[[Any, Any], Any]) -> Any:
        """combined((n, b) float64 minus centre, centre's block or None) -> (b,), over all blocks."""

        def per_block(block: Any, start: Any) -> tuple[Any, Any]:
            rows, middle = tf.cast(block, tf.float64), None
            stop = start + tf.shape(block)[1]
            if centre is not None:
                middle = tf.cast(centre[start:stop], tf.float64)
                rows -= middle
            return combined(rows, middle), stop

        values, _ = self.over_columns(updates, per_block, tf.constant(0))
        return values

    def gram(self, updates: Updates, centre: Any = None) -> Any:
        n = self.count(updates)

        def products(upper: Any, lower: Any, unit: Any, _: Any) -> Any:
            across = tf.matmul(upper, lower, transpose_b=True)
            whole = _joined(_products(upper), across + tf.transpose(across), _products(lower))
            return whole * (unit * tf.transpose(unit))

        return _over_quantised(updates, centre, products, tf.zeros([n, n], tf.float64))

    def rough_gram(self, updates: Updates, centre: Any = None) -> tuple[Any, Any]:
        n = self.count(updates)

        def products(upper: Any, lower: Any, unit: Any, columns: Any) -> Any:
            error = (UPPER_ERROR * unit) * (UPPER_ERROR * unit)
            rough = (_products(upper) * RADIX_SQUARED) * (unit * tf.transpose(unit))
            return tf.concat([rough, tf.transpose(columns * error)], axis=0)

        total = _over_quantised(updates, centre, products, tf.zeros([n + 1, n], tf.float64))
        return total[:-1], tf.sqrt(total[-1])

    def square_norms(self, updates: Updates, centre: Any = None) -> Any:
        def squares(upper: Any, lower: Any, unit: Any, _: Any) -> Any:
            parts = ((upper, upper), (2.0 * upper, lower), (lower, lower))
            return _joined(*(tf.reduce_sum(x * y, axis=1) for x, y in parts)) * (unit * unit)[:, 0]

        return _over_quantised(updates, centre, squares, tf.zeros([self.count(updates)], tf.float64))

    def over_columns(
        self, updates: Updates, per_block: Callable[[Any, Any], tuple[Any, Any]], carry: Any = ()
    ) -> tuple[Any, Any]:
        d = self.dimension(updates)
        columns = _block_columns(updates)
        num_blocks = (d + columns - 1) // columns
        results = tf.TensorArray(tf.float32, size=num_blocks, infer_shape=False, element_shape=[None])

        def body(index: Any, results: Any, carry: Any) -> tuple[Any, Any, Any]:
            start = index * columns
            values, carry = per_block(_block(updates, start, tf.minimum(start + columns, d)), carry)
            return index + 1, results.write(index, values), carry

        _, results, carry = tf.while_loop(lambda index, *_: index < num_blocks, body, (0, results, carry))
        return tf.reshape(results.concat(), [d]), carry

    # ---- on small arrays

    def sum_rows(self, rows: Any) -> Any:
        return _sum_rows(rows)

    def real(self, values: Any) -> Any:
        return _of_type(values, tf.float64)

    def single(self, values: Any) -> Any:
        return _of_type(values, tf.float32)

    def whole(self, values: Any) -> Any:
        return tf.cast(values, tf.int64)

    def length(self, values: Any) -> Any:
        return tf.shape(values)[0]

    def arange(self, n: Any) -> Any:
        return tf.range(tf.cast(n, tf.int64), dtype=tf.int64)

    def full(self, shape: tuple[Any, ...], value: Any) -> Any:
        dtype = tf.bool if isinstance(value, bool) else tf.float64
        return tf.fill(_shape(shape), _of_type(value, dtype))

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return tf.where(condition, *_alike(yes, no))

    def minimum(self, a: Any, b: Any) -> Any:
        return tf.minimum(*_alike(a, b))

    def maximum(self, a: Any, b: Any) -> Any:
        return tf.maximum(*_alike(a, b))

    def equal(self, a: Any, b: Any) -> Any:
        return tf.equal(*_alike(a, b))

    def equal_bits(self, a: Any, b: Any) -> Any:
        return tf.equal(tf.bitcast(a, tf.int32), tf.bitcast(b, tf.int32))

    def sqrt(self, values: Any) -> Any:
        return tf.sqrt(values)

    def floor(self, values: Any) -> Any:
        return tf.floor(values)

    def divide(self, a: Any, b: Any) -> Any:
        return tf.math.divide_no_nan(*(_of_type(value, tf.float64) for value in (a, b)))

    def sort(self, values: Any) -> Any:
        return tf.sort(values)

    def argsort(self, values: Any) -> Any:
        return tf.cast(tf.argsort(values, stable=True), tf.int64)

    def argmin(self, values: Any) -> Any:
        return tf.argmin(values)

    def smallest(self, values: Any) -> Any:
        return tf.reduce_min(values, axis=-1)

    def largest(self, values: Any) -> Any:
        return tf.reduce_max(values, axis=-1)

    def take(self, values: Any, indices: Any) -> Any:
        return tf.gather(values, indices)

    def take_along(self, values: Any, indices: Any) -> Any:
        return tf.gather(values, indices, batch_dims=1)

    def members(self, indices: Any, n: Any) -> Any:
        return tf.scatter_nd(indices[:, None], tf.ones_like(indices), tf.cast([n], indices.dtype)) > 0

    def replaced(self, values: Any, indices: Any, rows: Any) -> Any:
        return tf.tensor_scatter_nd_update(values, indices[:, None], rows)

    def transpose(self, matrix: Any) -> Any:
        return tf.transpose(matrix)

    def reshape(self, values: Any, shape: tuple[Any, ...]) -> Any:
        return tf.reshape(values, _shape(shape))

    def concat(self, parts: list[Any]) -> Any:
        return tf.concat(parts, axis=0)

    def diagonal(self, matrix: Any) -> Any:
        return tf.linalg.diag_part(matrix)

    def with_diagonal(self, matrix: Any, value: float) -> Any:
        return tf.linalg.set_diag(matrix, tf.fill([tf.shape(matrix)[0]], tf.cast(value, matrix.dtype)))

    def any(self, values: Any) -> Any:
        return tf.reduce_any(values)

    def all(self, values: Any) -> Any:
        return tf.reduce_all(values)

    def number_true(self, values: Any) -> Any:
        return tf.math.count_nonzero(values, axis=-1, dtype=tf.int64)

    def running_counts(self, values: Any) -> Any:
        return tf.cumsum(tf.cast(values, tf.int64), axis=-1)

    def while_loop(self, goes_on: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> Any:
        state = tf.nest.map_structure(tf.convert_to_tensor, state)
        invariants = tf.nest.map_structure(lambda tensor: tf.TensorShape([None] * tensor.shape.rank), state)
        return tf.while_loop(goes_on, body, state, shape_invariants=invariants)

    def exponent_parts(self, values: Any) -> tuple[Any, Any]:
        bits = tf.bitcast(values, tf.int64)
        exponent = tf.bitwise.right_shift(bits, tf.constant(MANTISSA_BITS, tf.int64)) - EXPONENT_BIAS
        of_one = tf.constant(EXPONENT_BIAS << MANTISSA_BITS, tf.int64)
        mantissa = tf.bitwise.bitwise_or(tf.bitwise.bitwise_and(bits, tf.constant(MANTISSA_MASK, tf.int64)), of_one)
        return tf.bitcast(mantissa, tf.float64), exponent

    def required(self, values: Any, condition: Any, what: str, remedy: str) -> Any:
        with tf.control_dependencies([tf.debugging.Assert(condition, [f"{what}; {remedy}"])]):
            return tf.identity(values)

    def random_bits(self, seed: Any, n: Any) -> Any:
        state = tf.cast(seed, tf.int64) + (self.arange(n) + 1) * SPLIT_MIX_STEP
        for shift, factor in SPLIT_MIX_ROUNDS:
            state = tf.bitwise.bitwise_xor(state, _shifted(state, shift)) * tf.constant(factor, tf.int64)
        return tf.bitwise.bitwise_xor(state, _shifted(state, SPLIT_MIX_LAST))


def _shifted(values: Any, places: int) -> Any:
    """Logical shift to the right of int64 bits: TensorFlow's own fills with the sign."""
    kept = (1 << (64 - places)) - 1
    shifted = tf.bitwise.right_shift(values, tf.constant(places, tf.int64))
    return tf.bitwise.bitwise_and(shifted, tf.constant(kept, tf.int64))


def _shape(shape: tuple[Any, ...]) -> Any:
    return tf.stack([tf.cast(size, tf.int32) for size in shape]) if shape else tf.constant([], tf.int32)


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Both as tensors of the dtype of whichever is a tensor already; two Python numbers as float64."""
    if tf.is_tensor(a):
        return a, _of_type(b, a.dtype)
    if tf.is_tensor(b):
        return _of_type(a, b.dtype), b
    return _of_type(a, tf.float64), _of_type(b, tf.float64)


def _of_type(value: Any, dtype: Any) -> Any:
    """A tensor of this dtype. tf.cast alone would take a Python number through float32 and lose half its digits."""
    return tf.cast(value if tf.is_tensor(value) else np.asarray(value), dtype)


def _sum_rows(rows: Any) -> Any:
    """(n, ...) -> (...) by halving; see `Kernels.sum_rows`."""

    def halve(x: Any) -> tuple[Any]:
        n = tf.shape(x)[0]
        half = (n + 1) // 2
        return (tf.concat([x[: n - half] + x[half:], x[n - half : half]], axis=0),)

    (total,) = tf.while_loop(
        lambda x: tf.shape(x)[0] > 1,
        halve,
        (rows,),
        shape_invariants=(tf.TensorShape([None, *rows.shape[1:]]),),
    )
    return total[0]


def _mean_rows(rows: Any) -> Any:
    """(n, b) float32 -> (b,) float32: mean over rows, summed in float64. Equal rows give exactly that row."""
    reciprocal = 1.0 / tf.cast(tf.shape(rows)[0], tf.float64)
    return tf.cast(_sum_rows(tf.cast(rows, tf.float64)) * reciprocal, tf.float32)


def _without_negative_zero(values: Any) -> Any:
    """-0.0 becomes 0.0: sorting does not say which of the two comes first."""
    return tf.where(tf.equal(values, 0.0), tf.zeros_like(values), values)


def _block_columns(updates: Updates) -> Any:
    """Width of a block of about BLOCK_VALUES numbers. Column-wise results do not depend on it."""
    return tf.maximum(BLOCK_VALUES // tf.maximum(tf.shape(updates.matrix)[0], 1), LEAST_BLOCK_COLUMNS)


def _block(updates: Updates, start: Any, stop: Any) -> Any:
    return _staged(updates.matrix[:, start:stop], updates.stages)


def _staged(block: Any, stages: tuple[Stage | Mixture, ...]) -> Any:
    """(n, b) float32 -> (m, b) float32: the block after all stages."""
    for stage in stages:
        block = _mixed(block, stage)
    return block


def _mixed(block: Any, stage: Stage | Mixture) -> Any:
    """One row of the stage at a time: all at once would be (m, k, b)."""
    rows = tf.cast(block, tf.float64)
    if isinstance(stage, Mixture):
        return _means(rows * stage.share, stage.members)

    def one(row: tuple[Any, Any]) -> Any:
        indices, weights = row
        return tf.cast(_sum_rows(tf.gather(rows, indices) * weights[:, None]), tf.float32)

    if stage.indices.shape[1] == 1:
        return tf.cast(tf.gather(rows, stage.indices[:, 0]) * stage.weights, tf.float32)
    return tf.map_fn(one, (stage.indices, stage.weights), fn_output_signature=tf.float32)


def _products(rows: Any) -> Any:
    return tf.matmul(rows, rows, transpose_b=True)


def _joined(above: Any, across: Any, below: Any) -> Any:
    """Sums of products of whole numbers from those of their parts; rounds once."""
    return above * RADIX_SQUARED + (across * RADIX + below)


def _means(rows: Any, members: Any) -> Any:
    """(n, b) rows times the share, (m, n) bool -> (m, b) float32: the sums of the members in the order of `Mixture`."""
    n = tf.shape(rows)[0]
    missing = -n % 4
    fours = tf.reshape(tf.pad(rows, [[0, missing], [0, 0]]), [-1, 4, tf.shape(rows)[1]])
    there = tf.reshape(tf.pad(members, [[0, 0], [0, missing]]), [tf.shape(members)[0], -1, 4, 1])

    def one(row: Any) -> Any:
        kept = tf.where(row, fours, tf.zeros_like(fours))
        return tf.cast(_sum_rows((kept[:, 0] + kept[:, 1]) + (kept[:, 2] + kept[:, 3])), tf.float32)

    return tf.map_fn(one, there, fn_output_signature=tf.float32)


def _over_quantised(updates: Updates, centre: Any, product: Callable[..., Any], zero: Any) -> Any:
    """Sum of product(upper, lower, unit, columns) over blocks of GRAM_COLUMNS columns of the centred, quantised rows.

    columns: how many the block has, a float64 scalar; the others as from `_quantised`.
    """
    d = tf.shape(updates.matrix)[1]

    def body(start: Any, total: Any) -> tuple[Any, Any]:
        stop = tf.minimum(start + GRAM_COLUMNS, d)
        rows = _block(updates, start, stop)
        if centre is not None:
            rows -= centre[start:stop]
        return stop, total + product(*_quantised(rows), tf.cast(stop - start, tf.float64))

    return tf.while_loop(lambda start, _: start < d, body, (0, zero))[1]


def _quantised(rows: Any) -> tuple[Any, Any, Any]:
    """(n, b) float32 -> whole numbers in two parts, (n, b) float64 each, and the unit (n, 1) of each row.

    A number is (upper * RADIX + lower) * unit.
    """
    peak = tf.maximum(tf.reduce_max(tf.abs(rows), axis=1, keepdims=True), LEAST_PEAK)
    bits = tf.bitwise.bitwise_and(tf.bitcast(peak, tf.int32), EXPONENT_MASK)
    bits = tf.minimum(bits, EXPONENT_OF_GREATEST)
    unit = tf.cast(tf.bitcast(bits, tf.float32), tf.float64) * 2.0**-QUANTUM_BITS
    # not 1.0 / unit: in a graph TensorFlow takes a reciprocal that is not right in the last bit
    inverse = tf.bitcast(EXPONENT_OF_ONE * 2 + (QUANTUM_BITS << 23) - bits, tf.float32)
    bound = 2.0 ** (QUANTUM_BITS + 1)  # also where the difference is infinite
    whole = tf.cast(tf.round(tf.clip_by_value(rows * inverse, -bound, bound)), tf.float64)
    upper = tf.floor((whole + RADIX / 2) * (1.0 / RADIX))
    return upper, whole - upper * RADIX, unit
