"""The geometric median and centred clipping against float64, and what they promise."""

from __future__ import annotations

import aggregation_references_more as more
import numpy as np
import pytest
import tensorflow_federated as tff
from aggregation_references import batch_of, bits, judge, noisy

from covey_coordinator.aggregation.factory import RuleFactory
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import least_devices
from covey_protocol.errors import ConfigError, RuleError

K = NumpyKernels()


def spread(updates: np.ndarray, centre: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(updates - centre, axis=1)))


# ---- geometric median


@pytest.mark.parametrize("size", [0.0, 3.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize(("n", "d", "f"), [(7, 13, 2), (8, 1000, 3), (21, 5003, 10), (12, 40, 4)])
def test_geometric_median_is_the_converged_one_however_far_a_minority_is(n: int, d: int, f: int, size: float) -> None:
    updates = noisy(n, n, d, hostile=f, size=size)
    found = judge(make_rule("geometric-median", f, tolerance=1e-8, max_iterations=1000), updates)
    expected = more.geometric_median(updates)
    assert np.linalg.norm(found.aggregate - expected) < 2e-6 * spread(updates, expected)
    assert found.measurements["moved"] <= 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_default_tolerance_ends_within_a_hundred_thousandth_of_the_spread(seed: int) -> None:
    updates = noisy(seed, n=15, d=300, hostile=5, size=2.0)
    found = judge(make_rule("geometric-median", 5), updates)
    expected = more.geometric_median(updates)
    assert np.linalg.norm(found.aggregate - expected) < 1e-5 * spread(updates, expected)
    assert 3 <= found.measurements["iterations"] <= 60


@pytest.mark.parametrize("relative", [1.0, 1e-2, 1e-4])
def test_geometric_median_is_as_good_at_a_small_relative_spread(relative: float) -> None:
    updates = noisy(3, n=11, d=2000, spread=relative, hostile=3, size=20 * relative)
    found = judge(make_rule("geometric-median", 4), updates)
    expected = more.geometric_median(updates)
    rounding = 6e-8 * np.linalg.norm(expected)
    assert np.linalg.norm(found.aggregate - expected) < 1e-5 * spread(updates, expected) + rounding


def test_geometric_median_weighs_by_capped_numbers_of_examples() -> None:
    updates = noisy(1, n=9, d=50)
    counts = np.array([1, 2, 3, 4, 5, 6, 7, 8, 1e6], np.float32)
    rule = make_rule("geometric-median", 0, weighted=True, cap_ratio=2.0, tolerance=1e-8, max_iterations=1000)
    expected = more.geometric_median(updates, np.minimum(counts, 10.0))
    found = judge(rule, updates, counts).aggregate
    assert np.linalg.norm(found - expected) < 2e-6 * spread(updates, expected)
    assert np.linalg.norm(found - more.geometric_median(updates)) > 1e-2 * spread(updates, expected)


def test_geometric_median_of_one_column_is_the_median() -> None:
    updates = np.array([[5.0], [-3.0], [1e30], [4.0], [9.0]], np.float32)
    np.testing.assert_allclose(judge(make_rule("geometric-median", 2), updates).aggregate, [5.0], rtol=1e-5)


@pytest.mark.parametrize("size", [10.0, 1e6, 1e30])
def test_updates_that_coincide_in_a_majority_are_the_geometric_median(size: float) -> None:
    row = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    updates = np.stack([row] * 4 + [row + np.float32(size), row - np.float32(size), row * np.float32(size)])
    found = judge(make_rule("geometric-median", 3), updates)
    np.testing.assert_array_equal(found.aggregate, row)
    np.testing.assert_array_equal(found.accepted, [True] * 4 + [False] * 3)
    assert np.isfinite(found.scores).all()


def test_updates_that_coincide_in_a_minority_do_not_stop_the_iteration() -> None:
    updates = noisy(6, n=10, d=30)
    updates[1] = updates[2] = updates[0]
    found = judge(make_rule("geometric-median", 0, tolerance=1e-8, max_iterations=2000), updates)
    expected = more.geometric_median(updates)
    assert np.linalg.norm(found.aggregate - expected) < 1e-5 * spread(updates, expected)


def test_geometric_median_that_lies_on_an_update_is_found_within_the_smoothing() -> None:
    updates = np.array([[0.0, 0.0], [1.0, 0.1], [-1.0, 0.2], [0.1, 1.0], [0.0, -1.1]], np.float32)
    expected = more.geometric_median(updates)
    np.testing.assert_array_equal(expected, [0.0, 0.0])
    found = judge(make_rule("geometric-median", 1), updates).aggregate
    assert np.linalg.norm(found) < 5e-6


def test_no_step_lowers_the_sum_of_distances_further() -> None:
    updates = noisy(5, n=9, d=20, hostile=3, size=4.0)
    found = judge(make_rule("geometric-median", 3), updates).aggregate.astype(np.float64)
    ones = np.ones(9)
    least = more.sum_of_distances(found, updates, ones)
    for direction in np.random.default_rng(0).standard_normal((50, 20)):
        assert more.sum_of_distances(found + 0.01 * direction, updates, ones) > least


def test_far_devices_are_named_by_how_many_median_distances_they_are_away() -> None:
    updates = noisy(2, n=10, d=400, hostile=2, size=50.0)
    rule = make_rule("geometric-median", 3)
    found = judge(rule, updates)
    distances = np.linalg.norm(updates - found.aggregate, axis=1)
    np.testing.assert_allclose(found.scores, distances / np.sort(distances)[4], rtol=1e-4)  # half of ten: the fifth
    np.testing.assert_array_equal(found.accepted, [False] * 2 + [True] * 8)
    reason = rule.explain(float(found.scores[0]), found.scores[found.accepted], 10)
    assert reason.startswith("its distance from the geometric median is 51 times")


def test_too_few_iterations_show_in_the_measurements() -> None:
    found = judge(make_rule("geometric-median", 3, max_iterations=2), noisy(2, n=10, d=40, hostile=3, size=2.0))
    assert found.measurements["iterations"] == 2
    assert found.measurements["moved"] > 1e-6


# ---- centred clipping


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("radius", [0.5, 30.0, 1e9])
def test_centred_clipping_goes_on_from_its_last_aggregate(radius: float, iterations: int) -> None:
    rule = make_rule("centred-clipping", 2, clip_radius=radius, iterations=iterations)
    state, expected = rule.initial_state(300), np.zeros(300)
    for round_number in range(4):
        updates = noisy(round_number, n=9, d=300, hostile=2, size=20.0)
        state, found = rule.advance(K, state, batch_of(updates))
        expected = more.centred_clipping(updates, expected, radius, iterations)
        np.testing.assert_allclose(found.aggregate, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(state, found.aggregate)


@pytest.mark.usefixtures("on_worker")
def test_centred_clipping_keeps_the_same_bits_over_rounds_in_both_doors() -> None:
    rule = make_rule("centred-clipping", 2, clip_radius=5.0, iterations=2)
    process = RuleFactory(rule).create(tff.TensorType(np.float32, [501]), tff.TensorType(np.float32))
    state, own = process.initialize(), rule.initial_state(501)
    aggregates = set()
    for round_number in range(4):
        updates = noisy(round_number, n=7 + round_number, d=501, hostile=2, size=10.0**round_number)
        output = process.next(state, list(updates), [1.0] * len(updates))
        own, expected = rule.advance(K, own, batch_of(updates))
        state = output.state
        assert bits(output.result) == bits(expected.aggregate)
        assert bits(output.measurements["scores"]) == bits(expected.scores)
        aggregates.add(bits(expected.aggregate))
    assert len(aggregates) == 4


@pytest.mark.parametrize("size", [1e3, 1e18, 3e38])
def test_f_devices_move_centred_clipping_by_their_share_of_the_radius(size: float) -> None:
    updates = noisy(0, n=10, d=100)
    attacked = updates.copy()
    attacked[:3] = size
    rule = make_rule("centred-clipping", 3, clip_radius=2.0)
    moved = np.linalg.norm(judge(rule, attacked).aggregate - judge(rule, updates).aggregate)
    assert 0.1 < moved <= 2 * 3 / 10 * 2.0 * 1.00001  # both what they gave up and what they sent instead


def test_a_radius_beyond_all_updates_gives_the_mean() -> None:
    updates = noisy(0, n=7, d=60)
    found = judge(make_rule("centred-clipping", 2, clip_radius=1e6), updates)
    np.testing.assert_allclose(found.aggregate, updates.astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-6)
    assert found.accepted.all()
    assert found.measurements["clipped_share"] == 0.0


def test_only_devices_cut_far_more_than_the_others_are_called_left_out() -> None:
    updates = noisy(1, n=10, d=100, hostile=2, size=1e4)
    rule = make_rule("centred-clipping", 3, clip_radius=0.01)  # cuts everybody
    found = judge(rule, updates)
    assert found.measurements["clipped_share"] == 1.0
    np.testing.assert_array_equal(found.accepted, [False] * 2 + [True] * 8)
    assert "distance from the last aggregate" in rule.explain(99.0, found.scores[2:], 10)


# ---- what they bear

PRECONDITIONS = {
    # rule: (name, f, settings, the fewest devices that bear it)
    "a geometric median needs n > 2f": ("geometric-median", 3, {}, 7),
    "a geometric median of honest devices needs one": ("geometric-median", 0, {"weighted": True}, 1),
    "a weighted one needs n > 2f (1 + cap_ratio)": ("geometric-median", 3, {"weighted": True, "cap_ratio": 2.0}, 19),
    "a cap that is no whole number counts exactly": ("geometric-median", 1, {"weighted": True, "cap_ratio": 1.25}, 5),
    "centred clipping needs n > 2f": ("centred-clipping", 3, {}, 7),
}


@pytest.mark.parametrize(("name", "f", "settings", "least"), PRECONDITIONS.values(), ids=PRECONDITIONS.keys())
def test_precondition_is_exact(name: str, f: int, settings: dict, least: int) -> None:
    rule = make_rule(name, f, **settings)
    assert least_devices(rule) == least
    with pytest.raises(RuleError, match=name):
        rule.check(least - 1)
    assert np.isfinite(judge(rule, noisy(0, least, 9)).aggregate).all()


@pytest.mark.parametrize("size", [1e2, 1e6])
def test_at_its_precondition_the_weighted_median_bears_liars_about_their_examples(size: float) -> None:
    """The worst the weights allow: f devices at the cap, and as many honest ones as can be with hardly any examples."""
    f, cap = 2, 3.0
    rule = make_rule("geometric-median", f, weighted=True, cap_ratio=cap)
    n = least_devices(rule)
    updates = noisy(0, n=n, d=50, hostile=f, size=size)
    counts = np.ones(n, np.float32)
    counts[:f] = 1e6
    counts[-(n // 2) :] = 1e-3
    honest = updates[f:].astype(np.float64)
    radius = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(judge(rule, updates, counts).aggregate - honest.mean(axis=0)) < 10 * radius
    counts[:f] = 1.0
    more_liars = make_rule("geometric-median", 0, weighted=True, cap_ratio=1000.0)
    counts[:f] = 1e6
    assert np.linalg.norm(judge(more_liars, updates, counts).aggregate - honest.mean(axis=0)) > size


REFUSED = {
    "a smoothing of nothing": ("geometric-median", {"nu": 0.0}, "nu"),
    "a tolerance that is not a number": ("geometric-median", {"tolerance": float("nan")}, "tolerance"),
    "no iterations": ("geometric-median", {"max_iterations": 0}, "max_iterations"),
    "a cap below the median": ("geometric-median", {"cap_ratio": 0.5}, "cap_ratio"),
    "a radius of nothing": ("centred-clipping", {"clip_radius": 0.0}, "clip_radius"),
    "an endless radius": ("centred-clipping", {"clip_radius": float("inf")}, "clip_radius"),
    "no steps": ("centred-clipping", {"iterations": 0}, "iterations"),
}


@pytest.mark.parametrize(("name", "settings", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_rule(name, 1, **settings)
