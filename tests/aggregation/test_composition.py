"""Rules as parts of TFF's own pipelines, on the real worker: clipping, zeroing, privacy, compression, learning."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import tensorflow as tf
import tensorflow_federated as tff
import tensorflow_privacy as tfp
from aggregation_references import bits, judge, noisy

from covey_coordinator.aggregation.accounting import epsilon_spent, epsilons_by_round
from covey_coordinator.aggregation.factory import RuleFactory, UnweightedRuleFactory, quantize_above_threshold
from covey_coordinator.aggregation.privacy import is_a_sum, private_aggregator
from covey_coordinator.aggregation.registry import make_rule
from covey_protocol.errors import ConfigError, UsageError

FLOAT = tff.TensorType(np.float32)


def vector(d: int) -> Any:
    return tff.TensorType(np.float32, [d])


def clipped(updates: np.ndarray, norm: float) -> np.ndarray:
    lengths = np.linalg.norm(updates, axis=1, keepdims=True)
    return (updates * np.minimum(1.0, norm / np.maximum(lengths, 1e-30))).astype(np.float32)


# ---- the unweighted form


@pytest.mark.usefixtures("on_worker")
@pytest.mark.parametrize("name", ["mean", "trimmed-mean", "multi-krum"])
def test_the_unweighted_form_gives_the_rules_own_bits_for_equal_counts(name: str) -> None:
    rule, updates = make_rule(name, 0 if name == "mean" else 2), noisy(1, n=9, d=700, hostile=2)
    process = UnweightedRuleFactory(rule).create(vector(700))
    output = process.next(process.initialize(), list(updates))
    expected = judge(rule, updates)
    assert bits(output.result) == bits(expected.aggregate)
    assert bits(output.measurements["scores"]) == bits(expected.scores)


@pytest.mark.usefixtures("on_worker")
def test_a_rule_as_a_sum_is_the_aggregate_times_the_clients_it_saw() -> None:
    rule, updates = make_rule("median", 1), noisy(2, n=8, d=30)
    updates[3, 0] = np.nan
    process = UnweightedRuleFactory(rule, as_sum=True).create(vector(30))
    result = process.next(process.initialize(), list(updates)).result
    np.testing.assert_allclose(result, 7 * judge(rule, np.delete(updates, 3, axis=0)).aggregate, rtol=1e-6)


# ---- TFF's clipping and zeroing


@pytest.mark.usefixtures("on_worker")
def test_adaptive_clipping_and_zeroing_of_tff_wrap_both_forms() -> None:
    quantile = tff.aggregators.PrivateQuantileEstimationProcess.no_noise
    updates = noisy(3, n=9, d=20, hostile=1)
    for form in (RuleFactory, UnweightedRuleFactory):
        inner = form(make_rule("trimmed-mean", 2))
        clip = tff.aggregators.clipping_factory(quantile(1.0, 0.8, 0.2), inner)
        zeroed = tff.aggregators.zeroing_factory(quantile(10.0, 0.98, math.log(10.0), 2.0, 1.0), clip)
        weights = (FLOAT,) if form is RuleFactory else ()
        process = zeroed.create(vector(20), *weights)
        output = process.next(process.initialize(), list(updates), *([[1.0] * 9] if weights else []))
        left = clipped(np.where(np.abs(updates).max(axis=1, keepdims=True) > 21.0, np.float32(0), updates), 1.0)
        expected = judge(make_rule("trimmed-mean", 2), left).aggregate
        np.testing.assert_allclose(output.result, expected, rtol=1e-5, atol=1e-6)
        assert output.measurements["zeroed_count"] == 1
        assert len(output.measurements["zeroing"]["clipping"]["scores"]) == 9
        assert output.state["zeroing_norm"] is not None


@pytest.mark.usefixtures("on_worker")
def test_a_rotation_of_tff_leaves_krum_its_choice() -> None:
    updates = noisy(4, n=8, d=37, hostile=1)
    process = tff.aggregators.HadamardTransformFactory(UnweightedRuleFactory(make_rule("krum", 2))).create(vector(37))
    result = process.next(process.initialize(), list(updates)).result
    np.testing.assert_allclose(result, judge(make_rule("krum", 2), updates).aggregate, atol=1e-4)


# ---- differential privacy


def exact_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Of the Gaussian mechanism, in closed form: Balle and Wang 2018 (arXiv:1805.06530), theorem 8."""
    mu = math.sqrt(rounds) / noise_multiplier
    normal = scipy.stats.norm

    def excess(epsilon: float) -> float:
        upper = normal.cdf(mu / 2 - epsilon / mu)
        return float(upper - math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(scipy.optimize.brentq(excess, 0, 300))


@pytest.mark.parametrize(("noise_multiplier", "rounds"), [(1.0, 1), (2.0, 10), (4.0, 100), (10.0, 7)])
def test_epsilon_without_sampling_is_just_above_the_exact_one(noise_multiplier: float, rounds: int) -> None:
    exact = exact_epsilon(noise_multiplier, rounds, 1e-5)
    assert exact < epsilon_spent(noise_multiplier, rounds, 1.0, 1e-5) < 1.15 * exact


def test_epsilon_with_sampling_is_that_of_the_literature() -> None:
    """Abadi et al. 2016 (arXiv:1607.00133), section 3.2: q = 0.01, sigma = 4, 10,000 steps give 1.26; bounds have
    become tighter since."""
    assert 0.9 < epsilon_spent(4.0, 10_000, 0.01, 1e-5) < 1.26


def test_epsilon_agrees_with_the_accountants_public_answer_and_grows_with_the_rounds() -> None:
    import dp_accounting

    table = epsilons_by_round(1.3, 30, 0.2, 1e-6)
    for rounds in (1, 7, 30):
        accountant = dp_accounting.rdp.RdpAccountant()
        event = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(1.3))
        accountant.compose(event, rounds)
        assert table[rounds] == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-9)
    assert table[0] == 0.0
    assert np.all(np.diff(table) > 0)


