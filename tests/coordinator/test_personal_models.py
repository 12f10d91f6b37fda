"""Real agents on a real broker keep the models of their rounds, tune copies of them, and answer with the better one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_coordinator.coordinator import Coordinator
from covey_coordinator.demo.devices import DeviceFiles, Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import Fleet
from covey_coordinator.store import RunStore
from covey_edge.inference import Predictor
from covey_edge.model_store import Kept, ModelStore
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

PLAN = TrainingPlan(epochs=2, learning_rate=0.1, shuffle_seed=1)
TUNED = {"keep": True, "finetune_epochs": 5, "finetune_learning_rate": 0.1}


class Home:
    """A coordinator and its agents; each sees mostly digits of its own."""

    def __init__(self, folder: Path, broker: RunningBroker, key: SealingKey, own: dict[str, tuple[int, ...]]) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        self.x, self.y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32)
        self.own = {name: np.flatnonzero(np.isin(y, digits)) for name, digits in own.items()}
        self.devices = {name: self._device(folder, name, broker, key) for name in own}
        self.agents = AgentProcesses({name: one.config for name, one in self.devices.items()}, folder / "logs")
        self.logs = folder / "logs"
        public = {name: one.public for name, one in self.devices.items()}
        self.fleet = Fleet(parse_broker(broker.url), "home", key, public)
        self.store = RunStore(folder / "run")
        self.coordinator = Coordinator(self.fleet, self.store)
        self.fleet.connect()
        self.coordinator.wait_for(len(own), PATIENCE_S)

    def _device(self, folder: Path, name: str, broker: RunningBroker, key: SealingKey) -> DeviceFiles:
        """60 examples to train on, 60 held out; what follows is for the test alone."""
        rows = self.own[name]
        shard = Shard(self.x[rows[:60]], self.y[rows[:60]])
        data = {"path": "data.npz", "evaluation_path": "held-out.npz"}
        made = make_device(
            name, folder / name, "home", {"url": broker.url}, key.public, shard, data=data, personal=TUNED
        )
        np.savez(made.folder / "held-out.npz", x=self.x[rows[60:120]], y=self.y[rows[60:120]])
        return made

    def round(self, number: int, bundle: bytes, parameters: np.ndarray) -> np.ndarray:
        result = self.coordinator.run_round(
            run_id="r",
            number=number,
            bundle=bundle,
            parameters=parameters,
            plan=PLAN,
            device_ids=list(self.devices),
            quorum=len(self.devices),
            engine=None,
        )
        updates = [self.store.read_update(offer.round_id, name) for name, offer in result.offers.items()]
        return np.asarray(parameters + np.mean(updates, axis=0), np.float32)

    def kept(self, name: str, when: Callable[[Kept], bool]) -> Kept:
        """As soon as it is so."""
        store, end = ModelStore(self.devices[name].folder / "state"), time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            kept = store.load()
            if kept is not None and when(kept):
                return kept
            time.sleep(0.05)
        raise AssertionError((self.logs / f"{name}.log").read_text())

    def close(self) -> None:
        self.agents.stop()
        self.fleet.close()

    def accuracy(self, name: str, answers: Callable[[np.ndarray], np.ndarray]) -> float:
        rows = self.own[name][120:]
        return float((answers(self.x[rows]).argmax(axis=1) == self.y[rows]).mean())


@pytest.fixture
def home(tmp_path: Path, mosquitto: RunningBroker, coordinator_key: SealingKey) -> Iterator[Any]:
    every: list[Home] = []

    def make(**own: tuple[int, ...]) -> Home:
        every.append(Home(tmp_path, mosquitto, coordinator_key, own))
        return every[-1]

    yield make
    for one in every:
        one.close()


def test_an_agent_keeps_the_model_of_its_round_and_answers_with_its_own_copy(home: Any, digits_bundle: bytes) -> None:
    """Two rounds with a moment between; the second begins while the first one's copy may still be in the making."""
    fleet = home(pi=(3, 4))
    start = Model(read_bundle(digits_bundle)).parameters()
    parameters = fleet.round(1, digits_bundle, start)
    kept = fleet.kept("pi", lambda kept: kept.personal is not None)
    assert (kept.used.kind, kept.federated.number) == ("personal", 1)
    predictor = Predictor.open(fleet.devices["pi"].folder / "state")
    assert fleet.accuracy("pi", predictor.predict) > 0.9
    fleet.round(2, digits_bundle, parameters)
    fleet.kept("pi", lambda kept: kept.federated.number == 2)
    assert predictor.version.number in (1, 2)


@pytest.mark.slow
def test_copies_help_where_devices_see_different_digits(home: Any, digits_bundle: bytes) -> None:
    """Four agents with two or three digits each, six rounds: on what nobody has seen, each one's model in use is as
    good as the federated one or better, and better by far in the mean."""
    fleet = home(a=(0, 1), b=(2, 3), c=(4, 5, 6), d=(7, 8, 9))
    parameters = Model(read_bundle(digits_bundle)).parameters()
    for number in range(1, 7):
        parameters = fleet.round(number, digits_bundle, parameters)
    gains = []
    for name in fleet.devices:
        kept = fleet.kept(name, lambda kept: kept.personal is not None and kept.personal.number == 6)
        store = ModelStore(fleet.devices[name].folder / "state")
        model = Model(read_bundle(digits_bundle))
        model.set_parameters(np.frombuffer(store.read(kept.federated)[1], "<f4").copy())
        federated = fleet.accuracy(name, model.infer)
        used = fleet.accuracy(name, Predictor.open(fleet.devices[name].folder / "state").predict)
        print(f"{name}: federated {federated:.1%}, {kept.used} {used:.1%}")
        gains.append(used - federated)
    assert min(gains) >= 0.0
    assert np.mean(gains) > 0.05
