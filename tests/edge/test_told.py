"""What others hear of data that cannot be used: why, and no path, no name of a file or column, nothing of the content.

Everything that an agent gives its connection is looked through, byte by byte; a real trainer reads real files.
"""

from __future__ import annotations

import queue
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from brokers import RunningBroker
from lone_coordinator import LoneCoordinator
from patience import PATIENCE_S

from covey_edge import data_sources
from covey_edge.agent import UNTOLD, AgentProgram
from covey_edge.cli_status import lines_of
from covey_edge.config import load_agent
from covey_edge.frames import Frame
from covey_edge.inbox import Inbox
from covey_edge.local_socket import ask
from covey_edge.mqtt import Incoming, MqttTransport, parse_broker
from covey_edge.png import png
from covey_edge.runtime import Model
from covey_edge.trainer import Trainer
from covey_protocol import codec, device
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import TrainingError
from covey_protocol.messages import Answer, Failure, Invitation, TrainingPlan
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

KEY, DEVICE, FLEET = SealingKey.from_seed(bytes(32)), "pi", "home"
UP = Topics(FLEET).up(DEVICE)
# a folder, a file, a column, a number that is somebody's, a text
SECRETS = ("heartclinic", "miller", "viralload", "77310", "secretly")
FEATURES = ",".join(["viralload", *(f"c{place}" for place in range(63)), "label"])
CELLS = ",".join(["0.5"] * 64)
NPZ, TABLE, DATABASE, CODE = "miller.npz", "miller.csv", "miller.sqlite", "miller.py:read"
SHAPE = {"shape": [8, 8, 1]}
ROWS = {**SHAPE, "table": "readings"}
CLASSES = {"colour": "grey", "classes": ["0", "secretly"]}


def arrays(x: Any = None, y: Any = None, **others: Any) -> Callable[[Path], None]:
    given = {"x": np.full((3, 8, 8, 1), 0.5) if x is None else x, "y": np.zeros(3, int) if y is None else y, **others}
    return lambda folder: np.savez(folder / NPZ, **{name: one for name, one in given.items() if one is not False})


def text(content: str, name: str = TABLE) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content.encode("latin-1")) and None


def code(body: str) -> Callable[[Path], None]:
    return text(
        f"import numpy as np\nfrom covey_protocol.errors import DataError\ndef read():\n    {body}\n", "miller.py"
    )


def readings(label: object = 0, value: object = 0.5) -> Callable[[Path], None]:
    """One row, whose id is somebody's."""

    def write(folder: Path) -> None:
        names = [one for one in FEATURES.split(",") if one != "label"]
        with sqlite3.connect(folder / DATABASE) as database:
            database.execute(f"CREATE TABLE readings (id INTEGER PRIMARY KEY, {', '.join(names)}, label)")
            marks = ",".join("?" * 66)
            row = (77310, value, *[0.5] * 63, label)
            database.execute(f"INSERT INTO readings VALUES ({marks})", row)  # noqa: S608  # question marks
        database.close()

    return write


