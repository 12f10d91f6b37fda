"""The same experiment through real agents: processes, TFLite, sealed updates over MQTT; and in TFF, to rounding."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import tensorflow as tf
from patience import PATIENCE_S
from simulation_helpers import digits, learning, test_digits

from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.attacks.registry import make_attack
from covey_coordinator.coordinator import shuffle_seed
from covey_coordinator.simulation.agreement import ComparedFleet, measure
from covey_coordinator.simulation.as_fleet import FleetLearner
from covey_coordinator.simulation.learning import CentralPrivacy, DeviceData, Learning, Privacy
from covey_coordinator.simulation.local_fleet import LocalFleet
from covey_coordinator.simulation.report.agreement import render, sentence
from covey_coordinator.simulation.results import ONE_ROUND, RoundAgreement
from covey_protocol.errors import ConfigError, RuleError, RunError

SIZES = (21, 8, 30, 17)
ALL = [0, 1, 2, 3]
COHORTS = (ALL, [0, 2, 3], ALL)  # the second round leaves a device out


def smooth_net() -> Any:
    """Without a ReLU, whose kink would make rounding large on some machines."""
    layers, start = tf.keras.layers, tf.keras.initializers.GlorotUniform
    return tf.keras.Sequential(
        [
            layers.InputLayer((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(24, "tanh", kernel_initializer=start(1)),
            layers.Dense(10, kernel_initializer=start(2)),
        ]
    )


def made(folder: Path, task: Learning, worker: Worker, cohorts: Any = COHORTS) -> tuple[ComparedFleet, Any, list[Any]]:
    """The rounds by a fleet of four beside the simulation's: what was compared, the last state, the outcomes."""
    outcomes = []
    with ComparedFleet(task, digits(SIZES), folder, test_digits(), title="digits", worker=worker) as fleet:
        state = fleet.initial_state()
        for number, cohort in enumerate(cohorts, 1):
            state, outcome = fleet.next(state, cohort, shuffle_seed(5, number))
            outcomes.append(outcome)
    return fleet, state, outcomes


def leftovers(folder: Path) -> list[str]:
    """Command lines of processes that work in this folder."""
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]


# --- what needs no process


LEARNINGS_OF_A_SIMULATION_ONLY = {
    "an algorithm that agents are not asked for": ({"algorithm": "fedsgd"}, "algorithm 'fedsgd' through a fleet"),
    "noise by the coordinator": ({"privacy": CentralPrivacy(1.0, 1.0, 4, 3)}, "central differential privacy"),
}


@pytest.mark.parametrize("case", LEARNINGS_OF_A_SIMULATION_ONLY)
def test_what_only_a_simulation_can_do_is_refused_before_anything_starts(case: str, tmp_path: Path) -> None:
    changes, said = LEARNINGS_OF_A_SIMULATION_ONLY[case]
    with pytest.raises(ConfigError, match=said):
        FleetLearner(learning(**changes), digits(SIZES), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [("b", "a"), ("a", "a"), ("a", "coordinator"), ("a", "b/c")])
