"""A whole fleet on this machine: a broker and one agent per device as processes, and their coordinator.

The demo's parts (`covey_coordinator.demo`), for any devices and any bundle. Decides nothing about rounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from covey_coordinator.coordinator import NO_TRAINING, Coordinator, OwnTraining
from covey_coordinator.demo.devices import DeviceFiles, Shard, make_device
from covey_coordinator.demo.logs import logged_to
from covey_coordinator.demo.processes import AgentProcesses, BrokerProcess
from covey_coordinator.fleet import Fleet
from covey_coordinator.simulation.learning import DeviceData
from covey_coordinator.store import RunStore
from covey_edge.config import BrokerSettings, read_broker
from covey_protocol.errors import ConfigError, MachineError, RunError
from covey_protocol.round import Progress
from covey_protocol.seals import SealingKey
from covey_protocol.topics import check_device_id

FLEET = "simulated"
START_TIMEOUT_S = 180.0
AGENT_BYTES = 110 * 2**20  # measured: an agent 42 MiB and its training child 54 MiB, with a small model


class LocalFleet:
    """Use it in a with block: it holds processes. Their files, logs and the coordinator's store are in `folder`.

    The agents start at once; `connect` waits for them. url: of the user's own broker, None starts the embedded one.
    tables: further tables for every agent.toml, such as [privacy]. check: called while waiting; may raise.
    Raises ConfigError for device ids that a fleet cannot have, MachineError where the agents would not fit in memory.
    """

    def __init__(
        self,
        devices: Sequence[DeviceData],
        folder: Path,
        *,
        url: str | None = None,
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        _check_devices(devices)
        self.key = SealingKey.generate()
        self.progress: dict[str, Progress] = {}
        self._folder, self._check_user = folder, check
        self._started = False
        with contextlib.ExitStack() as stack:
            stack.enter_context(logged_to(folder / "logs" / "coordinator.log"))
            self._broker = self._start_broker(stack, url)
            self._table = {"url": url} if url else {"url": self._broker_url, "protocol": "3.1.1"}
            self._files = [self._device(one, tables or {}) for one in devices]
            self._agents = AgentProcesses({one.device_id: one.config for one in self._files}, folder / "logs")
            stack.callback(self._agents.stop)
            self._stack = stack.pop_all()

    def __enter__(self) -> LocalFleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything; safe to call twice."""
        self._stack.close()

    def connect(self, own: OwnTraining = NO_TRAINING) -> Coordinator:
        """The coordinator, when every agent is online. RunError says which agent ended at its start, and why.

        own: as of Coordinator.
        """
        roster = {one.device_id: one.public for one in self._files}
        broker = read_broker(msgspec.convert(self._table, BrokerSettings), self._folder)
        fleet = Fleet(broker, FLEET, self.key, roster, check=self._check)
        fleet.connect()
        self._stack.callback(fleet.close)
        coordinator = Coordinator(fleet, RunStore(self._folder), on_progress=self._take_progress, own=own)
        coordinator.wait_for(len(self._files), START_TIMEOUT_S, lambda online: self._agents.check_start())
        self._started = True
        return coordinator

    def agents(self) -> dict[str, int]:
        """The agents' process ids."""
        return self._agents.pids()

    @property
    def _broker_url(self) -> str:
        assert self._broker is not None
        return self._broker.url

    def _start_broker(self, stack: contextlib.ExitStack, url: str | None) -> BrokerProcess | None:
        if url is not None:
            return None
        broker = BrokerProcess(self._folder / "logs" / "broker.log")
        stack.callback(broker.stop)
        return broker

    def _device(self, device: DeviceData, tables: Mapping[str, Mapping[str, Any]]) -> DeviceFiles:
        place = self._folder / "devices" / device.device_id
        shard = Shard(device.x, device.y)
        return make_device(
            device.device_id, place, FLEET, self._table, self.key.public, shard, device.replica, **tables
        )

    def _take_progress(self, progress: dict[str, Progress]) -> None:
        self.progress = progress

    def _check(self) -> None:
        """Called all the time: were we asked to stop, has a process of ours ended?"""
        self._check_user()
        if self._broker is not None:
            self._broker.check()
        if self._started:
            for device_id, how in self._agents.newly_lost().items():
                raise RunError(f"the agent of {device_id} ended ({how})", f"see {self._folder / 'logs'}")


def _check_devices(devices: Sequence[DeviceData]) -> None:
    for device in devices:
        check_device_id(device.device_id)
    ids = [device.device_id for device in devices]
    if ids != sorted(set(ids)):
        raise ConfigError(
            "the device ids of a fleet must be sorted and different", "name them so that they sort as they are numbered"
        )
    needed, free = len(devices) * AGENT_BYTES, psutil.virtual_memory().available
    if needed > free:
        raise MachineError(
            f"{len(devices)} agents need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            "take fewer devices, or simulate them without a fleet",
        )
