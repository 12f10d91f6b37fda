"""The kernels in numpy and compiled loops: what live rounds run. Same bits as the reference.

The loops compile when first used and are kept on disk beside the package, or in the user's cache folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.aggregation import compiled
from covey_coordinator.aggregation.kernels import (
    BLOCK_VALUES,
    EXPONENT_BIAS,
    LEAST_BLOCK_COLUMNS,
    MANTISSA_BITS,
    MANTISSA_MASK,
    SPLIT_MIX_LAST,
    SPLIT_MIX_ROUNDS,
    SPLIT_MIX_STEP,
    Kernels,
    Mixture,
    Stage,
    Updates,
)
from covey_protocol.errors import RuleError

AnyArray = npt.NDArray[Any]


class NumpyKernels(Kernels):
    """See `Kernels`. Arrays are numpy's, sizes are Python ints."""

    # ---- on the updates

    def count(self, updates: Updates) -> int:
        return len(updates.stages[-1][0] if updates.stages else updates.matrix)

    def dimension(self, updates: Updates) -> int:
        return int(updates.matrix.shape[1])

    def row(self, updates: Updates, index: Any) -> AnyArray:
        if not updates.stages:
            row: AnyArray = updates.matrix[index]
            return row
        values, _ = self.over_columns(updates, lambda block, carry: (block[index], carry))
        return values

    def columns(self, updates: Updates, indices: Any) -> AnyArray:
        return _staged(updates.matrix[:, indices], updates.stages)

    def ranked_means(self, updates: Updates, low: int, high: int, cut: int) -> tuple[AnyArray, AnyArray]:
        return compiled.ranked_means(updates, low, high, cut)

    def nearest_means(self, updates: Updates, keep: int) -> tuple[AnyArray, AnyArray]:
        return compiled.nearest_means(updates, keep)

    def combination(self, updates: Updates, weights: Any, centre: Any = None) -> AnyArray:
        return compiled.combination(updates, weights, centre)

    def gram(self, updates: Updates, centre: Any = None) -> AnyArray:
        return compiled.gram(updates, centre)

    def rough_gram(self, updates: Updates, centre: Any = None) -> tuple[AnyArray, AnyArray]:
        return compiled.rough_gram(updates, centre)

    def square_norms(self, updates: Updates, centre: Any = None) -> AnyArray:
        return compiled.square_norms(updates, centre)

    def over_columns(
        self, updates: Updates, per_block: Callable[[Any, Any], tuple[Any, Any]], carry: Any = ()
    ) -> tuple[AnyArray, Any]:
        result = np.empty(updates.matrix.shape[1], np.float32)
        for start, stop in _blocks(updates, _block_columns(updates)):
            result[start:stop], carry = per_block(_block(updates, start, stop), carry)
        return result, carry

    # ---- on small arrays

    def sum_rows(self, rows: Any) -> Any:
        return _sum_rows(rows)

    def real(self, values: Any) -> Any:
        return np.asarray(values, np.float64)

    def single(self, values: Any) -> Any:
        return np.asarray(values, np.float32)

    def whole(self, values: Any) -> Any:
        return np.asarray(values).astype(np.int64)

    def length(self, values: Any) -> int:
        return len(values)

    def arange(self, n: Any) -> AnyArray:
        return np.arange(n, dtype=np.int64)

    def full(self, shape: tuple[Any, ...], value: Any) -> AnyArray:
        return np.full(shape, value, bool if isinstance(value, bool) else np.float64)

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return np.where(condition, *_alike(yes, no))

    def minimum(self, a: Any, b: Any) -> Any:
        return np.minimum(*_alike(a, b))

    def maximum(self, a: Any, b: Any) -> Any:
        return np.maximum(*_alike(a, b))

    def equal(self, a: Any, b: Any) -> Any:
        return np.equal(a, b)

    def equal_bits(self, a: Any, b: Any) -> AnyArray:
        same: AnyArray = np.equal(a.view(np.int32), b.view(np.int32))
        return same

    def sqrt(self, values: Any) -> Any:
        return np.sqrt(values)

    def floor(self, values: Any) -> Any:
        return np.floor(values)

    def divide(self, a: Any, b: Any) -> Any:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if b.all():
            return np.divide(a, b)
        quotient = np.divide(a, np.where(b == 0, 1.0, b))
        return np.where(b == 0, 0.0, quotient)

    def sort(self, values: Any) -> AnyArray:
        return np.sort(values)

    def argsort(self, values: Any) -> AnyArray:
        return np.argsort(values, kind="stable")

    def argmin(self, values: Any) -> Any:
        return np.argmin(values)

    def smallest(self, values: Any) -> Any:
        return np.min(values, axis=-1)

    def largest(self, values: Any) -> Any:
        return np.max(values, axis=-1)

    def take(self, values: Any, indices: Any) -> Any:
        return np.take(values, indices, axis=0)

    def take_along(self, values: Any, indices: Any) -> AnyArray:
        return np.take_along_axis(values, indices, axis=1)

    def members(self, indices: Any, n: int) -> AnyArray:
        found = np.zeros(n, bool)
        found[indices] = True
        return found

    def replaced(self, values: Any, indices: Any, rows: Any) -> AnyArray:
        copy: AnyArray = values.copy()
        copy[indices] = rows
        return copy

    def transpose(self, matrix: Any) -> AnyArray:
        return np.transpose(matrix)

    def reshape(self, values: Any, shape: tuple[Any, ...]) -> AnyArray:
        return np.reshape(values, shape)

    def concat(self, parts: list[Any]) -> AnyArray:
        return np.concatenate(parts)

    def diagonal(self, matrix: Any) -> AnyArray:
        return np.diagonal(matrix)

    def with_diagonal(self, matrix: Any, value: float) -> AnyArray:
        copy: AnyArray = matrix.copy()
        np.fill_diagonal(copy, value)
        return copy

    def any(self, values: Any) -> Any:
        return np.any(values)

    def all(self, values: Any) -> Any:
        return np.all(values)

    def number_true(self, values: Any) -> Any:
        return np.count_nonzero(values, axis=-1)

    def running_counts(self, values: Any) -> Any:
        return np.cumsum(values, axis=-1, dtype=np.int64)

    def while_loop(self, goes_on: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> Any:
        while goes_on(*state):
            state = tuple(body(*state))
        return state

    def exponent_parts(self, values: Any) -> tuple[AnyArray, AnyArray]:
        bits = np.asarray(values, np.float64).view(np.int64)
        exponent = (bits >> MANTISSA_BITS) - EXPONENT_BIAS
        return ((bits & MANTISSA_MASK) | (EXPONENT_BIAS << MANTISSA_BITS)).view(np.float64), exponent

    def required(self, values: Any, condition: Any, what: str, remedy: str) -> Any:
        if not condition:
            raise RuleError(what, remedy)
        return values

    def random_bits(self, seed: Any, n: int) -> AnyArray:
        state = np.asarray(seed, np.int64) + (self.arange(n) + 1) * np.int64(SPLIT_MIX_STEP)
        for shift, factor in SPLIT_MIX_ROUNDS:
            state = (state ^ _shifted(state, shift)) * np.int64(factor)
        mixed: AnyArray = state ^ _shifted(state, SPLIT_MIX_LAST)
        return mixed


def _shifted(values: AnyArray, places: int) -> AnyArray:
    """Logical shift to the right of int64 bits."""
    shifted: AnyArray = (values.view(np.uint64) >> np.uint64(places)).view(np.int64)
    return shifted


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """A Python number beside an array takes the array's dtype, as in TensorFlow."""
    if isinstance(a, (bool, int, float)) and isinstance(b, np.ndarray):
        return b.dtype.type(a), b
    if isinstance(b, (bool, int, float)) and isinstance(a, np.ndarray):
        return a, a.dtype.type(b)
    return a, b


def _sum_rows(rows: AnyArray) -> AnyArray:
    """(n, ...) -> (...) by halving; see `Kernels.sum_rows`."""
    sums: AnyArray = np.array(rows)
    n = len(sums)
    while n > 1:
        half = (n + 1) // 2
        sums[: n - half] += sums[half:n]
        n = half
    total: AnyArray = sums[0]
    return total


def _block_columns(updates: Updates) -> int:
    return max(BLOCK_VALUES // max(len(updates.matrix), 1), LEAST_BLOCK_COLUMNS)


def _blocks(updates: Updates, columns: int) -> list[tuple[int, int]]:
    d = updates.matrix.shape[1]
    return [(start, min(start + columns, d)) for start in range(0, d, columns)]


def _block(updates: Updates, start: int, stop: int) -> AnyArray:
    return _staged(updates.matrix[:, start:stop], updates.stages)


def _staged(block: AnyArray, stages: tuple[Stage | Mixture, ...]) -> AnyArray:
    for stage in stages:
        rows = block.astype(np.float64)
        if isinstance(stage, Mixture):
            block = np.stack([_mean_of(rows * stage.share, row) for row in stage.members]).astype(np.float32)
            continue
        indices, weights = stage
        block = np.stack([_sum_rows(rows[row] * weight[:, None]) for row, weight in zip(indices, weights)]).astype(
            np.float32
        )
    return block


def _mean_of(rows: AnyArray, members: AnyArray) -> AnyArray:
    """(n, b) rows times the share, (n,) bool -> (b,): the sum of the members in the order of `Mixture`."""
    padded = np.zeros((-(-len(rows) // 4) * 4, rows.shape[1]))
    padded[: len(rows)] = np.where(members[:, None], rows, 0.0)
    fours = padded.reshape(-1, 4, rows.shape[1])
    total: AnyArray = _sum_rows((fours[:, 0] + fours[:, 1]) + (fours[:, 2] + fours[:, 3]))
    return total
