"""Meamed, Bulyan and MDA against plain numpy in float64."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from aggregation_references import judge, noisy

from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.mda import covered
from covey_coordinator.aggregation.registry import make_rule
from covey_protocol.errors import RuleError


def around_median(updates: np.ndarray, keep: int) -> np.ndarray:
    rows = updates.astype(np.float64)
    median = np.median(rows, axis=0)
    nearest = np.argsort(np.abs(rows - median), axis=0, kind="stable")[:keep]
    return np.take_along_axis(rows, nearest, axis=0).mean(axis=0)


def bulyan_choice(updates: np.ndarray, f: int) -> list[int]:
    rows = updates.astype(np.float64)
    distances = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        wanted = max(len(left) - f - 2, 1)
        scores = [sum(sorted(distances[i, j] for j in left if j != i)[:wanted]) for i in left]
        chosen.append(left.pop(int(np.argmin(scores))))
    return sorted(chosen)


def diameter(rows: np.ndarray) -> float:
    return max(np.linalg.norm(a - b) for a, b in itertools.combinations(rows.astype(np.float64), 2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "d", "f"), [(5, 3, 2), (9, 100, 2), (20, 700, 6), (33, 50, 0)])
def test_meamed_is_the_mean_of_the_values_nearest_the_median(n: int, d: int, f: int, seed: int) -> None:
    updates = noisy(seed, n, d, hostile=f, size=5.0)
    found = judge(make_rule("meamed", f), updates)
    np.testing.assert_allclose(found.aggregate, around_median(updates, n - f), rtol=1e-6, atol=1e-7)


def test_meamed_outvotes_a_device_far_off_in_every_coordinate_and_no_other() -> None:
    found = judge(make_rule("meamed", 3), noisy(1, n=10, d=400, hostile=2, size=50.0))
    np.testing.assert_array_equal(found.accepted, [False] * 2 + [True] * 8)
    assert found.scores[:2].min() == 1.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "d", "f"), [(7, 30, 1), (11, 200, 2), (23, 60, 5), (6, 20, 0)])
def test_bulyan_chooses_by_krum_and_averages_around_the_median(n: int, d: int, f: int, seed: int) -> None:
    updates = noisy(seed, n, d, hostile=f, size=1.0)
    found = judge(make_rule("bulyan", f), updates)
    chosen = bulyan_choice(updates, f)
    assert list(np.flatnonzero(found.accepted)) == chosen
    np.testing.assert_allclose(found.aggregate, around_median(updates[chosen], n - 4 * f), rtol=1e-6, atol=1e-7)


def test_bulyan_stops_what_hides_in_one_coordinate_from_krum() -> None:
    """The attack of the Bulyan paper: near the others in all coordinates but one."""
    updates = np.random.default_rng(0).standard_normal((15, 4000)).astype(np.float32)
    updates[:3] = updates[3:].mean(axis=0)
    updates[:3, 0] += 20.0
    krum, bulyan = (judge(make_rule(name, 3), updates) for name in ("krum", "bulyan"))
    assert krum.aggregate[0] > 10
    assert abs(bulyan.aggregate[0]) < 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n", "d", "f"), [(5, 3, 2), (7, 20, 2), (10, 5, 3), (9, 2, 0), (11, 8, 5)])
def test_mda_keeps_a_subset_of_least_diameter(n: int, d: int, f: int, seed: int) -> None:
    updates = noisy(seed, n, d, hostile=f // 2, size=4.0)
    found = judge(make_rule("mda", f), updates)
    assert found.accepted.sum() == n - f
    least = min(diameter(updates[list(kept)]) for kept in itertools.combinations(range(n), n - f))
    assert diameter(updates[found.accepted]) == pytest.approx(least, rel=1e-5)
    assert found.measurements["diameter"] == pytest.approx(least, rel=1e-4)
    np.testing.assert_allclose(found.aggregate, updates[found.accepted].astype(np.float64).mean(axis=0), rtol=1e-5)


def test_mda_takes_twelve_hostile_of_thirty_in_reasonable_time() -> None:
    updates = noisy(3, n=30, d=50, hostile=12, size=3.0)
    started = time.perf_counter()
    assert not judge(make_rule("mda", 12), updates).accepted[:12].any()
    assert time.perf_counter() - started < 60
    with pytest.raises(RuleError, match="12 or less"):
        make_rule("mda", 13).check(100)


@pytest.mark.parametrize("seed", range(20))
def test_a_vertex_cover_is_found_exactly_where_there_is_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n, most = 8, int(generator.integers(0, 7))
    graph = np.triu(generator.random((n, n)) < generator.uniform(0.1, 0.6), 1)
    graph |= graph.T
    exists = any(
        not graph[np.ix_(rest, rest)].any()
        for rest in (list(kept) for kept in itertools.combinations(range(n), n - most))
    )
    found, cover = covered(NumpyKernels(), graph, most)
    assert bool(found) == exists
    if exists:
        assert cover.sum() <= most
        assert not graph[np.ix_(~cover, ~cover)].any()
