"""Shards on several devices, the rule draco: the model has the bits of a fleet without liars, in TFF and on agents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from brokers import RunningBroker
from simulation_helpers import digits, learning

from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.attacks.registry import make_attack
from covey_coordinator.coding.simulated import CodedSimulation
from covey_coordinator.coordinator import shuffle_seed
from covey_coordinator.simulation.as_fleet import FleetLearner
from covey_coordinator.simulation.learning import DeviceData, Learning
from covey_coordinator.simulation.process import Simulation
from covey_coordinator.simulation.settings import ExperimentSettings
from covey_coordinator.simulation.sweep import Cell
from covey_coordinator.simulation.world import World, world_of
from covey_models.datasets import Dataset, load
from covey_models.partitions import partition
from covey_models.population import populate
from covey_protocol.coding import CyclicCode
from covey_protocol.errors import ConfigError, CoveyError, RuleError

LIAR = "device-001"


def replicas(shards: int = 1, size: int = 3) -> list[DeviceData]:
    """`size` devices hold each shard of real digits."""
    names = [f"device-{number:03d}" for number in range(shards * size)]
    held = [one for one in digits((21, 17)[:shards]) for _ in range(size)]
    return [
        DeviceData(name, one.x, one.y, replica=f"shard-{number // size}")
        for number, (name, one) in enumerate(zip(names, held))
    ]


def lying(devices: list[DeviceData], device_id: str = LIAR) -> list[DeviceData]:
    """This device has every label shifted by one class."""
    return [one._replace(y=(one.y + 1) % 10) if one.device_id == device_id else one for one in devices]


def write_data(folder: Path, device_id: str, x: Any, y: Any) -> None:
    """Replace what an agent trains on; it sees that in its next round."""
    np.savez(folder / "start-1" / "devices" / device_id / "data.npz", x=x, y=y)


def draco(devices: list[DeviceData], **changes: Any) -> Learning:
    rule = make_rule("draco", 1).for_fleet([one.device_id for one in devices])
    return learning(rule=rule, **changes)


def trained(learner: Any, cohort: list[int], rounds: int = 2) -> tuple[bytes, Any]:
    """The model's bits after the rounds, and the last outcome."""
    state = learner.initial_state()
    for number in range(1, rounds + 1):
        state, outcome = learner.next(state, cohort, shuffle_seed(5, number))
    return learner.parameters(state).tobytes(), outcome


# ---- real agents


@pytest.mark.broker
def test_one_liar_of_three_agents_changes_no_bit_of_the_model(mosquitto: RunningBroker, tmp_path: Path) -> None:
    """Processes of their own, TFLite, a real Mosquitto; then the same fleet after the liar's data were mended."""
    devices = lying(replicas())
    with FleetLearner(draco(devices), devices, tmp_path, url=mosquitto.url) as fleet:
        lied, outcome = trained(fleet, [0, 1, 2])
        assert {name: judged.accepted for name, judged in outcome.verdicts.items()} == {
            "device-000": True,
            LIAR: False,
            "device-002": True,
        }
        honest = replicas()[1]
        write_data(tmp_path, LIAR, honest.x, honest.y)
        clean, outcome = trained(fleet, [0, 1, 2])
        assert all(judged.accepted for judged in outcome.verdicts.values())
        assert lied == clean != fleet.parameters(fleet.initial_state()).tobytes()
        write_data(tmp_path, LIAR, honest.x, (honest.y + 1) % 10)
        write_data(tmp_path, "device-000", honest.x, (honest.y + 2) % 10)
        with pytest.raises(RuleError, match="the group device-000, device-001, device-002 needs at least 2 equal"):
            fleet.next(fleet.initial_state(), [0, 1, 2], shuffle_seed(5, 1))


# ---- TFF


def test_liars_change_no_bit_of_a_simulation_and_a_majority_of_them_fails_it(worker: Worker) -> None:
    """Of each shard's five devices the last two lie; rounds are of three of them."""
    devices = replicas(shards=2, size=5)
    for number in (3, 4, 8, 9):
        devices[number] = devices[number]._replace(y=(devices[number].y + number) % 10)
    rule = make_rule("draco", 1, group_size=5).for_fleet([one.device_id for one in devices])
    told = "the group device-005, .*, device-009 needs at least 2 equal updates"
    with Simulation(learning(rule=rule), devices, worker=worker) as simulation:
        clean, _ = trained(simulation, [0, 1, 2, 5, 6, 7])
        lied, outcome = trained(simulation, [0, 2, 3, 5, 7, 9])
        assert lied == clean != simulation.parameters(simulation.initial_state()).tobytes()
        refused = [one for one, judged in outcome.verdicts.items() if not judged.accepted]
        assert refused == ["device-003", "device-009"]
        with pytest.raises(RuleError, match=told):
            simulation.next(simulation.initial_state(), [0, 1, 2, 7, 8, 9])


