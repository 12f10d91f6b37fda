"""What each pre-step does to the updates, to the verdicts and to the rule behind it."""

from __future__ import annotations

import math
from typing import Any

import aggregation_references as reference
import aggregation_references_presteps as pre_reference
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from aggregation_references import batch_of, bits, hostile_inputs, judge, noisy
from aggregation_references_presteps import rounds_in
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.factory import RuleFactory
from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.kernels.mathematics import exp
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_coordinator.aggregation.presteps import Before
from covey_coordinator.aggregation.registry import PRE_STEPS, make_pre_step, make_rule
from covey_coordinator.aggregation.rules import Batch, Judgement, Rule, least_devices
from covey_protocol.errors import ConfigError, RuleError
from covey_protocol.parameters import ParameterSpec

FLOAT = tff.TensorType(np.float32)

# What stands before which rule, f; n = 9 bears all of them.
PIPELINES: dict[str, tuple[list[Any], str, int]] = {
    "clipping": ([{"step": "clipping", "clip_norm": 2.0}], "mean", 0),
    "norm clipping": (["norm-clipping"], "trimmed-mean", 2),
    "zeroing": (["zeroing"], "multi-krum", 2),
    "zeroing at a fixed norm": ([{"step": "zeroing", "threshold": 50.0}], "median", 2),
    "adaptive robust clipping": (["arc"], "median", 2),
    "buckets of two": (["bucketing"], "median", 2),
    "buckets of four": ([{"step": "bucketing", "size": 4, "seed": 7}], "mean", 0),
    "nearest-neighbour mixing": (["nnm"], "multi-krum", 2),
    "everything": (["zeroing", "norm-clipping", "arc", "nnm", "bucketing"], "trimmed-mean", 2),
}


def piped(name: str) -> Rule:
    before, rule, f = PIPELINES[name]
    return make_rule(rule, f, before=before)


class _Seen(Rule):
    """A rule that only looks: it keeps what the step before it made of the rows."""

    name = "seen"
    num_byzantine = 2

    def __init__(self, num_byzantine: int = 2) -> None:
        self.num_byzantine = num_byzantine  # type: ignore[misc]

    def check(self, n: int) -> None:
        pass

    def explain(self, score: float, accepted_scores: Any, n: int) -> str:
        return "seen"

    def step(self, k: Any, batch: Batch) -> Judgement:
        rows = k.columns(batch.updates, np.arange(k.dimension(batch.updates)))
        self.rows, self.num_examples, self.places = rows, batch.num_examples, batch.places
        m = len(rows)
        scores = np.arange(m).astype(np.float32)
        return Judgement(rows[0], scores % 2 == 0, scores, {})


def seen_after(step: Any, updates: np.ndarray, f: int = 2, counts: Any = None) -> tuple[_Seen, Judgement]:
    eye = _Seen(f)
    return eye, judge(Before(make_pre_step(step), eye), updates, counts)


# ---- each step against its reference


@pytest.mark.parametrize("clip_norm", [0.5, 10.0, 1e6])
def test_clipping_shortens_rows_to_the_norm_and_leaves_shorter_ones(clip_norm: float) -> None:
    updates = noisy(1, n=8, d=5000, hostile=2)
    updates[3] = 0
    eye, found = seen_after({"step": "clipping", "clip_norm": clip_norm}, updates)
    np.testing.assert_allclose(eye.rows, pre_reference.clipped(updates, clip_norm), rtol=2e-6)
    shorter = np.linalg.norm(updates, axis=1) < clip_norm
    np.testing.assert_array_equal(eye.rows[shorter], updates[shorter])
    assert found.measurements["clipping_clipped"] == np.count_nonzero(~shorter)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 9), st.integers(0, 1000))
