"""Rules with trusted data: what they are, in both doors, and what most devices can do to them."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from aggregation_references import bits, judge, losses_around, noisy, trusted_of

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.factory import RuleFactory
from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.kernels.reference import TensorFlowKernels
from covey_coordinator.aggregation.registry import RULES, make_rule
from covey_coordinator.aggregation.rules import TRUSTED_PLACE, UPDATE, Batch, Trusted
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.records import ACCEPTED
from covey_protocol.errors import ConfigError, RuleError, UsageError
from covey_protocol.parameters import ParameterSpec

SPECS = (ParameterSpec("kernel", (7, 300)), ParameterSpec("bias", (300,)))
D = 2400
NAMES = [name for name, kind in RULES.items() if kind.needs_trusted == UPDATE]


def ids(n: int) -> list[str]:
    return [f"device-{number:03d}" for number in range(n)]


def fleet(seed: int, n: int, hostile: int, scale: float = -1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Honest direction (d,), n updates around it of which the first ones are turned round, and a trusted update."""
    random = np.random.default_rng(seed)
    honest = random.standard_normal(D)
    updates = (honest + random.standard_normal((n, D))).astype(np.float32)
    updates[:hostile] *= np.float32(scale)
    return honest, updates, (honest + random.standard_normal(D)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ---- what they compute


def reference(name: str, updates: np.ndarray, trusted: np.ndarray, **settings: Any) -> np.ndarray:
    """In float64, one obvious loop, from the papers."""
    total, aggregate, own = 0.0, np.zeros(updates.shape[1]), trusted.astype(np.float64)
    for row in updates.astype(np.float64):
        length, own_length = np.linalg.norm(row), np.linalg.norm(own)
        if name == "fltrust":
            score = cosine(row, own)
            score = max(score, 0.0) if settings.get("relu", True) else score
            row = row * own_length / length if settings.get("normalise", True) else row
        else:
            row = row * min(1.0, settings.get("length_ratio", 1.0) * own_length / length)
            score = max(float(row @ own), 0.0)
        aggregate, total = aggregate + score * row, total + score
    return aggregate / total


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fltrust", {}),
        ("fltrust", {"relu": False}),
        ("fltrust", {"normalise": False}),
        ("trusted-alignment", {}),
        ("trusted-alignment", {"length_ratio": 3.0}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_aggregate_is_that_of_the_paper(name: str, settings: dict[str, Any], seed: int) -> None:
    _, updates, trusted = fleet(seed, n=11, hostile=3, scale=-0.7)
    updates[4:7] *= np.float32(20.0)
    found = judge(make_rule(name, **settings), updates, trusted=trusted)
    np.testing.assert_allclose(found.aggregate, reference(name, updates, trusted, **settings), rtol=1e-4, atol=1e-5)


def test_the_rules_with_trusted_data_differ_from_each_other() -> None:
    _, updates, trusted = fleet(0, n=9, hostile=2)
    updates[5] *= np.float32(0.1)
    found = [judge(make_rule(name), updates, trusted=trusted).aggregate for name in NAMES]
    assert all(not np.allclose(a, b, rtol=1e-2) for place, a in enumerate(found) for b in found[:place])


def test_trusted_only_is_the_trusted_update_and_accepts_nobody() -> None:
    _, updates, trusted = fleet(1, n=6, hostile=5)
    found = judge(make_rule("trusted-only"), updates, trusted=trusted)
    assert bits(found.aggregate) == bits(trusted)
    assert not found.accepted.any()


@pytest.mark.parametrize("name", ["fltrust", "trusted-alignment"])
def test_without_any_device_that_agrees_the_model_stands_still(name: str) -> None:
    _, updates, trusted = fleet(2, n=8, hostile=8)
    found = judge(make_rule(name), updates, trusted=trusted)
    assert not found.aggregate.any()
    assert not found.accepted.any()
    assert np.isfinite(found.scores).all()


# ---- what hostile devices can do


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [-1.0, -1e3, -1e12])
def test_nine_in_ten_devices_that_turn_their_updates_round_do_no_harm_where_a_mean_fails(
    name: str, scale: float
) -> None:
    honest, updates, trusted = fleet(3, n=20, hostile=18, scale=scale)
    found = judge(make_rule(name), updates, trusted=trusted)
    assert cosine(found.aggregate, honest) > 0.6
    assert found.accepted[:18].sum() == 0
    assert cosine(judge(make_rule("mean"), updates).aggregate, honest) < -0.6


@pytest.mark.parametrize("name", NAMES)
def test_no_device_makes_the_aggregate_longer_than_the_trusted_update(name: str) -> None:
    """Also none whose update points the right way and is huge."""
    _, updates, trusted = fleet(4, n=10, hostile=9, scale=1e9)
    found = judge(make_rule(name), updates, trusted=trusted)
    assert np.linalg.norm(found.aggregate) <= np.linalg.norm(trusted) * 1.0001


def test_the_ablations_show_what_each_part_is_for() -> None:
    honest, updates, trusted = fleet(5, n=10, hostile=4, scale=-1.0)
    assert cosine(judge(make_rule("fltrust", relu=False), updates, trusted=trusted).aggregate, honest) < 0.99
    updates[:4] *= np.float32(-1e6)  # the right way, and huge
    huge = judge(make_rule("fltrust", normalise=False), updates, trusted=trusted)
    assert np.linalg.norm(huge.aggregate) > 1e4 * np.linalg.norm(trusted)


# ---- in an engine, through both doors


@pytest.mark.parametrize(
    "name", ["fltrust", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "fltrust")]
)
def test_both_doors_give_the_same_bits_and_name_no_trusted_row(name: str, worker: Worker) -> None:
    rule = make_rule(name, 3, before=["norm-clipping"] if name == "fltrust" else [])
    with (
        closing(make_engine("direct", rule, SPECS)) as one,
        closing(make_engine("tff", rule, SPECS, worker=worker)) as other,
    ):
        parameters = np.zeros(D, np.float32)
        for seed, n in enumerate((1, 8)):
            _, updates, trusted = fleet(seed, n=n, hostile=n // 2, scale=-50.0)
            given = (updates, np.arange(1, n + 1), ids(n), Trusted(trusted))
            direct, through_tff = one.step(parameters, *given), other.step(parameters, *given)
            assert bits(direct.aggregate) == bits(through_tff.aggregate)
            assert direct.verdicts == through_tff.verdicts
            assert direct.measurements == through_tff.measurements
            assert [verdict.device_id for verdict in direct.verdicts] == ids(n)
            parameters = direct.parameters
        assert one.saved_state() == other.saved_state()


@pytest.mark.usefixtures("on_worker")
@pytest.mark.parametrize(
    "name", ["lfr-err", pytest.param("lfr", marks=pytest.mark.slow), pytest.param("err", marks=pytest.mark.slow)]
)
def test_rules_that_need_losses_have_the_same_bits_in_tff(name: str) -> None:
    """The model that the losses are of is the row of the coordinator's own."""
    rule, d = make_rule(name, 2), 700
    updates = noisy(9, n=8, d=d, hostile=2, size=5.0)
    model, best = np.ones(d, np.float32), trusted_of(updates)

    def losses() -> Any:
        return lambda models: losses_around(TensorFlowKernels(), tf.constant(best))(models - tf.constant(model))

    process = RuleFactory(rule, losses=losses).create(
        tff.TensorType(np.float32, [d]), tff.types.to_type((np.float32, np.int64))
    )
    weights = [*((1.0, place) for place in range(8)), (1.0, TRUSTED_PLACE)]
    output = process.next(process.initialize(), [*updates, model], weights)
    k = NumpyKernels()
    batch = Batch(Updates(updates), np.ones(8, np.float32), np.arange(8))
    own = batch._replace(losses=lambda rows: losses_around(k, best)((model + rows) - model))
    expected = rule.step(k, own)
    assert bits(output.result) == bits(expected.aggregate)
    assert bits(output.measurements["scores"]) == bits(expected.scores)
    assert bits(output.measurements["accepted"]) == bits(expected.accepted)
    assert not expected.accepted[:2].any()


def test_rejections_leave_out_whoever_does_harm_and_two_that_mask_each_other_pass() -> None:
    honest = noisy(10, n=9, d=50, spread=0.1)
    one = np.concatenate([honest[:1] * np.float32(-30), honest])
    for name in ("lfr", "err", "lfr-err"):
        assert not judge(make_rule(name, 1), one, trusted=trusted_of(honest)).accepted[0]
    direction = np.zeros(50, np.float32)
    direction[0] = 1e20
    pair = np.concatenate([direction[None], -direction[None], honest])
    for name in ("lfr", "err"):
        assert judge(make_rule(name, 1), pair, trusted=trusted_of(honest)).accepted[:2].any()


def test_rejections_are_those_of_the_paper() -> None:
    """With one obvious loop in float64: models with and without each update."""
    updates = noisy(11, n=9, d=40, hostile=2, size=3.0)
    counts = np.array([5, 1, 4, 2, 2, 3, 9, 1, 1], np.float32)
    best = trusted_of(updates[2:])

    def loss(rows: list[int]) -> float:
        aggregate = np.average(updates[rows].astype(np.float64), axis=0, weights=counts[rows])
        return float(np.sum((aggregate - best) ** 2))

    everyone = list(range(9))
    harm = [loss(everyone) - loss([row for row in everyone if row != one]) for one in everyone]
    kept = sorted(sorted(everyone, key=lambda row: harm[row])[:7])
    found = judge(make_rule("lfr", 2), updates, counts, trusted=best)
    assert list(np.flatnonzero(found.accepted)) == kept
    np.testing.assert_allclose(found.scores, harm, rtol=1e-4, atol=1e-4)
    expected = np.average(updates[kept].astype(np.float64), axis=0, weights=counts[kept])
    np.testing.assert_allclose(found.aggregate, expected, rtol=1e-5, atol=1e-6)


def test_losses_are_not_asked_for_on_tffs_worker_in_live_rounds() -> None:
    with pytest.raises(ConfigError, match="lfr in the engine 'tff'"):
        make_engine("tff", make_rule("lfr"), SPECS)


def test_the_trusted_update_is_no_copy_of_a_devices_and_nobody_of_f() -> None:
    with closing(make_engine("direct", make_rule("fltrust", 2), SPECS)) as engine:
        _, updates, trusted = fleet(6, n=4, hostile=0)
        updates[0] = trusted
        found = engine.step(np.zeros(D, np.float32), updates, np.ones(4), ids(4), Trusted(trusted))
        assert [verdict.status for verdict in found.verdicts] == [ACCEPTED] * 4
        assert found.measurements["num_byzantine_left"] == 2
        assert found.measurements["num_updates"] == 4


@pytest.mark.parametrize("fault", ["zeros", "nan", "shape"])
def test_a_trusted_update_that_no_device_could_send_refuses_the_round_and_names_its_table(fault: str) -> None:
    bad = {"zeros": np.zeros(D, np.float32), "nan": np.full(D, np.nan, np.float32), "shape": np.ones(3, np.float32)}
    with closing(make_engine("direct", make_rule("fltrust"), SPECS)) as engine:
        _, updates, _ = fleet(7, n=3, hostile=0)
        with pytest.raises(RuleError, match=r"coordinator's own update.*\[trusted\]"):
            engine.step(np.zeros(D, np.float32), updates, np.ones(3), ids(3), Trusted(bad[fault]))
        with pytest.raises(UsageError, match="fltrust was given no update"):
            engine.step(np.zeros(D, np.float32), updates, np.ones(3), ids(3))


def test_a_rule_that_needs_no_trusted_data_does_not_see_them() -> None:
    with closing(make_engine("direct", make_rule("median", 1), SPECS)) as engine:
        updates = noisy(8, n=5, d=D)
        given = (np.zeros(D, np.float32), updates, np.ones(5), ids(5))
        with_it, without = engine.step(*given, Trusted(np.ones(D, np.float32))), engine.step(*given)
        assert bits(with_it.aggregate) == bits(without.aggregate)


def test_no_device_has_the_place_of_the_trusted_row() -> None:
    assert TRUSTED_PLACE < -1  # -1 is a client without a place, devices count from 0


def test_a_length_ratio_that_is_no_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="length_ratio"):
        make_rule("trusted-alignment", length_ratio=0.0)
