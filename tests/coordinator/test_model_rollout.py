"""A new model goes to rings of devices, and no further than its evaluations allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_evaluation_rounds import CONFIG, fleet, order, run, says

from covey_coordinator.model_rollout import RolloutSettings, check_gate, check_rollout
from covey_coordinator.serve import CoordinatorConfig, EvaluationSettings
from covey_coordinator.store import RunStore
from covey_protocol.device import CAPABILITIES
from covey_protocol.errors import ConfigError, RunError

replace = msgspec.structs.replace
RINGS = (("a", "b", "c"), ("d",))
ROLLOUT = RolloutSettings(RINGS, 2, baseline=0.6, max_worse=0.1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    made = RunStore(tmp_path / "run")
    yield made
    made.close()


def config(rollout: RolloutSettings = ROLLOUT, **more: Any) -> CoordinatorConfig:
    own = replace(CONFIG.round, devices=3)
    return replace(CONFIG, round=own, evaluation=EvaluationSettings(every=2), rollout=rollout, **more)


def test_rounds_mean_the_devices_of_the_open_ring_and_in_the_end_all(store: RunStore) -> None:
    devices = fleet({"e": says(0.6, 0.8)})
    lines = run(store, devices, config())
    assert order(devices) == ["1", "2", "e2", "3", "4", "e4", "5", "e5"]
    invited = ["".join(one.devices) for one in devices.invitations]
    assert invited == ["abc"] * 3 + ["abcd"] * 3 + ["abcde"] * 2
    told = [line for line in lines if line.startswith("rollout")]
    assert told == [
        "rollout: ring 1 of 2 ends with loss 0.6; the next opens",
        "rollout: ring 2 of 2 ends with loss 0.65; the next opens",
    ]


def test_a_model_that_is_worse_than_the_old_one_goes_no_further_also_after_a_restart(store: RunStore) -> None:
    worse = config(replace(ROLLOUT, baseline=0.4, rings=RINGS[:1]))
    for devices in (fleet(), fleet()):
        with pytest.raises(RunError, match=r"worse than 0\.4 of the baseline by more than 0\.1"):
            run(store, devices, worse)
        assert {name for one in devices.invitations for name in one.devices} <= {"a", "b", "c"}
    assert devices.invitations == []  # nothing more was asked
    accepted = fleet()
    run(store, accepted, replace(worse, rollout=replace(worse.rollout, accept=(2,))))
    assert order(accepted) == ["3", "4", "e4", "5", "e5"]


def test_a_ring_that_nobody_has_evaluated_does_not_end(store: RunStore) -> None:
    devices = fleet(capabilities={"a": tuple(name for name in CAPABILITIES if name != "evaluate")})
    with pytest.raises(RunError, match="nobody knows the loss of round 2"):
        run(store, devices, config(replace(ROLLOUT, rings=RINGS[:1])))
    assert order(devices) == ["1", "2"]


def test_gates() -> None:
    said = {2: 0.5, 4: 0.58}
    assert "next opens" in check_gate(ROLLOUT, 2, said.get)
    assert "next opens" in check_gate(ROLLOUT, 4, said.get)
    with pytest.raises(RunError, match=r"than 0\.5 of the end of ring 1 by more than 0\.05"):
        check_gate(replace(ROLLOUT, max_worse=0.05), 4, said.get)
    right = replace(ROLLOUT, metric="accuracy", baseline=0.9)
    assert "next opens" in check_gate(right, 2, {2: 0.81}.get)
    with pytest.raises(RunError, match=r"accuracy 0\.79 .* worse than 0\.9"):
        check_gate(right, 2, {2: 0.79}.get)
    assert [ROLLOUT.is_gate(done) for done in range(7)] == [False, False, True, False, True, False, False]
    assert [ROLLOUT.only(number, ("x",)) for number in (1, 2, 3, 4, 5)] == [
        *[("a", "b", "c")] * 2,
        *[("a", "b", "c", "d")] * 2,
        ("x",),
    ]


WRONG = {
    "names x, which": {"rings": (("a", "b", "c", "x"),)},
    "names a, twice": {"rings": (("a", "b", "c"), ("a",))},
    "the first ring .* has 2 devices, a round needs 3": {"rings": (("a", "b"),)},
    "no evaluation of loss": {"rounds": 3},
    "5 rounds end before": {"rounds": 4, "rings": RINGS},
}


@pytest.mark.parametrize("words", WRONG)
def test_settings_that_cannot_be_followed_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        checked(replace(ROLLOUT, **WRONG[words]), rounds=5)
    checked(ROLLOUT, rounds=5)
    with pytest.raises(ConfigError, match="several exchanges"):
        checked(ROLLOUT, rounds=5, simple=False)


def checked(rollout: RolloutSettings, rounds: int, simple: bool = True) -> None:
    check_rollout(
        Path("c.toml"), rollout, meant="abcd", devices=3, rounds=rounds, evaluates=(2, ("loss",)), simple=simple
    )