def test_no_noise_is_no_privacy() -> None:
    assert epsilon_spent(0.0, 3, 0.1, 1e-5) == math.inf
    assert epsilon_spent(0.0, 0, 0.1, 1e-5) == 0.0


@pytest.mark.parametrize(
    ("noise_multiplier", "rounds", "rate", "delta", "hint"),
    [
        (-1.0, 1, 1.0, 1e-5, "noise_multiplier = -1"),
        (1.0, -1, 1.0, 1e-5, "epsilon of -1 rounds"),
        (1.0, 1, 0.0, 1e-5, "sampling_rate = 0"),
        (1.0, 1, 1.5, 1e-5, "sampling_rate = 1.5"),
        (1.0, 1, 1.0, 0.0, "delta = 0"),
        (math.nan, 1, 1.0, 1e-5, "noise_multiplier = nan"),
    ],
)
def test_what_is_no_privacy_setting_is_refused(
    noise_multiplier: float, rounds: int, rate: float, delta: float, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        epsilon_spent(noise_multiplier, rounds, rate, delta)


@pytest.mark.usefixtures("on_worker")
def test_a_private_mean_clips_adds_noise_of_the_stated_size_and_says_its_epsilon() -> None:
    n, d = 8, 20_000
    updates = noisy(0, n=n, d=d, hostile=1)
    factory = private_aggregator(
        make_rule("mean"), clip_norm=2.0, noise_multiplier=0.5, clients_per_round=10, rounds=3, delta=1e-6
    )
    process = factory.create(vector(d))
    state, expected = process.initialize(), epsilons_by_round(0.5, 3, 1.0, 1e-6)
    noises = []
    for number in (1, 2, 3):
        output = process.next(state, list(updates))
        state = output.state
        noises.append((output.result - clipped(updates, 2.0).sum(axis=0) / 10) / (0.5 * 2.0 / 10))
        spent = output.measurements["privacy"]
        assert spent["epsilon"] == pytest.approx(expected[number], rel=1e-12)
        assert spent["delta"] == 1e-6
        assert spent["noise_multiplier"] == 0.5
        assert output.measurements["dp"]["dp"]["accepted"].tolist() == [True] * n
    for noise in noises:
        assert abs(noise.mean()) < 5 / math.sqrt(d)
        assert noise.std() == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(noises[0], noises[1])[0, 1]) < 5 / math.sqrt(d)
    with pytest.raises(Exception, match="3 rounds that the privacy budget was planned for are over"):
        process.next(state, list(updates))


