"""Sorting networks as tables of steps, for `compiled.py` to run on many columns at once.

The network is a merge sort whose merges are bitonic with the first stage mirrored, so that every comparator puts the
smaller value at the smaller row. Rows are padded to a power of two with minus infinity in front and infinity behind;
a comparator never moves these, so it may be left out. What is not needed for the wanted ranks is left out as well.
Comparators are joined to steps of up to eight rows, which the processor holds in registers.
Source: Batcher 1968, "Sorting networks and their applications".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

# Kinds of steps: (kind, first row, distance, first row of the mirrored half). Only these names say what a kind means.
BOTH, LOWER, UPPER, SORT8, CLEAN8, CLEAN4, FLIP8, FLIP4 = range(8)
COST = {SORT8: 20.0, CLEAN8: 13.5, CLEAN4: 5.2, FLIP8: 13.5, FLIP4: 5.2}  # processor cycles for eight columns, measured
COST_BOTH, COST_ONE = 2.7, 2.0

Comparator = tuple[int, int]
Step = tuple[int, int, int, int]

# 19 comparators, the least for eight inputs (Knuth, The Art of Computer Programming 3, section 5.3.4).
EIGHT = (
    *((0, 2), (1, 3), (4, 6), (5, 7)),
    *((0, 4), (1, 5), (2, 6), (3, 7)),
    *((0, 1), (2, 3), (4, 5), (6, 7)),
    *((2, 4), (3, 5)),
    *((1, 4), (3, 6)),
    *((1, 2), (3, 4), (5, 6)),
)


@dataclass(frozen=True)
class Network:
    """steps: (s, 4) int32. rows: of the padded column, a power of two >= 8. front: rows of padding before the values.

    After the steps the wanted ranks stand at rows front + rank; other rows hold anything.
    """

    steps: npt.NDArray[np.int32]
    rows: int
    front: int


@lru_cache(maxsize=64)
def network(n: int, low: int, high: int, cut: int) -> Network:
    """The steps that sort n values as far as the ranks low to high - 1, cut and n - 1 - cut need it."""
    rows = max(8, 1 << (n - 1).bit_length())
    spare = rows - n
    wanted = [*range(low, high), cut, n - 1 - cut]
    fronts = sorted({0, spare // 2, spare // 16 * 8})
    choices = [(*needed_steps(rows, n, front, wanted), front) for front in fronts]
    _, steps, front = min(choices, key=lambda choice: choice[0])
    return Network(np.array(steps, np.int32).reshape(-1, 4), rows, front)


def needed_steps(rows: int, n: int, front: int, wanted: Iterable[int]) -> tuple[float, list[Step]]:
    """The steps of a sort of `rows` rows, of which front to front + n - 1 hold values; what they cost in all."""
    live = {front + rank for rank in wanted}
    cost = 0.0
    steps: list[Step] = []
    for step in reversed(list(sort_steps(0, rows))):
        needed = []
        for i, j in reversed(comparators(step)):
            if i >= front and j < front + n and (i in live or j in live):
                needed.append((BOTH if i in live and j in live else LOWER if i in live else UPPER, i, j, 0))
                live |= {i, j}
        one_by_one = sum(COST_BOTH if kind == BOTH else COST_ONE for kind, *_ in needed)
        if one_by_one < COST[step[0]]:
            cost, steps = cost + one_by_one, steps + needed
        else:
            cost, steps = cost + COST[step[0]], steps + [step]
    return cost, steps[::-1]


def sort_steps(first: int, rows: int) -> Iterator[Step]:
    """Sort rows first to first + rows - 1, halves first, so that a half's rows are still in the cache."""
    if rows == 8:
        yield (SORT8, first, 0, 0)
        return
    yield from sort_steps(first, rows // 2)
    yield from sort_steps(first + rows // 2, rows // 2)
    yield from merge_steps(first, rows)


def merge_steps(first: int, rows: int) -> Iterator[Step]:
    """Merge two sorted halves: a mirrored stage, then stages of distance rows / 4, ..., 2, 1, two or three at once."""
    stages = rows.bit_length() - 1
    joined = 2 if stages in (4, 7) else 3
    distance = rows >> joined
    for i in range(distance):
        last = first + rows - 1 - i
        if joined == 3:
            yield (FLIP8, first + i, distance, last - 3 * distance)
        else:
            yield (FLIP4, first + i, distance, last - distance)
    for part in range(first, first + rows, distance):
        yield from clean_steps(part, distance)


def clean_steps(first: int, rows: int) -> Iterator[Step]:
    """Sort a bitonic part: stages of distance rows / 2, ..., 2, 1, two or three at once."""
    if rows == 1:
        return
    if rows == 2:
        yield (BOTH, first, first + 1, 0)
        return
    stages = rows.bit_length() - 1
    joined = 2 if stages in (2, 4) else 3
    distance = rows >> joined
    for i in range(distance):
        yield (CLEAN8 if joined == 3 else CLEAN4, first + i, distance, 0)
    for part in range(first, first + rows, distance):
        yield from clean_steps(part, distance)


def comparators(step: Step) -> list[Comparator]:
    """What a step does, in order: the smaller of rows i and j to i, the larger to j."""
    kind, first, distance, mirrored = step
    if kind in (BOTH, LOWER, UPPER):
        return [(first, distance)]
    if kind == SORT8:
        return [(first + i, first + j) for i, j in EIGHT]
    if kind in (CLEAN4, CLEAN8):
        size = 4 if kind == CLEAN4 else 8
        return clean([first + k * distance for k in range(size)])
    size = 2 if kind == FLIP4 else 4
    lower = [first + k * distance for k in range(size)]
    upper = [mirrored + k * distance for k in range(size)]
    return [*zip(lower, reversed(upper)), *clean(lower), *clean(upper)]


def clean(rows: list[int]) -> list[Comparator]:
    """The stages of a bitonic sort of 2, 4 or 8 rows."""
    half = len(rows) // 2
    if half == 0:
        return []
    return [*zip(rows[:half], rows[half:]), *clean(rows[:half]), *clean(rows[half:])]
