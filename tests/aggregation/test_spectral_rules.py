"""DnC and CAF against plain numpy in float64, with LAPACK's singular vectors."""

from __future__ import annotations

import numpy as np
import pytest
from aggregation_references import batch_of, judge, noisy

from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.spectral import stratified_columns, top_eigenvector
from covey_protocol.errors import ConfigError, RuleError

K = NumpyKernels()


def dnc_reference(updates: np.ndarray, removed: int) -> tuple[np.ndarray, np.ndarray]:
    """One repeat on all columns: who is kept, and the squared projections."""
    centred = updates.astype(np.float64) - updates.astype(np.float64).mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    squares = (centred @ direction) ** 2
    kept = np.zeros(len(updates), bool)
    kept[np.argsort(squares, kind="stable")[: len(updates) - removed]] = True
    return kept, squares


def caf_reference(updates: np.ndarray, f: int) -> tuple[np.ndarray, np.ndarray]:
    """The aggregate and the weights under which it was found."""
    rows, weights = updates.astype(np.float64), np.ones(len(updates))
    best, least = (rows.mean(axis=0), weights), np.inf
    while weights.sum() > len(rows) - 2 * f:
        mean = weights @ rows / weights.sum()
        scaled = (rows - mean) * np.sqrt(weights / weights.sum())[:, None]
        _, sizes, directions = np.linalg.svd(scaled, full_matrices=False)
        if sizes[0] ** 2 < least:
            best, least = (mean, weights), sizes[0] ** 2
        squares = ((rows - mean) @ directions[0]) ** 2
        weights = weights * (1 - squares / squares[weights > 0].max())
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "d", "f"), [(7, 40, 2), (12, 3000, 3), (30, 500, 10)])
def test_dnc_leaves_out_whom_the_singular_vector_names(n: int, d: int, f: int, seed: int) -> None:
    updates = noisy(seed, n, d, hostile=f, size=3.0)
    found = judge(make_rule("dnc", f, num_columns=d), updates)
    kept, squares = dnc_reference(updates, removed=f)
    np.testing.assert_array_equal(found.accepted, kept)
    np.testing.assert_allclose(found.scores, squares, rtol=1e-4, atol=1e-6 * squares.max())
    np.testing.assert_allclose(found.aggregate, updates[kept].astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-7)


def test_dnc_finds_a_shift_too_small_for_any_coordinate() -> None:
    updates = np.random.default_rng(1).standard_normal((20, 4000)).astype(np.float32)
    updates[:5] += np.float32(0.3)
    assert not judge(make_rule("dnc", 5, num_columns=2000), updates).accepted[:5].any()


def test_dnc_draws_other_columns_every_round_and_the_same_for_the_same_seed() -> None:
    rule, other = make_rule("dnc", 2, num_columns=16), make_rule("dnc", 2, num_columns=16, seed=1)
    batch = batch_of(noisy(0, n=9, d=500))
    state, first = rule.advance(K, rule.initial_state(500), batch)
    _, second = rule.advance(K, state, batch)
    _, again = rule.advance(K, rule.initial_state(500), batch)
    _, seeded = other.advance(K, other.initial_state(500), batch)
    np.testing.assert_array_equal(first.scores, again.scores)
    assert not np.array_equal(first.scores, second.scores)
    assert not np.array_equal(first.scores, seeded.scores)


def test_dnc_keeps_only_those_that_no_repeat_leaves_out() -> None:
    updates = noisy(3, n=15, d=2000, hostile=2, size=5.0)
    once = judge(make_rule("dnc", 2, num_columns=50), updates).accepted
    thrice = judge(make_rule("dnc", 2, num_columns=50, repeats=3), updates).accepted
    assert once.sum() == 13
    assert 15 - 3 * 2 <= thrice.sum() <= 13
    assert not (thrice & ~once).any()
    assert not thrice[:2].any()


def test_columns_are_spread_over_the_whole_update_and_all_taken_where_they_are_few() -> None:
    np.testing.assert_array_equal(stratified_columns(K, 5, 40, 10_000), np.arange(40))
    drawn = stratified_columns(K, 5, 100_000, 1000)
    np.testing.assert_array_equal(drawn // 100, np.arange(1000))
    assert 40 < np.std(drawn % 100) * np.sqrt(12) / np.sqrt(12) + 20 < 60  # uniform within a stretch: 28.9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "d", "f", "size"), [(7, 40, 2, 3.0), (12, 2000, 3, 100.0), (30, 300, 9, 1.0)])
def test_caf_is_the_mean_under_the_weights_of_least_spread(n: int, d: int, f: int, size: float, seed: int) -> None:
    updates = noisy(seed, n, d, hostile=f, size=size)
    found = judge(make_rule("caf", f), updates)
    aggregate, weights = caf_reference(updates, f)
    np.testing.assert_allclose(1 - found.scores, weights, atol=2e-3)
    spread = np.linalg.norm(updates[f:] - updates[f:].mean(axis=0)) / np.sqrt(n - f)
    assert np.linalg.norm(found.aggregate - aggregate) < 2e-3 * spread
    np.testing.assert_array_equal(found.accepted, weights >= 0.25)


@pytest.mark.parametrize("size", [1e2, 1e6, 1e12])
def test_caf_drops_far_updates_whatever_their_size(size: float) -> None:
    updates = noisy(4, n=15, d=300, hostile=4, size=size)
    found = judge(make_rule("caf", 4), updates)
    assert not found.accepted[:4].any()
    honest = updates[4:].astype(np.float64)
    assert np.linalg.norm(found.aggregate - honest.mean(axis=0)) < np.linalg.norm(honest - honest.mean(axis=0)) / 4


def test_caf_without_hostile_devices_is_the_mean() -> None:
    updates = noisy(5, n=8, d=100)
    found = judge(make_rule("caf", 0), updates)
    np.testing.assert_allclose(found.aggregate, updates.astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-7)
    assert found.accepted.all()


def test_the_top_eigenvector_is_lapacks() -> None:
    rows = np.random.default_rng(2).standard_normal((30, 60)) * np.linspace(0.5, 3, 60)
    vector, eigenvalue = top_eigenvector(K, rows @ rows.T)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    assert eigenvalue == pytest.approx(values[-1], rel=1e-9)
    assert abs(vector @ vectors[:, -1]) == pytest.approx(1, abs=1e-6)


REFUSED = {
    "no columns": ({"num_columns": 0}, "num_columns"),
    "no repeats": ({"repeats": 0}, "repeats"),
    "no filter": ({"filter_ratio": 0.0}, "filter_ratio"),
    "a seed below zero": ({"seed": -1}, "seed"),
}


@pytest.mark.parametrize(("settings", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_of_dnc_that_mean_nothing_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_rule("dnc", 2, **settings)


def test_dnc_is_refused_where_its_repeats_could_leave_nobody() -> None:
    make_rule("dnc", 3, repeats=3).check(10)
    with pytest.raises(RuleError, match="3 repeats may leave out 9 of 9"):
        make_rule("dnc", 3, repeats=3).check(9)
