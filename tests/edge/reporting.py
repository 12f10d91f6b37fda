"""One round of a real agent, whatever starts it, against a real Mosquitto and a real coordinator in this process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator, Timing
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.fleet import Fleet
from covey_coordinator.store import RunStore
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey


@dataclass(frozen=True)
class Reported:
    """change: largest difference of any weight after the round. log: what the agent said. seconds: until the end."""

    outcome: str
    change: float
    log: str
    seconds: float


def one_round(
    agent: Sequence[str],
    folder: Path,
    broker: RunningBroker,
    bundle: bytes,
    key: SealingKey,
    shard: Shard,
    *,
    seen_as: Path | None = None,
    environment: Mapping[str, str] | None = None,
    patience_s: float = PATIENCE_S,
) -> Reported:
    """Start `agent --config FILE`, have it train once, end it with SIGTERM. AssertionError where it ends otherwise.

    seen_as: what the device's folder is called by the agent, where that is another name (chroot).
    """
    device = make_device("pi", folder / "pi", "alone", {"url": broker.url}, key.public, shard)
    config = device.config if seen_as is None else seen_as / device.config.name
    log = folder / "agent.log"
    fleet = Fleet(parse_broker(broker.url), "alone", key, {"pi": device.public})
    started = time.monotonic()
    with log.open("wb") as output:
        command = [*agent, "agent", "--config", str(config)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment or dict(os.environ))
    try:
        fleet.connect()
        coordinator = Coordinator(fleet, RunStore(folder / "run"))
        coordinator.wait_for(1, patience_s)
        manifest, parameters = read_bundle(bundle).manifest, Model(read_bundle(bundle)).parameters()
        result = coordinator.run_round(
            run_id="alone",
            number=1,
            bundle=bundle,
            parameters=parameters,
            plan=TrainingPlan(epochs=1, learning_rate=0.1),
            device_ids=["pi"],
            quorum=1,
            engine=make_engine("direct", make_rule("mean"), manifest.parameters),
            timing=Timing(duration_s=patience_s, answer_s=patience_s),
        )
        seconds = time.monotonic() - started
        process.terminate()
        code = process.wait(patience_s)
    except BaseException as exc:
        raise AssertionError(f"{exc!r}; the agent said: {log.read_text()[-2000:]}") from exc
    finally:
        process.kill()
        process.wait()
        fleet.close()
    assert code == 0, log.read_text()[-2000:]
    change = float(np.abs(result.parameters - parameters).max())
    return Reported(result.outcome, change, log.read_text(), seconds)
