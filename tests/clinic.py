"""A clinic: a coordinator, three agents and a Mosquitto as processes that tests kill, starve and start again."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from brokers import free_port, retained, start_mosquitto, stop_broker

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.records import ACCEPTED, REJECTED
from covey_coordinator.store import KEEP_ROUNDS, RunStore
from covey_edge.runtime import Model
from covey_edge.withheld import Withheld
from covey_protocol.bundle import read_bundle
from covey_protocol.seals import SealingKey

IDS = ("ward-1", "ward-2", "ward-3")
PUBLISHED = "SELECT id, number FROM rounds WHERE phase = 'published' ORDER BY number"
USED = "SELECT id, offer, round FROM devices WHERE status = 'accepted' ORDER BY id"
VICTIMS = ("serve", "serve", "broker", *IDS)
PER_ROUND_S = 290  # far more than a round takes; a loaded machine needs a minute to start a coordinator
CONFIG = """
fleet = "clinic"
run = "digits"
rounds = {rounds}
bundle = "digits.covey"
key_file = "coordinator.pem"
runs_dir = "{runs_dir}"
[broker]
url = "{url}"
[round]
devices = {quorum}
quorum = {quorum}
duration_s = {duration_s}
answer_s = {answer_s}
grace_s = {grace_s}
goal = {goal}
max_staleness = {max_staleness}
pause_s = {pause_s}
[aggregation]
rule = "mean"
[server]
optimizer = "adam"
learning_rate = 0.01
[training]
learning_rate = 0.1
epochs = {epochs}
[wire]
{wire}
[devices]
{devices}
"""


DEFAULTS = {
    "quorum": 2,
    "duration_s": 90,
    "answer_s": 15,
    "grace_s": 10,
    "goal": 0,
    "max_staleness": 0,
    "pause_s": 0,
    "epochs": 100,
    "wire": "",
    "runs_dir": "runs",
}


def rows_of(path, query):  # type: ignore[no-untyped-def]  # its text is run alone, too
    if not os.path.exists(path):
        return []
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
    try:
        return database.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []  # not made yet
    finally:
        database.close()


QUERY = f"""
import os, pickle, sqlite3, sys
{inspect.getsource(rows_of)}
sys.stdout.buffer.write(pickle.dumps(rows_of(*sys.argv[1:])))
"""


@dataclass
class Clinic:
    """A coordinator, three agents and a broker, each started again whenever it ends."""

    folder: Path
    port: int
    keys: dict[str, str]
    runs: Path  # runs_dir, as `serve` sees it
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)  # what to put before a program's command
    kills: Counter[str] = field(default_factory=Counter)

    def configure(self, rounds: int, **changes: object) -> None:
        """Write coordinator.toml. changes: of the values in DEFAULTS."""
        values = {"url": f"mqtt://127.0.0.1:{self.port}", "rounds": rounds, **DEFAULTS, **changes}
        devices = "\n".join(f'{name} = "{key}"' for name, key in self.keys.items())
        (self.folder / "coordinator.toml").write_text(CONFIG.format(**values, devices=devices))

    def command(self, name: str) -> list[str]:
        covey = [*self.before.get(name, []), sys.executable, "-m", "covey_edge"]
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

    def rows(self, query: str) -> list[tuple[object, ...]]:
        """Of the coordinator's database; nothing where it is not made yet."""
        path = self.runs / "digits" / "coordinator.sqlite"
        command = [*self.before.get("serve", []), sys.executable, "-I", "-S", "-c", QUERY, str(path), query]
        if "serve" in self.before:  # on a disk that only a process inside can open a database on
            return pickle.loads(subprocess.run(command, check=True, capture_output=True).stdout)  # noqa: S301 - ours
        return rows_of(str(path), query)

    def checkpoint(self, number: int) -> Path:
        return self.runs / "digits" / "checkpoints" / "digits" / f"round-{number:05d}.f32"

    def withheld(self, name: str) -> np.ndarray:
        """The numbers that this device's updates have left out."""
        data = (self.folder / name / "state" / "withheld.msgpack").read_bytes()
        return np.frombuffer(msgspec.msgpack.decode(data, type=Withheld).numbers, "<f4")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def story(self) -> str:
        """The ends of all logs."""
        logs = [
            f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:]) for path in self.folder.glob("*.log")
        ]
        return f"kills: {dict(self.kills)}\n" + "\n".join(logs)


def make_clinic(folder: Path, bundle: bytes, key: SealingKey, shards: dict[str, Shard]) -> Clinic:
    """The files of a coordinator and its devices. Skips the test where there is no Mosquitto."""
    port = free_port()
    table = {"url": f"mqtt://127.0.0.1:{port}"}
    devices = [make_device(name, folder / name, "clinic", table, key.public, shard) for name, shard in shards.items()]
    (folder / "digits.covey").write_bytes(bundle)
    (folder / "coordinator.pem").write_bytes(key.pem())
    stop_broker(start_mosquitto(folder, port=port))
    return Clinic(folder, port, {device.device_id: device.public.hex() for device in devices}, folder / "runs")