def test_arc_shortens_the_longest_rows_to_the_next(n: int, f: int, seed: int) -> None:
    f = min(f, (n - 1) // 2)
    generator = np.random.default_rng(seed)
    updates = (noisy(seed, n=n, d=7) * np.exp(generator.normal(0, 3, (n, 1)))).astype(np.float32)
    eye, found = seen_after("arc", updates, f)
    np.testing.assert_allclose(eye.rows, pre_reference.arc(updates, f), rtol=1e-5, atol=1e-12)
    assert found.measurements["arc_clipped"] == math.floor(2 * (f / n) * (n - f))


@pytest.mark.parametrize(("n", "f"), [(3, 1), (7, 2), (12, 5), (20, 0)])
def test_nnm_gives_each_row_the_mean_of_its_nearest(n: int, f: int) -> None:
    updates = noisy(n, n=n, d=800, hostile=f)
    counts = np.arange(1, n + 1)
    eye, _ = seen_after("nnm", updates, f, counts)
    np.testing.assert_allclose(eye.rows, pre_reference.nnm(updates, f), rtol=1e-5, atol=1e-6)
    expected = [np.mean(nearest) for nearest in nearest_counts(updates, f, counts)]
    np.testing.assert_allclose(eye.num_examples, expected, rtol=1e-6)


def nearest_counts(updates: np.ndarray, f: int, counts: np.ndarray) -> list[np.ndarray]:
    rows = updates.astype(np.float64)
    distances = ((rows[:, None] - rows[None, :]) ** 2).sum(axis=2)
    return [counts[np.argsort(row, kind="stable")[: len(rows) - f]] for row in distances]


def test_nnm_of_equal_rows_mixes_each_with_itself() -> None:
    updates = np.array([[0.0], [0.0], [0.0], [9.0], [9.5]], np.float32)
    eye, _ = seen_after("nnm", updates, f=2, counts=[1, 2, 3, 4, 5])
    np.testing.assert_array_equal(eye.rows[:3], 0.0)
    assert eye.rows[4] > eye.rows[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 23), st.integers(1, 6), st.integers(0, 2**40))
def test_buckets_partition_the_devices_and_hold_their_means(n: int, size: int, seed: int) -> None:
    updates = np.eye(n, dtype=np.float32) * 12.0
    counts = np.arange(1, n + 1)
    eye, found = seen_after({"step": "bucketing", "size": size, "seed": seed}, updates, counts=counts)
    assert len(eye.rows) == math.ceil(n / size)
    members = [np.flatnonzero(row) for row in eye.rows]
    assert sorted(np.concatenate(members)) == list(range(n))
    assert [len(group) for group in members[:-1]] == [size] * (len(members) - 1)
    for index, group in enumerate(members):
        np.testing.assert_allclose(eye.rows[index][group], 12.0 / len(group), rtol=1e-6)
        assert eye.num_examples[index] == counts[group].sum()
        np.testing.assert_array_equal(found.scores[group], index)
        np.testing.assert_array_equal(found.accepted[group], index % 2 == 0)


def test_buckets_are_drawn_anew_each_round_and_again_alike_from_the_same_seed() -> None:
    rule = make_rule("median", 0, before=["bucketing"])
    rows = np.eye(12, dtype=np.float32)

    def grouped(rule: Rule) -> list[bytes]:
        eye = _Seen(0)
        rounds_in("numpy", Before(rule.first, eye), [rows])  # type: ignore[attr-defined]
        outcomes, state = [], np.int64(0)
        for _ in range(6):
            state, prepared = rule.first.prepare(NumpyKernels(), state, batch_of(rows), 0)  # type: ignore[attr-defined]
            outcomes.append(bits(prepared.row_of))
        return outcomes

    first = grouped(rule)
    assert len(set(first)) == 6
    assert first == grouped(rule)
    assert first != grouped(make_rule("median", 0, before=[{"step": "bucketing", "seed": 1}]))


def test_each_pair_of_devices_shares_a_bucket_equally_often() -> None:
    step, state, together = make_pre_step("bucketing"), np.int64(0), np.zeros((6, 6))
    batch, rounds = batch_of(np.zeros((6, 1), np.float32)), 3000
    with np.errstate(all="ignore"):
        for _ in range(rounds):
            state, prepared = step.prepare(NumpyKernels(), state, batch, 0)
            together += prepared.row_of[:, None] == prepared.row_of[None, :]
    share = together[np.triu_indices(6, 1)] / rounds
    assert np.all(np.abs(share - 1 / 5) < 4.5 * math.sqrt(0.2 * 0.8 / rounds))


@pytest.mark.parametrize("name", ["norm-clipping", "zeroing"])
def test_the_adaptive_norm_follows_the_quantile_of_the_norms(name: str) -> None:
    generator = np.random.default_rng(0)
    rounds = [(generator.standard_normal((10, 40)) * generator.uniform(0.1, 9, (10, 1))).astype(np.float32)] * 30
    norms = [np.linalg.norm(updates.astype(np.float64), axis=1) for updates in rounds]
    step = make_pre_step(name)
    initial, target, rate = {"norm-clipping": (1.0, 0.8, 0.2), "zeroing": (10.0, 0.98, math.log(10.0))}[name]
    expected = pre_reference.quantile_estimates(norms, initial, target, rate)
    found = [judged.measurements for _, judged in rounds_in("numpy", make_rule("mean", before=[name]), rounds)]
    key = f"{name.replace('-', '_')}_norm"
    shown = [2 * value + 1 for value in expected] if name == "zeroing" else expected
    np.testing.assert_allclose([one[key] for one in found], shown, rtol=1e-6)
    if name == "norm-clipping":
        assert np.mean(norms[0] <= float(found[-1][key])) == pytest.approx(0.8, abs=0.11)
    assert step.initial_state(40) == initial


