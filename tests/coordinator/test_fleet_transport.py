"""The coordinator's transport: limits of brokers, what it leaves behind, and real agents on bad connections."""

from __future__ import annotations

import dataclasses
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import RunningBroker
from proxy import Proxy

from covey_coordinator.coordinator import Coordinator, RoundResult, Timing
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import MAX_REFUSED, Fleet
from covey_coordinator.store import RunStore
from covey_edge.mqtt import Incoming, MqttTransport, parse_broker
from covey_protocol import codec
from covey_protocol.bundle import read_bundle
from covey_protocol.codec import CHUNK_ROOM_BYTES
from covey_protocol.errors import NotSealed, TransportError
from covey_protocol.messages import BlobRef, Invitation, Presence, TrainingPlan
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

pytestmark = pytest.mark.broker

TOPICS = Topics("home")
ANYONE = "allow_anonymous true"
DATA = bytes(range(256)) * 1024  # 256 KiB
Start = Callable[..., RunningBroker]
Join = Callable[..., Fleet]


@pytest.fixture
def join(coordinator_key: SealingKey) -> Iterator[Join]:
    """A connected coordinator."""
    made: list[Fleet] = []

    def connect(url: str, roster: dict[str, Any] | None = None, chunk_bytes: int = 65536, **broker: Any) -> Fleet:
        address = dataclasses.replace(parse_broker(url), **broker)
        fleet = Fleet(address, "home", coordinator_key, roster or {}, chunk_bytes=chunk_bytes)
        fleet.connect()
        made.append(fleet)
        return fleet

    yield connect
    for fleet in made:
        fleet.close()


