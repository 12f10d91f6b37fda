"""FoolsGold and FLAME against float64 references, scikit-learn's HDBSCAN, and what their papers promise."""

from __future__ import annotations

from typing import Any

import aggregation_references_similarity as reference
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
import tensorflow_federated as tff
from aggregation_references import bits, hostile_inputs, judge, noisy
from aggregation_references_presteps import rounds_in
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.aggregation.factory import RuleFactory
from covey_coordinator.aggregation.flame import majority_cluster
from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.kernels.normal import normal_quantile, normals
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Batch, Rule, least_devices
from covey_coordinator.aggregation.similarity import cosine_distances, cosines_between
from covey_protocol.errors import ConfigError, RuleError

RULES: dict[str, Rule] = {
    "foolsgold": make_rule("foolsgold"),
    "foolsgold with history": make_rule("foolsgold", history_devices=40),
    "flame": make_rule("flame", 2),
    "flame with noise": make_rule("flame", 2, noise=0.001, seed=3),
    "foolsgold behind norm clipping": make_rule("foolsgold", history_devices=40, before=["norm-clipping", "nnm"]),
    "flame behind zeroing": make_rule("flame", 2, noise=0.01, before=["zeroing"]),
}


def sybils(seed: int, honest: int, hostile: int, d: int = 400) -> np.ndarray:
    """Honest updates with directions of their own; hostile ones, first, nearly equal to each other."""
    generator = np.random.default_rng(seed)
    goal = generator.standard_normal(d) * 2
    attack = goal + 0.02 * generator.standard_normal((hostile, d))
    own = 0.3 * generator.standard_normal(d) + generator.standard_normal((honest, d))
    return np.concatenate([attack, own]).astype(np.float32)


# ---- cosines


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 60), st.integers(0, 10**6))
def test_cosines_are_right_to_a_millionth_at_any_size_of_the_rows(n: int, d: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = (generator.standard_normal((n, d)) * np.exp(generator.normal(0, 20, (n, 1)))).astype(np.float32)
    rows[np.abs(rows) < 1e-30] = 1e-30
    found, norms = cosines_between(NumpyKernels(), Updates(rows))
    np.testing.assert_allclose(found, reference.cosines(rows), atol=3e-6)
    np.testing.assert_allclose(norms, np.linalg.norm(rows.astype(np.float64), axis=1), rtol=3e-6)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-4])
def test_cosine_distances_are_right_where_cosines_are_all_but_one(spread: float) -> None:
    rows = noisy(7, n=9, d=3000, spread=spread)
    rows[1] *= np.float32(1e15)
    rows[2] *= np.float32(1e-30)
    rows[3] = 0
    found, norms = cosine_distances(NumpyKernels(), Updates(rows))
    rest = [0, 1, 2, 4, 5, 6, 7, 8]
    expected = reference.cosine_distances(rows[rest])
    np.testing.assert_allclose(found[np.ix_(rest, rest)], expected, rtol=5e-5)
    np.testing.assert_array_equal(found[3], [1, 1, 1, 0, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(norms, np.linalg.norm(rows.astype(np.float64), axis=1), rtol=3e-6)
    naive = 1 - cosines_between(NumpyKernels(), Updates(rows[rest]))[0]
    assert np.allclose(naive, expected, rtol=5e-5, atol=1e-14) == (spread > 1e-4)


# ---- FoolsGold


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 15), st.integers(0, 10**6), st.floats(0.2, 3))
def test_foolsgold_weighs_as_the_papers_algorithm(n: int, seed: int, kappa: float) -> None:
    updates = np.random.default_rng(seed).standard_normal((n, 6)).astype(np.float32)
    weights, likeness = reference.foolsgold_weights(updates, kappa)
    found = judge(make_rule("foolsgold", kappa=kappa), updates)
    np.testing.assert_allclose(found.scores, likeness, atol=1e-5)
    assert found.measurements["total_weight"] == pytest.approx(weights.sum(), abs=1e-3 * n)
    if weights.sum() > 0.1:
        expected = (weights[:, None] * updates).sum(axis=0) / weights.sum()
        np.testing.assert_allclose(found.aggregate, expected, atol=2e-3)