@pytest.mark.usefixtures("on_worker")
def test_one_client_more_moves_the_private_sum_by_the_clip_norm_at_most() -> None:
    factory = private_aggregator(
        make_rule("mean", before=[{"step": "clipping", "clip_norm": 5.0}]),
        clip_norm=1.5,
        noise_multiplier=0.0,
        clients_per_round=1,
        rounds=9,
    )
    process = factory.create(vector(50))
    state = process.initialize()
    for seed in range(4):
        updates = noisy(seed, n=7, d=50, hostile=1, size=10.0 ** (3 * seed))
        with_all = process.next(state, list(updates)).result
        without = process.next(state, list(updates[1:])).result
        assert np.linalg.norm(with_all - without) < 1.5 * 1.0001
    assert process.next(state, list(updates)).measurements["privacy"]["epsilon"] == math.inf


@pytest.mark.parametrize(
    ("rule", "f", "before"),
    [
        ("median", 1, []),
        ("multi-krum", 1, []),
        ("flame", 1, []),
        ("mean", 0, ["norm-clipping"]),
        ("mean", 0, ["zeroing"]),
        ("mean", 0, ["nnm"]),
        ("mean", 0, ["arc"]),
    ],
)
def test_no_epsilon_is_claimed_for_what_is_no_sum_of_single_clients(rule: str, f: int, before: list[str]) -> None:
    with pytest.raises(ConfigError, match="no epsilon can be claimed"):
        private_aggregator(
            make_rule(rule, f, before=before), clip_norm=1.0, noise_multiplier=1.0, clients_per_round=9, rounds=1
        )


def test_a_median_times_n_does_move_by_more_than_the_clip_norm() -> None:
    """Why the refusal is right: one client of eleven moves the sum eleven times the clip norm."""
    up, down = np.ones((5, 1), np.float32), -np.ones((5, 1), np.float32)
    rule = make_rule("median")
    high, low = (judge(rule, np.concatenate([up, down, one])).aggregate[0] for one in (up[:1], down[:1]))
    assert 11 * abs(high - low) == 22


def test_what_counts_as_a_sum() -> None:
    fixed = [{"step": "zeroing", "threshold": 3.0}, {"step": "clipping", "clip_norm": 2.0}]
    assert is_a_sum(make_rule("mean"))
    assert is_a_sum(make_rule("mean", before=fixed))
    assert not is_a_sum(make_rule("mean", before=[*fixed, "bucketing"]))


@pytest.mark.parametrize("wrong", [{"clip_norm": 0.0}, {"clients_per_round": -1.0}, {"rounds": 0}, {"delta": 2.0}])
def test_wrong_sizes_of_a_private_aggregator_are_refused(wrong: dict[str, float]) -> None:
    right = {"clip_norm": 1.0, "noise_multiplier": 1.0, "clients_per_round": 9, "rounds": 1}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        private_aggregator(make_rule("mean"), **{**right, **wrong})  # type: ignore[arg-type]


@pytest.mark.usefixtures("on_worker")
def test_a_robust_rule_can_stand_in_tffs_private_factory_without_an_epsilon() -> None:
    query = tfp.NormalizedQuery(tfp.GaussianSumQuery(l2_norm_clip=1.0, stddev=0.0), denominator=8.0)
    inner = UnweightedRuleFactory(make_rule("median", 2), as_sum=True)
    process = tff.aggregators.DifferentiallyPrivateFactory(query, inner).create(vector(40))
    updates = noisy(5, n=8, d=40, hostile=2)
    result = process.next(process.initialize(), list(updates)).result
    np.testing.assert_allclose(result, judge(make_rule("median", 2), clipped(updates, 1.0)).aggregate, atol=1e-6)


# ---- compression


@pytest.mark.usefixtures("on_worker")
@pytest.mark.parametrize("num_bits", [4, 8])
def test_quantised_updates_reach_the_rule_within_half_a_step(num_bits: int) -> None:
    kinds = tff.types.to_type(
        collections.OrderedDict(large=tff.TensorType(np.float32, [30, 20]), small=tff.TensorType(np.float32, [3]))
    )
    generator = np.random.default_rng(0)
    updates = [
        collections.OrderedDict(
            large=generator.standard_normal((30, 20)).astype(np.float32),
            small=generator.standard_normal(3).astype(np.float32),
        )
        for _ in range(7)
    ]
    rule = make_rule("trimmed-mean", 2)
    encoder_fn = quantize_above_threshold(num_bits, threshold=100)
    process = UnweightedRuleFactory(rule, encoder_fn=encoder_fn).create(kinds)
    result = process.next(process.initialize(), updates).result
    large = np.stack([one["large"].ravel() for one in updates])
    step = (large.max(axis=1) - large.min(axis=1)).max() / (2**num_bits - 1)
    error = np.abs(result["large"].ravel() - judge(rule, large).aggregate)
    assert 0 < error.max() <= 0.51 * step
    small = judge(rule, np.stack([one["small"] for one in updates])).aggregate
    assert bits(result["small"]) == bits(small)


