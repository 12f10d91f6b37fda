"""One round of a real agent, whatever starts it, against a real Mosquitto and a real coordinator in this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Clock, Coordinator, Timing
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.fleet import Fleet
from covey_coordinator.store import RunStore
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

LONGEST_S = 86400.0  # of a round: what ends the waiting before is that nothing is done


class Watching(Clock):
    """The coordinator's clock, by which it waits for an agent that works, however slowly, and for no other.

    AssertionError where the agent has ended, or it and its children have had less than a second of the processors in
    PATIENCE_S: an emulated one on a busy machine takes half an hour, and one that hangs takes none.
    """

    def __init__(self, agent: subprocess.Popen[bytes]) -> None:
        self._agent, self._used_s = agent, 0.0
        self._looked_at = self._moved_at = time.monotonic()

    def monotonic_s(self) -> float:
        now = time.monotonic()
        if now - self._looked_at > 1.0:
            self._looked_at = now
            self._look(now)
        return now

    def _look(self, now: float) -> None:
        assert self._agent.poll() is None, f"the agent ended with code {self._agent.returncode}"
        used_s = used_by(self._agent.pid)
        if abs(used_s - self._used_s) >= 1.0:  # less where a child has ended that nobody waited for
            self._used_s, self._moved_at = used_s, now
        assert now - self._moved_at < PATIENCE_S, f"the agent has done nothing for {PATIENCE_S:g} s"


def used_by(pid: int) -> float:
    """Seconds of the processors that a process, its children and theirs have had."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (agent := psutil.Process(pid), *agent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])  # its own, and of its children that have ended
    return total


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
        coordinator = Coordinator(fleet, RunStore(folder / "run"), clock=Watching(process))
        coordinator.wait_for(1, LONGEST_S)
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
            timing=Timing(duration_s=LONGEST_S, answer_s=LONGEST_S),
        )
        seconds = time.monotonic() - started
        process.terminate()
        code = process.wait(4 * PATIENCE_S)  # it ends what it is at, in emulation, too
    except BaseException as exc:
        raise AssertionError(f"{exc!r}; the agent said: {log.read_text()[-2000:]}") from exc
    finally:
        process.kill()
        process.wait()
        fleet.close()
    assert code == 0, log.read_text()[-2000:]
    change = float(np.abs(result.parameters - parameters).max())
    return Reported(result.outcome, change, log.read_text(), seconds)
