"""A real agent on a real broker between hostile peers: it refuses, says why, stays healthy, and serves the honest.

What is below this level: any bytes (tests/protocol/test_hostile_input.py), damaged bundles (test_bundle.py there),
models made to read data (test_model_screening.py, tests/coordinator/test_hostile_coordinator.py).
"""

from __future__ import annotations

import dataclasses
import io
import queue
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from brokers import RunningBroker
from lone_coordinator import LoneCoordinator
from msgspec.structs import replace
from patience import PATIENCE_S

from covey_coordinator.demo.devices import DeviceFiles, Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_edge.agent import AgentProgram
from covey_edge.config import load_agent
from covey_edge.inbox import Inbox
from covey_edge.mqtt import Incoming, MqttTransport, parse_broker
from covey_edge.runtime import Model
from covey_protocol import codec, device
from covey_protocol.bundle import read_bundle
from covey_protocol.codec import COORDINATOR
from covey_protocol.messages import Answer, Invitation, TrainingPlan
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

FLEET, DEVICE = "home", "pi"
TOPICS = Topics(FLEET)
STRANGER = SealingKey.from_seed(b"stranger".ljust(32, b"."))
PLAN = TrainingPlan(1, 0.1)
FLOOD = 10_000


@dataclasses.dataclass(frozen=True)
class Scene:
    """One agent process, its coordinator, and somebody else with access to the broker."""

    files: DeviceFiles
    process: psutil.Process
    log: Path
    coordinator: LoneCoordinator
    stranger: MqttTransport
    key: SealingKey
    bundle: bytes
    parameters: bytes

    def trains(self) -> Invitation:
        """A whole honest round."""
        invitation = self.coordinator.invite(self.bundle, self.parameters, PLAN)
        offer, update = self.coordinator.take(invitation)
        assert len(update) == offer.update.size == len(self.parameters)
        return invitation

    def says(self, words: str) -> None:
        """Wait for these words in the agent's log."""
        end = time.monotonic() + PATIENCE_S
        while words not in self.log.read_text():
            assert time.monotonic() < end, f"{words!r} is not in {self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        assert self.stranger.flush([self.stranger.publish(topic, payload, retain=retain)], PATIENCE_S)


