"""The tables of comparators sort: shown for all zero-one columns, which by Knuth's principle is enough."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from covey_coordinator.aggregation import networks


def run(found: networks.Network, columns: np.ndarray) -> np.ndarray:
    """Apply the steps, comparator by comparator, to every column of (n, c) values."""
    n, count = columns.shape
    rows = np.full((found.rows, count), np.inf)
    rows[: found.front] = -np.inf
    rows[found.front : found.front + n] = columns
    for step in found.steps:
        kind = int(step[0])
        for i, j in networks.comparators(tuple(int(number) for number in step)):
            less, more = np.minimum(rows[i], rows[j]), np.maximum(rows[i], rows[j])
            rows[i] = rows[i] if kind == networks.UPPER else less
            rows[j] = rows[j] if kind == networks.LOWER else more
    return rows[found.front : found.front + n]


@pytest.mark.parametrize("n", range(1, 15))
def test_network_puts_every_wanted_rank_in_its_place_for_all_zero_one_columns(n: int) -> None:
    columns = np.array(list(itertools.product([0.0, 1.0], repeat=n))).T
    ordered = np.sort(columns, axis=0)
    for low, high in [(0, n), ((n - 1) // 2, n // 2 + 1), (n // 3, n - n // 3)]:
        for cut in {0, n // 4, (n - 1) // 2}:
            wanted = sorted({*range(low, high), cut, n - 1 - cut})
            np.testing.assert_array_equal(run(networks.network(n, low, high, cut), columns)[wanted], ordered[wanted])


@pytest.mark.parametrize("n", [16, 31, 50, 64, 65, 100, 129, 200, 257, 500, 1000])
def test_network_of_many_rows_sorts_random_columns_with_ties(n: int) -> None:
    columns = np.random.default_rng(n).integers(0, n, (n, 40)).astype(np.float64)
    ordered = np.sort(columns, axis=0)
    middle = [(n - 1) // 2, n // 2, n // 4, n - 1 - n // 4]
    found = run(networks.network(n, middle[0], middle[1] + 1, n // 4), columns)
    np.testing.assert_array_equal(found[middle], ordered[middle])
    np.testing.assert_array_equal(run(networks.network(n, 0, n, 0), columns), ordered)


def test_network_for_a_median_is_shorter_than_one_that_sorts() -> None:
    assert len(networks.network(9, 4, 5, 4).steps) < 30
    whole, middle = networks.network(50, 0, 50, 0), networks.network(50, 24, 26, 24)
    assert work(middle) < 0.9 * work(whole)


def work(found: networks.Network) -> float:
    single = {networks.BOTH: networks.COST_BOTH, networks.LOWER: networks.COST_ONE, networks.UPPER: networks.COST_ONE}
    return sum({**networks.COST, **single}[int(kind)] for kind in found.steps[:, 0])
