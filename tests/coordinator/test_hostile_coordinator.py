"""A hostile coordinator and a real agent on a real broker: its models are not trained, and it does not hear why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from brokers import RunningBroker

from covey_coordinator.coordinator import Coordinator
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import Fleet
from covey_coordinator.inversion.imprint import imprinted
from covey_coordinator.store import RunStore
from covey_edge.frames import SUSPECTED_TOLD
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]


def test_an_imprinted_round_is_refused_and_so_is_another_bundle_and_honest_rounds_go_on(
    tmp_path: Path, coordinator_key: SealingKey, mosquitto: RunningBroker, dense_bundle: bytes, digits_bundle: bytes
) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32)
    pinned = {"bundles": [blob_ref(dense_bundle).sha256.hex()]}
    device = make_device(
        "pi", tmp_path / "pi", "home", {"url": mosquitto.url}, coordinator_key.public, Shard(x[:60], y[:60]),
        policy=pinned,
    )  # fmt: skip
    agents = AgentProcesses({"pi": device.config}, tmp_path / "logs")
    fleet = Fleet(parse_broker(mosquitto.url), "home", coordinator_key, {"pi": device.public})
    coordinator = Coordinator(fleet, RunStore(tmp_path / "run"))
    manifest = read_bundle(dense_bundle).manifest
    honest = Model(read_bundle(dense_bundle)).parameters()
    hostile = imprinted(manifest.parameters, honest, x[200:1000], seed=0)
    foreign = Model(read_bundle(digits_bundle)).parameters()
    rounds = ((dense_bundle, hostile), (digits_bundle, foreign), (dense_bundle, honest))
    try:
        fleet.connect()
        coordinator.wait_for(1, 60)
        results = [
            coordinator.run_round(
                run_id="r",
                number=number,
                bundle=bundle,
                parameters=parameters,
                plan=TrainingPlan(1, 0.1, shuffle_seed=1),
                device_ids=["pi"],
                quorum=1,
                engine=None,
            )
            for number, (bundle, parameters) in enumerate(rounds, 1)
        ]
    finally:
        agents.stop()
        fleet.close()
    assert [one.outcome for one in results] == ["abandoned", "abandoned", "published"]
    assert results[0].verdicts[0].reason == f"failed: {SUSPECTED_TOLD}"
    assert "[policy] bundles" in results[1].verdicts[0].reason
    log = (tmp_path / "logs" / "pi.log").read_text()
    assert "imprint in dense/kernel: 128 of 128 units" in log
    assert "your examples" in log