@pytest.mark.parametrize("hostile", [2, 5, 20])
def test_any_number_of_sybils_is_shut_out(hostile: int) -> None:
    updates = sybils(hostile, honest=6, hostile=hostile)
    rule = make_rule("foolsgold")
    found = judge(rule, updates)
    np.testing.assert_array_equal(found.accepted, [False] * hostile + [True] * 6)
    honest = updates[hostile:].astype(np.float64)
    assert np.linalg.norm(found.aggregate - honest.mean(axis=0)) < 0.2 * np.linalg.norm(honest.mean(axis=0))
    reason = rule.explain(float(found.scores[0]), found.scores[found.accepted], len(updates))
    assert reason.startswith("pushes the same way as another device: cosine 1.00 (median of the accepted 0.")


def test_foolsgold_does_not_stop_one_hostile_device_alone() -> None:
    updates = sybils(0, honest=6, hostile=1)
    assert judge(make_rule("foolsgold"), updates).accepted[0]


def test_devices_that_are_all_alike_get_no_weight_and_the_aggregate_is_zero() -> None:
    rule = make_rule("foolsgold")
    found = judge(rule, np.tile(np.array([[1.0, 2.0]], np.float32), (5, 1)))
    np.testing.assert_array_equal(found.aggregate, [0.0, 0.0])
    assert not found.accepted.any()
    assert rule.explain(1.0, found.scores[found.accepted], 5) == "pushes the same way as another device: cosine 1.00"


def test_history_finds_sybils_that_hide_in_noise_of_each_single_round() -> None:
    generator = np.random.default_rng(2)
    goal = generator.standard_normal(3000) * 0.5
    own = generator.standard_normal((6, 3000)) * 0.5
    rounds = []
    for _ in range(40):
        noise = 1.5 * generator.standard_normal((10, 3000))
        rounds.append((np.concatenate([np.tile(goal, (4, 1)), own]) + noise).astype(np.float32))
    blind = rounds_in("numpy", make_rule("foolsgold"), rounds)[-1][1]
    state, remembering = rounds_in("numpy", make_rule("foolsgold", history_devices=12), rounds)[-1]
    assert blind.accepted.all()
    np.testing.assert_array_equal(remembering.accepted, [False] * 4 + [True] * 6)
    np.testing.assert_allclose(state[:10], np.sum(rounds, axis=0, dtype=np.float64), rtol=1e-4, atol=1e-3)
    assert not state[10:].any()
    assert state.dtype == np.float32
    weights, likeness = reference.foolsgold_weights(np.sum(rounds, axis=0, dtype=np.float64))
    np.testing.assert_allclose(remembering.scores, likeness, atol=1e-4)
    np.testing.assert_array_equal(remembering.accepted, weights > 0)


def test_history_follows_devices_that_come_and_go() -> None:
    rule, k = make_rule("foolsgold", history_devices=3), NumpyKernels()
    state = rule.initial_state(2)
    for places in ([0, 2], [2, 1]):
        batch = Batch(Updates(np.array([[1, 0], [0, 1]], np.float32)), np.ones(2, np.float32), np.array(places))
        state, _ = rule.advance(k, state, batch)
    np.testing.assert_array_equal(state, [[1, 0], [0, 1], [1, 1]])


@pytest.mark.usefixtures("on_worker")
def test_a_device_beyond_the_history_fails_the_round_and_says_what_to_set() -> None:
    rule, updates = make_rule("foolsgold", history_devices=4), noisy(0, n=5, d=3)
    with pytest.raises(RuleError, match="remembers 4 devices") as refused:
        judge(rule, updates)
    assert "set history_devices" in refused.value.remedy
    process = RuleFactory(rule).create(tff.TensorType(np.float32, [3]), tff.TensorType(np.float32))
    with pytest.raises(Exception, match="remembers 4 devices"):
        process.next(process.initialize(), list(updates), [1.0] * 5)
    process.next(process.initialize(), list(updates[:4]), [1.0] * 4)


def test_foolsgold_cannot_stand_behind_buckets() -> None:
    with pytest.raises(ConfigError, match="foolsgold remembers devices"):
        make_rule("foolsgold", before=["bucketing"])


