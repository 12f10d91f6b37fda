"""Devices that screening refuses count against num_byzantine, so they cannot starve rounds (docs/adr/0014)."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from aggregation_references import bits, losses_around, noisy
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator.aggregation.engines import StepResult, make_engine
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.registry import PRE_STEPS, make_rule
from covey_coordinator.aggregation.registry import RULES as REGISTERED
from covey_coordinator.aggregation.rules import Rule, Trusted, least_devices
from covey_coordinator.aggregation.screening import Arrivals, screen_updates
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.attacks.attacked import Attacked
from covey_coordinator.attacks.registry import make_attack
from covey_coordinator.records import REJECTED, DeviceVerdict
from covey_protocol.errors import RuleError
from covey_protocol.parameters import ParameterSpec

D = 12
SPECS = (ParameterSpec("kernel", (3, 3)), ParameterSpec("bias", (3,)))
PARAMETERS = np.linspace(-1, 1, D).astype(np.float32)
WITH_MEMORY: dict[str, dict[str, Any]] = {
    "centred-clipping": {},
    "foolsgold": {"history_devices": 20},
    "dnc": {"num_columns": 5},
    "flame": {"noise": 0.1},
    "median": {"before": ["norm-clipping"]},
}
EVERY_DAY = ("centred-clipping", "foolsgold")  # tracing for TFF takes seconds per rule and f
RULES: dict[str, dict[str, Any]] = {
    **{
        name: {"name": name, **WITH_MEMORY.get(name, {})}
        for name, kind in REGISTERED.items()
        if not kind.expects_copies  # no refused device lowers what such a rule needs: test_draco.py
    },
    "median": {"name": "median"},
    **{f"{step}+multi-krum": {"name": "multi-krum", "before": [step]} for step in PRE_STEPS},
    "multi-krum of 2": {"name": "multi-krum", "num_selected": 2},
    "dnc, twice": {"name": "dnc", "repeats": 2},
}


def rule_of(label: str, f: int) -> Rule:
    return make_rule(num_byzantine=f, **RULES[label])


FAULTS = {
    "not a number": (np.full(D, np.nan, np.float32), 10.0),
    "infinite": (np.full(D, -np.inf, np.float32), 10.0),
    "too large to square": (np.full(D, 1e30, np.float32), 10.0),
    "too long": (np.ones(D + 1, np.float32), 10.0),
    "double precision": (np.ones(D), 10.0),
    "no array": (None, 10.0),
    "all zeros": (np.zeros(D, np.float32), 10.0),
    "no examples": (np.ones(D, np.float32), 0.0),
    "more examples than numbers": (np.ones(D, np.float32), float("inf")),
}
faults = st.sampled_from(list(FAULTS))


def names(count: int, kind: str) -> list[str]:
    return [f"{kind}-{number:02}" for number in range(count)]


def stepped(rule: Rule, updates: list[Any], counts: list[float], ids: list[str], door: str = "direct") -> StepResult:
    own = PARAMETERS[::-1].copy()
    trusted = Trusted(own, losses_around(NumpyKernels(), own))
    with closing(make_engine(door, rule, SPECS)) as engine:
        return engine.step(PARAMETERS, updates, counts, ids, trusted)


def by_id(result: StepResult) -> list[DeviceVerdict]:
    return sorted(result.verdicts, key=lambda verdict: verdict.device_id)


@pytest.mark.parametrize("label", RULES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(0, 3), st.data())
def test_refused_devices_leave_what_a_rule_with_a_lower_f_gives_on_the_others(
    label: str, f: int, spare: int, data: st.DataObject
) -> None:
    try:
        n = least_devices(rule_of(label, f)) + spare
    except RuleError:
        f, n = 0, least_devices(rule_of(label, 0)) + spare  # a rule that bears nobody
    n = max(n, f + 1)  # rules with trusted data bear any share, but somebody has to be left
    n += label == "foolsgold"  # it compares devices, and with one left there is none to compare
    sent = data.draw(st.lists(faults, min_size=0, max_size=f))
    honest = list(noisy(n + f, n - len(sent), D))
    good, bad = names(len(honest), "good"), names(len(sent), "bad")
    rows = [FAULTS[fault] for fault in sent]
    order = np.random.default_rng(n).permutation(n)

    together = [*honest, *(update for update, _ in rows)], [10.0] * len(honest) + [count for _, count in rows]
    found = stepped(rule_of(label, f), *([part[i] for i in order] for part in (*together, [*good, *bad])))
    alone = stepped(rule_of(label, f - len(sent)), honest, [10.0] * len(honest), good)

    assert bits(found.parameters) == bits(alone.parameters)
    assert [v for v in by_id(found) if v.device_id in good] == by_id(alone)
    assert {v.device_id for v in found.verdicts if v.status == REJECTED} >= set(bad)
    assert found.measurements["num_byzantine"] == f
    assert found.measurements["num_byzantine_left"] == f - len(sent)


@pytest.mark.parametrize(
    "label", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in WITH_MEMORY]
)
def test_both_engines_keep_their_memory_while_f_goes_down_and_up(label: str, worker: Worker) -> None:
    rule = make_rule(label, 2, **WITH_MEMORY[label])
    n = least_devices(rule) + 2
    ids = names(n, "device")
    with closing(make_engine("direct", rule, SPECS)) as one:
        other = make_engine("tff", rule, SPECS, worker=worker)
        parameters = PARAMETERS
        for number, broken in enumerate([0, 2, 1, 2, 0]):
            updates = noisy(number, n, D)
            updates[:broken] = np.nan
            by_call = one.step(parameters, updates, [10.0] * n, ids)
            by_tff = other.step(parameters, updates, [10.0] * n, ids)
            assert by_call.measurements["num_byzantine_left"] == 2 - broken
            assert bits(by_call.parameters) == bits(by_tff.parameters)
            assert (by_call.verdicts, by_call.measurements) == (by_tff.verdicts, by_tff.measurements)
            parameters = by_call.parameters


def test_the_tff_engine_traces_a_rule_once_for_each_f_that_comes_up(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from covey_coordinator.aggregation import engines

    built: list[int] = []
    build = engines._build_aggregation
    monkeypatch.setattr(
        engines, "_build_aggregation", lambda rule, specs: built.append(rule.num_byzantine) or build(rule, specs)
    )
    engine = make_engine("tff", make_rule("multi-krum", 2), SPECS, worker=worker)
    for broken in (0, 1, 0, 1, 1):
        updates = noisy(broken, 7, D)
        updates[:broken] = np.inf
        engine.step(PARAMETERS, updates, [10.0] * 7, names(7, "device"))
    assert built == [2, 1]


@pytest.mark.parametrize("label", RULES)
def test_a_state_of_one_f_fits_every_other(label: str) -> None:
    rule = rule_of(label, 2)
    lower = rule.with_num_byzantine(1)
    assert (rule.num_byzantine, lower.num_byzantine) == (2, 1)
    assert lower == rule_of(label, 1)
    for one, other in zip(*(tf.nest.flatten(made.initial_state(D)) for made in (rule, lower)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_rule_under_attack_hands_f_on() -> None:
    attacked = Attacked(make_attack("ipm"), hostile=(0,), inner=make_rule("median", 2, before=["nnm"]))
    assert attacked.with_num_byzantine(1) == Attacked(
        make_attack("ipm"), hostile=(0,), inner=make_rule("median", 1, before=["nnm"])
    )


def test_of_c_equal_updates_one_stays_and_the_others_count() -> None:
    rows = noisy(0, 6, D)
    rows[[1, 4]] = rows[3]  # four devices, three equal updates: at least two of them copied
    screened = screen_updates(rows, [1] * 6, names(6, "device"), D)
    assert screened.device_ids == ("device-00", "device-01", "device-02", "device-05")
    assert screened.num_faulty == 2
    assert screen_updates(rows, [1] * 6, names(6, "device"), D, refuse_copies=False).num_faulty == 0


def test_f_devices_that_copy_one_honest_update_do_not_starve_the_round() -> None:
    honest = noisy(1, 5, D)
    rows = [*honest, honest[2], honest[2]]
    ids = [*names(5, "good"), "a-copier", "z-copier"]
    found = stepped(make_rule("multi-krum", 2), rows, [10.0] * 7, ids)
    alone = stepped(make_rule("multi-krum", 0), list(honest), [10.0] * 5, names(5, "good"))
    np.testing.assert_allclose(found.parameters, alone.parameters, atol=1e-6)  # rows in another order
    assert found.measurements["num_byzantine_left"] == 0
    named = {v.device_id: v.reason for v in found.verdicts if v.status == REJECTED}
    assert named == dict.fromkeys(("good-02", "z-copier"), "update is bit-equal to that of a-copier")


def test_what_was_refused_on_arrival_counts_and_devices_that_never_came_do_not() -> None:
    arrivals = Arrivals(names(9, "device"), D)
    for number, row in enumerate(noisy(2, 5, D)):
        arrivals.add(f"device-{number:02}", row, 10)
    arrivals.add("device-05", np.full(D, np.nan, np.float32), 10)  # 6 and 7 never come, 8 sent too many bytes
    screened = arrivals.screened(names(6, "device"), refused_on_arrival=1)
    assert screened.num_faulty == 2
    with closing(make_engine("direct", make_rule("multi-krum", 3), SPECS)) as engine:
        found = engine.aggregate(PARAMETERS, screened)
    assert found.measurements["num_byzantine_left"] == 1


def test_devices_that_never_came_can_still_starve_a_round() -> None:
    with pytest.raises(RuleError, match=r"n > 2f \+ 2: 5 updates do not bear num_byzantine = 2"):
        stepped(make_rule("multi-krum", 2), list(noisy(3, 5, D)), [10.0] * 5, names(5, "device"))


def test_more_faults_than_f_leave_a_rule_with_f_0() -> None:
    rows = noisy(4, 8, D)
    rows[:3] = np.nan
    found = stepped(make_rule("multi-krum", 2), list(rows), [10.0] * 8, names(8, "device"))
    np.testing.assert_allclose(found.parameters, PARAMETERS + rows[3:].mean(axis=0), atol=1e-6)
    assert found.measurements["num_byzantine_left"] == 0


def test_a_reason_speaks_of_the_f_that_was_left() -> None:
    rows = noisy(5, 9, D, hostile=1)
    rows[8] = np.nan
    found = stepped(make_rule("trimmed-mean", 2), list(rows), [10.0] * 9, names(9, "device"))
    reasons = {v.device_id: v.reason for v in found.verdicts}
    assert "among the 1 largest or smallest of 8 devices" in reasons["device-00"]


def test_a_round_that_is_refused_all_the_same_says_what_was_refused_before() -> None:
    rows = noisy(6, 5, D)
    rows[:1] = np.inf
    with pytest.raises(RuleError, match=r"4 updates do not bear num_byzantine = 1 \(refused .*= 2: device-00: update"):
        stepped(make_rule("multi-krum", 2), list(rows), [10.0] * 5, names(5, "device"))
