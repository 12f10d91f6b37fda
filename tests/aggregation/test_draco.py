"""The repetition code: whatever the liars send, the aggregate has the bits of a fleet without them."""

from __future__ import annotations

import itertools
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from aggregation_references import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.aggregation.draco import Draco
from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.factory import traced
from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import make_rule, rule_from_table
from covey_coordinator.aggregation.rules import Batch, Judgement, Rule, least_devices
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.records import ACCEPTED
from covey_protocol.errors import ConfigError, RuleError, UsageError
from covey_protocol.parameters import ParameterSpec

LIES = {
    "a reversed gradient": lambda row, draw: -100 * row,
    "a constant": lambda row, draw: np.full_like(row, -100),
    "one bit of one number": lambda row, draw: flipped(row, int(draw.integers(len(row)))),
    "the sign of a zero": lambda row, draw: np.where(np.arange(len(row)) == 0, -row, row),
    "the smallest number there is": lambda row, draw: row + (np.arange(len(row)) == 0) * np.float32(1e-45),
    "noise": lambda row, draw: row + draw.standard_normal(len(row)).astype(np.float32),
    "nothing like it": lambda row, draw: (1e30 * draw.standard_normal(len(row))).astype(np.float32),
}


def flipped(row: np.ndarray, at: int) -> np.ndarray:
    changed = row.copy()
    changed.view(np.int32)[at] ^= 1
    return changed


def replicated(seed: int, groups: int, size: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) updates and (n,) examples; every group's rows are equal, and have a 0 in front."""
    draw = np.random.default_rng(seed)
    shards = draw.standard_normal((groups, d)).astype(np.float32)
    shards[:, 0] = 0.0
    return np.repeat(shards, size, axis=0), np.repeat(draw.integers(1, 500, groups), size).astype(np.float32)


def judge(rule: Rule, updates: np.ndarray, examples: np.ndarray, places: Any = None) -> Judgement:
    places = np.arange(len(updates)) if places is None else np.asarray(places)
    with np.errstate(all="ignore"):
        batch = Batch(Updates(np.ascontiguousarray(updates)), examples, places)
        return rule.advance(NumpyKernels(), rule.initial_state(updates.shape[1]), batch)[1]


def judge_in_tensorflow(rule: Rule, updates: np.ndarray, examples: np.ndarray) -> Judgement:
    rows = tf.constant(updates), tf.constant(examples), tf.range(len(updates), dtype=tf.int64)
    state = tf.nest.map_structure(tf.constant, rule.initial_state(updates.shape[1]))
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), traced(rule)(state, *rows)[1])


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("s", [1, 2, 3])
def test_any_s_liars_of_every_group_change_no_bit(lie: str, s: int) -> None:
    size, groups = 2 * s + 1, 4
    updates, examples = replicated(s, groups, size, 300)
    rule, honest = make_rule("draco", s), judge(make_rule("draco", s), updates, examples).aggregate
    for liars in itertools.islice(itertools.combinations(range(size), s), 12):
        draw = np.random.default_rng(liars)
        rows, hostile = updates.copy(), [g * size + liar for g in range(groups) for liar in liars]
        for row in hostile:
            rows[row] = LIES[lie](rows[row], draw)
        found = judge(rule, rows, examples)
        assert bits(found.aggregate) == bits(honest)
        assert list(np.flatnonzero(~found.accepted)) == hostile
        assert (found.scores[hostile] > 0).all()
        assert float(found.measurements["num_outvoted"]) == len(hostile)


def test_the_aggregate_is_the_mean_of_the_groups_weighted_by_examples() -> None:
    updates, examples = replicated(0, 5, 3, 200)
    found = judge(make_rule("draco", 1), updates, examples)
    expected = np.average(updates[::3].astype(np.float64), axis=0, weights=examples[::3])
    np.testing.assert_allclose(found.aggregate, expected, rtol=1e-6)
    assert found.accepted.all()
    assert not found.scores.any()


def test_liars_that_agree_with_each_other_are_outvoted_also_where_they_come_first() -> None:
    updates, examples = replicated(1, 2, 5, 64)
    rows = updates.copy()
    rows[[0, 1]] = rows[[5, 6]] = 7.0
    found = judge(make_rule("draco", 2), rows, examples)
    assert bits(found.aggregate) == bits(judge(make_rule("draco", 2), updates, examples).aggregate)
    assert list(np.flatnonzero(~found.accepted)) == [0, 1, 5, 6]


def test_a_copy_of_another_groups_update_loses_the_vote_of_its_own() -> None:
    updates, examples = replicated(2, 3, 3, 64)
    rows = updates.copy()
    rows[0] = rows[4]
    found = judge(make_rule("draco", 1), rows, examples)
    assert bits(found.aggregate) == bits(judge(make_rule("draco", 1), updates, examples).aggregate)
    assert list(np.flatnonzero(~found.accepted)) == [0]