@pytest.fixture
def scene(
    tmp_path: Path, mosquitto: RunningBroker, coordinator_key: SealingKey, digits_bundle: bytes
) -> Iterator[Scene]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    shard = Shard((x[:40] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[:40])
    files = make_device(DEVICE, tmp_path / DEVICE, FLEET, {"url": mosquitto.url}, coordinator_key.public, shard)
    agents = AgentProcesses({DEVICE: files.config}, tmp_path / "logs")
    stranger = MqttTransport(parse_broker(mosquitto.url), "stranger", Inbox())
    parameters = Model(read_bundle(digits_bundle)).parameters().astype("<f4").tobytes()
    try:
        stranger.connect()
        with LoneCoordinator(mosquitto.url, FLEET, DEVICE, coordinator_key, files.public) as coordinator:
            process = psutil.Process(agents.pids()[DEVICE])
            log = tmp_path / "logs" / f"{DEVICE}.log"
            yield Scene(files, process, log, coordinator, stranger, coordinator_key, digits_bundle, parameters)
        assert agents.newly_lost() == {}
    finally:
        stranger.close()
        agents.stop()


def sealed(message: Any, topic: str, key: SealingKey, sequence: int = 2**52) -> bytes:
    return codec.encode(message, topic=topic, sender=COORDINATOR, sequence=sequence, key=key)


def test_forged_moved_and_repeated_invitations_are_not_followed(scene: Scene) -> None:
    first = scene.trains()
    fake = {why: replace(first, round_id=f"fake.{number}.a") for number, why in enumerate(FORGERIES)}
    for why, forge in FORGERIES.items():
        scene.publish(TOPICS.round, forge(scene, fake[why]))
    for words in ("not sealed by the key", "not a covey message"):
        scene.says(words)
    scene.trains()
    heard = {getattr(message, "round_id", "") for message in scene.coordinator.heard}
    assert heard.isdisjoint({one.round_id for one in fake.values()})


def _of_another_fleet(scene: Scene, fake: Invitation) -> bytes:
    return sealed(fake, Topics("other").round, scene.key)


def _moved(scene: Scene, fake: Invitation) -> bytes:
    return sealed(fake, TOPICS.down(DEVICE), scene.key)


def _changed(scene: Scene, fake: Invitation) -> bytes:
    data = bytearray(sealed(fake, TOPICS.round, scene.key))
    place = data.index(fake.round_id.encode())
    data[place : place + 4] = b"FAKE"
    return bytes(data)


FORGERIES: dict[str, Callable[[Scene, Invitation], bytes]] = {
    "a stranger's key": lambda scene, fake: sealed(fake, TOPICS.round, STRANGER),
    "the coordinator's, for another fleet": _of_another_fleet,
    "the coordinator's, from another topic": _moved,
    "the coordinator's, with a number that is long past": lambda scene, fake: sealed(fake, TOPICS.round, scene.key, 1),
    "the coordinator's, with another round's id written in": _changed,
    "no message at all": lambda scene, fake: b"\x00\xff" * 100,
}


def _zip_bomb() -> bytes:
    """A quarter of a gigabyte of zeros in as many kilobytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("manifest.json", "seal"):
            archive.writestr(name, b"{}")
        with archive.open("model.tflite", "w") as entry:
            for _ in range(256):
                entry.write(bytes(2**20))
    return buffer.getvalue()


@pytest.mark.slow
def test_hostile_bundles_and_plans_cost_their_round_and_nothing_more(scene: Scene) -> None:
    from handmade_bundles import linear_bundle

    scene.trains()
    peak = scene.process.memory_info().rss
    hostile = {
        "seal is not the expected coordinator's": linear_bundle(STRANGER),
        "compressed": _zip_bomb(),
        "not a covey bundle": b"PK\x03\x04" + bytes(500),
    }
    for words, bundle in hostile.items():
        invitation = scene.coordinator.invite(bundle, scene.parameters, PLAN)
        assert words in scene.coordinator.failure(invitation)
    greedy = scene.coordinator.invite(scene.bundle, scene.parameters, TrainingPlan(1000, 0.1))
    answer = scene.coordinator.wait_for(lambda one: isinstance(one, Answer) and one.round_id == greedy.round_id)
    assert not answer.accept
    assert "more than this device allows" in answer.reason
    short = scene.coordinator.invite(scene.bundle, scene.parameters[:-4], PLAN)
    assert "parameters came" in scene.coordinator.failure(short)
    scene.trains()
    assert scene.process.memory_info().rss < peak + 10e6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_flood_and_garbage_that_the_broker_keeps_cost_little_and_honest_rounds_go_on(scene: Scene) -> None:
    first = scene.trains()
    topics = [TOPICS.round, TOPICS.down(DEVICE), TOPICS.presence(DEVICE)]
    topics += [TOPICS.blob(ref.sha256, 0) for ref in first.blobs]
    for topic in topics:
        scene.publish(topic, b"garbage " * 1000, retain=True)
    before, cpu = scene.process.memory_info().rss, sum(scene.process.cpu_times()[:2])
    garbage = [bytes([number % 256]) * 2000 for number in range(256)]
    sent = [scene.stranger.publish(TOPICS.down(DEVICE), garbage[number % 256]) for number in range(FLOOD)]
    assert scene.stranger.flush(sent, PATIENCE_S)
    scene.coordinator.heard = [one for one in scene.coordinator.heard if not hasattr(one, "online")]
    scene.trains()
    grown, spent = _peak(scene.process.pid) - before, sum(scene.process.cpu_times()[:2]) - cpu
    print(f"\n{FLOOD} messages: {grown / 1e6:.1f} MB more, {spent:.1f} s of processor time")
    assert grown < 60e6  # 32 MiB wait at most (inbox.HOLD_BYTES), and what is under way
    assert spent < 30.0


def _peak(pid: int) -> int:
    """The most resident bytes this process has ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


class Flood:
    """An inbox that always has something, of which nothing takes longer than a moment."""

    def __init__(self, program: AgentProgram) -> None:
        self._program, self.given, self._end = program, 0, time.monotonic() + 5.0

    def get(self, timeout: float | None = None) -> Any:
        self.given += 1
        if time.monotonic() > self._end:
            raise queue.Empty
        return Incoming(TOPICS.down(DEVICE), b"garbage")

    def put(self, item: Any) -> None:
        pass


def test_time_passes_for_the_agent_while_a_flood_comes(tmp_path: Path, coordinator_key: SealingKey) -> None:
    files = make_device(
        DEVICE, tmp_path, FLEET, {"url": "mqtt://127.0.0.1:1"}, coordinator_key.public, Shard(np.zeros(1), np.zeros(1))
    )
    program = AgentProgram(load_agent(files.config))
    flood = Flood(program)
    program._inbox = flood  # type: ignore[assignment]
    ticks: list[int] = []

    def handle(event: device.Event) -> None:
        ticks.append(flood.given)
        program.stop()

    program._handle = handle  # type: ignore[method-assign]
    program.run()
    program.close()
    assert ticks
    assert ticks[0] > 10
    assert flood.given < ticks[0] + 3  # the flood had not ended