@pytest.mark.slow
def test_attackers_change_no_bit_of_a_simulation(worker: Worker) -> None:
    devices, found = replicas(shards=2), []
    for attack in ({}, {"attack": make_attack("sign-flip"), "hostile": (2, 3), "seed": 1}):
        with Simulation(draco(devices, **attack), devices, worker=worker) as simulation:
            bits, outcome = trained(simulation, list(range(6)))
        found.append(bits)
        assert [judged.accepted for judged in outcome.verdicts.values()].count(False) == (2 if attack else 0)
    assert found[0] == found[1]


# ---- experiments


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("digits")


def test_a_replicated_partition_gives_every_shard_to_neighbours(dataset: Dataset) -> None:
    table = {"kind": "replicated", "replicas": 3, "of": {"kind": "dirichlet", "alpha": 0.5}}
    parts = partition(dataset, 6, table, seed=1)
    shards = partition(dataset, 2, {"kind": "dirichlet", "alpha": 0.5}, seed=1)
    for number, part in enumerate(parts):
        np.testing.assert_array_equal(part, shards[number // 3])
    people = populate(dataset, devices=6, partition=table, seed=1).devices
    assert [one.replica for one in people] == ["shard-000"] * 3 + ["shard-001"] * 3
    assert [one.order_name for one in populate(dataset, devices=2).devices] == ["device-000", "device-001"]
    with pytest.raises(ConfigError, match="7 devices are not groups of 3 replicas"):
        partition(dataset, 7, table, seed=1)


EXPERIMENT: dict[str, Any] = {
    "name": "copies",
    "rounds": 1,
    "devices": 6,
    "data": {"set": "digits"},
    "partition": {"kind": "replicated", "replicas": 3},
    "aggregation": {"rule": "draco", "num_byzantine": 1},
}


def world(**changes: Any) -> World:
    settings = msgspec.convert({**EXPERIMENT, **changes}, ExperimentSettings)
    return world_of(Cell("copies", 0, {}, settings))


def test_an_experiment_knows_its_groups_and_corrupts_devices_one_by_one() -> None:
    found = world(corruption=[{"kind": "shift-labels", "devices": ["device-001"]}])
    assert found.rule.groups == (  # type: ignore[attr-defined]
        ("device-000", "device-001", "device-002"),
        ("device-003", "device-004", "device-005"),
    )
    assert [bool(faults) for faults in found.faults.values()] == [False, True, False, False, False, False]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "devices that share nothing": ({"partition": {"kind": "iid"}}, "device-000, device-001, device-002 are a group"),
    "other groups than shards": ({"partition": {"kind": "replicated", "replicas": 2}}, "do not hold one shard"),
    "a sample": ({"sample": 4}, "draco with sample = 4"),
    "noise": ({"privacy": {"clip_norm": 1.0, "noise_multiplier": 0.5}}, "draco with privacy.noise_multiplier = 0.5"),
    "groups too small": ({"aggregation": {"rule": "draco", "num_byzantine": 1, "group_size": 2}}, "2f \\+ 1 devices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_equal_updates_impossible_is_refused_by_name(case: str) -> None:
    changes, told = REFUSED[case]
    with pytest.raises(CoveyError, match=told):
        world(**changes)


# ---- the cyclic code in TFF


@pytest.mark.parametrize("count", [5, pytest.param(6, marks=pytest.mark.slow)], ids=["real", "complex"])
def test_coded_rows_of_tff_give_the_attack_free_mean_under_a_liar(count: int, worker: Worker) -> None:
    """Round 2 is as sent; in rounds 3 and 4 the device of that number sends -100 times its row."""

    def lie(rows: Any, number: int) -> Any:
        return np.where((np.arange(count)[:, None] == number) & (number > 2), -100 * rows, rows)

    shards, code = digits((21, 17, 8, 25, 12, 30)[:count]), CyclicCode(count, 1)
    with CodedSimulation(learning(), shards, code.s, worker=worker, lie=lie) as coded:
        start = coded.initial_parameters()
        (moved, clean), (lied_moved, lied), (_, other) = (
            coded.next(start, number, shuffle_seed(5, 1)) for number in (2, 3, 4)
        )
    assert (clean.liars, lied.liars, other.liars) == ((), (3,), (4,))
    assert np.linalg.norm(lied.mean - clean.mean) < 1e-9 * np.linalg.norm(clean.mean)
    np.testing.assert_allclose(lied_moved, moved, rtol=0, atol=1e-7)
    assert np.abs(moved - start).max() > 1e-3


@pytest.mark.slow
def test_the_coded_mean_is_the_plain_one(worker: Worker) -> None:
    shards = digits((21, 17, 8, 25, 12))
    with CodedSimulation(learning(), shards, 1, worker=worker) as coded:
        mean = coded.next(coded.initial_parameters(), 1, shuffle_seed(5, 1))[1].mean
    with Simulation(learning(rule=make_rule("mean")), shards, worker=worker) as plain:
        state, _ = plain.next(plain.initial_state(), list(range(5)), shuffle_seed(5, 1))
        change = plain.parameters(state) - plain.parameters(plain.initial_state())
    np.testing.assert_allclose(change, mean, rtol=0, atol=1e-6)
