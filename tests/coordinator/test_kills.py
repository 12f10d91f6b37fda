"""`kill -9` of coordinator, agents and broker at random moments, with real processes and a real Mosquitto.

What must hold at the end: all rounds are published; every update that was acknowledged has a verdict, and its device
has heard it or still has the update in its outbox, so that it will ask; the model is, bit for bit, what the accepted
updates of each round make of the model before it.
"""

from __future__ import annotations

import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from brokers import free_port, start_mosquitto, stop_broker

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.records import ACCEPTED, REJECTED
from covey_coordinator.store import KEEP_ROUNDS, RunStore
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

IDS = ("ward-1", "ward-2", "ward-3")
PUBLISHED = "SELECT id, number FROM rounds WHERE phase = 'published' ORDER BY number"
USED = "SELECT id, offer, round FROM devices WHERE status = 'accepted' ORDER BY id"
PER_ROUND_S = 290  # far more than a round takes; a loaded machine needs a minute to start a coordinator
CONFIG = """
fleet = "clinic"
run = "digits"
rounds = {rounds}
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[round]
devices = 2
quorum = 2
duration_s = 90
answer_s = 15
grace_s = 10
[aggregation]
rule = "mean"
[server]
optimizer = "adam"
learning_rate = 0.01
[training]
learning_rate = 0.1
epochs = {epochs}
[devices]
{devices}
"""


@dataclass
class Clinic:
    """A coordinator, three agents and a broker, each started again whenever it ends."""

    folder: Path
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)

    def command(self, name: str) -> list[str]:
        covey = [sys.executable, "-m", "covey_edge"]
        if name == "serve":
            return [*covey, "serve", "--config", str(self.folder / "coordinator.toml")]
        return [*covey, "agent", "--config", str(self.folder / name / "agent.toml")]

    def start(self, name: str) -> None:
        if name == "broker":
            self.running[name] = start_mosquitto(self.folder, port=self.port).process
            return
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(self.command(name), stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()
        self.kills[name] += 1

    def keep_running(self) -> None:
        """The service manager: start again what ended by itself, but for a coordinator that is done."""
        for name, process in list(self.running.items()):
            if process.poll() is not None and not (name == "serve" and process.returncode == 0):
                self.start(name)

    def done(self) -> bool:
        return self.running["serve"].poll() == 0

    def stop(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def clinic(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Clinic]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    made = Clinic(tmp_path, free_port())
    url = f"mqtt://127.0.0.1:{made.port}"
    devices = []
    for place, name in enumerate(IDS):
        shard = Shard(x[place::3], y[place::3].astype(np.int32))
        devices.append(make_device(name, tmp_path / name, "clinic", {"url": url}, coordinator_key.public, shard))
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    keys = "\n".join(f'{device.device_id} = "{device.public.hex()}"' for device in devices)
    (tmp_path / "template").write_text(CONFIG.replace("{url}", url).replace("{devices}", keys))
    stop_broker(start_mosquitto(tmp_path, port=made.port))  # skips here where there is none
    yield made
    made.stop()


def run_with_kills(clinic: Clinic, rounds: int, epochs: int, seed: int, most_kills: int) -> None:
    rng = random.Random(seed)
    text = (clinic.folder / "template").read_text().replace("{rounds}", str(rounds)).replace("{epochs}", str(epochs))
    (clinic.folder / "coordinator.toml").write_text(text)
    for name in ("broker", *IDS, "serve"):
        clinic.start(name)
    end = time.monotonic() + PER_ROUND_S * rounds
    opened = due = 0
    victims = ["serve", *rng.choices(["serve", "broker", *IDS], weights=[2, 1, 1, 1, 1], k=most_kills - 1)]
    while not clinic.done():
        assert time.monotonic() < end, story(clinic)
        clinic.keep_running()
        if len(invitations(clinic)) > opened:  # a few kills for each round that was opened
            opened, due = len(invitations(clinic)), rng.choice([1, 2, 3])
        if victims and due and connected(clinic):
            time.sleep(rng.uniform(0.0, rng.choice([0.5, 3.0])))
            if clinic.running[victims[0]].poll() is None:
                clinic.kill(victims.pop(0))
                due -= 1
        time.sleep(0.05)


def connected(clinic: Clinic) -> bool:
    """Whether the coordinator has got as far as the broker: killing its imports over and over shows nothing."""
    return (clinic.folder / "serve.log").read_text().count("connected to") > clinic.kills["serve"]


def invitations(clinic: Clinic) -> list[str]:
    """The rounds that the coordinator has opened, by its own database."""
    return [row[0] for row in rows(clinic, "SELECT id FROM rounds")]


def rows(clinic: Clinic, query: str) -> list[tuple[object, ...]]:
    path = clinic.folder / "runs" / "digits" / "coordinator.sqlite"
    if not path.exists():
        return []
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
    try:
        return database.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []  # not made yet
    finally:
        database.close()


def story(clinic: Clinic) -> str:
    logs = [
        f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:]) for path in clinic.folder.glob("*.log")
    ]
    return f"kills: {dict(clinic.kills)}\n" + "\n".join(logs)


