"""What each rule computes, against references in float64, and what it promises."""

from __future__ import annotations

import aggregation_references as reference
import numpy as np
import pytest
from aggregation_references import ALL_RULES, judge, noisy
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import least_devices
from covey_protocol.errors import ConfigError, RuleError

# n = 7, f = 2, d = 2: one row far away, one near it, five scattered unevenly; all five rules answer differently.
TELLS_RULES_APART = np.array(
    [[0.0, 0.0], [1.0, 0.3], [2.5, 0.1], [2.0, 2.0], [3.0, 5.0], [9.0, 4.0], [80.0, -70.0]], np.float32
)


FIRST_RULES = ("mean", "median", "trimmed-mean", "multi-krum", "krum")


def expected_aggregate(name: str, updates: np.ndarray, num_examples: np.ndarray) -> np.ndarray:
    f = ALL_RULES[name]
    if name == "mean":
        return reference.mean(updates, num_examples)
    if name == "median":
        return reference.median(updates)
    if name == "trimmed-mean":
        return reference.trimmed_mean(updates, f)
    m = 1 if name == "krum" else len(updates) - f
    return updates[reference.krum_selection(updates, f, m)].astype(np.float64).mean(axis=0)


@pytest.mark.parametrize("name", FIRST_RULES)
@pytest.mark.parametrize(("n", "d"), [(7, 1), (7, 13), (8, 1000), (21, 5003), (33, 4097)])
def test_rule_agrees_with_its_float64_reference(name: str, n: int, d: int) -> None:
    updates = noisy(seed=n + d, n=n, d=d, hostile=2)
    num_examples = np.random.default_rng(d).integers(1, 50, n).astype(np.float32)
    found = judge(make_rule(name, ALL_RULES[name]), updates, num_examples)
    assert found.aggregate.dtype == found.scores.dtype == np.float32
    assert found.accepted.dtype == np.bool_
    np.testing.assert_allclose(found.aggregate, expected_aggregate(name, updates, num_examples), rtol=1e-6, atol=1e-7)


def test_one_fixture_tells_all_rules_apart() -> None:
    rules = reference.rules()
    aggregates = {name: judge(rules[name], TELLS_RULES_APART).aggregate for name in FIRST_RULES}
    ones = np.ones(7, np.float32)
    for name, aggregate in aggregates.items():
        np.testing.assert_allclose(aggregate, expected_aggregate(name, TELLS_RULES_APART, ones), rtol=1e-6)
    rounded = {tuple(np.round(aggregate, 3)) for aggregate in aggregates.values()}
    assert len(rounded) == len(aggregates)


# ---- mean


def test_a_device_that_claims_a_billion_examples_counts_ten_times_the_median() -> None:
    updates = np.array([[0.0], [0.0], [0.0], [0.0], [14.0]], np.float32)
    found = judge(make_rule("mean"), updates, [20, 20, 20, 20, 1e9])
    assert found.aggregate == pytest.approx([14.0 * 200 / 280])
    found = judge(make_rule("mean", cap_ratio=1.0), updates, [20, 20, 20, 20, 1e9])
    assert found.aggregate == pytest.approx([14.0 / 5])


def test_equal_updates_give_exactly_that_update_under_rules_that_average() -> None:
    row = np.random.default_rng(3).standard_normal(1001).astype(np.float32)
    for rule in (reference.rules()[name] for name in FIRST_RULES):
        for n in (7, 10, 49):
            found = judge(rule, np.tile(row, (n, 1)), np.arange(1, n + 1))
            np.testing.assert_array_equal(found.aggregate, row)
            assert np.all(np.isfinite(found.scores))


def test_score_of_the_mean_is_distance_over_median_distance() -> None:
    updates = noisy(seed=1, n=9, d=500, hostile=1, size=10.0)
    found = judge(make_rule("mean"), updates)
    distances = np.linalg.norm(updates - updates.astype(np.float64).mean(axis=0), axis=1)
    np.testing.assert_allclose(found.scores, distances / np.median(distances), rtol=1e-5)
    assert found.accepted.all()


# ---- median and trimmed mean

columns = st.integers(1, 6)
finite = st.floats(-1e3, 1e3, width=32)


