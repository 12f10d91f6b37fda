"""Rounds through the engines: equal bits, verdicts, refusals, parameters that are not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
from aggregation_references import ALL_RULES, bits, judge, noisy
from test_aggregation_doors import RunningTotal

from covey_coordinator.aggregation.engines import Engine, make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.records import ACCEPTED, REJECTED
from covey_protocol.errors import ConfigError, RuleError, UsageError
from covey_protocol.parameters import ParameterSpec, total_size

SPECS = (
    ParameterSpec("dense/kernel", (11, 7)),
    ParameterSpec("norm/moving_mean", (7,), trainable=False),
    ParameterSpec("dense/bias", (7,)),
    ParameterSpec("scale", ()),
)
D = total_size(SPECS)
MOVING_MEAN = slice(77, 84)
IDS = tuple(f"device-{letter}" for letter in "hgfedcba")  # not in sorted order
COUNTS = np.arange(10, 18, dtype=np.float32)
PARAMETERS = np.random.default_rng(99).standard_normal(D).astype(np.float32)


def some_updates(seed: int, hostile: int = 0) -> np.ndarray:
    return noisy(seed, n=len(IDS), d=D, hostile=hostile) * np.float32(0.01)


@contextmanager
def direct(rule: Any, optimizer: str = "sgd", learning_rate: float = 1.0, **settings: Any) -> Iterator[Engine]:
    with closing(make_engine("direct", rule, SPECS, optimizer, learning_rate, **settings)) as engine:
        yield engine


OPTIMIZERS = {"sgd": 1.0, "sgdm": 0.5, "adagrad": 0.1, "adam": 0.01, "yogi": 0.01}


@pytest.mark.parametrize(
    ("rule_name", "optimizer"),
    [(rule_name, "sgd") for rule_name in ALL_RULES] + [("mean", "sgdm"), ("multi-krum", "adam"), ("median", "yogi")],
)
def test_both_engines_give_the_same_bits_round_after_round(rule_name: str, optimizer: str, worker: Worker) -> None:
    rule = make_rule(rule_name, ALL_RULES[rule_name])
    with direct(rule, optimizer, OPTIMIZERS[optimizer]) as one:
        other = make_engine("tff", rule, SPECS, optimizer, OPTIMIZERS[optimizer], worker=worker)
        parameters = PARAMETERS
        for seed in range(5):
            by_call = one.step(parameters, some_updates(seed), COUNTS, IDS)
            by_tff = other.step(parameters, some_updates(seed), COUNTS, IDS)
            assert bits(by_call.parameters) == bits(by_tff.parameters)
            assert by_call.verdicts == by_tff.verdicts
            assert by_call.measurements == by_tff.measurements
            parameters = by_call.parameters


def test_adagrad_gives_the_same_but_for_the_last_bit(worker: Worker) -> None:
    """One number in hundreds differs by one unit in the last place: TensorFlow divides by a root in two ways."""
    with direct(make_rule("trimmed-mean", 2), "adagrad", 0.1) as one:
        other = make_engine("tff", make_rule("trimmed-mean", 2), SPECS, "adagrad", 0.1, worker=worker)
        parameters = PARAMETERS
        for seed in range(3):
            by_call = one.step(parameters, some_updates(seed), COUNTS, IDS).parameters
            by_tff = other.step(parameters, some_updates(seed), COUNTS, IDS).parameters
            np.testing.assert_allclose(by_call, by_tff, rtol=1e-6, atol=1e-7)
            parameters = by_call


def test_both_engines_keep_a_rules_memory(worker: Worker) -> None:
    with direct(RunningTotal()) as one:
        other = make_engine("tff", RunningTotal(), SPECS, worker=worker)
        for seed in range(3):
            by_call = one.step(PARAMETERS, some_updates(seed), COUNTS, IDS)
            by_tff = other.step(PARAMETERS, some_updates(seed), COUNTS, IDS)
            np.testing.assert_allclose(by_call.parameters, by_tff.parameters, rtol=1e-6)
            assert by_call.verdicts[0].score == by_tff.verdicts[0].score == seed + 1


@pytest.mark.parametrize("name", ALL_RULES)
def test_sgd_at_learning_rate_one_adds_the_aggregate_exactly(name: str) -> None:
    rule = make_rule(name, ALL_RULES[name])
    updates = some_updates(1)
    aggregate = judge(rule, updates[::-1], COUNTS[::-1]).aggregate  # the ids are in falling order
    with direct(rule) as engine:
        assert bits(engine.step(PARAMETERS, updates, COUNTS, IDS).parameters) == bits(PARAMETERS + aggregate)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_that_are_not_trained_bypass_the_optimizer(optimizer: str) -> None:
    rule = make_rule("median", 2)
    with direct(rule, optimizer, 0.001) as engine:
        result = engine.step(PARAMETERS, some_updates(2), COUNTS, IDS).parameters
    plain = PARAMETERS + judge(rule, some_updates(2)).aggregate
    np.testing.assert_array_equal(result[MOVING_MEAN], plain[MOVING_MEAN])
    assert np.all(result[: MOVING_MEAN.start] != plain[: MOVING_MEAN.start])


@pytest.mark.parametrize("name", ALL_RULES)
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    order = np.random.default_rng(5).permutation(len(IDS))
    rule = make_rule(name, ALL_RULES[name])
    with direct(rule) as engine, direct(rule) as another:
        plain = engine.step(PARAMETERS, some_updates(3, hostile=2), COUNTS, IDS)
        mixed = another.step(PARAMETERS, some_updates(3, hostile=2)[order], COUNTS[order], [IDS[i] for i in order])
    assert bits(plain.parameters) == bits(mixed.parameters)
    assert [plain.verdicts[i] for i in order] == mixed.verdicts


def test_verdicts_come_in_the_order_given_and_say_why() -> None:
    updates = list(some_updates(4, hostile=1))
    updates[2] = updates[2].copy()
    updates[2][0] = np.nan
    with direct(make_rule("multi-krum", 2)) as engine:  # one of the two is refused before the rule
        result = engine.step(PARAMETERS, updates, COUNTS, IDS)
    assert [verdict.device_id for verdict in result.verdicts] == list(IDS)
    hostile, honest, broken = result.verdicts[:3]
    assert (hostile.status, broken.status) == (REJECTED, REJECTED)
    assert hostile.reason.startswith("not among the 6 of 7 kept: Krum score ")
    assert hostile.score is not None
    assert honest.score is not None
    assert hostile.score > 10 * honest.score
    assert honest.status == ACCEPTED
    assert (honest.reason, honest.num_examples) == ("", 11)
    assert honest.update_norm == pytest.approx(float(np.linalg.norm(updates[1])), rel=1e-5)
    assert broken.reason == "update holds 1 values that are not finite (NaN or infinity)"
    assert (broken.score, broken.update_norm) == (None, None)
    assert result.measurements["num_refused_before_rule"] == 1
    assert result.measurements["num_accepted"] == 6
    assert all(isinstance(value, float) for value in result.measurements.values())


def test_the_precondition_counts_what_survives_screening() -> None:
    updates = some_updates(5)
    updates[0, 0] = np.inf
    with direct(make_rule("krum", 2)) as engine:
        engine.step(PARAMETERS, updates[:6], COUNTS[:6], IDS[:6])  # five are left, and krum with f = 1 needs five
        with pytest.raises(RuleError, match=r"n > 2f \+ 2: 4 updates.*device-h: update holds 1 values"):
            engine.step(PARAMETERS, updates[:5], COUNTS[:5], IDS[:5])


def test_a_refused_round_leaves_the_engine_as_it_was() -> None:
    rule = make_rule("median", 2)
    with direct(rule, "adam", 0.01) as engine, direct(rule, "adam", 0.01) as undisturbed:
        first = engine.step(PARAMETERS, some_updates(0), COUNTS, IDS)
        undisturbed.step(PARAMETERS, some_updates(0), COUNTS, IDS)
        with pytest.raises(RuleError):
            engine.step(PARAMETERS, some_updates(1)[:3], COUNTS[:3], IDS[:3])
        second = engine.step(first.parameters, some_updates(2), COUNTS, IDS)
        assert bits(second.parameters) == bits(
            undisturbed.step(first.parameters, some_updates(2), COUNTS, IDS).parameters
        )


def test_a_round_that_would_end_in_infinity_is_refused() -> None:
    with direct(make_rule("mean"), "sgd", 1e38) as engine, pytest.raises(RuleError, match="not finite"):
        engine.step(PARAMETERS, some_updates(0) * np.float32(1e4), COUNTS, IDS)


def test_cohorts_of_changing_size_are_no_trouble() -> None:
    with direct(make_rule("multi-krum", 1)) as engine:
        for n in (5, 8, 6, 7):
            assert len(engine.step(PARAMETERS, some_updates(n)[:n], COUNTS[:n], IDS[:n]).verdicts) == n


def test_parameters_of_the_wrong_shape_are_our_bug() -> None:
    with direct(make_rule("mean")) as engine, pytest.raises(UsageError, match="parameters"):
        engine.step(PARAMETERS[:-1], some_updates(0), COUNTS, IDS)


UNKNOWN = {
    "a misspelt engine": (("direkt", "sgd", 1.0), "did you mean 'direct'"),
    "a misspelt optimizer": (("direct", "adamm", 1.0), "did you mean 'adam'"),
    "a learning rate of zero": (("direct", "sgd", 0.0), "server_learning_rate"),
    "a learning rate that is not a number": (("direct", "sgd", float("nan")), "server_learning_rate"),
}


@pytest.mark.parametrize(("arguments", "hint"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_settings_are_refused_with_a_hint(arguments: tuple[str, str, float], hint: str) -> None:
    engine, optimizer, learning_rate = arguments
    with pytest.raises(ConfigError) as refused:
        make_engine(engine, make_rule("mean"), SPECS, optimizer, learning_rate)
    assert hint in str(refused.value)


def test_an_engine_that_started_its_own_worker_stops_it() -> None:
    engine = make_engine("tff", make_rule("median", 1), SPECS)
    owned = engine._door._worker  # type: ignore[attr-defined]  # the worker is nobody else's business
    assert owned.is_running
    engine.step(PARAMETERS, some_updates(0), COUNTS, IDS)
    engine.close()
    assert not owned.is_running