def retained(url: str, topics: list[str], wait_s: float = 1.0) -> dict[str, bytes]:
    """What the broker keeps on these topics."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    transport = MqttTransport(parse_broker(url), "onlooker", inbox)
    transport.subscribe(topics)
    transport.connect()
    time.sleep(wait_s)
    transport.close()
    items = []
    while not inbox.empty():
        items.append(inbox.get())
    return {item.topic: item.payload for item in items if isinstance(item, Incoming)}


@pytest.mark.parametrize("limit", [16_384, 131_072])
def test_chunks_fit_the_limit_that_the_broker_announces(broker_with: Start, join: Join, limit: int) -> None:
    broker = broker_with(ANYONE, f"max_packet_size {limit}")
    ref = join(broker.url).publish_blob(DATA)
    assert ref.chunk_bytes == min(65536, limit - CHUNK_ROOM_BYTES)
    kept = retained(broker.url, [TOPICS.all_blob_chunks(ref.sha256)])
    assert b"".join(kept[TOPICS.blob(ref.sha256, index)] for index in range(ref.num_chunks)) == DATA


def test_chunks_fit_the_limit_that_is_configured(broker_with: Start, join: Join) -> None:
    broker = broker_with(ANYONE, "message_size_limit 16384")
    for protocol in ("5", "3.1.1"):
        fleet = join(broker.url, max_message_bytes=16384, protocol=protocol)
        assert fleet.publish_blob(DATA).chunk_bytes == 16384 - CHUNK_ROOM_BYTES


WORDS = {
    "5": "could not take a message of 65536 bytes",
    "3.1.1": "acknowledged a message of 65536 bytes and did not keep",
}


@pytest.mark.parametrize("protocol", WORDS)
def test_a_limit_that_nobody_announced_is_an_error_that_names_the_size(
    broker_with: Start, join: Join, protocol: str
) -> None:
    fleet = join(broker_with(ANYONE, "message_size_limit 16384").url, protocol=protocol)
    with pytest.raises(TransportError, match=WORDS[protocol]) as caught:
        fleet.publish_blob(DATA)
    assert not caught.value.transient


def test_a_broker_of_tiny_messages_is_refused_at_once(broker_with: Start, join: Join) -> None:
    with pytest.raises(TransportError, match="at most 1000 bytes, covey needs 1536"):
        join(broker_with(ANYONE, "max_packet_size 1000").url)


def invitation(duration_ms: int) -> Invitation:
    ref = BlobRef(bytes(32), 4)
    return Invitation("run.1.a", 1, 0, duration_ms, ref, ref, TrainingPlan(1, 0.1))


def test_a_coordinator_that_died_leaves_no_invitation_longer_than_its_round(broker_with: Start, join: Join) -> None:
    broker = broker_with()
    fleet = join(broker.url)
    fleet.publish_round(invitation(60_000))
    assert TOPICS.round in retained(broker.url, [TOPICS.round])
    fleet.publish_round(invitation(1_000))
    time.sleep(2.5)
    assert retained(broker.url, [TOPICS.round]) == {}


def test_a_model_is_renewed_before_the_broker_forgets_it(
    broker_with: Start, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covey_coordinator.fleet.BLOB_EXPIRY_S", 2.0)
    broker = broker_with()
    fleet = join(broker.url)
    ref = fleet.publish_blob(DATA)
    topics = [TOPICS.all_blob_chunks(ref.sha256)]
    end = time.monotonic() + 4.0
    while time.monotonic() < end:
        fleet.next(0.1)
    assert len(retained(broker.url, topics, 0.5)) == ref.num_chunks
    time.sleep(4.0)  # nobody looks after it any more
    assert retained(broker.url, topics, 0.5) == {}


def test_strangers_under_ever_new_names_do_not_fill_the_memory(coordinator_key: SealingKey) -> None:
    fleet = Fleet(parse_broker("mqtt://127.0.0.1:1"), "home", coordinator_key, {})
    for number in range(MAX_REFUSED + 1000):
        fleet._verified(Incoming(TOPICS.up(f"s{number}"), b"x"))
    assert len(fleet.refused) == MAX_REFUSED


OLD_KEY, NEW_KEY = (SealingKey.from_seed(bytes([number]) * 32) for number in (1, 2))


def presence(key: SealingKey, online: bool, session: int) -> Incoming:
    topic = TOPICS.presence("a")
    data = codec.encode(Presence(online, session), topic=topic, sender="a", sequence=session, key=key)
    return Incoming(topic, data)


def test_a_thief_of_the_old_key_cannot_hold_the_device_offline_under_its_new_one(coordinator_key: SealingKey) -> None:
    roster = {"a": (OLD_KEY.public, NEW_KEY.public)}
    fleet = Fleet(parse_broker("mqtt://127.0.0.1:1"), "home", coordinator_key, roster)
    assert fleet._verified(presence(OLD_KEY, False, 2**53)) is not None
    assert fleet._verified(presence(OLD_KEY, True, 7)) is None  # older than the thief's session
    assert fleet.online() == []
    assert fleet._verified(presence(NEW_KEY, True, 8)) is not None
    assert fleet.online() == ["a"]
    with pytest.raises(NotSealed):
        fleet._verified(presence(OLD_KEY, False, 2**53))
    assert fleet.online() == ["a"]


def test_a_device_that_is_no_longer_in_the_roster_is_not_online(coordinator_key: SealingKey) -> None:
    fleet = Fleet(parse_broker("mqtt://127.0.0.1:1"), "home", coordinator_key, {"a": OLD_KEY.public})
    assert fleet._verified(presence(OLD_KEY, True, 8)) is not None
    fleet.roster.replace({"b": NEW_KEY.public})
    assert fleet.online() == []
    assert fleet._verified(presence(OLD_KEY, True, 9)) is None
    assert fleet.refused == {"a": 1}


# --- rounds of real agents


@dataclasses.dataclass
class Home:
    """One agent behind a proxy, and its coordinator beside the broker."""

    broker: RunningBroker
    proxy: Proxy
    folder: Path
    bundle: bytes
    coordinator: Coordinator

    def run(self) -> RoundResult:
        return self.coordinator.run_round(
            run_id="r",
            number=1,
            bundle=self.bundle,
            parameters=np.zeros(read_bundle(self.bundle).manifest.dimension, np.float32),
            plan=TrainingPlan(epochs=1, learning_rate=0.1),
            device_ids=["pi"],
            quorum=1,
            engine=None,
            timing=Timing(duration_s=100.0, answer_s=60.0, grace_s=60.0),
        )

    def log(self) -> str:
        return (self.folder / "logs" / "pi.log").read_text()


@pytest.fixture
def home(
    tmp_path: Path,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    broker_with: Start,
    proxy_to: Callable[..., Proxy],
    join: Join,
) -> Iterator[Callable[..., Home]]:
    agents: list[AgentProcesses] = []

    def start(*lines: str, chunk_bytes: int = 4096, **proxy: int) -> Home:
        broker = broker_with(*lines)
        before = proxy_to(broker, **proxy)
        rng = np.random.default_rng(0)
        shard = Shard(rng.random((40, 8, 8, 1), np.float32), rng.integers(0, 10, 40, np.int32))
        table = {"url": before.url}
        device = make_device("pi", tmp_path / "pi", "home", table, coordinator_key.public, shard)
        agents.append(AgentProcesses({"pi": device.config}, tmp_path / "logs"))
        fleet = join(broker.url, {"pi": device.public}, chunk_bytes=chunk_bytes)
        coordinator = Coordinator(fleet, RunStore(tmp_path / "run"))
        coordinator.wait_for(1, 60)
        return Home(broker, before, tmp_path, digits_bundle, coordinator)

    yield start
    for processes in agents:
        processes.stop()


@pytest.mark.fleet
@pytest.mark.parametrize("limit", [16_384, 131_072])
def test_a_round_with_default_settings_through_a_broker_that_limits_messages(
    home: Callable[..., Home], limit: int
) -> None:
    assert home(ANYONE, f"max_packet_size {limit}", chunk_bytes=65536).run().outcome == "published"


@pytest.mark.fleet
def test_a_round_over_a_slow_line_that_is_cut_and_stalls_fetches_every_chunk_about_once(
    home: Callable[..., Home],
) -> None:
    place = home(ANYONE, bytes_per_s=25_000)
    before = place.proxy.down

    def disturb() -> None:
        while place.proxy.down - before < len(place.bundle) // 3:
            time.sleep(0.02)
        place.proxy.cut()
        while place.proxy.down - before < 2 * len(place.bundle) // 3:
            time.sleep(0.02)
        place.proxy.stall()
        time.sleep(3)
        place.proxy.go_on()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    result = place.run()
    disturber.join()
    assert result.outcome == "published", place.log()
    down = place.proxy.settled()[1] - before
    model = len(place.bundle) + 4 * read_bundle(place.bundle).manifest.dimension
    print(f"a model of {model} bytes took {down} over a cut and a stall")
    assert model < down < 1.6 * model


@pytest.mark.fleet
def test_a_recording_of_a_round_passes_its_own_check(home: Callable[..., Home], coordinator_key: SealingKey) -> None:
    place = home(ANYONE)
    path = place.folder / "round.jsonl"
    base = [sys.executable, "-m", "covey_edge", "protocol"]
    options = ["record", "--broker", place.broker.url, "--fleet", "home", "--output", str(path)]
    with subprocess.Popen([*base, *options], stdout=subprocess.PIPE, text=True) as recorder:
        assert recorder.stdout is not None
        assert recorder.stdout.readline() == f"recording into {path}\n"
        time.sleep(1)
        assert place.run().outcome == "published"
        time.sleep(1)
        recorder.send_signal(signal.SIGTERM)
        assert recorder.wait(20) == 0
    again = subprocess.run([*base, *options], capture_output=True, text=True, check=False)
    assert "File exists" in again.stderr
    assert again.returncode == 10
    first = json.loads(path.read_text().splitlines()[0])
    assert set(first) == {"time_s", "topic", "payload", "retained"}
    checked = subprocess.run(
        [*base, "check", str(path), "--coordinator-key", coordinator_key.public.hex()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.splitlines()[-1].endswith("0 violations")