def test_a_zeroed_device_is_not_accepted_and_is_told_why_and_the_others_are() -> None:
    updates = noisy(0, n=8, d=50)
    updates[2] *= 1e4
    rule = make_rule("mean", before=[{"step": "zeroing", "threshold": 100.0}])
    found = judge(rule, updates)
    np.testing.assert_array_equal(found.accepted, np.arange(8) != 2)
    rest = np.where(np.arange(8)[:, None] == 2, 0, updates)
    np.testing.assert_allclose(found.aggregate, rest.astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-7)
    assert found.scores[2] == np.float32(FLOAT32_MAX)
    assert found.measurements["zeroing_zeroed"] == 1
    assert "zeroed" in rule.explain(float(found.scores[2]), found.scores[found.accepted], 8)


# ---- against TFF's own


@pytest.mark.usefixtures("on_worker")
def test_adaptive_zeroing_and_clipping_leave_what_tffs_own_leave() -> None:
    quantile = tff.aggregators.PrivateQuantileEstimationProcess.no_noise
    zeroing = quantile(10.0, 0.98, math.log(10.0), multiplier=2.0, increment=1.0)
    clipping = quantile(1.0, 0.8, 0.2)
    clip = tff.aggregators.clipping_factory(clipping, tff.aggregators.UnweightedMeanFactory())
    factory = tff.aggregators.zeroing_factory(zeroing, clip, norm_order=2.0)
    process = factory.create(tff.TensorType(np.float32, [30]))
    state = process.initialize()
    rule = make_rule("mean", before=["zeroing", "norm-clipping"])
    rounds = []
    for seed in range(8):
        updates = noisy(seed, n=9, d=30, hostile=1, size=10.0**seed)
        rounds.append(updates)
    for updates, (_, ours) in zip(rounds, rounds_in("numpy", rule, rounds)):
        output = process.next(state, list(updates))
        state = output.state
        np.testing.assert_allclose(ours.aggregate, output.result, rtol=2e-5, atol=1e-7)
        theirs = output.measurements
        assert ours.measurements["zeroing_zeroed"] == theirs["zeroed_count"]
        assert ours.measurements["norm_clipping_clipped"] == theirs["zeroing"]["clipped_count"]
        assert ours.measurements["norm_clipping_norm"] == pytest.approx(theirs["zeroing"]["clipping_norm"], rel=1e-5)


# ---- composition


def test_steps_run_in_the_order_written() -> None:
    updates = noisy(5, n=9, d=20, hostile=1)
    clip = {"step": "clipping", "clip_norm": 1.0}
    one = judge(make_rule("mean", before=[clip, "bucketing"]), updates).aggregate
    other = judge(make_rule("mean", before=["bucketing", clip]), updates).aggregate
    assert not np.allclose(one, other)
    clipped = pre_reference.clipped(updates, 1.0).astype(np.float32)
    np.testing.assert_allclose(one, judge(make_rule("mean", before=["bucketing"]), clipped).aggregate, rtol=1e-5)
    assert make_rule("mean", before=[clip, "bucketing"]).name == "clipping + bucketing + mean"


def test_buckets_of_one_change_nothing_but_the_order() -> None:
    updates = noisy(6, n=9, d=200, hostile=2)
    plain = judge(make_rule("multi-krum", 2), updates)
    found = judge(make_rule("multi-krum", 2, before=[{"step": "bucketing", "size": 1}]), updates)
    np.testing.assert_array_equal(found.accepted, plain.accepted)
    np.testing.assert_array_equal(found.scores, plain.scores)
    np.testing.assert_allclose(found.aggregate, plain.aggregate, rtol=1e-6)


