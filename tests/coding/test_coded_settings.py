"""What a run with the cyclic code asks of coordinator.toml, and what its engine bears: arrays in, verdicts out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.mean import Mean
from covey_coordinator.aggregation.screening import Arrivals
from covey_coordinator.algorithms.coded import LOCATED, Coded, CodedEngine
from covey_coordinator.algorithms.coded_settings import CodingSettings, coding_plan
from covey_coordinator.serve import serve
from covey_protocol.coding import CyclicCode, as_numbers, weighed
from covey_protocol.errors import ConfigError, CoveyError, RuleError
from covey_protocol.parameters import ParameterSpec
from covey_protocol.seals import SealingKey

CONFIG = """
fleet = "yard"
run = "coded"
rounds = 1
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "mqtt://127.0.0.1:1"
[round]
devices = 5
quorum = 5
#round
[aggregation]
rule = "mean"
#aggregation
[training]
algorithm = "cyclic-code"
#training
[coding]
shards = ["p", "q", "r", "t", "u"]
#coding
[wire]
#wire
[devices]
"""
REFUSED = {
    # what: (what is replaced, by what, what is said)
    "a shard too few": ('"t", "u"]', '"t"]', r"\[coding\] names 4 shards for 5 devices; .*round.only"),
    "a shard twice": ('"t", "u"]', '"t", "t"]', r"\[coding\]: a code that names one of its shards twice"),
    "more liars than devices bear": ("#coding", "liars = 3", r"s = 3; .*at least 7 devices"),
    "as many with absent ones": ("#coding", "liars = 2\nabsent = 1", r"s = 3; .*at least 7 devices"),
    "a quorum below it": ("quorum = 5", "quorum = 4", r"round.quorum = 4 with a code of 5 devices of which 0 may be"),
    "a sample": ("#round", "sample = 5", r"with round.sample = 5; leave it out: every device has its place"),
    "a goal": ("#round", "goal = 5", "with round.goal = 5"),
    "compression": ("#wire", 'compression = "rotated-8bit"', "with wire.compression = 'rotated-8bit'"),
    "a rule": ('rule = "mean"', 'rule = "median"', r"its decoder is the rule: write rule = \"mean\" alone"),
    "no table": ("[coding]", "[ignored]", "Object contains unknown field `ignored`"),
    "another algorithm": ('algorithm = "cyclic-code"', 'algorithm = "fedavg"', r"'fedavg' with \[coding\]"),
    "a shard whose name is none": ('"u"]', '"../u"]', "shard '../u'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_is_refused_before_any_device_is_asked_with(
    case: str, tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    old, new, told = REFUSED[case]
    assert old in CONFIG
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    keys = "\n".join(f'{name} = "{SealingKey.generate().public.hex()}"' for name in "abcde")
    (tmp_path / "coordinator.toml").write_text(CONFIG.replace(old, new, 1) + keys)
    with pytest.raises(CoveyError, match=told) as caught:
        serve(tmp_path / "coordinator.toml", print)
    assert isinstance(caught.value, ConfigError)


# --- the engine

D = 6
NAMES = ("e", "b", "d", "a", "c")  # the order of the code is the operator's
SHARDS = [np.random.default_rng(shard).standard_normal(D) for shard in range(5)]
COUNTS = [10, 20, 30, 40, 50]
MEAN = np.average(SHARDS, axis=0, weights=COUNTS)


@functools.cache
def engine(liars: int = 1, absent: int = 0) -> CodedEngine:
    plan = coding_plan(CodingSettings(("p", "q", "r", "t", "u"), liars, absent), NAMES)
    return CodedEngine(make_engine("direct", Mean(), [ParameterSpec("w", (D,))]), Coded(plan, liars, absent))


@pytest.fixture(scope="module", autouse=True)
def _engines_end_before_the_interpreter() -> Iterator[None]:
    yield
    engine.cache_clear()


def rows(s: int) -> dict[str, Any]:
    code = CyclicCode(5, s)
    parts = [weighed(update, count) for update, count in zip(SHARDS, COUNTS)]
    return {name: as_numbers(code.encode(parts[k] for k in code.shards(j))) for j, name in enumerate(NAMES)}


def outcome(one: CodedEngine, came: dict[str, Any], refused: int = 0) -> Any:
    arrivals = Arrivals(NAMES, D + 1, dtype=np.float64)
    for name, row in came.items():
        arrivals.add(name, row, 90)
    screened = arrivals.screened(NAMES, refuse_copies=False, refused_on_arrival=refused)
    return one.aggregate(np.ones(D, np.float32), screened)


def test_the_new_model_is_the_mean_over_the_shards_and_the_liar_is_named() -> None:
    came = rows(1)
    came["d"] = -came["d"]
    result = outcome(engine(), came)
    np.testing.assert_allclose(result.parameters, 1 + MEAN.astype(np.float32), rtol=2.0**-23)
    assert {v.device_id: v.reason for v in result.verdicts if v.status == "rejected"} == {"d": LOCATED}
    assert result.measurements["liars"] == 1
    assert result.measurements["misfit"] < 8e-15


def test_the_model_has_the_same_bits_whenever_it_is_made_again() -> None:
    came = rows(1)
    came["d"] = came["d"] + 1e-13 * np.abs(came["d"]).max()  # near what can be located at all
    made = {outcome(engine(), came).parameters.tobytes() for _ in range(5)}
    assert len(made) == 1


def test_absent_devices_are_borne_beside_liars_as_far_as_the_settings_say() -> None:
    came = rows(2)
    came["a"] = came["a"] + 1.0
    del came["e"]
    result = outcome(engine(1, 1), came)
    np.testing.assert_allclose(result.parameters, 1 + MEAN.astype(np.float32), rtol=2.0**-23)
    assert [v.device_id for v in result.verdicts if v.status == "rejected"] == ["a"]
    del came["d"]
    with pytest.raises(RuleError, match="2 devices of the code are absent and 0 sent no row that can be used"):
        outcome(engine(1, 1), came)  # a lie of the three that are left could pass


def test_rows_that_screening_refuses_count_as_liars_by_name() -> None:
    came = rows(1)
    came["b"] = np.full(D + 1, np.nan)
    result = outcome(engine(), came)
    np.testing.assert_allclose(result.parameters, 1 + MEAN.astype(np.float32), rtol=2.0**-23)
    (rejected,) = [v for v in result.verdicts if v.status == "rejected"]
    assert rejected.device_id == "b"
    assert "not finite" in rejected.reason
    with pytest.raises(RuleError, match=r"2 sent no row that can be used \(b: update holds 7 values"):
        outcome(engine(), {name: row for name, row in came.items() if name != "c"}, refused=1)


def test_more_liars_than_borne_fail_the_round_and_nothing_is_changed() -> None:
    came, one = rows(1), engine()
    came["a"], came["b"] = came["a"] + 1.0, came["b"] * 2
    before = one.saved_state()
    with pytest.raises(RuleError, match="not within 1 lies of a codeword of 5 devices"):
        outcome(one, came)
    assert one.saved_state() == before
    assert one.load_state(before)
    assert not engine(1, 1).load_state(before)  # of another code