def pictures(**classes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in classes.items():
            (folder / name.strip("_")).mkdir()
            (folder / name.strip("_") / "miller.png").write_bytes(content)

    return write


def nothing(folder: Path) -> None:
    """No data at all."""


DIGIT = png(np.full((8, 8, 1), 128, np.uint8))


class Case(NamedTuple):
    """path: in the folder; "" for the source's own."""

    write: Callable[[Path], Any]
    told: str
    options: Mapping[str, Any] = MappingProxyType({})
    path: str = ""


def foreign(path: Path) -> Any:
    """A source of another distribution, whose errors are nobody's that we know."""
    raise (TrainingError if path.name == "training" else KeyError)(f"{path}: secretly")


PATHS = {"npz": NPZ, "csv": TABLE, "images": "", "sqlite": DATABASE, "python": CODE, "foreign": ""}
FAULTS: dict[str, dict[str, Case]] = {
    "npz": {
        "no file": Case(nothing, "cannot be read (No such file or directory)"),
        "no archive": Case(text("secretly", NPZ), "is not a readable .npz file"),
        "no such array": Case(arrays(viralload=1, y=False), "lacks an array"),
        "other lengths": Case(arrays(y=np.zeros(2, int)), "x holds (3,) examples and y (2,)"),
        "none": Case(arrays(np.zeros((0, 8, 8, 1)), np.zeros(0)), "holds no examples"),
        "texts": Case(arrays(y=np.array(["secretly"] * 3)), "y does not hold numbers"),
        "another shape": Case(arrays(np.zeros((3, 4))), "of shape (4,), the model takes (8, 8, 1)"),
        "NaN": Case(arrays(np.full((3, 8, 8, 1), np.nan)), "x holds NaN or infinite values in 3 of 3 rows"),
        "labels": Case(arrays(y=np.full(3, 77310)), "labels above 9 in 3 of 3 rows"),
    },
    "csv": {
        "no file": Case(nothing, "cannot be read (No such file or directory)"),
        "no rows": Case(text(""), "holds no rows"),
        "no such column": Case(text("viralload,label\n1,0\n"), "lacks a column", {"columns": ["viralloat"]}),
        "a column twice": Case(text("viralload,viralload,label\n1,1,0\n"), "has a column twice"),
        "no header": Case(text("77310,77310,77310\n"), "has a column twice"),
        "another code page": Case(text("viralload,label\n\xe9,0\n"), "is not text in utf-8"),
        "a quote that does not end": Case(text('viralload,label\n"secretly,0\n'), "no table that can be read"),
        "a shape of another size": Case(text("viralload,label\n1,0\n"), "1 columns do not make", SHAPE),
        "a text": Case(text(f"{FEATURES}\nsecretly{CELLS[3:]},0\n"), "not a number in 1 of 1 rows", SHAPE),
        "a label": Case(text(f"{FEATURES}\n{CELLS},77310\n"), "labels above 9 in 1 of 1 rows", SHAPE),
    },
    "images": {
        "no folder": Case(nothing, "is no folder", path="secretly"),
        "a file": Case(text("", "secretly"), "is no folder", path="secretly"),
        "no images": Case(nothing, "holds no images"),
        "classes without numbers": Case(pictures(secretly=DIGIT), "has folders that are no numbers"),
        "an unknown class": Case(pictures(miller=DIGIT), "none of options.classes", CLASSES),
        "what is no image": Case(pictures(_0_=b"secretly"), "what is no example in 1 of 1 rows", CLASSES),
        "a damaged image": Case(pictures(_0_=DIGIT, secretly=DIGIT[:60]), "no example in 1 of 2 rows", CLASSES),
        "no table of labels": Case(nothing, "no readable table", {"labels": "miller.csv"}),
        "another table": Case(text("viralload\n1\n"), "lacks the columns file and label", {"labels": "miller.csv"}),
        "a size": Case(pictures(_0_=DIGIT), "of shape (8, 8, 3)", {"classes": ["0"]}),
    },
    "sqlite": {
        "no file": Case(nothing, "does not exist", ROWS),
        "no database": Case(text("secretly" * 20, DATABASE), "is no database that can be read", ROWS),
        "no such table": Case(readings(), "lacks the table", {**SHAPE, "table": "miller"}),
        "a query": Case(readings(), "is no database that can", {"query": "SELECT viralloads FROM readings"}),
        "no column for days": Case(readings(), "lacks the column for `days`", {**ROWS, "days": 3}),
        "no such column": Case(readings(), "lacks a column", {**ROWS, "columns": ["viralloads"]}),
        "a text": Case(readings(value="secretly"), "not a number in 1 of 1 rows", ROWS),
        "a label": Case(readings(label=99), "labels above 9 in 1 of 1 rows", ROWS),
    },
    "python": {
        "no file": Case(nothing, "cannot be read (No such file or directory)"),
        "no Python": Case(text("secretly(", "miller.py"), "failed"),
        "no such function": Case(code("return 1"), "lacks the function", path="miller.py:viralload"),
        "an error": Case(code("raise ValueError('secretly')"), "data source failed"),
        "an error of its own": Case(code("raise type('Viralload', (Exception,), {})(77310)"), "data source failed"),
        "a DataError": Case(code("raise DataError(f'{__file__}: secretly')"), UNTOLD),
        "a DataError for others": Case(code("raise DataError(__file__, told='no key')"), "no key"),
        "no pair": Case(code("return 'secretly'"), "returned no pair"),
        "no arrays": Case(code("return [[77310], [1, 2]], [0]"), "returned what is no array"),
        "labels": Case(code("return np.full((2, 8, 8, 1), 0.5), np.full(2, 77310)"), "labels above 9 in 2 of 2 rows"),
        "a module that is not there": Case(nothing, "data source failed", path="miller:read"),
    },
    "foreign": {
        "an error": Case(nothing, "data source failed"),
        "an error of covey's": Case(pictures(training=DIGIT), "data source failed", path="training"),
    },
}


class Wire:
    """In place of a connection: keeps what would leave this device."""

    connected, alive, max_message_bytes, protocol = True, True, None, "5"

    def __init__(self) -> None:
        self.left: list[bytes] = []

    def set_will(self, topic: str, payload: bytes) -> None:
        self.left += [topic.encode(), payload]

    def publish(self, topic: str, payload: bytes, **_: object) -> int:
        self.set_will(topic, payload)
        return len(self.left)

    def unsubscribe(self, topics: object) -> None:
        raise AssertionError("all that is fetched is here")

    subscribe = forget = unsubscribe


class ChildHere:
    """The trainer, real, in this process."""

    busy, pid = False, None

    def __init__(self, program: AgentProgram) -> None:
        self._program, self._trainer = program, Trainer()

    def request(self, token: object, frame: Frame, timeout_s: float) -> None:
        self._program._inbox.put((token, self._trainer.answer(frame)))

    def stop(self) -> None:
        pass


def write_agent(folder: Path, coordinator: SealingKey, data: str, url: str = "mqtt://127.0.0.1:1") -> Path:
    (folder / "device.pem").write_bytes(KEY.pem())
    (folder / "agent.toml").write_text(
        f'device_id = "{DEVICE}"\nfleet = "{FLEET}"\nstate_dir = "state"\n[broker]\nurl = "{url}"\n'
        f'[identity]\nkey_file = "device.pem"\ncoordinator_key = "{coordinator.public.hex()}"\n{data}'
    )
    return folder / "agent.toml"


def table_of(source: str, path: str, options: Mapping[str, Any], name: str = "data") -> str:
    """As in agent.toml."""
    lines = "".join(f"{key} = {msgspec.json.encode(value).decode()}\n" for key, value in options.items())
    return f'[{name}]\nsource = "{source}"\npath = "{path}"\n[{name}.options]\n{lines}'


@pytest.fixture(scope="module")
def blobs(digits_bundle: bytes) -> tuple[bytes, bytes]:
    """The bundle and its parameters."""
    return digits_bundle, Model(read_bundle(digits_bundle)).parameters().astype("<f4").tobytes()


def check_silent(left: list[bytes]) -> None:
    """None of the secrets is in what has left."""
    everything = b"\n".join(left).lower()
    assert [one for one in SECRETS if one.encode() in everything] == []


@pytest.mark.parametrize(("source", "fault"), [(source, fault) for source in FAULTS for fault in FAULTS[source]])
def test_others_hear_why_data_cannot_be_used_and_the_owner_where_they_are(
    source: str,
    fault: str,
    blobs: tuple[bytes, bytes],
    coordinator_key: SealingKey,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [EntryPoint("foreign", f"{__name__}:foreign", data_sources.ENTRY_POINTS)]
    monkeypatch.setattr(data_sources, "_installed", lambda: points)
    case, folder = FAULTS[source][fault], tmp_path / "heartclinic"
    folder.mkdir()
    case.write(folder)
    path = f"heartclinic/{case.path or PATHS[source]}"
    program = AgentProgram(load_agent(write_agent(tmp_path, coordinator_key, table_of(source, path, case.options))))
    refs = [blob_ref(blob) for blob in blobs]
    for ref, blob in zip(refs, blobs):
        program._cache.put(blob, ref.sha256)
    wire = Wire()
    program._transport, program._child = wire, ChildHere(program)  # type: ignore[assignment]
    program._set_will()
    program._publish_presence(online=True)
    program._handle(device.Invited(Invitation("r.1.a", 1, 0, 60_000, *refs, TrainingPlan(1, 0.1))))
    program._take(program._inbox.get(timeout=0))
    status = program.report()
    program._publish_presence(online=False)
    said = [
        codec.decode_from_device(payload, topic=UP, sender=DEVICE, key=KEY.public)[0]
        for topic, payload in zip(wire.left[::2], wire.left[1::2])
        if topic.decode() == UP
    ]
    assert [type(one) for one in said] == [Answer, Failure]
    assert case.told in said[1].reason
    check_silent(wire.left)
    assert str(folder) in caplog.text
    assert str(folder) in status.problem
    assert any(line.startswith("problem ") and str(folder) in line for line in lines_of(msgspec.to_builtins(status)))


GOOD: dict[str, Case] = {
    "npz": Case(arrays(), "cannot be read"),
    "csv": Case(text(f"{FEATURES}\n{CELLS},0\n"), "cannot be read", SHAPE),
    "images": Case(pictures(_0_=DIGIT), "holds no images", {"colour": "grey"}),
    "sqlite": Case(readings(), "does not exist", ROWS),
    "python": Case(code("return np.full((2, 8, 8, 1), 0.5), np.zeros(2)"), "cannot be read"),
}


@pytest.mark.slow
@pytest.mark.broker
def test_nothing_that_a_broker_carries_for_a_device_names_its_data(
    blobs: tuple[bytes, bytes], coordinator_key: SealingKey, mosquitto: RunningBroker, tmp_path: Path
) -> None:
    """One real agent with five tasks, one for each source, whose data go away while it runs."""
    folder, tables = tmp_path / "heartclinic", []
    folder.mkdir()
    for source, case in GOOD.items():
        (folder / source).mkdir()
        case.write(folder / source)
        tables.append(table_of(source, f"heartclinic/{source}/{PATHS[source]}", case.options, f"data.tasks.{source}"))
    config, inbox = write_agent(tmp_path, coordinator_key, "".join(tables), mosquitto.url), Inbox()
    listener = MqttTransport(parse_broker(mosquitto.url), "listener", inbox)
    listener.subscribe(["#"])
    listener.connect()
    log = tmp_path / "agent.log"
    with (
        log.open("wb") as output,
        LoneCoordinator(mosquitto.url, FLEET, DEVICE, coordinator_key, KEY.public) as coordinator,
    ):
        command = [sys.executable, "-m", "covey_edge", "agent", "--config", str(config)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            end = time.monotonic() + PATIENCE_S
            while "connected to" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            for source, case in GOOD.items():
                plan = TrainingPlan(1, 0.1, task=source)
                coordinator.take(coordinator.invite(*blobs, plan, requires=("train", "tasks")))
                for path in sorted((folder / source).rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                invitation = coordinator.invite(*blobs, plan, requires=("train", "tasks"))
                assert case.told in coordinator.failure(invitation)
                status = ask(tmp_path / "state", "status")
                assert str(folder / source) in status["problem"]
                coordinator.close_round(invitation)
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()
    left = []
    while True:
        try:
            item = inbox.get(timeout=1.0)
        except queue.Empty:
            break
        if isinstance(item, Incoming):
            left += [item.topic.encode(), item.payload]
    listener.close()
    assert UP.encode() in left
    check_silent(left)
    assert all(str(folder / source) in log.read_text() for source in GOOD)