def test_mean_through_buckets_of_equal_claims_is_the_mean() -> None:
    updates = noisy(7, n=11, d=33)
    found = judge(make_rule("mean", before=[{"step": "bucketing", "size": 3}]), updates)
    np.testing.assert_allclose(found.aggregate, reference.mean(updates, np.ones(11)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_equal_updates_come_out_unchanged(name: str) -> None:
    row = (np.random.default_rng(3).standard_normal(101) * 0.01).astype(np.float32)
    found = judge(piped(name), np.tile(row, (9, 1)))
    np.testing.assert_array_equal(found.aggregate, row)
    assert np.all(np.isfinite(found.scores))


def test_the_matrix_of_updates_is_never_written_to_and_never_copied() -> None:
    updates = noisy(8, n=9, d=5000, hostile=2)
    batch = Batch(Updates(updates), np.ones(9, np.float32), np.arange(9))
    updates.flags.writeable = False
    rule = piped("everything")
    with np.errstate(all="ignore"):
        rule.advance(NumpyKernels(), rule.initial_state(5000), batch)
        _, prepared = make_pre_step("nnm").prepare(NumpyKernels(), (), batch, 2)
    assert prepared.batch.updates.matrix is updates


@pytest.mark.parametrize("f", [1, 2, 3])
def test_hostile_rows_cannot_move_nnm_and_the_median_far(f: int) -> None:
    generator = np.random.default_rng(f)
    honest = (generator.standard_normal((10 - f, 60)) + 5).astype(np.float32)
    spread = np.sqrt(np.mean(np.sum((honest - honest.mean(axis=0)) ** 2, axis=1)))
    for size in (10.0, 1e6, 1e30):
        updates = np.vstack([np.full((f, 60), size, np.float32), honest])
        found = judge(make_rule("median", f, before=["nnm"]), updates)
        assert np.linalg.norm(found.aggregate - honest.mean(axis=0)) < 2 * spread


# ---- both doors


@pytest.mark.usefixtures("on_worker")
@pytest.mark.parametrize(
    ("name", "d"),
    [
        # mixing is in "everything", too
        *(
            pytest.param(name, 4097, marks=[pytest.mark.slow] * (name == "nearest-neighbour mixing"))
            for name in PIPELINES
        ),
        pytest.param("everything", 1, marks=pytest.mark.slow),
    ],
)
def test_pre_steps_give_the_same_bits_in_all_doors_round_after_round(name: str, d: int) -> None:
    rule = piped(name)
    process = RuleFactory(rule).create(tff.TensorType(np.float32, [d]), FLOAT)
    rounds = [hostile_inputs(seed, n, d)[0] for seed, n in enumerate((9, 10, 33))]
    state = process.initialize()
    outcomes = zip(rounds, rounds_in("numpy", rule, rounds), rounds_in("tensorflow", rule, rounds))
    for updates, (fast_state, fast), (traced_state, traced) in outcomes:
        output = process.next(state, list(updates), [1.0] * len(updates))
        state = output.state
        for found, kept in ((traced, traced_state), (_as_judgement(output), state)):
            for mine, theirs in zip(fast[:3], found[:3]):
                assert bits(mine) == bits(theirs)
            assert [bits(part) for part in tf.nest.flatten(kept)] == [
                bits(part) for part in tf.nest.flatten(fast_state)
            ]
            assert {name: float(value) for name, value in fast.measurements.items()} == {
                name: float(value) for name, value in found.measurements.items()
            }


def _as_judgement(output: Any) -> Judgement:
    measurements = dict(output.measurements)
    return Judgement(output.result, measurements.pop("accepted"), measurements.pop("scores"), measurements)


def test_the_direct_engine_names_the_step_that_refused_a_device() -> None:
    specs = [ParameterSpec("w", (50,), trainable=True)]
    engine = make_engine("direct", make_rule("multi-krum", 1, before=[{"step": "zeroing", "threshold": 500.0}]), specs)
    updates = noisy(1, n=8, d=50)
    updates[3] *= 1e4
    result = engine.step(np.zeros(50, np.float32), updates, np.ones(8), [f"d{i}" for i in range(8)])
    assert result.verdicts[3].reason == "zeroed: its norm is above the threshold of the step zeroing"
    updates = noisy(1, n=10, d=50)
    updates[3] *= 1e4
    engine = make_engine("direct", make_rule("multi-krum", 1, before=["bucketing"]), specs)
    verdicts = engine.step(np.zeros(50, np.float32), updates, np.ones(10), [f"d{i}" for i in range(10)]).verdicts
    reasons = [verdict.reason for verdict in verdicts if verdict.reason]
    assert len(reasons) == 2
    assert "its group of up to 2 devices, after bucketing: not among the 4 of 5 kept" in reasons[0]


# ---- what may stand where

PRECONDITIONS = {
    "buckets of two halve the rows": ("median", 2, ["bucketing"], 9),
    "buckets of three leave a third": ("multi-krum", 1, [{"step": "bucketing", "size": 3}], 13),
    "mixing needs an honest majority": ("mean", 0, ["nnm"], 1),
    "mixing leaves the rule its own need": ("multi-krum", 2, ["nnm"], 7),
    "two steps": ("median", 1, ["arc", "bucketing"], 5),
}


@pytest.mark.parametrize(("rule", "f", "before", "least"), PRECONDITIONS.values(), ids=PRECONDITIONS.keys())
def test_the_precondition_of_a_pipeline_is_exact(rule: str, f: int, before: list[Any], least: int) -> None:
    made = make_rule(rule, f, before=before)
    assert least_devices(made) == least
    found = judge(made, noisy(0, n=least, d=9))
    assert np.all(np.isfinite(found.aggregate))


def test_a_refusal_behind_bucketing_says_how_many_rows_there_were() -> None:
    with pytest.raises(RuleError, match="bucketing makes 4 rows of 8 updates"):
        make_rule("multi-krum", 1, before=["bucketing"]).check(8)


@pytest.mark.parametrize("step", ["nnm", "arc"])
def test_steps_that_count_on_an_honest_majority_say_so(step: str) -> None:
    with pytest.raises(RuleError, match=f"{step} needs n > 2f"):
        make_pre_step(step).check(4, 2)
    make_pre_step(step).check(5, 2)


def test_a_rule_that_remembers_devices_cannot_stand_behind_buckets() -> None:
    class Remembering(_Seen):
        remembers_devices = True

    Before(make_pre_step("nnm"), Remembering())
    with pytest.raises(ConfigError, match="remembers devices"):
        Before(make_pre_step("bucketing"), Remembering())
    with pytest.raises(ConfigError, match="remembers devices"):
        Before(make_pre_step("bucketing"), Before(make_pre_step("nnm"), Remembering()))


REFUSED = {
    "a misspelt step": ("nmm", "did you mean 'nnm'"),
    "a misspelt setting of a step": ({"step": "bucketing", "sizes": 3}, "did you mean 'size'"),
    "a string for a number": ({"step": "bucketing", "size": "3"}, "size = '3', expected `int`"),
    "a truth value for a number": ({"step": "clipping", "clip_norm": True}, "clip_norm = True"),
    "buckets of nothing": ({"step": "bucketing", "size": 0}, "size = 0"),
    "a negative seed": ({"step": "bucketing", "seed": -1}, "seed = -1"),
    "a clip norm of zero": ({"step": "clipping", "clip_norm": 0}, "clip_norm = 0"),
    "a clip norm that is not finite": ({"step": "clipping", "clip_norm": math.inf}, "clip_norm = inf"),
    "a quantile above one": ({"step": "norm-clipping", "target_quantile": 1.5}, "target_quantile = 1.5"),
    "a learning rate out of all reason": ({"step": "zeroing", "learning_rate": 1e3}, "learning_rate = 1000"),
    "a negative increment": ({"step": "zeroing", "increment": -1.0}, "increment = -1"),
    "a negative threshold": ({"step": "zeroing", "threshold": -1.0}, "threshold = -1"),
    "a table without a step": ({"size": 3}, "before holds"),
    "a number": (3, "before holds 3"),
}


@pytest.mark.parametrize(("entry", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_pre_step_is_refused_with_a_hint(entry: Any, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_rule("mean", before=[entry])
    assert hint in str(refused.value)


@pytest.mark.parametrize("name", PRE_STEPS)
def test_pre_steps_are_values(name: str) -> None:
    assert make_pre_step(name) == make_pre_step({"step": name})
    assert hash(make_pre_step(name)) == hash(make_pre_step(name))
    with pytest.raises(AttributeError):
        make_pre_step(name).name = "other"  # type: ignore[misc]


# ---- what the steps are made of


def test_python_numbers_keep_all_their_digits_beside_tensors() -> None:
    k = TensorFlowKernels()
    values = tf.constant([0.1, 0.3], tf.float64)
    assert k.full((), 0.1).numpy() == 0.1
    assert k.real(0.1).numpy() == 0.1
    assert k.divide(0.1, 3.0).numpy() == 0.1 / 3.0
    assert k.minimum(values, 0.2).numpy().tolist() == [0.1, 0.2]
    assert k.where(values > 0.2, 1e-300, values).numpy().tolist() == [0.1, 1e-300]


def test_exp_is_right_to_two_units_in_the_last_place_and_the_same_in_both_kernels() -> None:
    values = np.concatenate([np.linspace(-700, 700, 20001), np.linspace(-1, 1, 20001), [0.0, -0.0, 1e-300]])
    found = exp(NumpyKernels(), values)
    units = np.abs(found - np.exp(values)) / np.spacing(np.exp(values))
    assert units.max() <= 2
    assert found[-3:].tolist() == [1.0, 1.0, 1.0]
    traced = tf.function(lambda x: exp(TensorFlowKernels(), x))(tf.constant(values)).numpy()
    assert bits(traced) == bits(found)