def test_eight_bits_send_less_than_a_third_of_the_bytes() -> None:
    """Two sevenths: TFF's encoder packs into 28 of the 32 bits of a whole number."""
    encoder = quantize_above_threshold(8, threshold=100)(tf.TensorSpec([1000], tf.float32))
    encoded, _ = encoder.encode(tf.linspace(0.0, 1.0, 1000))
    sent = sum(part.numpy().nbytes for part in tf.nest.flatten(encoded))
    assert 1000 <= sent < 1200


def test_tffs_compressions_for_sums_do_not_take_a_rule_as_their_inside() -> None:
    with pytest.raises(TypeError):
        tff.aggregators.EncodedSumFactory(lambda spec: None, UnweightedRuleFactory(make_rule("median")))
    with pytest.raises(UsageError, match="float32"):  # what discretisation hands on
        UnweightedRuleFactory(make_rule("median")).create(tff.TensorType(np.int32, [3]))


# ---- learning


def tiny_model() -> Any:
    keras = tf.keras.Sequential([tf.keras.layers.Dense(1, kernel_initializer="zeros", input_shape=(2,))])
    return tff.learning.models.from_keras_model(
        keras,
        loss=tf.keras.losses.MeanSquaredError(),
        input_spec=(tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
    )


def line_data(seed: int, slope: float = 1.0) -> tf.data.Dataset:
    x = np.random.default_rng(seed).standard_normal((32, 2)).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((x, slope * x @ np.array([[1.0], [-2.0]], np.float32))).batch(8)


def learned(build: Any, aggregator: Any, datasets: list[tf.data.Dataset], rounds: int) -> tuple[np.ndarray, Any]:
    process = build(
        tiny_model, client_optimizer_fn=tff.learning.optimizers.build_sgdm(0.1), model_aggregator=aggregator
    )
    state = process.initialize()
    for _ in range(rounds):
        output = process.next(state, datasets)
        state = output.state
    return process.get_model_weights(state).trainable[0], output.metrics["aggregator"]


@pytest.mark.usefixtures("on_worker")
def test_weighted_averaging_learns_behind_clipping_mixing_and_a_robust_rule() -> None:
    datasets = [line_data(seed) for seed in range(6)] + [line_data(6, slope=-50.0)]
    rule = make_rule("trimmed-mean", 1, before=["norm-clipping", "nnm"])
    aggregator = tff.aggregators.clipping_factory(20.0, RuleFactory(rule))
    kernel, measured = learned(tff.learning.algorithms.build_weighted_fed_avg, aggregator, datasets, 6)
    np.testing.assert_allclose(kernel, [[1.0], [-2.0]], atol=0.5)
    assert measured["clipping"]["norm_clipping_clipped"] >= 1


@pytest.mark.usefixtures("on_worker")
def test_unweighted_averaging_learns_with_a_rule_and_with_a_private_mean() -> None:
    build = tff.learning.algorithms.build_unweighted_fed_avg
    datasets = [line_data(seed) for seed in range(6)]
    kernel, measured = learned(build, UnweightedRuleFactory(make_rule("multi-krum", 1)), datasets, 5)
    np.testing.assert_allclose(kernel, [[1.0], [-2.0]], atol=0.3)
    assert len(measured["scores"]) == 6
    private = private_aggregator(
        make_rule("mean"), clip_norm=1.0, noise_multiplier=0.1, clients_per_round=6, rounds=5, sampling_rate=0.5
    )
    kernel, measured = learned(build, private, datasets, 5)
    np.testing.assert_allclose(kernel, [[1.0], [-2.0]], atol=0.5)
    assert measured["privacy"]["epsilon"] == pytest.approx(epsilon_spent(0.1, 5, 0.5, 1e-5))
