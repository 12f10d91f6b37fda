"""The kernels in operations that TensorFlow traces: what TFF runs, and what the fast kernels are tested against.

TFF's C++ worker has other compiled operations than this Python's TensorFlow (oneDNN, AVX-512), other vector lengths and
maybe another number of threads, so `tf.reduce_sum` and `tf.matmul` of fractions are not used: their order of summation
is the operation's business. See the package's docstring. Everything works on blocks of columns, so memory beyond the
updates stays small at n = 500, d = 1e6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from covey_coordinator.aggregation.kernels import (
    BLOCK_VALUES,
    EXPONENT_BIAS,
    EXPONENT_MASK,
    GRAM_COLUMNS,
    LEAST_BLOCK_COLUMNS,
    MANTISSA_BITS,
    MANTISSA_MASK,
    QUANTUM_BITS,
    SPLIT_MIX_LAST,
    SPLIT_MIX_ROUNDS,
    SPLIT_MIX_STEP,
    Kernels,
    Stage,
    Updates,
)


class TensorFlowKernels(Kernels):
    """See `Kernels`. Traceable without AutoGraph; also runs eagerly, slowly."""

    # ---- on the updates

    def count(self, updates: Updates) -> Any:
        return tf.shape(updates.stages[-1].indices if updates.stages else updates.matrix)[0]

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

        def product(numbers: Any, unit: Any) -> Any:
            return tf.matmul(numbers, numbers, transpose_b=True) * (unit * tf.transpose(unit))

        return _over_quantised(updates, centre, product, tf.zeros([n, n], tf.float64))

    def square_norms(self, updates: Updates, centre: Any = None) -> Any:
        def squares(numbers: Any, unit: Any) -> Any:
            return tf.reduce_sum(numbers * numbers, axis=1) * (unit * unit)[:, 0]

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
        return _cast(values, tf.float64)

    def single(self, values: Any) -> Any:
        return tf.cast(values, tf.float32)

    def whole(self, values: Any) -> Any:
        return tf.cast(values, tf.int64)

    def length(self, values: Any) -> Any:
        return tf.shape(values)[0]

    def arange(self, n: Any) -> Any:
        return tf.range(tf.cast(n, tf.int64), dtype=tf.int64)

    def full(self, shape: tuple[Any, ...], value: Any) -> Any:
        dtype = tf.bool if isinstance(value, bool) else tf.float64
        return tf.fill(_shape(shape), _cast(value, dtype))

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return tf.where(condition, *_alike(yes, no))

    def minimum(self, a: Any, b: Any) -> Any:
        return tf.minimum(*_alike(a, b))

    def maximum(self, a: Any, b: Any) -> Any:
        return tf.maximum(*_alike(a, b))

    def sqrt(self, values: Any) -> Any:
        return tf.sqrt(values)

    def floor(self, values: Any) -> Any:
        return tf.floor(values)

    def divide(self, a: Any, b: Any) -> Any:
        return tf.math.divide_no_nan(*(_cast(value, tf.float64) for value in (a, b)))

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
        return a, _cast(b, a.dtype)
    if tf.is_tensor(b):
        return _cast(a, b.dtype), b
    return _cast(a, tf.float64), _cast(b, tf.float64)


def _cast(value: Any, dtype: Any) -> Any:
    """tf.cast, but Python's floats keep their 53 bits: tf.cast makes float32 of them first."""
    return tf.constant(value, dtype) if isinstance(value, float) else tf.cast(value, dtype)


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


def _staged(block: Any, stages: tuple[Stage, ...]) -> Any:
    """(n, b) float32 -> (m, b) float32: the block after all stages."""
    for stage in stages:
        block = _mixed(block, stage)
    return block


def _mixed(block: Any, stage: Stage) -> Any:
    """One row of the stage at a time: all at once would be (m, k, b)."""
    rows = tf.cast(block, tf.float64)

    def one(row: tuple[Any, Any]) -> Any:
        indices, weights = row
        return tf.cast(_sum_rows(tf.gather(rows, indices) * weights[:, None]), tf.float32)

    if stage.indices.shape[1] == 1:
        return tf.cast(tf.gather(rows, stage.indices[:, 0]) * stage.weights, tf.float32)
    return tf.map_fn(one, (stage.indices, stage.weights), fn_output_signature=tf.float32)


def _over_quantised(updates: Updates, centre: Any, product: Callable[[Any, Any], Any], zero: Any) -> Any:
    """Sum of product(numbers, unit) over blocks of GRAM_COLUMNS columns of the centred, quantised rows."""
    d = tf.shape(updates.matrix)[1]

    def body(start: Any, total: Any) -> tuple[Any, Any]:
        stop = tf.minimum(start + GRAM_COLUMNS, d)
        rows = tf.cast(_block(updates, start, stop), tf.float64)
        if centre is not None:
            rows -= tf.cast(centre[start:stop], tf.float64)
        return stop, total + product(*_quantised(rows))

    return tf.while_loop(lambda start, _: start < d, body, (0, zero))[1]


def _quantised(rows: Any) -> tuple[Any, Any]:
    """(n, b) float64 -> whole numbers (n, b) of at most 2^20 and the unit (n, 1) of each row, a power of two."""
    peak = tf.reduce_max(tf.abs(rows), axis=1, keepdims=True)
    bits = tf.bitwise.bitwise_and(tf.bitcast(peak, tf.int64), tf.constant(EXPONENT_MASK, tf.int64))
    power = tf.bitcast(bits, tf.float64)
    unit = tf.where(power > 0.0, power, tf.ones_like(power)) * (2.0**-QUANTUM_BITS)
    return tf.round(rows / unit), unit