@st.composite
def matrices(draw: st.DrawFn, least_rows: int = 3, most_rows: int = 12) -> np.ndarray:
    n, d = draw(st.integers(least_rows, most_rows)), draw(columns)
    return np.array([[draw(finite) for _ in range(d)] for _ in range(n)], np.float32)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.randoms(use_true_random=False))
def test_the_order_of_devices_is_irrelevant(updates: np.ndarray, random: object) -> None:
    order = list(range(len(updates)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for name in ("mean", "median", "trimmed-mean"):
        rule = make_rule(name, 0 if name == "mean" else 1)
        plain, mixed = judge(rule, updates), judge(rule, updates[order])
        np.testing.assert_allclose(mixed.aggregate, plain.aggregate, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(mixed.accepted, plain.accepted[order])
        np.testing.assert_allclose(mixed.scores, plain.scores[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_devices_is_irrelevant_to_krum_without_ties(name: str, seed: int) -> None:
    updates = noisy(seed, n=11, d=300, hostile=2)
    order = np.random.default_rng(seed).permutation(11)
    plain, mixed = judge(make_rule(name, 3), updates), judge(make_rule(name, 3), updates[order])
    np.testing.assert_allclose(mixed.aggregate, plain.aggregate, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(mixed.accepted, plain.accepted[order])


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(-1000, 1000))
def test_shifting_all_updates_shifts_the_aggregate(updates: np.ndarray, shift: int) -> None:
    updates = np.round(updates)  # whole numbers: the shift itself must not round
    for name in ("mean", "median", "trimmed-mean"):
        rule = make_rule(name, 0 if name == "mean" else 1)
        shifted = judge(rule, updates + np.float32(shift)).aggregate
        np.testing.assert_allclose(shifted, judge(rule, updates).aggregate + shift, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
@pytest.mark.parametrize("shift", [-4096.0, 1.0, 1048576.0])
def test_shifting_all_updates_does_not_change_whom_krum_keeps(name: str, shift: float) -> None:
    updates = np.round(noisy(7, n=12, d=200, spread=30.0))  # whole numbers below 2^24: the shift itself is exact
    plain, shifted = judge(make_rule(name, 3), updates), judge(make_rule(name, 3), updates + np.float32(shift))
    np.testing.assert_array_equal(shifted.accepted, plain.accepted)
    np.testing.assert_allclose(shifted.scores, plain.scores, rtol=1e-5)
    np.testing.assert_allclose(shifted.aggregate, plain.aggregate + shift, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_trimmed_mean_without_trimming_is_the_plain_mean(updates: np.ndarray) -> None:
    found = judge(make_rule("trimmed-mean", 0), updates)
    np.testing.assert_allclose(found.aggregate, judge(make_rule("mean"), updates).aggregate, rtol=1e-6, atol=1e-7)
    assert found.accepted.all()


@settings(max_examples=60, deadline=None)
@given(
    matrices(least_rows=5, most_rows=9),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2),
)
def test_f_outliers_of_any_size_cannot_push_median_or_trimmed_mean_outside_the_honest_range(
    honest: np.ndarray, values: list[float]
) -> None:
    hostile = np.array([np.full(honest.shape[1], value) for value in values], np.float32)
    updates = np.concatenate([hostile, honest])
    for name in ("median", "trimmed-mean"):
        aggregate = judge(make_rule(name, 2), updates).aggregate
        slack = 1e-6 * np.abs(honest).max(axis=0)
        assert np.all(aggregate >= honest.min(axis=0) - slack)
        assert np.all(aggregate <= honest.max(axis=0) + slack)


def test_one_outlier_does_not_move_the_median() -> None:
    honest = noisy(2, n=8, d=50)
    found = [judge(make_rule("median", 1), np.vstack([honest, np.full(50, size)])).aggregate for size in (1e2, 3e38)]
    np.testing.assert_array_equal(found[0], found[1])


def test_score_of_a_column_wise_rule_is_the_share_of_trimmed_coordinates() -> None:
    updates = noisy(4, n=10, d=3000, hostile=1)
    for name in ("median", "trimmed-mean"):
        np.testing.assert_allclose(
            judge(make_rule(name, 2), updates).scores, reference.trimmed_shares(updates, 2), rtol=1e-6
        )
    outer_quarters = judge(make_rule("median", 0), updates)
    np.testing.assert_allclose(outer_quarters.scores, reference.trimmed_shares(updates, 2), rtol=1e-6)
    assert outer_quarters.accepted.all()


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
@pytest.mark.parametrize("seed", range(10))
def test_exchangeable_honest_devices_are_never_outvoted(name: str, seed: int) -> None:
    for n, f in ((5, 2), (10, 3), (20, 2), (50, 10)):
        assert judge(make_rule(name, f), noisy(seed, n=n, d=400)).accepted.all()


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
@pytest.mark.parametrize("seed", range(5))
def test_a_device_far_off_in_every_coordinate_is_outvoted_and_told_why(name: str, seed: int) -> None:
    updates = noisy(seed, n=10, d=400, hostile=2, size=50.0)
    rule = make_rule(name, 3)
    found = judge(rule, updates)
    np.testing.assert_array_equal(found.accepted, [False] * 2 + [True] * 8)
    reason = rule.explain(float(found.scores[0]), found.scores[found.accepted], 10)
    assert reason == (
        "outvoted: 100% of its coordinates lie among the 3 largest or smallest of 10 devices (60% would be chance)"
    )


def test_honest_device_with_twice_the_spread_is_not_outvoted() -> None:
    updates = np.random.default_rng(0).standard_normal((20, 5000)).astype(np.float32)
    updates[0] *= 2
    found = judge(make_rule("trimmed-mean", 2), updates)
    assert found.scores[0] > 0.3  # well above chance, 20%
    assert found.accepted.all()


def test_negative_zero_does_not_reach_the_aggregate() -> None:
    updates = np.array([[0.0], [-0.0], [-0.0], [0.0], [-0.0], [-0.0], [0.0]], np.float32)
    for name in ("median", "trimmed-mean"):
        assert not np.signbit(judge(make_rule(name, 2), updates).aggregate).any()


# ---- Krum


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("seed", range(3))
def test_krum_scores_are_right_at_any_relative_spread(spread: float, seed: int) -> None:
    updates = noisy(seed, n=12, d=9000, spread=spread)
    found = judge(make_rule("multi-krum", 3), updates)
    np.testing.assert_allclose(found.scores, reference.krum_scores(updates, 3), rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(found.accepted), reference.krum_selection(updates, 3, 9))


@pytest.mark.parametrize("seed", range(5))
def test_krum_keeps_honest_rows_at_relative_spread_one_ten_thousandth(seed: int) -> None:
    updates = noisy(seed, n=15, d=5000, spread=1e-4)
    updates[:4] += np.float32(5e-4)  # hostile: five spreads away, far below the size of the updates
    for name in ("krum", "multi-krum"):
        assert not judge(make_rule(name, 4), updates).accepted[:4].any()


@pytest.mark.parametrize("size", [1e3, 1e6, 1e18, 3e38])
def test_a_huge_row_cannot_blur_the_distances_between_the_others(size: float) -> None:
    updates = noisy(0, n=15, d=5000, spread=1e-4)
    updates[:3] += np.float32(5e-4)
    updates[3] = size
    found = judge(make_rule("multi-krum", 4), updates)
    np.testing.assert_array_equal(found.accepted, [False] * 4 + [True] * 11)
    np.testing.assert_allclose(found.scores[4:], reference.krum_scores(updates, 4)[4:], rtol=1e-4)
    assert np.all(np.isfinite(found.scores))


def test_krum_sums_n_minus_f_minus_2_distances() -> None:
    updates = np.array([[0.0], [1.0], [3.0], [7.0], [15.0]], np.float32)  # n = 5, f = 1: two nearest
    found = judge(make_rule("krum", 1), updates)
    np.testing.assert_allclose(found.scores, [1 + 9, 1 + 4, 4 + 9, 16 + 36, 64 + 144], rtol=1e-5)
    np.testing.assert_array_equal(found.aggregate, [1.0])


def test_ties_go_to_the_smallest_index() -> None:
    updates = np.array([[3.0], [2.0], [1.0], [0.0], [-1.0], [-2.0], [-3.0]], np.float32)
    found = judge(make_rule("krum", 1), updates)  # rows 2, 3 and 4: two at 1, two at 2
    assert found.scores[2] == found.scores[3] == found.scores[4]
    np.testing.assert_array_equal(np.flatnonzero(found.accepted), [2])


def test_multi_krum_can_select_fewer_than_n_minus_f() -> None:
    updates = noisy(5, n=11, d=100, hostile=2)
    found = judge(make_rule("multi-krum", 2, num_selected=4), updates)
    chosen = reference.krum_selection(updates, 2, 4)
    np.testing.assert_array_equal(np.flatnonzero(found.accepted), chosen)
    np.testing.assert_allclose(found.aggregate, updates[chosen].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_krum_explains_with_the_score_beside_the_kept() -> None:
    reason = make_rule("multi-krum", 1).explain(31.0, np.array([3.0, 3.78, 5.0], np.float32), 4)
    assert reason == "not among the 3 of 4 kept: Krum score 3.1e+01 is 8.2 times the median of the accepted"


# ---- what a rule bears

PRECONDITIONS = {
    # rule: (f, the fewest devices that bear it)
    "the mean bears any number of honest devices": ("mean", 0, 1),
    "a median needs n > 2f": ("median", 2, 5),
    "a median of honest devices needs one": ("median", 0, 1),
    "a trimmed mean needs n > 2f": ("trimmed-mean", 3, 7),
    "Krum needs n > 2f + 2": ("krum", 2, 7),
    "Multi-Krum needs n > 2f + 2": ("multi-krum", 9, 21),
    "Krum without hostile devices still needs a neighbour": ("krum", 0, 3),
}


@pytest.mark.parametrize(("name", "f", "least"), PRECONDITIONS.values(), ids=PRECONDITIONS.keys())
def test_precondition_is_exact(name: str, f: int, least: int) -> None:
    rule = make_rule(name, f)
    assert least_devices(rule) == least
    rule.check(least)
    with pytest.raises(RuleError, match=name) as refused:
        rule.check(least - 1)
    assert refused.value.remedy


@pytest.mark.parametrize(("name", "f", "least"), PRECONDITIONS.values(), ids=PRECONDITIONS.keys())
def test_rule_runs_at_its_precondition(name: str, f: int, least: int) -> None:
    found = judge(make_rule(name, f), noisy(0, n=least, d=9))
    assert np.all(np.isfinite(found.aggregate))
    assert found.accepted.any()


def test_the_mean_refuses_to_claim_that_it_bears_hostile_devices() -> None:
    with pytest.raises(RuleError, match="mean bears no corrupted device"):
        make_rule("mean", 1).check(100)


def test_multi_krum_refuses_to_select_more_than_n_minus_f() -> None:
    make_rule("multi-krum", 2, num_selected=8).check(10)
    with pytest.raises(RuleError, match="num_selected"):
        make_rule("multi-krum", 2, num_selected=9).check(10)


@pytest.mark.parametrize("f", [-1, 1.5, True, "2", None])
def test_num_byzantine_is_a_whole_number_of_at_least_zero(f: object) -> None:
    with pytest.raises(RuleError, match="num_byzantine"):
        make_rule("median", f)  # type: ignore[arg-type]


REFUSED = {
    "a misspelt rule": (("multikrum", {}), "did you mean 'multi-krum'"),
    "a misspelt setting": (("multi-krum", {"num_select": 3}), "did you mean 'num_selected'"),
    "F instead of num_byzantine": (("trimmed-mean", {"F": 3}), "known: num_byzantine"),
    "another rule's setting": (("median", {"cap_ratio": 3.0}), "known: num_byzantine"),
    "nothing like any rule": (("xyz", {}), "known: mean, median"),
    "a cap below the median": (("mean", {"cap_ratio": 0.5}), "cap_ratio"),
    "a cap that is not a number": (("mean", {"cap_ratio": float("nan")}), "cap_ratio"),
    "a selection of nothing": (("multi-krum", {"num_selected": 0}), "num_selected"),
}


@pytest.mark.parametrize(("arguments", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_unknown_names_and_settings_are_refused_with_a_hint(arguments: tuple[str, dict], hint: str) -> None:
    name, settings_ = arguments
    with pytest.raises(ConfigError) as refused:
        make_rule(name, **settings_)
    assert hint in str(refused.value)


def test_rules_are_values() -> None:
    assert make_rule("multi-krum", 2) == make_rule("multi-krum", 2) != make_rule("multi-krum", 3)
    assert make_rule("krum", 2) != make_rule("multi-krum", 2)
    with pytest.raises(AttributeError):
        make_rule("median", 2).num_byzantine = 0  # type: ignore[misc]
