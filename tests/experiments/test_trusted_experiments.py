"""Trusted data in experiments: whose they are, what is refused, and that rules get the coordinator's own update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulation_helpers import digits, learning, test_digits

from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.attacks.registry import make_attack
from covey_coordinator.simulation.learning import DeviceData, Privacy
from covey_coordinator.simulation.process import Simulation
from covey_coordinator.simulation.sweep import cells_of
from covey_coordinator.simulation.trusted_data import drawn_rows
from covey_coordinator.simulation.world import world_of
from covey_models import datasets
from covey_protocol.errors import ConfigError, RuleError
from covey_protocol.topics import RESERVED_ID

FLTRUST = {"name": "one", "rounds": 1, "aggregation": {"rule": "fltrust"}}


def experiment(**changes: Any) -> dict[str, Any]:
    return {**FLTRUST, "trusted": {"size": 40}, **changes}


def examples(x: np.ndarray, y: np.ndarray) -> set[bytes]:
    return {row.tobytes() + label.tobytes() for row, label in zip(x, y)}


# ---- the data


def test_no_device_holds_a_trusted_example_and_none_is_lost() -> None:
    world = world_of(cells_of(experiment())[0])
    plain = world_of(cells_of(experiment(aggregation={"rule": "mean"}, trusted={}))[0])
    assert world.trusted is not None
    assert len(world.trusted) == 40
    held = examples(*(np.concatenate([getattr(one, part) for one in world.devices]) for part in "xy"))
    own = examples(world.trusted.x, world.trusted.y)
    assert held.isdisjoint(own)
    assert held | own == examples(plain.train.x, plain.train.y)
    np.testing.assert_array_equal(world.test.x, plain.test.x)


def test_a_rule_without_need_of_them_sees_the_same_devices() -> None:
    worlds = [world_of(cells_of(experiment(aggregation={"rule": rule}))[0]) for rule in ("mean", "fltrust")]
    for one, other in zip(worlds[0].devices, worlds[1].devices):
        np.testing.assert_array_equal(one.x, other.x)


def test_a_smaller_set_is_part_of_a_larger_and_seeds_differ() -> None:
    y = datasets.load("digits").y
    small, large = drawn_rows(y, 20, 0.0, seed=3), drawn_rows(y, 100, 0.0, seed=3)
    assert set(small) < set(large)
    assert set(small) != set(drawn_rows(y, 20, 0.0, seed=4))


@pytest.mark.parametrize("bias", [0.1, 0.5, 1.0])
def test_a_biased_set_has_that_share_of_one_class(bias: float) -> None:
    y = datasets.load("digits").y
    counts = np.bincount(y[drawn_rows(y, 100, bias, seed=0)], minlength=10)
    assert counts.sum() == 100
    chosen = np.bincount(y[drawn_rows(y, 100, 1.0, seed=0)], minlength=10).argmax()
    assert counts[chosen] == round(100 * bias)


def test_a_file_of_ones_own_is_taken_and_must_fit(tmp_path: Path) -> None:
    data = datasets.load("digits")
    names = np.array(data.class_names)
    np.savez(tmp_path / "own.npz", x=data.x[:30], y=data.y[:30], class_names=names)
    np.savez(tmp_path / "flat.npz", x=data.x[:30].reshape(30, -1), y=data.y[:30], class_names=names)
    world = world_of(cells_of(experiment(trusted={"path": "own.npz"}), beside=tmp_path)[0])
    assert world.trusted is not None
    np.testing.assert_array_equal(world.trusted.x, data.x[:30])
    with pytest.raises(ConfigError, match=r"trusted\.path.*examples of shape"):
        world_of(cells_of(experiment(trusted={"path": "flat.npz"}), beside=tmp_path)[0])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trusted": {}}, "'fltrust' needs trusted data"),
        ({"trusted": {"size": 5, "path": "x.npz"}}, "both a size and a path"),
        ({"trusted": {"bias": 0.5}}, "a bias and no size"),
        ({"trusted": {"size": 5, "bias": 2.0}}, "bias"),
        ({"training": {"algorithm": "scaffold", "local_steps": 3}}, "'fltrust' with the algorithm 'scaffold'"),
        ({"trusted": {"sise": 5}}, "sise"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cells_of(experiment(**changes))


def test_more_trusted_examples_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trusted\.size = 5000"):
        world_of(cells_of(experiment(trusted={"size": 5000}))[0])


def test_size_and_bias_can_be_swept() -> None:
    cells = cells_of(experiment(sweep={"trusted.size": [10, 20], "trusted.bias": [0.1, 0.5]}))
    assert [(one.settings.trusted.size, one.settings.trusted.bias) for one in cells] == [
        (10, 0.1),
        (10, 0.5),
        (20, 0.1),
        (20, 0.5),
    ]


# ---- learning


def parameters_after(worker: Worker, rounds: int, devices: list[DeviceData], **changes: Any) -> np.ndarray:
    with Simulation(learning(**changes), devices, worker=worker) as simulation:
        state = simulation.initial_state()
        for _ in range(rounds):
            state, outcome = simulation.next(state, range(len(devices)))
            assert list(outcome.verdicts) == [device.device_id for device in devices]
        return np.asarray(simulation.parameters(state))


def test_the_coordinators_own_update_is_that_of_a_device_of_its_name_without_noise(worker: Worker) -> None:
    first, *others = digits()
    own = DeviceData(RESERVED_ID, first.x, first.y)
    alone = parameters_after(worker, 2, [own], rule=make_rule("mean"))
    rule, privacy = make_rule("trusted-only"), Privacy(clip_norm=0.01, noise_multiplier=1.0)
    trusted = parameters_after(worker, 2, others[:2], rule=rule, trusted=own, privacy=privacy)
    np.testing.assert_array_equal(trusted, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "hostile"), [("fltrust", (0, 1, 2, 3)), ("lfr", (0,)), ("mean", (0,))])
def test_what_ruins_a_mean_does_not_ruin_a_rule_with_trusted_data(
    worker: Worker, rule: str, hostile: tuple[int, ...]
) -> None:
    trusted, *devices = digits((60, 20, 20, 20, 20, 20))
    told = 0 if rule == "mean" else len(hostile)
    made = learning(
        rule=make_rule(rule, told),
        attack=make_attack("sign-flip", scale=10.0),
        hostile=hostile,
        trusted=DeviceData(RESERVED_ID, trusted.x, trusted.y),
    )
    with Simulation(made, devices, worker=worker) as simulation:
        state = simulation.initial_state()
        for _ in range(3):
            state, outcome = simulation.next(state, range(5))
        accuracy = simulation.evaluate(state, *test_digits())["accuracy"]
    if rule == "mean":
        assert accuracy < 0.2
    else:
        assert accuracy > 0.3
        judged = [verdict.accepted for verdict in outcome.verdicts.values()]
        assert not any(judged[place] for place in hostile)
        assert judged[4]


@pytest.mark.slow
def test_a_trusted_update_that_diverges_refuses_the_round_and_not_the_run(worker: Worker) -> None:
    first, *others = digits()
    own = DeviceData(RESERVED_ID, first.x * np.float32(1e30), first.y)
    with Simulation(learning(rule=make_rule("fltrust"), trusted=own), others[:2], worker=worker) as simulation:
        state = simulation.initial_state()
        with pytest.raises(RuleError, match="the row of trusted data for fltrust is missing, not finite"):
            simulation.next(state, range(2))


def test_a_rule_without_the_data_it_needs_is_refused_before_any_worker() -> None:
    with pytest.raises(ConfigError, match="'fltrust' needs trusted data"):
        learning(rule=make_rule("fltrust"))