# ---- FLAME's clustering


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 10**6), st.floats(0, 4))
def test_the_majority_cluster_is_hdbscans(n: int, d: int, seed: int, apart: float) -> None:
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 3, n)
    points = generator.standard_normal((n, d + 1)) + apart * generator.standard_normal((3, d + 1))[groups]
    distances = reference.cosine_distances(points)
    with np.errstate(all="ignore"):
        found, joins = majority_cluster(NumpyKernels(), distances, n // 2 + 1)
    np.testing.assert_array_equal(found, reference.hdbscan_majority(distances))
    assert found.sum() > n / 2
    assert joins[found].max() < joins[~found].min(initial=np.inf)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 15), st.integers(0, 10**6))
def test_the_majority_cluster_is_hdbscans_with_many_equal_distances(n: int, seed: int) -> None:
    whole = np.random.default_rng(seed).integers(1, 4, (n, n)).astype(np.float64)
    distances = np.maximum(whole, whole.T)
    np.fill_diagonal(distances, 0)
    found, _ = majority_cluster(NumpyKernels(), distances, n // 2 + 1)
    np.testing.assert_array_equal(found, reference.hdbscan_majority(distances))


@pytest.mark.parametrize("seed", range(6))
def test_flame_agrees_with_its_float64_reference(seed: int) -> None:
    updates = noisy(seed, n=11, d=3000, spread=0.5)
    updates[:4] = -updates[:4] * 3
    found = judge(make_rule("flame", 4), updates)
    np.testing.assert_array_equal(found.accepted, reference.hdbscan_majority(reference.cosine_distances(updates)))
    np.testing.assert_allclose(found.aggregate, reference.flame(updates), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e30])
def test_a_minority_that_points_another_way_is_left_out_whatever_its_size(size: float) -> None:
    honest = noisy(0, n=6, d=500, spread=0.3)
    hostile = np.tile(-honest.mean(axis=0) * np.float32(size), (5, 1))
    updates = np.concatenate([hostile, honest])
    rule = make_rule("flame", 5)
    found = judge(rule, updates)
    np.testing.assert_array_equal(found.accepted, [False] * 5 + [True] * 6)
    assert "joins the 6 of 11 only at cosine distance" in rule.explain(
        float(found.scores[0]), found.scores[found.accepted], 11
    )


def test_a_boosted_update_in_the_right_direction_weighs_no_more_than_the_median() -> None:
    updates = noisy(1, n=9, d=200, spread=0.2)
    boosted = updates.copy()
    boosted[0] *= 1e6
    plain, found = judge(make_rule("flame", 2), updates), judge(make_rule("flame", 2), boosted)
    np.testing.assert_allclose(found.aggregate, plain.aggregate, atol=0.03)


def test_the_noise_of_flame_has_the_stated_size_and_is_new_each_round() -> None:
    updates = noisy(4, n=9, d=200_000, spread=0.2)
    quiet, loud = make_rule("flame", 2), make_rule("flame", 2, noise=0.05, seed=1)
    plain = judge(quiet, updates)
    rounds = [judged.aggregate for _, judged in rounds_in("numpy", loud, [updates, updates])]
    unit = 0.05 * float(plain.measurements["flame_median_norm"])
    noises = [(found - plain.aggregate) / unit for found in rounds]
    for noise in noises:
        assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
        assert noise.std() == pytest.approx(1, abs=0.01)
        assert scipy.stats.kstest(noise, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(noises)[0, 1]) < 5 / np.sqrt(200_000)
    again = rounds_in("numpy", loud, [updates])[0][1].aggregate
    assert bits(again) == bits(rounds[0])
    other = judge(make_rule("flame", 2, noise=0.05, seed=2), updates).aggregate
    assert bits(other) != bits(rounds[0])


# ---- normal numbers


