"""`covey serve` with the cyclic code: real agents and a real Mosquitto, liars, missing devices, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_coordinator.algorithms.coded import Coded, CodedEngine, mean_of
from covey_coordinator.coordinator import arrivals_of
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.serve import serve
from covey_coordinator.store import RunStore
from covey_edge.runtime import Model
from covey_edge.trainer import train
from covey_protocol.bundle import read_bundle
from covey_protocol.coding import weighed
from covey_protocol.messages import CodingPlan, TrainingPlan
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

ROUNDS = 2
SHARDS = ("north", "east", "south", "west")
LOCATED = "its row is not what the rows of the others allow"
CONFIG = """
fleet = "yard"
run = "coded"
rounds = {rounds}
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[aggregation]
rule = "mean"
[round]
devices = {quorum}
quorum = {quorum}
grace_s = 20.0
[training]
algorithm = "cyclic-code"
epochs = 2
[coding]
shards = {shards}
{coding}
[wire]
encryption = true
[devices]
{devices}
"""


def digits(count: int) -> dict[str, Shard]:
    """Shards of 40, 47, 54, ... examples."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32)
    starts = [40 * place + 7 * place * (place - 1) // 2 for place in range(count + 1)]
    return {name: Shard(x[a:b], y[a:b]) for name, a, b in zip(SHARDS, starts, starts[1:])}


class Yard:
    """Devices a, b, ...: device j holds the shards j to j + 2s, each in a file of its own."""

    def __init__(self, folder: Path, url: str, key: SealingKey, bundle: bytes) -> None:
        self.folder, self.url, self.coordinator, self.bundle = folder, url, key.public, bundle
        self.shards = digits(len(SHARDS))
        self.keys: dict[str, str] = {}
        self._agents: dict[str, AgentProcesses] = {}
        (folder / "digits.covey").write_bytes(bundle)
        (folder / "coordinator.pem").write_bytes(key.pem())

    def add(self, name: str, held: tuple[str, ...], told: Mapping[str, Shard] = {}) -> None:
        """held: the shards of this device. told: what is in its files in place of them."""
        tables: dict[str, Any] = {"data": {"source": "npz"}, "data.shards": {one: f"{one}.npz" for one in held}}
        folder = self.folder / name
        made = make_device(name, folder, "yard", {"url": self.url}, self.coordinator, self.shards[held[0]], **tables)
        for one in held:
            shard = told.get(one, self.shards[one])
            np.savez(folder / f"{one}.npz", x=shard.x, y=shard.y)
        self.keys[name] = made.public.hex()

    def start(self, name: str) -> None:
        self._agents[name] = AgentProcesses({name: self.folder / name / "agent.toml"}, self.folder / "logs")

    def kill(self, name: str) -> None:
        agent = self._agents.pop(name)
        os.kill(agent.pids()[name], signal.SIGKILL)
        agent.stop()

    def stop(self) -> None:
        for agent in self._agents.values():
            agent.stop()

    def configure(self, coding: str, quorum: int, rounds: int = ROUNDS) -> Path:
        devices = "\n".join(f'{name} = "{key}"' for name, key in self.keys.items())
        shards = list(SHARDS[: len(self.keys)])
        path = self.folder / "coordinator.toml"
        path.write_text(
            CONFIG.format(url=self.url, devices=devices, coding=coding, quorum=quorum, shards=shards, rounds=rounds)
        )
        return path

    def model(self, number: int) -> np.ndarray:
        path = self.folder / "runs" / "coded" / "checkpoints" / "coded" / f"round-{number:05d}.f32"
        return np.frombuffer(path.read_bytes(), "<f4")


def without_liars(yard: Yard, parameters: np.ndarray, plan: TrainingPlan) -> np.ndarray:
    """(d,) float64: the mean over the shards, each trained once here, weighted by its examples."""
    assert isinstance(plan.coding, CodingPlan)
    model, total = Model(read_bundle(yard.bundle)), np.zeros(len(parameters) + 1)
    for name in plan.coding.shards:
        model.set_parameters(parameters)
        train(model, (yard.shards[name].x, yard.shards[name].y), plan, name)
        total += weighed(model.parameters() - parameters, len(yard.shards[name].y))
    return mean_of(total)


def check_run(yard: Yard, rejected: tuple[str, ...], coded: dict[str, int]) -> None:
    """Every round: what was decoded of the stored rows is what no liar had part in, and so is the model."""
    parameters = Model(read_bundle(yard.bundle)).parameters()
    with closing(RunStore(yard.folder / "runs" / "coded")) as store:
        rounds = store._all("SELECT id, number FROM rounds WHERE phase = 'published' ORDER BY number")
        assert [number for _, number in rounds] == list(range(1, ROUNDS + 1))
        for round_id, number in rounds:
            plan = store.invitation(round_id).plan
            assert isinstance(plan.coding, CodingPlan)
            true = without_liars(yard, parameters, plan)
            kept = store.kept_updates(round_id)
            arrivals = arrivals_of(kept, plan, len(parameters))
            for name, (offer, row) in kept.items():
                arrivals.add(name, row, offer.num_examples)
            engine = CodedEngine(None, Coded(plan.coding, **coded))  # type: ignore[arg-type]  # decodes only
            found = engine.decoded(arrivals.screened(kept, refuse_copies=False))
            assert tuple(plan.coding.devices[place] for place in found.liars) == rejected
            error = np.abs(mean_of(found.total) - true).max() / np.abs(true).max()
            assert error < 1e-12, error
            # the float32 of either may lie on the other side of a rounding; a unit in the last place of the model
            np.testing.assert_allclose(yard.model(number), parameters + true.astype(np.float32), rtol=2.0**-23, atol=0)
            said = dict(store._all("SELECT id, why FROM devices WHERE round = ? AND status = 'rejected'", round_id))
            assert set(said) == set(rejected)
            assert all(why.startswith(LOCATED) for why in said.values())
            parameters = yard.model(number)


@pytest.fixture
def yard(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker) -> Iterator[Yard]:
    made = Yard(tmp_path, mosquitto.url, coordinator_key, digits_bundle)
    yield made
    made.stop()


def hold(yard: Yard, liars: tuple[str, ...] = ()) -> None:
    """Four devices with s = 1. A liar has the examples of each of its shards, and another label for all of them."""
    for place, name in enumerate("abcd"):
        held = tuple(SHARDS[(place + step) % 4] for step in range(3))
        wrong = {one: Shard(yard.shards[one].x, (yard.shards[one].y + 1) % 10) for one in held}
        yard.add(name, held, wrong if name in liars else {})


def test_a_device_with_other_data_is_named_and_the_model_is_that_without_it(yard: Yard) -> None:
    hold(yard, liars=("c",))
    for name in "abcd":
        yard.start(name)
    said: list[str] = []
    serve(yard.configure("liars = 1", quorum=4), said.append)
    assert any("round 2/2 (cyclic-code) published: 3 of 4 updates" in line for line in said), said
    check_run(yard, ("c",), {"liars": 1})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", ["serve", "b", "everyone"])
def test_whoever_is_killed_the_models_are_those_of_the_shards(victim: str, yard: Yard) -> None:
    """In the middle of the second round; a device that was killed sends the same row again."""
    hold(yard, liars=("d",))
    for name in "abcd":
        yard.start(name)
    path = yard.configure("liars = 1", quorum=4)
    command = [sys.executable, "-m", "covey_edge", "serve", "--config", str(path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    while "round 1/2" not in (line := first.stdout.readline()):
        assert line, "serve has ended"
    time.sleep(0.3)
    if victim in ("serve", "everyone"):
        first.kill()
    for name in "abcd" if victim == "everyone" else victim if victim != "serve" else "":
        yard.kill(name)
        yard.start(name)
    if first.poll() is None and victim == "b":
        assert first.wait(PATIENCE_S) == 0
    else:
        first.wait()
        subprocess.run(command, check=True, timeout=PATIENCE_S, capture_output=True)
    first.stdout.close()
    check_run(yard, ("d",), {"liars": 1})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_device_that_is_away_is_borne_where_the_settings_say_so(yard: Yard) -> None:
    """The rows of the three others hold what it has: with s = 1, one absent device and no liar, or one liar."""
    hold(yard)
    for name in "abd":
        yard.start(name)
    said: list[str] = []
    serve(yard.configure("liars = 0\nabsent = 2", quorum=3), said.append)
    assert any("round 2/2 (cyclic-code) published: 3 of 3 updates" in line for line in said), said
    check_run(yard, (), {"liars": 0, "absent": 2})
