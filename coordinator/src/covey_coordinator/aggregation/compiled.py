"""Kernels of the rules, compiled: the bits of `kernels.reference`, many times as fast.

What fixes the bits is the same as there: comparisons, element-wise float64 arithmetic, additions in the halving order
of `Kernels.sum_rows`, and sums of whole numbers that no order changes. Threads share the work by columns, and a
column's result does not depend on its neighbours.

An `Updates` may have *stages*: new rows that are weighted sums of rows, made for a few columns at a time, so that the
mixed matrix never exists as a whole. Memory beyond the updates: under 1 MB per thread; for inner products and norms a
block of GRAM_COLUMNS columns per thread, with stages two, and in `gram` a few (n, n) matrices.

All numbers must be finite; that is not checked here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.aggregation import crew, loops, networks
from covey_coordinator.aggregation.kernels import Mixture, Stage, Updates
from covey_coordinator.aggregation.loops import GRAM_COLUMNS, TILE
from covey_protocol.errors import UsageError

Array = npt.NDArray[Any]

BUFFER_VALUES = 48 << 10  # numbers in a block of columns: 192 KB, less than half of the second cache
BLOCK_RESULTS = 1 << 16  # numbers that blocks of inner products computed together may have: 512 KB
PART_VALUES = 1 << 18  # numbers below which a second thread costs more than it brings


class Plan:
    """An `Updates` as the compiled functions take it, and the columns in parts for the threads."""

    def __init__(self, updates: Updates) -> None:
        matrix = np.require(updates.matrix, np.float32, ["C", "A"])
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise UsageError(f"updates of shape {matrix.shape}", "pass a matrix with one row per device")
        self.n, self.d = matrix.shape
        self.m = len(updates.stages[-1][0] if updates.stages else matrix)
        self.flat = constant(matrix.reshape(-1))
        if updates.stages:
            self._take(updates.stages)
        else:  # most calls, and of few numbers: nothing to look up or to copy
            self.rows, self.stages, self.places, self.weights = self.n, NO_STAGES, NO_PLACES, NO_WEIGHTS
        self.columns = min(max(BUFFER_VALUES // self.rows // TILE * TILE, TILE), 1024)

    def _take(self, stages: tuple[Stage | Mixture, ...]) -> None:
        heights = [self.n, *(len(stage[0]) for stage in stages)]
        parts = [as_stage(stage, height) for stage, height in zip(stages, heights)]
        self.rows = max(*heights, *(places.shape[1] for _, places, _ in parts))
        table, offset = [], 0
        for kind, places, _ in parts:
            table.append((*places.shape, offset, kind))
            offset += places.size
        self.stages = constant(np.array(table, np.int64))
        self.places = joined([places * np.int64(loops.WIDTH) for _, places, _ in parts], np.int64)
        self.weights = joined([weights for _, _, weights in parts], np.float64)

    @property
    def source(self) -> tuple[Any, ...]:
        return self.flat, self.n, self.d

    @property
    def how(self) -> tuple[Any, ...]:
        return self.stages, self.places, self.weights, self.rows

    def over_columns(self, work: Callable[[int, int], None]) -> None:
        """work(start, stop) for ranges that cover all columns; each range is a whole number of blocks but the last."""
        blocks = -(-self.d // self.columns)
        parts = max(1, min(blocks, 4 * crew.SIZE, self.n * self.d // (PART_VALUES // 2)))
        if crew.SIZE == 1 or self.n * self.d < PART_VALUES:
            work(0, self.d)
            return
        edges = [blocks * part // parts * self.columns for part in range(parts)] + [self.d]
        crew.spread(parts, lambda part: work(edges[part], edges[part + 1]))

    def add_blocks(self, total: Array, blocks: Callable[[int, int], Array]) -> None:
        """Add all that blocks(start, stop) gives, one array per GRAM_COLUMNS columns, to total, from left to right."""
        waiting: dict[int, Array] = {}
        lock = threading.Lock()
        done = 0
        many = -(-self.d // GRAM_COLUMNS)
        few = self.n * self.d < PART_VALUES // 2
        together = many if few else max(1, min(many // (4 * crew.SIZE), BLOCK_RESULTS // total.size))
        columns = together * GRAM_COLUMNS

        def work(part: int) -> None:
            nonlocal done
            results = blocks(part * columns, min((part + 1) * columns, self.d))
            with lock:
                waiting[part] = results
                while done in waiting:
                    for result in waiting.pop(done):
                        np.add(total, result, out=total)
                    done += 1

        crew.spread(-(-many // together), work)


def constant(array: Array) -> Array:
    """A view that cannot be written to, so that compiled functions meet one kind of array only."""
    view = array.view()
    view.flags.writeable = False
    return view


def joined(parts: list[Array], dtype: Any) -> Array:
    return constant(np.concatenate([np.asarray(part, dtype).reshape(-1) for part in parts]))


NO_STAGES, NO_PLACES, NO_WEIGHTS = (constant(np.zeros(*what)) for what in (((0, 4), int), (0, int), (0, float)))
NO_CENTRE = constant(np.zeros(0, np.float32))


@lru_cache(maxsize=64)
def all_rows(n: int) -> Array:
    return constant(np.arange(n))


def as_stage(stage: Stage | Mixture, rows: int) -> tuple[int, Array, Array]:
    """Kind of stage, places (m, k) of what is added up for each new row, and weights in the same shape."""
    if isinstance(stage, Mixture):
        groups = -(-rows // 4)
        if stage.members.ndim != 2 or stage.members.shape[1] != rows or 0 in stage.members.shape:
            raise UsageError(f"members of shape {stage.members.shape} for {rows} rows", "pass one bool per pair")
        bits = np.zeros((len(stage.members), 4 * groups), np.int64)
        bits[:, :rows] = stage.members
        codes = bits.reshape(-1, groups, 4) @ (1 << np.arange(4))
        return loops.MIXTURE, codes + 16 * np.arange(groups), np.full(codes.shape, stage.share, np.float64)
    indices, weights = stage
    check_stage(indices, weights, rows)
    return loops.EQUAL if (weights == weights[0, 0]).all() else loops.WEIGHTED, indices, weights


def check_stage(indices: Array, weights: Array, rows: int) -> None:
    if indices.ndim != 2 or indices.shape != weights.shape or indices.size == 0:
        raise UsageError(f"a stage of shapes {indices.shape}, {weights.shape}", "pass two equal matrices")
    if indices.min() < 0 or indices.max() >= rows:
        raise UsageError(
            f"a stage with index {indices.min()} or {indices.max()} of {rows} rows", "pass rows that exist"
        )


def ranked_means(updates: Updates, low: int, high: int, cut: int) -> tuple[Array, Array]:
    """Per column the mean of the sorted values of rank low to high - 1: (d,) float32.

    And per row how many of its numbers lie strictly outside the values of rank cut to n - 1 - cut: (n,) int64.
    """
    plan = Plan(updates)
    if not (0 <= low < high <= plan.m and 0 <= cut < plan.m):
        raise UsageError(f"ranks {low} to {high}, {cut} of {plan.m}", "pass ranks that exist")
    net = compiled_network(plan.m, low, high, min(cut, plan.m - 1 - cut))
    out, outside, lock = np.empty(plan.d, np.float32), np.zeros(plan.m, np.int64), threading.Lock()

    def work(start: int, stop: int) -> None:
        found = np.zeros(plan.m, np.int64)
        loops.ranked_range(
            *plan.source, start, stop, *plan.how, plan.m, plan.columns, net, low, high, cut, out, found
        )  # fmt: skip
        with lock:
            np.add(outside, found, out=outside)

    plan.over_columns(work)
    return out, outside


def nearest_means(updates: Updates, keep: int) -> tuple[Array, Array]:
    """Per column the mean of the `keep` consecutive sorted values nearest the median: (d,) float32.

    Nearest: the first window with the least distance from the median to its farther end. And per row how many of its
    numbers lie strictly outside their column's window: (n,) int64.
    """
    plan = Plan(updates)
    if not 1 <= keep <= plan.m:
        raise UsageError(f"{keep} values of {plan.m}", "keep at least one and at most all")
    net = compiled_network(plan.m, 0, plan.m, 0)
    out, outside, lock = np.empty(plan.d, np.float32), np.zeros(plan.m, np.int64), threading.Lock()

    def work(start: int, stop: int) -> None:
        found = np.zeros(plan.m, np.int64)
        loops.nearest_range(*plan.source, start, stop, *plan.how, plan.m, plan.columns, net, keep, out, found)
        with lock:
            np.add(outside, found, out=outside)

    plan.over_columns(work)
    return out, outside


def combination(
    updates: Updates, weights: Array, centre: Array | None = None, rows: Array | None = None, scale: float = 1.0
) -> Array:
    """(d,) float32: centre + scale * the sum, in the halving order, of weights[j] * (row rows[j] - centre).

    weights: (k,) float64. rows: (k,) indices, all rows if None. centre: (d,) float32, None is zero. Float64 throughout.
    """
    plan = Plan(updates)
    chosen = all_rows(plan.m) if rows is None else joined([rows], np.int64)
    shares = joined([weights], np.float64)
    if rows is not None or len(shares) != plan.m:
        check_stage(chosen[None], shares[None], plan.m)
    plan.rows = max(plan.rows, len(chosen))
    middle, out = as_centre(centre, plan.d), np.empty(plan.d, np.float32)

    def work(start: int, stop: int) -> None:
        loops.combination_range(
            *plan.source, start, stop, *plan.how, plan.columns, shares, chosen, float(scale), middle, out
        )  # fmt: skip

    plan.over_columns(work)
    return out


def gram(updates: Updates, centre: Array | None = None) -> Array:
    """(n, n) float64: inner products of the rows minus centre, (d,) float32 or None for zero. As `Kernels.gram`."""
    return inner_products(updates, centre, rough=False)[0]


def rough_gram(updates: Updates, centre: Array | None = None) -> tuple[Array, Array]:
    """(n, n) float64 and (n,) float64: the same of rounded rows, and how far they are from these. See `Kernels`."""
    products, squares = inner_products(updates, centre, rough=True)
    return products, np.sqrt(squares)


def inner_products(updates: Updates, centre: Array | None, rough: bool) -> tuple[Array, Array]:
    plan = Plan(updates)
    middle, total = as_centre(centre, plan.d), np.zeros((plan.m + 1, plan.m))
    plan.add_blocks(
        total, lambda start, stop: loops.gram_blocks(*plan.source, start, stop, *plan.how, plan.m, middle, rough)
    )
    lower = np.tril(total[:-1])
    return lower + np.tril(lower, -1).T, total[-1]


def square_norms(updates: Updates, centre: Array | None = None) -> Array:
    """(n,) float64: squared distance of each row from centre, (d,) float32 or None. As `Kernels.square_norms`."""
    plan = Plan(updates)
    middle, total = as_centre(centre, plan.d), np.zeros(plan.m)
    plan.add_blocks(
        total, lambda start, stop: loops.square_norms_blocks(*plan.source, start, stop, *plan.how, plan.m, middle)
    )
    return total


def as_centre(centre: Array | None, d: int) -> Array:
    if centre is None:
        return NO_CENTRE
    flat = np.require(centre, np.float32, ["C", "A"])
    if flat.shape != (d,):
        raise UsageError(f"a centre of shape {flat.shape} for {d} columns", "pass one number per column")
    return constant(flat)


def compiled_network(n: int, low: int, high: int, cut: int) -> tuple[Array, int, int]:
    found = networks.network(n, low, high, cut)
    return constant(found.steps), found.rows, found.front