def test_the_normal_quantile_is_right_to_the_last_digits_and_the_same_in_both_kernels() -> None:
    tails = 10.0 ** -np.linspace(0.31, 15.9, 5001)
    p = np.concatenate([np.linspace(1e-6, 1 - 1e-6, 20001), tails, 1 - tails[tails > 1e-15]])
    found = normal_quantile(NumpyKernels(), p)
    np.testing.assert_allclose(found, scipy.special.ndtri(p), rtol=2e-15, atol=1e-16)
    traced = tf.function(lambda x: normal_quantile(TensorFlowKernels(), x))(tf.constant(p)).numpy()
    assert bits(traced) == bits(found)


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    with np.errstate(over="ignore"):
        drawn = normals(NumpyKernels(), 5, 1_000_000)
    expected = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}  # moment: (mean, variance)
    for power, (mean, variance) in expected.items():
        assert abs(np.mean(drawn**power) - mean) < 5 * np.sqrt(variance / drawn.size)
    assert scipy.stats.kstest(drawn[:100_000], "norm").pvalue > 1e-4


# ---- doors, preconditions, settings


@pytest.mark.usefixtures("on_worker")
@pytest.mark.parametrize("name", RULES)
def test_both_give_the_same_bits_in_all_doors_round_after_round(name: str) -> None:
    rule, d = RULES[name], 4097
    process = RuleFactory(rule).create(tff.TensorType(np.float32, [d]), tff.TensorType(np.float32))
    rounds = [hostile_inputs(seed, n, d)[0] for seed, n in enumerate((9, 10, 33))]
    state = process.initialize()
    outcomes = zip(rounds, rounds_in("numpy", rule, rounds), rounds_in("tensorflow", rule, rounds))
    for updates, (fast_state, fast), (traced_state, traced) in outcomes:
        output = process.next(state, list(updates), [1.0] * len(updates))
        state = output.state
        assert bits(output.result) == bits(traced.aggregate) == bits(fast.aggregate)
        for index, key in enumerate(("accepted", "scores"), start=1):
            assert bits(output.measurements[key]) == bits(traced[index]) == bits(fast[index])
        for kept in (state, traced_state):
            assert [bits(part) for part in tf.nest.flatten(kept)] == [
                bits(part) for part in tf.nest.flatten(fast_state)
            ]


@pytest.mark.parametrize(("name", "f", "least"), [("foolsgold", 0, 2), ("foolsgold", 5, 6), ("flame", 2, 5)])
def test_the_precondition_is_exact_and_the_rule_runs_at_it(name: str, f: int, least: int) -> None:
    rule = make_rule(name, f)
    assert least_devices(rule) == least
    found = judge(rule, noisy(0, n=least, d=9))
    assert np.all(np.isfinite(found.aggregate))
    assert np.all(np.isfinite(found.scores))


@pytest.mark.parametrize("name", ["foolsgold", "flame"])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_devices_is_irrelevant(name: str, seed: int) -> None:
    updates = noisy(seed, n=11, d=300, hostile=2)
    order = np.random.default_rng(seed).permutation(11)
    plain, mixed = judge(make_rule(name, 3), updates), judge(make_rule(name, 3), updates[order])
    np.testing.assert_allclose(mixed.aggregate, plain.aggregate, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(mixed.accepted, plain.accepted[order])


@pytest.mark.parametrize("name", ["foolsgold", "flame"])
def test_the_sizes_of_updates_do_not_change_whom_they_suspect(name: str) -> None:
    updates = noisy(3, n=9, d=300)
    sizes = np.exp(np.random.default_rng(0).normal(0, 5, (9, 1))).astype(np.float32)
    plain, scaled = judge(make_rule(name, 2), updates), judge(make_rule(name, 2), updates * sizes)
    np.testing.assert_allclose(scaled.scores, plain.scores, atol=1e-5)
    np.testing.assert_array_equal(scaled.accepted, plain.accepted)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a negative history": ("foolsgold", {"history_devices": -1}, "history_devices = -1"),
    "a history beyond any fleet": ("foolsgold", {"history_devices": 10**6}, "history_devices = 1000000"),
    "a kappa of nothing": ("foolsgold", {"kappa": 0.0}, "kappa = 0"),
    "negative noise": ("flame", {"noise": -0.1}, "noise = -0.1"),
    "noise that is not a number": ("flame", {"noise": float("nan")}, "noise = nan"),
    "a seed out of range": ("flame", {"seed": -1}, "seed = -1"),
}


@pytest.mark.parametrize(("name", "wrong", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_settings_are_refused(name: str, wrong: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_rule(name, **wrong)
    assert hint in str(refused.value)
