"""The engines of Federated SVRG and SCAFFOLD: what one exchange leaves for the next, who lies, what a restart knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.screening import Arrivals, shares_fault
from covey_coordinator.algorithms.engines import asked_by
from covey_coordinator.algorithms.making import make_algorithm_engine
from covey_coordinator.algorithms.settings import Algorithm
from covey_coordinator.records import REJECTED
from covey_protocol.errors import ConfigError, RuleError
from covey_protocol.parameters import ParameterSpec

D = 6
SPECS = [ParameterSpec("w", (D,))]
W = np.linspace(-1, 1, D, dtype=np.float32)
IDS = "abcde"


def engine(algorithm: Algorithm, rule: str = "mean", f: int = 0, **changes: Any) -> Any:
    options: dict[str, Any] = {"rate": 0.1, "devices": 10, **changes}
    return make_algorithm_engine(algorithm, "direct", make_rule(rule, f), SPECS, **options)


def screened(rows: Any, counts: Any = (1, 2, 3, 4, 5), shares: bool = False) -> Any:
    arrivals = Arrivals(IDS[: len(rows)], D, shares_fault if shares else None)
    for device_id, row, count in zip(IDS, rows, counts):
        arrivals.add(device_id, np.asarray(row, np.float32), count)
    return arrivals.screened(IDS[: len(rows)], refuse_copies=not shares)


def rows(seed: int, n: int = 5) -> Any:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)


SHARES = np.array([[1, 0.5, 0, 0, 0.25, 1]] * 4 + [[1, 0.5, 0, 0.75, 0.25, 1]])


def test_three_exchanges_make_a_step_and_then_two() -> None:
    made, w = engine(Algorithm("fsvrg")), W
    assert asked_by(made) == ("features", ())
    result = made.aggregate(w, screened(SHARES, shares=True))
    assert_array_equal(result.parameters, w)
    assert asked_by(made) == ("gradient", ())
    gradients, weights = rows(1), np.arange(1, 6) / 15
    result = made.aggregate(w, screened(gradients))
    assert_array_equal(result.parameters, w)
    work, (full, shares) = asked_by(made)
    assert work == "svrg"
    assert_allclose(full, weights @ gradients, rtol=1e-5, atol=1e-6)
    assert_allclose(shares, weights @ SHARES, rtol=1e-6)
    updates = rows(2)
    result = made.aggregate(w, screened(updates))
    boost = [1, 1, 1, 5, 1, 1]  # the fourth feature is on one of five devices, the third on none
    assert_allclose(result.parameters, w + boost * (weights @ updates), rtol=1e-5, atol=1e-6)
    assert asked_by(made) == ("gradient", ())


def test_the_naive_form_counts_every_device_the_same_in_the_local_exchange_alone() -> None:
    made = engine(Algorithm("fsvrg-naive", steps=3), server_learning_rate=0.5)
    gradients, updates = rows(1), rows(2)
    made.aggregate(W, screened(gradients))
    assert_allclose(made.vectors[0], np.arange(1, 6) / 15 @ gradients, rtol=1e-5, atol=1e-6)
    result = made.aggregate(W, screened(updates))
    assert_allclose(result.parameters, W + 0.5 * updates.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_rule_bears_liars_in_every_exchange() -> None:
    lies = {"huge": np.full(D, 1e6), "all of it": np.ones(D), "not finite": np.full(D, np.nan), "negative": -np.ones(D)}
    for name, lie in lies.items():
        made = engine(Algorithm("fsvrg"), "median", 1)
        told = SHARES.copy()
        told[4] = lie
        result = made.aggregate(W, screened(told, shares=True))
        refused = [verdict.device_id for verdict in result.verdicts if verdict.status == REJECTED]
        assert refused == ([] if name == "all of it" else ["e"])
        gradients = rows(1)
        gradients[4] = lie
        made.aggregate(W, screened(gradients))
        full, shares = made.vectors
        assert_allclose(shares, SHARES[0], rtol=1e-6)
        honest = gradients[:4]
        assert (full >= honest.min(axis=0)).all()
        assert (full <= honest.max(axis=0)).all()


def test_too_few_devices_for_the_rule_leave_everything_as_it_was() -> None:
    made = engine(Algorithm("fsvrg"), "median", 2)
    before = made.saved_state()
    with pytest.raises(RuleError):
        made.aggregate(W, screened(SHARES[:4], shares=True))
    assert made.saved_state() == before


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_restart_between_any_two_exchanges_changes_no_bit(done: int) -> None:
    exchanges = [screened(SHARES, shares=True), *(screened(rows(seed)) for seed in range(4))]
    through, first, w, v = engine(Algorithm("fsvrg"), "median", 1), engine(Algorithm("fsvrg"), "median", 1), W, W
    for one in exchanges:
        w = through.aggregate(w, one).parameters
    for one in exchanges[:done]:
        v = first.aggregate(v, one).parameters
    second = engine(Algorithm("fsvrg"), "median", 1)
    assert second.load_state(first.saved_state())
    assert second.work == first.work
    for one in exchanges[done:]:
        v = second.aggregate(v, one).parameters
    assert v.tobytes() == w.tobytes()
    assert second.saved_state() == through.saved_state()


def test_a_state_of_another_algorithm_is_not_taken() -> None:
    made = engine(Algorithm("scaffold", steps=4))
    made.aggregate(W, screened(rows(0)))
    before = made.saved_state()
    plain = make_engine("direct", make_rule("mean"), SPECS)
    for state in (plain.saved_state(), engine(Algorithm("scaffold", steps=5)).saved_state()):
        assert not made.load_state(state)
    assert made.saved_state() == before
    assert not engine(Algorithm("fsvrg")).load_state(before)


def test_scaffolds_control_moves_by_what_the_rule_used() -> None:
    made = engine(Algorithm("scaffold", steps=4))
    updates = rows(3)
    result = made.aggregate(W, screened(updates))
    assert_allclose(result.parameters, W + updates.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert_allclose(made.vectors[0], 0.5 * -updates.mean(axis=0) / (4 * 0.1), rtol=1e-5, atol=1e-6)  # 5 of 10 devices


def test_numbers_that_are_not_finite_are_refused() -> None:
    made = engine(Algorithm("fsvrg", feature_scaling=False), server_learning_rate=1e38)
    made.aggregate(W, screened(rows(0)))
    before = made.saved_state()
    with pytest.raises(RuleError, match="not finite"):
        made.aggregate(W, screened(rows(1) * 1e6))
    assert made.saved_state() == before


def test_exchanges_are_counted() -> None:
    scaled, plain, naive = Algorithm("fsvrg"), Algorithm("fsvrg", feature_scaling=False), Algorithm("fedavg")
    assert (scaled.exchanges(30), plain.exchanges(30), naive.exchanges(30)) == (61, 60, 30)
    assert [number for number in range(1, 8) if scaled.moves(number)] == [3, 5, 7]
    assert [number for number in range(1, 8) if plain.moves(number)] == [2, 4, 6]
    assert [scaled.rounds(number) for number in range(8)] == [0, 0, 0, 1, 1, 2, 2, 3]


def test_an_adaptive_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="sgd"):
        engine(Algorithm("fsvrg"), server_optimizer="adam")
