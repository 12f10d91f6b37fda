"""Keys that change and a device that is stolen, in a running fleet: real processes and a real Mosquitto."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import Process, stop_all
from covey_edge.inbox import Inbox
from covey_edge.mqtt import Incoming, MqttTransport, parse_broker
from covey_protocol import codec
from covey_protocol.messages import Envelope, FromDevice, Presence, Verdict
from covey_protocol.seals import PublicKey, SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

IDS = ("ward-1", "ward-2", "ward-3")
CONFIG = """
fleet = "clinic"
run = "digits"
rounds = 1000
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[round]
devices = {devices}
quorum = 2
duration_s = 60
grace_s = 2
pause_s = 0.5
[aggregation]
rule = "mean"
[training]
learning_rate = 0.1
"""


class Clinic:
    """Three agents and a coordinator, and an onlooker that keeps what the devices say."""

    def __init__(self, folder: Path, broker: RunningBroker, bundle: bytes, key: SealingKey) -> None:
        self.folder, self.broker, self.key = folder, broker, key
        self.keys: dict[str, list[str]] = {}
        x = np.random.default_rng(0).random((48, 8, 8, 1), np.float32)
        for name in IDS:
            shard = Shard(x, np.arange(48, dtype=np.int32) % 10)
            made = make_device(name, folder / name, "clinic", {"url": broker.url}, key.public, shard)
            self.keys[name] = [made.public.hex()]
        (folder / "digits.covey").write_bytes(bundle)
        (folder / "coordinator.pem").write_bytes(key.pem())
        self.text = CONFIG.replace("{url}", broker.url)
        self.processes: dict[str, Process] = {}
        self._inbox = Inbox()
        self._onlooker = MqttTransport(parse_broker(broker.url), "onlooker", self._inbox)
        self._onlooker.subscribe(["covey/1/clinic/device/+/up"])
        self._onlooker.connect()

    # --- what an operator does

    @property
    def config(self) -> Path:
        return self.folder / "coordinator.toml"

    def write(self, devices: int = 3) -> None:
        def quoted(keys: list[str]) -> str:
            return json.dumps(keys[0] if len(keys) == 1 else keys)

        roster = "".join(f"{name} = {quoted(keys)}\n" for name, keys in self.keys.items())
        self.config.write_text(f"{self.text.replace('{devices}', str(devices))}[devices]\n{roster}")

    def start(self, name: str) -> None:
        config = self.config if name == "serve" else self.folder / name / "agent.toml"
        command = "serve" if name == "serve" else "agent"
        arguments = [command, "--config", str(config)]
        if name != "serve":
            arguments += ["--parent", str(os.getpid())]
        self.processes[name] = Process(name, arguments, self.folder / f"{name}.log")

    def stop(self, name: str) -> None:
        stop_all([self.processes.pop(name)])

    def covey(self, *arguments: Any) -> str:
        command = [sys.executable, "-m", "covey_edge", *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def close(self) -> None:
        self._onlooker.close()
        for process in self.processes.values():
            if process.name in IDS:
                os.kill(process.pid, signal.SIGCONT)
        stop_all(list(self.processes.values()))

    # --- what is seen

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            found = holds()
            if found:
                return found
            for name, process in self.processes.items():
                assert process.ended() is None, f"{name} ended: {self.log(name)[-3000:]}"
            time.sleep(0.05)
        raise AssertionError(f"{what} did not come\n{self.log('serve')[-3000:]}")

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        path = self.folder / "runs" / "digits" / "coordinator.sqlite"
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
        try:
            return database.execute(query, values).fetchall()
        except sqlite3.OperationalError:
            return []
        finally:
            database.close()

    def published(self) -> int:
        return len(re.findall(r"round \d+/1000 published", self.log("serve")))

    def more_rounds(self, count: int = 2) -> None:
        """So many more: the first may have been under way."""
        before = self.published()
        self.until(lambda: self.published() >= before + count, f"{count} more rounds")

    def newest(self) -> dict[str, tuple[str, str]]:
        """Of the newest round that is over: device -> (status, why)."""
        (round_id,) = self.rows("SELECT id FROM rounds WHERE phase = 'published' ORDER BY rowid DESC LIMIT 1")[0]
        return {name: row for name, *row in self.rows("SELECT id, status, why FROM devices WHERE round = ?", round_id)}

    def accepted(self) -> list[str]:
        return sorted(name for name, (status, _) in self.newest().items() if status == "accepted")

    def heard(self) -> list[Incoming]:
        items = []
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._inbox.get(timeout=0))
        return [item for item in items if isinstance(item, Incoming)]

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self._onlooker.flush([self._onlooker.publish(topic, payload, retain=retain)], timeout_s=10)


@pytest.fixture
def clinic(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker
) -> Iterator[Clinic]:
    made = Clinic(tmp_path, mosquitto, digits_bundle, coordinator_key)
    made.write()
    for name in (*IDS, "serve"):
        made.start(name)
    yield made
    made.close()


def sealed_by(item: Incoming, key: PublicKey) -> bool:
    sender = item.topic.split("/")[4]
    try:
        codec.decode_from_device(item.payload, topic=item.topic, sender=sender, key=key)
    except codec.NotSealed:
        return False
    return True


@pytest.mark.timeout(900)
def test_a_device_moves_to_its_next_key_without_a_stop_of_the_run(clinic: Clinic) -> None:
    clinic.more_rounds(1)
    assert clinic.accepted() == list(IDS)
    # the operator makes a key on the device, and puts it into the roster of the coordinator that runs
    said = clinic.covey("key", "next", "--config", clinic.folder / "ward-2" / "agent.toml")
    new = PublicKey.from_hex(said.split()[1])
    old = PublicKey.from_hex(clinic.keys["ward-2"][0])
    assert f'ward-2 = ["{old.hex()}", "{new.hex()}"]' in said
    clinic.keys["ward-2"].append(new.hex())
    clinic.write()
    clinic.until(lambda: "ward-2 has other keys in the roster: 2" in clinic.log("serve"), "the new roster")
    clinic.more_rounds()  # under the old key, which the roster still has
    assert clinic.accepted() == list(IDS)
    mine = [item for item in clinic.heard() if "/ward-2/" in item.topic]
    assert mine
    assert all(sealed_by(item, old) for item in mine)
    # the device begins to use it
    clinic.stop("ward-2")
    path = clinic.folder / "ward-2" / "agent.toml"
    path.write_text(path.read_text().replace('"device.pem"', '"device-2.pem"'))
    clinic.start("ward-2")
    clinic.more_rounds(3)
    assert clinic.accepted() == list(IDS)
    mine = [item for item in clinic.heard() if "/ward-2/" in item.topic and sealed_by(item, new)]
    assert mine
    # from now on the old key is refused: what it said before, and what its thief says now
    thief = SealingKey.from_pem((clinic.folder / "ward-2" / "device.pem").read_bytes())
    refused = clinic.log("serve").count("not sealed by the key known for ward-2")
    assert all(sealed_by(item, new) for item in clinic.heard() if "/ward-2/" in item.topic)
    goodbye = Presence(False, 2**53)
    topic = "covey/1/clinic/device/ward-2/presence"
    clinic.publish(topic, codec.encode(goodbye, topic=topic, sender="ward-2", sequence=2**53, key=thief))
    clinic.publish(mine[0].topic, replayed_under(mine[0], thief))
    clinic.until(
        lambda: clinic.log("serve").count("not sealed by the key known for ward-2") >= refused + 2, "two refusals"
    )
    # and by the next coordinator, too, though its roster names both
    clinic.stop("serve")
    clinic.start("serve")
    clinic.more_rounds(1)
    assert clinic.accepted() == list(IDS)
    retired = json.loads((clinic.folder / "runs" / "clinic.retired.json").read_text())
    assert retired == {"ward-2": [old.hex()]}
    before = clinic.log("serve").count("not sealed by the key known for ward-2")
    clinic.publish(mine[0].topic, replayed_under(mine[0], thief))
    clinic.until(
        lambda: clinic.log("serve").count("not sealed by the key known for ward-2") > before, "a refusal after it"
    )


def replayed_under(item: Incoming, key: SealingKey) -> bytes:
    """What a device said, under another key of it and with a number that is new."""
    envelope = msgspec.msgpack.decode(item.payload, type=Envelope)
    message = msgspec.msgpack.decode(envelope.body, type=FromDevice)
    number = envelope.sequence + 2**21
    return codec.encode(message, topic=item.topic, sender=envelope.sender, sequence=number, key=key)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_coordinator_moves_to_its_next_key_in_the_middle_of_a_run(clinic: Clinic) -> None:
    clinic.more_rounds(1)
    said = clinic.covey("key", "next", "--config", clinic.config)
    new, old = PublicKey.from_hex(said.split()[1]), clinic.key.public
    for name in IDS:  # every device pins both, one after the other
        path = clinic.folder / name / "agent.toml"
        both = json.dumps([old.hex(), new.hex()])
        path.write_text(path.read_text().replace(f'"{old.hex()}"', both))
        clinic.stop(name)
        clinic.start(name)
    clinic.more_rounds()  # under the old key
    assert clinic.accepted() == list(IDS)
    clinic.stop("serve")
    done = clinic.published()
    keys = f'key_file = "coordinator-2.pem"\nbundle_key = "{old.hex()}"'
    clinic.text = clinic.text.replace('key_file = "coordinator.pem"', keys)
    clinic.write()
    clinic.start("serve")
    clinic.more_rounds()
    assert clinic.accepted() == list(IDS)
    assert clinic.published() >= done + 2
    # no round was lost on the way, and the devices have moved for good
    assert clinic.rows("SELECT count(*) FROM rounds WHERE phase = 'abandoned'") == [(0,)]
    for name in IDS:
        retired = json.loads((clinic.folder / name / "state" / "retired.json").read_text())
        assert retired == {"coordinator": [old.hex()]}
    # a thief of the old key gives a verdict; nobody listens, also not after a restart
    topic = "covey/1/clinic/device/ward-1/down"
    forged = codec.encode(
        Verdict("digits.1.a", "accepted"), topic=topic, sender=codec.COORDINATOR, sequence=2**53, key=clinic.key
    )
    for _ in range(2):
        before = clinic.log("ward-1").count("not sealed by the key known for coordinator")
        clinic.publish(topic, forged)
        clinic.until(
            lambda: clinic.log("ward-1").count("not sealed by the key known for coordinator") > before,  # noqa: B023
            "a refusal by the device",
        )
        clinic.stop("ward-1")
        clinic.start("ward-1")
        clinic.more_rounds(1)
    # the bundle gets its seal, and the old key is history
    clinic.covey(
        "key",
        "reseal",
        clinic.folder / "digits.covey",
        "--sealed-by",
        old.hex(),
        "--key",
        clinic.folder / "coordinator-2.pem",
        "-o",
        clinic.folder / "digits-2.covey",
    )
    clinic.stop("serve")
    clinic.text = clinic.text.replace(f'\nbundle_key = "{old.hex()}"', "").replace("digits.covey", "digits-2.covey")
    clinic.write()
    for name in IDS:
        path = clinic.folder / name / "agent.toml"
        path.write_text(path.read_text().replace(both, json.dumps(new.hex())))
        clinic.stop(name)
        clinic.start(name)
    clinic.start("serve")
    clinic.more_rounds(1)
    assert clinic.accepted() == list(IDS)


@pytest.mark.timeout(900)
def test_a_stolen_device_is_shut_out_within_seconds_and_for_good(clinic: Clinic) -> None:
    clinic.more_rounds(1)
    # a round in which ward-2 has delivered and ward-3 has not
    os.kill(clinic.processes["ward-3"].pid, signal.SIGSTOP)
    stored = "SELECT d.round FROM devices d JOIN rounds r ON r.id = d.round WHERE r.phase = 'inviting' AND {}"
    both = stored.format("d.id = 'ward-2' AND d.progress = 'stored'")
    waiting = stored.format("d.id = 'ward-3' AND d.progress IN ('invited', 'accepted')")
    (round_id,) = clinic.until(lambda: set(clinic.rows(both)) & set(clinic.rows(waiting)), "a delivery").pop()
    said = clinic.covey("revoke", "ward-2", "--config", clinic.config, "--reason", "stolen on Monday")
    assert said == "ward-2 is revoked\n"
    progress = "SELECT progress, reason FROM devices WHERE round = ? AND id = 'ward-2'"
    began = time.monotonic()
    clinic.until(
        lambda: clinic.rows(progress, round_id) == [("revoked", "revoked: stolen on Monday")], "the revocation"
    )
    assert time.monotonic() - began < PATIENCE_S / 2
    os.kill(clinic.processes["ward-3"].pid, signal.SIGCONT)
    verdict = "SELECT status, why FROM devices WHERE round = ? AND id = 'ward-2' AND status IS NOT NULL"
    (found,) = clinic.until(lambda: clinic.rows(verdict, round_id), "its verdict")
    assert found == ("rejected", "revoked: stolen on Monday")
    clinic.until(lambda: "update rejected: revoked: stolen on Monday" in clinic.log("ward-2"), "what the device hears")
    # the others go on without it, also with another coordinator
    clinic.stop("serve")
    clinic.write(devices=2)
    clinic.start("serve")
    clinic.more_rounds()
    assert sorted(clinic.newest()) == ["ward-1", "ward-3"]
    listed = {one["device"]: one for one in json.loads(clinic.covey("devices", "--config", clinic.config, "--json"))}
    assert listed["ward-2"]["revoked"]["reason"] == "stolen on Monday"
    assert listed["ward-1"]["revoked"] is None
    assert "ward-2 is revoked" in clinic.log("serve")
    # and it may come back
    assert clinic.covey("readmit", "ward-2", "--config", clinic.config) == "ward-2 is readmitted\n"
    clinic.until(lambda: "ward-2" in clinic.accepted(), "ward-2 in a round again")
