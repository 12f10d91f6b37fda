"""What `covey inspect` says a round costs on the wire, against a real round through a broker, counted byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from brokers import RunningBroker
from proxy import Proxy

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import Fleet
from covey_coordinator.store import RunStore
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_models.traffic import traffic
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

FLEET, DEVICE, CHUNK = "living-room", "kitchen-pi-2", 4096


def test_a_real_round_costs_what_was_computed(
    tmp_path: Path,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    mosquitto: RunningBroker,
    proxy_to: Callable[..., Proxy],
) -> None:
    proxy = proxy_to(mosquitto)
    x, y = np.full((300, 8, 8, 1), 0.5, np.float32), np.arange(300, dtype=np.int32) % 10
    table = {"url": proxy.url, "protocol": "3.1.1"}
    device = make_device(
        DEVICE, tmp_path / DEVICE, FLEET, table, coordinator_key.public, Shard(x, y),
        privacy={"screen_models": "off"},  # the parameters below are no model's
    )  # fmt: skip
    agents = AgentProcesses({DEVICE: device.config}, tmp_path / "logs")
    fleet = Fleet(parse_broker(mosquitto.url), FLEET, coordinator_key, {DEVICE: device.public}, chunk_bytes=CHUNK)
    manifest = read_bundle(digits_bundle).manifest
    engine = make_engine("direct", make_rule("mean", 0), manifest.parameters)
    measured = []
    try:
        fleet.connect()
        coordinator = Coordinator(fleet, RunStore(tmp_path / "run"))
        coordinator.wait_for(1, 60)
        for number in (12, 13):
            before = proxy.settled()
            result = coordinator.run_round(
                run_id="living-room",
                number=number,
                bundle=digits_bundle,
                parameters=Model(read_bundle(digits_bundle)).parameters() + np.float32(number),
                plan=TrainingPlan(epochs=1, learning_rate=0.1, shuffle_seed=number),
                device_ids=[DEVICE],
                quorum=1,
                engine=engine,
            )
            assert result.outcome == "published"
            after = proxy.settled()
            measured.append((after[0] - before[0], after[1] - before[1]))
    finally:
        agents.stop()
        fleet.close()
        engine.close()
    expected = traffic(manifest, len(digits_bundle), CHUNK, FLEET, DEVICE)
    first, second = measured
    print(f"computed {expected.up} up and {expected.down} down; measured {second[0]} and {second[1]}")
    # equal to the byte on a quiet machine; on a slow one an Offer is repeated (some 300 bytes) or the client pings
    assert second == pytest.approx((expected.up, expected.down), rel=0.04)
    once = (first[0] - second[0], first[1] - second[1])
    assert once == pytest.approx((expected.bundle_up, expected.bundle_down), rel=0.04, abs=400)