def test_device_ids_that_a_fleet_cannot_have_are_refused(ids: tuple[str, str], tmp_path: Path) -> None:
    x, y = test_digits()
    with pytest.raises(ConfigError):
        LocalFleet([DeviceData(one, x, y) for one in ids], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_an_agreement_says_whether_it_holds() -> None:
    def found(*one_round: float, same: bool = True) -> list[RoundAgreement]:
        return [RoundAgreement(n, value, 2 * value, 0.5, 0.5, same) for n, value in enumerate(one_round, 1)]

    agree = "Fleet and simulation agree: "
    assert sentence(found(1e-7, 4e-6)).startswith(agree)
    assert "by 4.0e-06 at most" in sentence(found(1e-7, 4e-6))
    assert sentence(found(1e-7, 9e-3, 1e-7)).startswith(agree)  # a kink
    assert not sentence(found(1e-7, 1.1e-2, 1e-7)).startswith(agree)
    assert not sentence(found(1.1e-5)).startswith(agree)
    assert "differ by 2.0e-07 of the round’s update in the median" in sentence(found(1e-7, 2e-7, 3e-7))
    assert "other verdicts in 1 round;" in sentence(found(1e-7, same=False))
    assert "finished no round" in render("nothing", [])
    assert "6.00e-07" in render("equal bits", found(0.0, 3e-7))
    assert len(render("long", found(*[1e-7] * 10_000))) < 100_000


def test_an_update_that_float32_cannot_hold_is_held_against_what_it_can() -> None:
    model = np.full(10_000, 0.1, np.float32)  # 10 long
    far, near = model + np.float32(0.01), model + np.float32(1e-6)
    assert measure(model, far) == pytest.approx(1.0, rel=1e-3)  # its own length
    assert measure(model, near) == pytest.approx(10 * 2**-23 / ONE_ROUND, rel=1e-3)
    assert measure(np.zeros(3, np.float32), np.zeros(3, np.float32)) == 1.0


# --- with processes


@pytest.mark.fleet
def test_a_fleet_does_what_the_simulation_does_to_rounding(tmp_path: Path, worker: Worker) -> None:
    fleet, state, outcomes = made(tmp_path, learning(model=smooth_net()), worker)
    assert [one.number for one in fleet.found] == [1, 2, 3]
    for one in fleet.found:
        assert 0 < one.one_round < ONE_ROUND  # other software, so not bit-equal
        assert one.all_rounds < ONE_ROUND
        assert one.fleet == one.simulation
        assert one.same_verdicts
    assert np.linalg.norm(state.fleet.vector - fleet.parameters(state)) == 0
    assert [sorted(one.verdicts) for one in outcomes] == [[f"device-{n:03d}" for n in cohort] for cohort in COHORTS]
    assert outcomes[2].loss < outcomes[0].loss
    numbers = msgspec.json.decode((tmp_path / "agreement.json").read_bytes(), type=list[RoundAgreement])
    assert numbers == fleet.found
    assert "Fleet and simulation agree" in (tmp_path / "agreement.html").read_text()
    assert leftovers(tmp_path) == []


@pytest.mark.fleet
def test_a_robust_rule_under_an_attack_judges_the_fleet_as_it_judges_the_simulation(
    tmp_path: Path, worker: Worker
) -> None:
    task = learning(rule=make_rule("multi-krum", 1), attack=make_attack("sign-flip", scale=3.0), hostile=(2,))
    devices = digits((21, 8, 30, 17, 25, 12))
    with ComparedFleet(task, devices, tmp_path, test_digits(), worker=worker) as fleet:
        state = fleet.initial_state()
        for number in (1, 2, 3):
            # without device 0 in the second round: places stay numbers of devices, whoever came first
            cohort = [1, 2, 3, 4, 5] if number == 1 else [0, 1, 2, 3, 4, 5]
            state, outcome = fleet.next(state, cohort, shuffle_seed(5, number))
            assert [one for one, judged in outcome.verdicts.items() if not judged.accepted] == ["device-002"]
        with pytest.raises(RuleError):  # Krum needs n > 2 f + 2
            fleet.next(state, ALL, 9)
        resumed = fleet.loaded(fleet.saved(state))
        assert [np.array_equal(fleet.parameters(one), state.fleet.vector) for one in (state, resumed)] == [True, True]
    assert all(one.one_round < ONE_ROUND and one.same_verdicts for one in fleet.found)


@pytest.mark.fleet
def test_a_device_clips_by_its_own_policy_and_one_that_is_lost_ends_the_run_by_name(tmp_path: Path) -> None:
    clip_norm = 0.01
    task = learning(privacy=Privacy(clip_norm))
    with FleetLearner(task, digits(SIZES), tmp_path) as fleet:
        first = fleet.initial_state()
        second, _ = fleet.next(first, [1], 7)
        length = float(np.linalg.norm(second.vector - first.vector))
        assert length == pytest.approx(clip_norm, rel=1e-4)
        os.kill(fleet.fleet.agents()["device-003"], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(RunError, match=r"the agent of device-003 ended \(SIGKILL\)"):
            fleet.next(second, ALL, 8)
        assert time.monotonic() - started < PATIENCE_S
    assert leftovers(tmp_path) == []
