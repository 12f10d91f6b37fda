"""Backup and restore with real agents, a real coordinator and a real Mosquitto."""

from __future__ import annotations

import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from brokers import retained
from clinic import IDS, Clinic, check, digits_shards, make_clinic, same_bits
from paho.mqtt.enums import CallbackAPIVersion
from patience import PATIENCE_S

from covey_protocol import codec
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

pytestmark = [pytest.mark.broker, pytest.mark.fleet, pytest.mark.slow, pytest.mark.timeout(1800)]

ROUNDS = 4
PUBLISHED = "SELECT max(number) FROM rounds WHERE phase = 'published'"


@pytest.fixture
def clinic(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Clinic]:
    made = make_clinic(tmp_path, digits_bundle, coordinator_key, digits_shards())
    yield made
    made.stop()


def until(clinic: Clinic, what: str, holds: Callable[[], object]) -> None:
    end = time.monotonic() + 3 * PATIENCE_S
    while not holds():
        ended = clinic.running["serve"].poll()
        assert time.monotonic() < end, f"{what}\n{clinic.story()}"
        assert ended is None or holds(), f"covey serve has ended with {ended}\n{clinic.story()}"
        time.sleep(0.05)


def covey(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "covey_edge", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def back_up(clinic: Clinic, words: Path) -> Path:
    out = clinic.folder / "clinic.backup"
    config = str(clinic.folder / "coordinator.toml")
    covey("backup", config, "--out", str(out), "--with-keys", "--passphrase-file", str(words))
    return out


def move_to(clinic: Clinic, backup: Path, words: Path) -> Path:
    """Restore elsewhere, and let nothing of the old coordinator's folder be used any more."""
    new = clinic.folder / "elsewhere"
    covey("restore", str(backup), "--to", str(new), "--passphrase-file", str(words))
    clinic.runs.rename(clinic.folder / "lost")
    for name in ("coordinator.toml", "coordinator.pem", "digits.covey"):
        (clinic.folder / name).unlink()
    clinic.runs = new / "runs"
    return new


def serve_from(clinic: Clinic, folder: Path) -> None:
    with (clinic.folder / "serve.log").open("ab") as log:
        command = [sys.executable, "-m", "covey_edge", "serve", "--config", str(folder / "coordinator.toml")]
        clinic.running["serve"] = subprocess.Popen(command, stdout=log, stderr=log)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words").write_text("correct horse battery staple")
    return tmp_path / "words"


def stored(clinic: Clinic, number: int) -> list[tuple[object, ...]]:
    query = "SELECT d.id, d.sha256 FROM devices d JOIN rounds r ON r.id = d.round WHERE progress = 'stored'"
    return clinic.rows(f"{query} AND phase = 'inviting' AND number = {number}")


def test_a_run_goes_on_elsewhere_from_a_backup_in_the_middle_of_a_round(
    clinic: Clinic, words: Path, digits_bundle: bytes
) -> None:
    """Nothing happened between backup and kill: nothing that was acknowledged is lost, all promises hold."""
    clinic.configure(ROUNDS, quorum=3, epochs=100, duration_s=600, answer_s=300, grace_s=300)
    for name in ("broker", *IDS, "serve"):
        clinic.start(name)
    until(clinic, "round 2 gets no update", lambda: stored(clinic, 2))
    clinic.running["serve"].send_signal(19)  # SIGSTOP: in the middle of whatever it does
    before = stored(clinic, 2)
    backup = back_up(clinic, words)
    clinic.running["serve"].kill()
    clinic.running["serve"].wait()
    serve_from(clinic, move_to(clinic, backup, words))
    until(clinic, "the run does not end", lambda: clinic.running["serve"].poll() is not None)
    assert clinic.done(), clinic.story()
    assert before
    accepted = clinic.rows("SELECT id, sha256 FROM devices WHERE status = 'accepted'")
    assert set(before) <= set(accepted)
    assert clinic.log("serve").count(f"round 2/{ROUNDS} published: 3 of 3 updates") == 1
    check(clinic, digits_bundle, ROUNDS)


def rounds(clinic: Clinic) -> set[object]:
    return {row[0] for row in clinic.rows("SELECT id FROM rounds")}


class Recorder:
    """Everything that the broker delivers, from now on."""

    def __init__(self, port: int) -> None:
        self.heard: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._client = paho.Client(CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *_: client.subscribe("covey/1/clinic/#", qos=1)
        self._client.on_message = lambda client, _, message: self.heard.put((message.topic, message.payload))
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def taken(self) -> list[tuple[str, bytes]]:
        return [self.heard.get() for _ in range(self.heard.qsize())]

    def replay(self, messages: list[tuple[str, bytes]]) -> None:
        for topic, payload in messages:
            self._client.publish(topic, payload, qos=1).wait_for_publish(PATIENCE_S)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def numbers(messages: list[tuple[str, bytes]], key: SealingKey) -> list[int]:
    """Those of the coordinator's messages."""
    topics, found = Topics("clinic"), []
    for topic, payload in messages:
        if payload and (topic == topics.round or topic.endswith("/down")):
            found.append(codec.decode_from_coordinator(payload, topic=topic, key=key.public)[1])
    return found


def test_an_older_backup_loses_the_rounds_since_and_nothing_of_them_can_be_replayed(
    clinic: Clinic, words: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    clinic.configure(ROUNDS, quorum=3, epochs=50, duration_s=600, answer_s=300, grace_s=300, pause_s=3)
    for name in ("broker", *IDS):
        clinic.start(name)
    recorder = Recorder(clinic.port)
    clinic.start("serve")
    until(clinic, "round 1 does not end", lambda: clinic.rows(PUBLISHED) == [(1,)])
    backup = back_up(clinic, words)
    until(clinic, "round 3 does not end", lambda: clinic.rows(PUBLISHED) == [(3,)])
    clinic.running["serve"].kill()
    clinic.running["serve"].wait()
    old, had = recorder.taken(), rounds(clinic)
    new_folder = move_to(clinic, backup, words)
    lost = had - rounds(clinic)
    assert lost
    serve_from(clinic, new_folder)
    until(clinic, "no round is opened", lambda: clinic.rows("SELECT 1 FROM rounds WHERE number = 2"))
    recorder.replay([message for message in old if message[0].endswith(("/up", "/down", "/round"))])
    until(clinic, "the run does not end", lambda: clinic.running["serve"].poll() is not None)
    assert clinic.done(), clinic.story()
    new = recorder.taken()
    recorder.close()
    replayed = set(old)
    said = numbers([message for message in new if message not in replayed], coordinator_key)
    assert said
    assert min(said) > max(numbers(old, coordinator_key))
    assert not lost & rounds(clinic)  # done again under other names
    assert [row[0] for row in clinic.rows("SELECT number FROM rounds WHERE phase = 'published'")] == [1, 2, 3, 4]
    same_bits(clinic, digits_bundle, ROUNDS)
    outboxes = [path for name in IDS for path in (clinic.folder / name / "state" / "outbox").glob("*.msgpack")]
    assert outboxes == [], clinic.story()
    assert {topic.split("/")[-1] for topic in retained(clinic.port, "covey/1/clinic/#")} <= {"presence"}