def check(clinic: Clinic, bundle: bytes, rounds: int) -> None:
    published = rows(clinic, PUBLISHED)
    assert [number for _, number in published] == list(range(1, rounds + 1)), story(clinic)
    assert rows(clinic, "SELECT id FROM rounds WHERE phase NOT IN ('published', 'abandoned')") == []
    kept = rows(clinic, "SELECT status, why, id, round FROM devices WHERE sha256 IS NOT NULL")
    assert [row for row in kept if row[0] not in (ACCEPTED, REJECTED)] == []
    assert [row for row in kept if row[0] == REJECTED and not row[1]] == []
    told_by_devices(clinic)
    same_bits(clinic, bundle, rounds)


def told_by_devices(clinic: Clinic) -> None:
    """What an agent logged as delivered is stored; what it logged as accepted is accepted."""
    stored = "SELECT id, coalesce(origin, round), status FROM devices WHERE sha256 NOTNULL"
    facts = {(row[0], row[1]): row[2] for row in rows(clinic, stored)}
    for name in IDS:
        log = (clinic.folder / f"{name}.log").read_text()
        for round_id in re.findall(r"round (\S+): update delivered", log):
            assert (name, round_id) in facts, (name, round_id, story(clinic))
        heard = dict(re.findall(r"round (\S+): update (accepted|rejected)", log))
        assert {round_id: facts[name, round_id] for round_id in heard} == heard
        kept = {path.stem for path in (clinic.folder / name / "state" / "outbox").glob("*.msgpack")}
        assert {round_id for device, round_id in facts if device == name} <= heard.keys() | kept, story(clinic)


def same_bits(clinic: Clinic, bundle: bytes, rounds: int) -> None:
    """The models of the newest rounds, computed once more from what is stored."""
    opened = read_bundle(bundle)
    store = RunStore(clinic.folder / "runs" / "digits")
    first = max(1, rounds - KEEP_ROUNDS // 2)  # abandoned rounds count among those that are kept
    engine = make_engine("direct", make_rule("mean", 0), opened.manifest.parameters, "adam", 0.01)
    model = Model(opened).parameters()
    if first > 1:
        before = store.checkpoints("digits") / f"round-{first - 1:05d}"
        model = np.frombuffer(before.with_suffix(".f32").read_bytes(), "<f4").astype(np.float32)
        assert engine.load_state(before.with_suffix(".state").read_bytes())
    for round_id, number in rows(clinic, PUBLISHED)[first - 1 :]:
        used = [row[:2] for row in rows(clinic, USED) if row[2] == round_id]
        counts = [msgspec.msgpack.decode(offer)["num_examples"] for _, offer in used]
        updates = [store.read_update(str(round_id), str(name)) for name, _ in used]
        model = engine.step(model, updates, counts, [str(name) for name, _ in used]).parameters
        path = store.checkpoints("digits") / f"round-{number:05d}.f32"
        assert path.read_bytes() == model.tobytes(), (number, json.dumps(dict(clinic.kills)))
    store.close()


@pytest.mark.timeout(900)
def test_rounds_survive_kills_of_everything(clinic: Clinic, digits_bundle: bytes) -> None:
    run_with_kills(clinic, rounds=3, epochs=100, seed=1, most_kills=6)
    assert clinic.kills["serve"] >= 1
    check(clinic, digits_bundle, 3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_rounds_survive_kills_of_everything(clinic: Clinic, digits_bundle: bytes) -> None:
    run_with_kills(clinic, rounds=50, epochs=100, seed=2, most_kills=90)
    assert min(clinic.kills[name] for name in ("serve", "broker", *IDS)) >= 3
    check(clinic, digits_bundle, 50)


@pytest.mark.timeout(900)
def test_an_encrypted_round_survives_a_kill_of_the_coordinator(clinic: Clinic, digits_bundle: bytes) -> None:
    template = clinic.folder / "template"
    wire = '[wire]\nencryption = true\ncompression = "rotated-8bit"\n[devices]'
    template.write_text(template.read_text().replace("[devices]", wire))
    run_with_kills(clinic, rounds=1, epochs=100, seed=3, most_kills=1)
    assert clinic.kills["serve"] == 1
    check(clinic, digits_bundle, 1)
