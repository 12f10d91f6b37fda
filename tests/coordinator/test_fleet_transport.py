"""The coordinator's transport: limits of brokers, what it leaves behind, and real agents on bad connections."""

from __future__ import annotations

import dataclasses
import json
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
from brokers import RunningBroker, retained
from proxy import Proxy

from covey_coordinator.coordinator import Coordinator, RoundResult, Timing
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import MAX_REFUSED, Fleet
from covey_coordinator.retained import RetainedNote
from covey_coordinator.store import RunStore
from covey_edge.mqtt import Incoming, parse_broker
from covey_protocol import codec
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle
from covey_protocol.codec import CHUNK_ROOM_BYTES
from covey_protocol.errors import NotSealed, TransportError
from covey_protocol.messages import BlobRef, Invitation, Presence, TrainingPlan
from covey_protocol.round import RoundSettings
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

    def connect(
        url: str,
        roster: dict[str, Any] | None = None,
        chunk_bytes: int = 65536,
        note: RetainedNote | None = None,
        **broker: Any,
    ) -> Fleet:
        address = dataclasses.replace(parse_broker(url), **broker)
        fleet = Fleet(address, "home", coordinator_key, roster or {}, chunk_bytes=chunk_bytes, note=note)
        fleet.connect()
        made.append(fleet)
        return fleet

    yield connect
    for fleet in made:
        fleet.close()


@pytest.mark.parametrize("limit", [16_384, 131_072])
def test_chunks_fit_the_limit_that_the_broker_announces(broker_with: Start, join: Join, limit: int) -> None:
    broker = broker_with(ANYONE, f"max_packet_size {limit}")
    ref = join(broker.url).publish_blob(DATA)
    assert ref.chunk_bytes == min(65536, limit - CHUNK_ROOM_BYTES)
    kept = retained(broker.port, TOPICS.all_blob_chunks(ref.sha256))
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
    broker_with: Start, join: Join, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covey_coordinator.fleet.CONFIRM_S", 1.0)
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


def test_what_a_killed_coordinator_left_on_the_broker_is_cleared_by_the_next(
    broker_with: Start, join: Join, tmp_path: Path
) -> None:
    """When that one has invited, so that a model that goes on being used stays where it is."""
    broker, path = broker_with(), tmp_path / "home.retained"
    killed = join(broker.url, note=RetainedNote(path))
    left, kept = (killed.publish_blob(DATA + bytes([number])) for number in range(2))
    killed._transport.close()  # and nothing is tidied: what it noted is all that is known
    killed._blobs.clear()
    after = join(broker.url, note=RetainedNote(path))
    assert after.publish_blob(DATA + bytes([1])) == kept
    topics = [TOPICS.all_blob_chunks(ref.sha256) for ref in (left, kept)]
    assert len(retained(broker.port, *topics)) == left.num_chunks + kept.num_chunks
    after.publish_round(invitation(60_000))
    after.publish_blob(DATA[1:])  # acknowledged, and so is all that went before it
    assert len(retained(broker.port, topics[0])) == 0
    assert len(retained(broker.port, topics[1])) == kept.num_chunks
    after.close()
    assert retained(broker.port, *topics) == {}
    assert RetainedNote(path).noted == {}


def test_a_blob_is_noted_before_it_is_published_and_until_the_broker_has_cleared_it(
    broker_with: Start, join: Join, tmp_path: Path
) -> None:
    path = tmp_path / "home.retained"
    fleet = join(broker_with().url, note=RetainedNote(path))
    first = fleet.publish_blob(DATA)
    assert list(RetainedNote(path).noted) == [first.sha256]
    fleet.clear_blob(first.sha256)
    assert list(RetainedNote(path).noted) == [first.sha256]  # nobody has acknowledged that yet
    second = fleet.publish_blob(DATA[1:])  # acknowledged, and so is all that went before it
    third = fleet.publish_blob(DATA[2:])
    assert set(RetainedNote(path).noted) == {second.sha256, third.sha256}


def test_a_round_of_another_model_is_abandoned_with_the_reason(
    broker_with: Start, join: Join, tmp_path: Path, digits_bundle: bytes
) -> None:
    """As after a checkpoint that was lost with its updates: nobody has published the round's model again."""
    store = RunStore(tmp_path / "run")
    before, now = np.zeros(3818, "<f4"), np.ones(3818, "<f4")
    refs = blob_ref(digits_bundle), blob_ref(before.tobytes())
    opened = Invitation("run.2.a", 2, 0, 60_000, *refs, TrainingPlan(1, 0.1), ("a",))
    store.open_round("run", opened, RoundSettings.of(opened, 1, 1.0, 1.0), 0)
    coordinator = Coordinator(join(broker_with().url), store, leave_open=True)
    result = coordinator.resume_round(run_id="run", bundle=digits_bundle, parameters=now, engine=None)
    assert result is not None
    assert (result.outcome, "not what the round was opened with" in result.reason) == ("abandoned", True)
    assert store.unfinished("run") is None
    store.close()


def test_a_note_that_cannot_be_read_notes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "home.retained"
    path.write_bytes(b"nonsense")
    assert RetainedNote(path).noted == {}


def test_a_coordinator_that_died_leaves_no_invitation_longer_than_its_round(broker_with: Start, join: Join) -> None:
    broker = broker_with()
    fleet = join(broker.url)
    fleet.publish_round(invitation(60_000))
    fleet.publish_blob(DATA)  # acknowledged, and so is all that went before it
    assert TOPICS.round in retained(broker.port, TOPICS.round)
    fleet.publish_round(invitation(1_000))
    end = time.monotonic() + 3.5
    while retained(broker.port, TOPICS.round):
        assert time.monotonic() < end
        time.sleep(0.05)


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
    assert len(retained(broker.port, *topics)) == ref.num_chunks
    end = time.monotonic() + 4.5
    while retained(broker.port, *topics):  # nobody looks after it any more
        assert time.monotonic() < end
        time.sleep(0.05)


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


def test_the_operator_hears_once_of_a_devices_trouble(
    coordinator_key: SealingKey, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet(parse_broker("mqtt://127.0.0.1:1"), "home", coordinator_key, {"a": OLD_KEY.public})
    for session, trouble in enumerate(("release 0.2.0 ended with code 1",) * 2 + ("another",), start=7):
        said = Presence(True, session, trouble=trouble)
        data = codec.encode(said, topic=TOPICS.presence("a"), sender="a", sequence=session, key=OLD_KEY)
        fleet._verified(Incoming(TOPICS.presence("a"), data))
    assert [record.getMessage() for record in caplog.records] == [
        "a says: release 0.2.0 ended with code 1",
        "a says: another",
    ]


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