def test_a_liar_about_its_number_of_examples_is_outvoted_though_its_update_is_right() -> None:
    updates, examples = replicated(3, 3, 3, 64)
    claimed = examples.copy()
    claimed[3] = 1e6
    rule = make_rule("draco", 1)
    found = judge(rule, updates, claimed)
    assert bits(found.aggregate) == bits(judge(rule, updates, examples).aggregate)
    assert list(np.flatnonzero(~found.accepted)) == [3]
    assert "another number of examples" in rule.explain(float(found.scores[3]), found.scores[found.accepted], 9)


def test_a_group_with_too_few_equal_updates_fails_the_round_by_name() -> None:
    updates, examples = replicated(4, 2, 3, 64)
    rule = make_rule("draco", 1, groups=[["a", "b", "c"], ["d", "e", "f"]]).for_fleet(list("abcdef"))
    rows = updates.copy()
    rows[3], rows[4] = 1.0, 2.0
    with pytest.raises(RuleError, match="the group d, e, f needs at least 2 equal updates"):
        judge(rule, rows, examples)
    with pytest.raises(RuleError, match="the group a, b, c"):
        judge(rule, updates[2:], examples[2:], [2, 3, 4, 5])  # one of its devices is no proof
    with pytest.raises(RuleError, match="every group of 3"):
        judge(make_rule("draco", 1), rows, examples)


def test_devices_that_are_missing_take_no_bit_away_while_s_and_one_are_there() -> None:
    updates, examples = replicated(5, 3, 5, 64)
    rule = make_rule("draco", 2).for_fleet([f"device-{number:02}" for number in range(15)])
    there = [0, 2, 4, 5, 6, 7, 8, 9, 11, 12, 14]
    rows = updates[there]
    rows[[3, 5]] += 1
    found = judge(rule, rows, examples[there], there)
    assert bits(found.aggregate) == bits(judge(rule, updates, examples).aggregate)
    assert list(np.flatnonzero(~found.accepted)) == [3, 5]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 2), st.integers(1, 90))
def test_the_order_of_rows_changes_no_bit_and_no_verdict(seed: int, groups: int, s: int, d: int) -> None:
    draw, size = np.random.default_rng(seed), 2 * s + 1
    updates, examples = replicated(seed, groups, size, d)
    for group in range(groups):
        liars = group * size + draw.permutation(size)[: draw.integers(s + 1)]
        updates[liars] += draw.standard_normal((len(liars), d)).astype(np.float32)
    order = draw.permutation(groups * size)
    plain = judge(make_rule("draco", s), updates, examples)
    mixed = judge(make_rule("draco", s), updates[order], examples[order], order)
    assert bits(mixed.aggregate) == bits(plain.aggregate)
    np.testing.assert_array_equal(mixed.accepted, plain.accepted[order])
    assert bits(mixed.scores) == bits(plain.scores[order])


def test_named_groups_lie_anywhere_in_the_fleet() -> None:
    updates, examples = replicated(6, 2, 3, 50)
    fleet = list("abcdef")
    rule = make_rule("draco", 1, groups=[["f", "a", "d"], ["b", "e", "c"]]).for_fleet(fleet)
    at = [fleet.index(name) for name in "fadbec"]
    rows, counts = np.empty_like(updates), np.empty_like(examples)
    rows[at], counts[at] = updates, examples
    rows[fleet.index("e")] *= 2
    found = judge(rule, rows, counts)
    assert bits(found.aggregate) == bits(judge(make_rule("draco", 1), updates, examples).aggregate)
    assert list(np.flatnonzero(~found.accepted)) == [4]


def test_a_device_of_no_group_has_no_vote() -> None:
    updates, examples = replicated(7, 1, 3, 50)
    rule = make_rule("draco", 1).for_fleet(list("abc"))
    rows = np.concatenate([np.full((1, 50), 3.0, np.float32), updates])
    found = judge(rule, rows, np.append(np.float32(9), examples), [3, 0, 1, 2])
    assert bits(found.aggregate) == bits(updates[0])
    assert list(found.accepted) == [False, True, True, True]
    assert found.scores[0] == np.float32(FLOAT32_MAX)
    assert "no group" in rule.explain(float(found.scores[0]), found.scores[1:], 4)


def test_a_tolerance_lets_rounding_pass_and_bounds_what_a_liar_can_do() -> None:
    updates, examples = replicated(8, 2, 3, 400)
    noise = np.random.default_rng(8).uniform(-1e-6, 1e-6, updates.shape).astype(np.float32)
    rows = updates + noise
    rows[0] += 1e-3
    with pytest.raises(RuleError, match="needs at least 2 equal updates"):
        judge(make_rule("draco", 1), rows, examples)
    found = judge(make_rule("draco", 1, tolerance=3e-6), rows, examples)
    assert list(np.flatnonzero(~found.accepted)) == [0]
    np.testing.assert_allclose(
        found.aggregate, judge(make_rule("draco", 1), updates, examples).aggregate, rtol=0, atol=2e-6
    )