def digits_shards() -> dict[str, Shard]:
    """All of digits, a third for each device."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return {name: Shard(x[place::3], y[place::3].astype(np.int32)) for place, name in enumerate(IDS)}


def run_with_kills(clinic: Clinic, rounds: int, seed: int, most_kills: int, victims: Sequence[str] = VICTIMS) -> None:
    """Until the configured run is over."""
    rng = random.Random(seed)
    for name in ("broker", *IDS, "serve"):
        clinic.start(name)
    end = time.monotonic() + PER_ROUND_S * rounds
    opened = due = 0
    doomed = ["serve", *rng.choices(victims, k=most_kills - 1)] if most_kills else []
    while not clinic.done():
        assert time.monotonic() < end, clinic.story()
        clinic.keep_running()
        if len(invitations(clinic)) > opened:  # a few kills for each round that was opened
            opened, due = len(invitations(clinic)), rng.choice([1, 2, 3])
        if doomed and due and connected(clinic):
            time.sleep(rng.uniform(0.0, rng.choice([0.5, 3.0])))
            if clinic.running[doomed[0]].poll() is None:
                clinic.kill(doomed.pop(0))
                due -= 1
        time.sleep(0.05)


def connected(clinic: Clinic) -> bool:
    """Whether the coordinator has got as far as the broker: killing its imports over and over shows nothing."""
    return clinic.log("serve").count("connected to") > clinic.kills["serve"]


def invitations(clinic: Clinic) -> list[str]:
    """The rounds that the coordinator has opened, by its own database."""
    return [row[0] for row in clinic.rows("SELECT id FROM rounds")]


def check(clinic: Clinic, bundle: bytes, rounds: int) -> None:
    published = clinic.rows(PUBLISHED)
    assert [number for _, number in published] == list(range(1, rounds + 1)), clinic.story()
    assert clinic.rows("SELECT id FROM rounds WHERE phase NOT IN ('published', 'abandoned')") == []
    kept = clinic.rows("SELECT status, why, id, round FROM devices WHERE sha256 IS NOT NULL")
    assert [row for row in kept if row[0] not in (ACCEPTED, REJECTED)] == []
    assert [row for row in kept if row[0] == REJECTED and not row[1]] == []
    told_by_devices(clinic)
    left = retained(clinic.port, "covey/1/clinic/#")
    assert {topic.split("/")[-1] for topic in left} <= {"presence"}  # no round and no model
    same_bits(clinic, bundle, rounds)


def told_by_devices(clinic: Clinic) -> None:
    """What an agent logged as delivered is stored; what it logged as accepted is accepted."""
    stored = "SELECT id, coalesce(origin, round), status FROM devices WHERE sha256 NOTNULL"
    facts = {(row[0], row[1]): row[2] for row in clinic.rows(stored)}
    for name in IDS:
        log = clinic.log(name)
        for round_id in re.findall(r"round (\S+): update delivered", log):
            assert (name, round_id) in facts, (name, round_id, clinic.story())
        heard = dict(re.findall(r"round (\S+): update (accepted|rejected)", log))
        assert {round_id: facts[name, round_id] for round_id in heard} == heard
        kept = {path.stem for path in (clinic.folder / name / "state" / "outbox").glob("*.msgpack")}
        assert {round_id for device, round_id in facts if device == name} <= heard.keys() | kept, clinic.story()


def same_bits(clinic: Clinic, bundle: bytes, rounds: int) -> None:
    """The models of the newest rounds, computed once more from what is stored."""
    opened = read_bundle(bundle)
    store = RunStore(clinic.runs / "digits")
    first = max(1, rounds - KEEP_ROUNDS // 2)  # abandoned rounds count among those that are kept
    engine = make_engine("direct", make_rule("mean", 0), opened.manifest.parameters, "adam", 0.01)
    model = Model(opened).parameters()
    if first > 1:
        before = store.checkpoints("digits") / f"round-{first - 1:05d}"
        model = np.frombuffer(before.with_suffix(".f32").read_bytes(), "<f4").astype(np.float32)
        assert engine.load_state(before.with_suffix(".state").read_bytes())
    for round_id, number in clinic.rows(PUBLISHED)[first - 1 :]:
        used = [row[:2] for row in clinic.rows(USED) if row[2] == round_id]
        counts = [msgspec.msgpack.decode(offer)["num_examples"] for _, offer in used]
        updates = [store.read_update(str(round_id), str(name)) for name, _ in used]
        model = engine.step(model, updates, counts, [str(name) for name, _ in used]).parameters
        path = store.checkpoints("digits") / f"round-{number:05d}.f32"
        assert path.read_bytes() == model.tobytes(), (number, json.dumps(dict(clinic.kills)))
    store.close()
