"""Same updates, same bits: the TFF door on a real worker against the direct call."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from aggregation_references import (
    ALL_RULES,
    bits,
    digest_of_rules,
    hostile_inputs,
    judge,
    judge_in_tensorflow,
    noisy,
)

from covey_coordinator.aggregation.factory import RuleFactory, traced
from covey_coordinator.aggregation.kernels import Kernels
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Batch, Judgement, Rule, require_devices
from covey_protocol.errors import RuleError, UsageError

FLOAT = tff.TensorType(np.float32)


def vector(d: int) -> Any:
    return tff.TensorType(np.float32, [d])


def with_static_shapes(rule: Rule, updates: np.ndarray, counts: np.ndarray) -> Judgement:
    """The reference kernels with static shapes, which gives the graph optimiser the most to do."""
    state = tf.nest.map_structure(tf.constant, rule.initial_state(updates.shape[1]))
    found = traced(rule)(state, tf.constant(updates), tf.constant(counts), tf.range(len(updates), dtype=tf.int64))[1]
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), found)


@pytest.mark.usefixtures("on_worker")
@pytest.mark.parametrize(
    "d", [pytest.param(1, marks=pytest.mark.slow), 4099, pytest.param(30011, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ALL_RULES)
def test_all_doors_give_the_same_bits(name: str, d: int) -> None:
    rule = make_rule(name, ALL_RULES[name])
    process = RuleFactory(rule).create(vector(d), FLOAT)
    state = process.initialize()
    for seed, n in enumerate((7, 8, 33)[d == 4099 :]):  # an even and an odd number; a small odd one with the slow sizes
        updates, counts = hostile_inputs(seed, n, d)
        output = process.next(state, list(updates), list(counts))
        for door in (judge, judge_in_tensorflow, with_static_shapes)[
            : 3 if n == 8 and d != 4099 else 2
        ]:  # slow to trace
            expected = door(rule, updates, counts)
            assert bits(output.result) == bits(expected.aggregate)
            assert bits(output.measurements["scores"]) == bits(expected.scores)
            assert bits(output.measurements["accepted"]) == bits(expected.accepted)


@pytest.mark.parametrize(
    "names", [["mean", "trimmed-mean", "multi-krum"], pytest.param(list(ALL_RULES), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}, marks=pytest.mark.slow),
        {"TF_NUM_INTRAOP_THREADS": "7", "TF_NUM_INTEROP_THREADS": "3", "TF_ENABLE_ONEDNN_OPTS": "0"},
    ],
    ids=["one thread", "seven threads without oneDNN"],
)
def test_bits_do_not_depend_on_threads_or_onednn(environment: dict[str, str], names: list[str]) -> None:
    code = f"import aggregation_references as reference; print(reference.digest_of_rules({names}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == digest_of_rules(names)


@pytest.mark.usefixtures("on_worker")
def test_structured_updates_come_back_in_their_structure() -> None:
    value_type = tff.types.to_type(
        collections.OrderedDict(kernel=tff.TensorType(np.float32, [2, 3]), bias=vector(2), scale=FLOAT)
    )
    updates = [
        collections.OrderedDict(
            kernel=np.full((2, 3), i, np.float32), bias=np.array([i, -i], np.float32), scale=np.float32(10 * i)
        )
        for i in (1, 5, 2)
    ]
    process = RuleFactory(make_rule("median", 1)).create(value_type, FLOAT)
    result = process.next(process.initialize(), updates, [1.0, 1.0, 1.0]).result
    assert list(result) == ["kernel", "bias", "scale"]
    np.testing.assert_array_equal(result["kernel"], np.full((2, 3), 2))
    np.testing.assert_array_equal(result["bias"], [2, -2])
    assert result["scale"] == 20


@pytest.mark.usefixtures("on_worker")
def test_clients_that_are_not_finite_or_have_no_examples_are_left_out() -> None:
    updates = noisy(0, n=10, d=20)
    counts = np.ones(10, np.float32)
    updates[3, 5], counts[6] = np.nan, 0.0
    rest = [row for row in range(10) if row not in (3, 6)]
    process = RuleFactory(make_rule("multi-krum", 2)).create(vector(20), FLOAT)
    output = process.next(process.initialize(), list(updates), list(counts))
    expected = judge(make_rule("multi-krum", 2), updates[rest])
    assert bits(output.result) == bits(expected.aggregate)
    np.testing.assert_array_equal(output.measurements["accepted"][rest], expected.accepted)
    np.testing.assert_array_equal(output.measurements["accepted"][[3, 6]], [False, False])
    assert np.all(output.measurements["scores"][[3, 6]] > 1e38)


@pytest.mark.usefixtures("on_worker")
def test_too_few_clients_fail_the_computation_and_name_the_rule() -> None:
    process = RuleFactory(make_rule("multi-krum", 2)).create(vector(3), FLOAT)
    with pytest.raises(Exception, match="multi-krum with num_byzantine = 2 needs at least 7"):
        process.next(process.initialize(), list(noisy(0, n=6, d=3)), [1.0] * 6)


def test_a_rule_that_no_number_of_clients_bears_is_refused_when_joined() -> None:
    with pytest.raises(RuleError, match="mean"):
        RuleFactory(make_rule("mean", 1)).create(vector(3), FLOAT)


def test_updates_that_are_not_float32_are_refused_when_joined() -> None:
    with pytest.raises(UsageError, match="float32"):
        RuleFactory(make_rule("mean")).create(tff.TensorType(np.int32, [3]), FLOAT)


@dataclass(frozen=True)
class RunningTotal(Rule):
    """A deliberately silly rule with memory: the aggregate is the sum of all updates of all rounds so far."""

    num_byzantine: int = 0
    name = "running-total"

    def check(self, n: int) -> None:
        require_devices(self, n, least=2, because="n >= 2")

    def initial_state(self, d: int) -> Any:
        return {"total": np.zeros(d, np.float32), "rounds": np.int64(0)}

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        raise NotImplementedError

    def advance(self, k: Kernels, state: Any, batch: Batch) -> tuple[Any, Judgement]:
        n = k.count(batch.updates)
        total = state["total"] + k.combination(batch.updates, k.full((n,), 1.0))
        rounds = state["rounds"] + 1
        scores = k.single(k.full((n,), rounds))
        return {"total": total, "rounds": rounds}, Judgement(total, scores > 0, scores, {"rounds": k.single(rounds)})

    def explain(self, score: float, accepted_scores: Any, n: int) -> str:
        return "silly"


@pytest.mark.usefixtures("on_worker")
def test_a_rule_with_memory_keeps_it_from_round_to_round() -> None:
    process = RuleFactory(RunningTotal()).create(vector(2), FLOAT)
    state = process.initialize()
    for number in (1, 2, 3):
        output = process.next(state, [np.array([1.0, 2.0], np.float32)] * 2, [1.0, 1.0])
        state = output.state
        np.testing.assert_array_equal(output.result, [2.0 * number, 4.0 * number])
        np.testing.assert_array_equal(output.measurements["scores"], [number, number])
        assert output.measurements["rounds"] == number


@pytest.mark.usefixtures("on_worker")
def test_the_rule_sees_what_tffs_clipping_and_zeroing_leave() -> None:
    factory = tff.aggregators.zeroing_factory(
        1000.0, tff.aggregators.clipping_factory(1.0, RuleFactory(make_rule("trimmed-mean", 1)))
    )
    updates = [np.array(row, np.float32) for row in ([0.3, 0.4], [3, 4], [30, 40], [-6, 8], [4000, 3000])]
    process = factory.create(vector(2), FLOAT)
    output = process.next(process.initialize(), updates, [1.0] * 5)
    left = np.array([[0.3, 0.4], [0.6, 0.8], [0.6, 0.8], [-0.6, 0.8], [0, 0]], np.float32)
    expected = judge(make_rule("trimmed-mean", 1), left)
    np.testing.assert_allclose(output.result, expected.aggregate, rtol=1e-6)


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


@pytest.mark.usefixtures("on_worker")
def test_federated_averaging_in_tff_learns_under_attack_with_multi_krum_and_not_with_the_mean() -> None:
    datasets = [line_data(seed) for seed in range(5)] + [line_data(5, slope=-50.0)]
    kernels = {}
    for rule in (make_rule("multi-krum", 1), make_rule("mean")):
        process = tff.learning.algorithms.build_weighted_fed_avg(
            tiny_model,
            client_optimizer_fn=tff.learning.optimizers.build_sgdm(0.1),
            model_aggregator=RuleFactory(rule),
        )
        state = process.initialize()
        for _ in range(2):
            output = process.next(state, datasets)
            state = output.state
        kernels[rule.name] = process.get_model_weights(state).trainable[0]
        if rule.name == "multi-krum":
            np.testing.assert_array_equal(output.metrics["aggregator"]["accepted"], [True] * 5 + [False])
    np.testing.assert_allclose(kernels["multi-krum"], [[1.0], [-2.0]], atol=0.5)
    assert np.abs(kernels["mean"] - [[1.0], [-2.0]]).max() > 5