# ---- both doors

SHARDED = {
    "liars in front": ([0, 4], "a reversed gradient"),
    "one bit": ([2, 8], "one bit of one number"),
    "subnormal numbers": ([1, 6], "the smallest number there is"),
}


@pytest.mark.slow  # a trace takes seconds; the engine below is the everyday test of the doors
@pytest.mark.parametrize("case", SHARDED)
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_the_reference_kernels_give_the_same_bits(case: str, tolerance: float) -> None:
    liars, lie = SHARDED[case]
    updates, examples = replicated(9, 3, 3, 4099)
    draw = np.random.default_rng(0)
    for row in liars:
        updates[row] = LIES[lie](updates[row], draw)
    rule = make_rule("draco", 1, tolerance=tolerance, before=["norm-clipping"]).for_fleet(
        [f"device-{number}" for number in range(9)]
    )
    found, expected = judge_in_tensorflow(rule, updates, examples), judge(rule, updates, examples)
    assert bits(found.aggregate) == bits(expected.aggregate)
    assert bits(found.scores) == bits(expected.scores)
    assert bits(found.accepted) == bits(expected.accepted)


SPECS = (ParameterSpec("kernel", (3, 3)), ParameterSpec("bias", (3,)))
IDS = [f"gateway-{number}" for number in range(6)]


@pytest.mark.parametrize("door", ["direct", "tff"])
def test_an_engine_keeps_equal_updates_and_outvotes_who_sends_nan(door: str, worker: Worker) -> None:
    """Replicas are no copies, and a device that screening refuses lowers nobody's need of votes."""
    updates, examples = replicated(10, 2, 3, 12)
    parameters = np.linspace(-1, 1, 12).astype(np.float32)
    rule = make_rule("draco", 1).for_fleet(IDS)
    with closing(make_engine(door, rule, SPECS, worker=worker, device_ids=IDS)) as engine:
        clean = engine.step(parameters, updates, examples, IDS)
        rows = updates.copy()
        rows[1], rows[3] = np.nan, -rows[3]
        found = engine.step(parameters, rows, examples, IDS)
        assert bits(found.parameters) == bits(clean.parameters)
        assert [v.device_id for v in found.verdicts if v.status != ACCEPTED] == ["gateway-1", "gateway-3"]
        assert "majority of its group" in found.verdicts[3].reason
        assert found.measurements["num_byzantine_left"] == 1.0
        rows[4] = 2.0
        with pytest.raises(RuleError, match="the group gateway-3, gateway-4, gateway-5 needs at least 2 equal"):
            engine.step(parameters, rows, examples, IDS)


# ---- settings

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "groups and a size": ({"groups": [["a"]], "group_size": 3}, "group_size = 3"),
    "a device in two groups": ({"groups": [["a", "b"], ["b"]]}, "'b' is in its groups twice"),
    "a negative tolerance": ({"tolerance": -1.0}, "tolerance = -1.0"),
    "a group that is no list": ({"groups": "abc"}, "groups = 'abc'"),
    "a step that mixes devices": ({"before": ["nnm"]}, "nnm mixes them with others"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_make_no_sense_are_refused_by_name(case: str) -> None:
    table, told = REFUSED[case]
    with pytest.raises(ConfigError, match=told):
        rule_from_table({"rule": "draco", "num_byzantine": 1, **table})


FLEETS: dict[str, tuple[dict[str, Any], str]] = {
    "a group of a stranger": ({"groups": [["a", "b", "x"]]}, "'x', which is not in the fleet"),
    "a device without a group": ({"groups": [["a", "b", "c"]]}, "'d' is in no group"),
    "a size that does not divide the fleet": ({"group_size": 3}, "4 devices are not groups of group_size = 3"),
}


@pytest.mark.parametrize("case", FLEETS)
def test_groups_that_are_not_the_fleet_are_refused_by_name(case: str) -> None:
    table, told = FLEETS[case]
    rule = rule_from_table({"rule": "draco", "num_byzantine": 1, **table})
    with pytest.raises(ConfigError, match=told):
        rule.for_fleet(list("abcd"))


def test_groups_too_small_for_the_liars_are_refused() -> None:
    with pytest.raises(RuleError, match="needs 2f \\+ 1 devices in a group: 3 do not bear num_byzantine = 2"):
        make_rule("draco", 2, group_size=3).check(30)
    rule = make_rule("draco", 1, groups=[["a", "b", "c"], ["d", "e", "f"]])
    assert least_devices(rule.for_fleet(list("abcdef"))) == 4
    updates, examples = replicated(0, 2, 3, 4)
    with pytest.raises(UsageError, match="for_fleet"):
        judge(rule, updates, examples)


def test_a_rule_of_the_registry_is_draco() -> None:
    assert isinstance(make_rule("draco", 1), Draco)
