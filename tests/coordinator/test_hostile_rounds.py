"""An agent that was sent sealed garbage lives on, says why it did not train, and takes part in the next round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from brokers import RunningBroker

from covey_coordinator.coordinator import Coordinator, RoundResult
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import Fleet
from covey_coordinator.store import RunStore
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle, write_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]


def test_the_agent_outlives_models_that_kill_its_child(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker
) -> None:
    bundle = read_bundle(digits_bundle)
    random = np.random.default_rng(0)
    shard = Shard(random.random((40, 8, 8, 1), np.float32), random.integers(0, 10, 40, np.int32))
    device = make_device("pi", tmp_path / "pi", "home", {"url": mosquitto.url}, coordinator_key.public, shard)
    agents = AgentProcesses({"pi": device.config}, tmp_path / "logs")
    fleet = Fleet(parse_broker(mosquitto.url), "home", coordinator_key, {"pi": device.public})

    def round_of(number: int, model: bytes) -> RoundResult:
        return coordinator.run_round(
            run_id="r",
            number=number,
            bundle=write_bundle(bundle.manifest, model, coordinator_key),
            parameters=Model(bundle).parameters(),
            plan=TrainingPlan(epochs=1, learning_rate=0.1),
            device_ids=["pi"],
            quorum=1,
            engine=None,
        )

    try:
        fleet.connect()
        coordinator = Coordinator(fleet, RunStore(tmp_path / "run"))
        coordinator.wait_for(1, 60)
        for number, model in enumerate((bundle.model[: len(bundle.model) // 2], random.bytes(3000))):
            bad = round_of(number, model)
            assert bad.outcome == "abandoned"
            (verdict,) = bad.verdicts
            assert "the training process died (SIG" in verdict.reason or "cannot be loaded" in verdict.reason
        assert round_of(2, bundle.model).outcome == "published"
    finally:
        agents.stop()
        fleet.close()
