"""Several tasks in one fleet: whose turn it is, what a file may say, and the real thing with kills and orders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from brokers import RunningBroker
from clinic import rows_of
from patience import PATIENCE_S

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.serve import CoordinatorConfig
from covey_coordinator.store import RunStore
from covey_coordinator.tasks import Turns, read_tasks
from covey_edge.runtime import Model
from covey_protocol import errors
from covey_protocol.bundle import read_bundle
from covey_protocol.seals import SealingKey

# --- turns


def turns(count: int, made: Turns[str], ready: Callable[[int], str] = lambda turn: "xyz") -> str:
    return "".join(made.choose(ready(turn)) for turn in range(count))


def test_tasks_take_turns_in_the_order_of_the_file() -> None:
    assert turns(7, Turns({"x": 1.0, "y": 1.0, "z": 1.0}, {})) == "xyzxyzx"


def test_twice_the_weight_is_twice_the_rounds() -> None:
    assert Counter(turns(60, Turns({"x": 1.0, "y": 2.0, "z": 3.0}, {}))) == {"x": 10, "y": 20, "z": 30}


def test_who_waited_longest_is_first_after_a_start() -> None:
    last = {"x": 0, "y": 0, "z": 0}
    order = ""
    for now in range(1, 8):  # a program that is killed after every single round
        chosen = Turns({"x": 1.0, "y": 1.0, "z": 1.0}, last).choose("xyz")
        last[chosen] = now
        order += chosen
    assert order == "xyzxyzx"


def test_a_task_that_could_not_have_rounds_does_not_catch_up() -> None:
    made = Turns({"x": 1.0, "y": 1.0, "z": 1.0}, {})
    assert Counter(turns(40, made, lambda turn: "xy"))["z"] == 0
    assert Counter(turns(9, made)) == {"x": 3, "y": 3, "z": 3}


# --- the file

FILE = """
fleet = "clinic"
run = "ward"
bundle = "digits.covey"
key_file = "coordinator.pem"
rounds = 4
[broker]
url = "mqtt://127.0.0.1:1"
[round]
devices = 2
quorum = 2
[aggregation]
rule = "median"
[training]
epochs = 3
[devices]
ward-1 = "KEY"
ward-2 = "KEY"
[[tasks]]
name = "odd"
weight = 2
[[tasks]]
name = "even"
rounds = 9
bundle = "even.covey"
aggregation = { rule = "mean" }
[tasks.training]
learning_rate = 0.5
"""


def test_what_a_task_leaves_out_is_the_files_table_by_table(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text(FILE)
    (odd, odd_weight), (even, even_weight) = read_tasks(tmp_path / "coordinator.toml", CoordinatorConfig)
    assert (odd.run, odd.task, odd.rounds, odd.bundle, odd_weight) == ("ward-odd", "odd", 4, "digits.covey", 2.0)
    assert (even.run, even.task, even.rounds, even.bundle, even_weight) == ("ward-even", "even", 9, "even.covey", 1.0)
    assert (odd.aggregation["rule"], even.aggregation["rule"]) == ("median", "mean")
    assert (odd.training.epochs, even.training.epochs, even.training.learning_rate) == (3, 1, 0.5)
    assert odd.round == even.round


def test_a_file_without_tasks_is_one_run_of_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text(FILE.split("[[tasks]]")[0])
    ((only, weight),) = read_tasks(tmp_path / "coordinator.toml", CoordinatorConfig)
    assert (only.run, only.task, weight) == ("ward", "", 1.0)


BAD = {
    "two of a name": ('"even"', '"odd"', "two tasks have the same name"),
    "a name that is no folder": ('"even"', '"e/ven"', "task 'e/ven' cannot be used"),
    "a name that is too long with the run's": ('"even"', f'"{"e" * 60}"', "run and task"),
    "a mistyped key of a task": ("weight = 2", "wieght = 2", "did you mean `weight`"),
    "a mistyped key in a task's table": ("learning_rate = 0.5", "learning_rat = 0.5", "task even: "),
    "a weight of nothing": ("weight = 2", "weight = 0", "weight"),
    "a setting of the fleet": ("weight = 2", 'fleet = "home"', "unknown field `fleet`"),
    "a rule that cannot be had": ('rule = "mean"', 'rule = "maen"', "did you mean 'mean'"),
    "a bundle that is not there": ("even.covey", "other.covey", "other.covey cannot be read"),
    "a sample below the quorum": ("quorum = 2", "quorum = 2\nsample = 1", "quorum of 2"),
    "a stranger among those meant": ("quorum = 2", 'quorum = 2\nonly = ["ward-9"]', "names ward-9"),
    "too few who are meant": ("quorum = 2", 'quorum = 2\nexclude = ["ward-2"]', "1 keys of devices that may be"),
    "an unknown metric": (
        "[devices]",
        '[evaluation]\nevery = 1\nmetrics = ["f1"]\n[devices]',
        "ask for some of loss, accuracy",
    ),
    "an evaluation of more updates than devices": (
        "[devices]",
        "[evaluation]\nevery = 1\ndevices = 1\n[devices]",
        "[evaluation] asks for 2 updates of 1 devices",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_line_that_names_the_thing(
    what: str, tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    old, new, words = BAD[what]
    assert FILE.count(old) == 1
    (tmp_path / "coordinator.toml").write_text(FILE.replace("KEY", coordinator_key.public.hex()).replace(old, new))
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    for name in ("digits.covey", "even.covey"):
        (tmp_path / name).write_bytes(digits_bundle)
    from covey_coordinator.serve import serve

    with pytest.raises(errors.ConfigError) as caught:
        serve(tmp_path / "coordinator.toml", lambda line: None)
    assert words in str(caught.value)


# --- the real thing

IDS = ("ward-1", "ward-2", "ward-3")
CONFIG = """
fleet = "clinic"
run = "ward"
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[round]
devices = 3
quorum = 2
answer_s = 100
grace_s = 20
pause_s = 0.2
[aggregation]
rule = "mean"
[training]
epochs = 100
[metrics]
listen = "127.0.0.1:0"
[devices]
{devices}
[[tasks]]
name = "odd"
rounds = {odd}
[[tasks]]
name = "even"
rounds = {even}
[tasks.evaluation]
every = 2
"""
DATA = """
[data.tasks.{task}]
path = "{task}.npz"
evaluation_path = "{task}-test.npz"
"""


@dataclass
class Ward:
    """Three agents; ward-3 has no data of task odd. Nobody has the data of even for odd."""

    folder: Path
    keys: str
    url: str
    agents: AgentProcesses
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def configure(self, odd: int, even: int) -> None:
        text = CONFIG.format(url=self.url, devices=self.keys, odd=odd, even=even)
        (self.folder / "coordinator.toml").write_text(text)

    def serve(self, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "covey_edge", "serve", *self.config, *options]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with (self.folder / "out").open("ab") as out, (self.folder / "err").open("ab") as err:
            self.started.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
        return self.started[-1]

    @property
    def config(self) -> tuple[str, str]:
        return "--config", str(self.folder / "coordinator.toml")

    def covey(self, name: str, *arguments: str) -> str:
        command = [sys.executable, "-m", "covey_edge", name, *self.config, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def out(self) -> str:
        return (self.folder / "out").read_text()

    def story(self) -> str:
        return f"{self.out()}\n{(self.folder / 'err').read_text()[-3000:]}"

    def until(self, holds: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end, self.story()
            assert process.poll() is None, self.story()
            time.sleep(0.05)

    def rows(self, task: str, query: str) -> list[Any]:
        return list(rows_of(str(self.folder / "runs" / f"ward-{task}" / "coordinator.sqlite"), query))

    def data(self, name: str, file: str) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self.folder / name / file) as archive:
            return archive["x"].astype(np.float32), archive["y"].astype(np.int32)


@pytest.fixture
def ward(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker) -> Iterator[Ward]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32)
    devices = []
    for place, name in enumerate(IDS):
        made = make_device(
            name, tmp_path / name, "clinic", {"url": mosquitto.url}, coordinator_key.public, Shard(x[:1], y[:1])
        )
        devices.append(made)
        text = made.config.read_text().split("[data]")[0]
        for task, remainder in (("odd", 1), ("even", 0)):
            mine = np.flatnonzero(y % 2 == remainder)[place::3]
            np.savez(made.folder / f"{task}.npz", x=x[mine[:60]], y=y[mine[:60]])
            np.savez(made.folder / f"{task}-test.npz", x=x[mine[60:90]], y=y[mine[60:90]])
            text += DATA.format(task=task) if (name, task) != ("ward-3", "odd") else ""
        made.config.write_text(text)
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    keys = "\n".join(f'{device.device_id} = "{device.public.hex()}"' for device in devices)
    agents = AgentProcesses({device.device_id: device.config for device in devices}, tmp_path / "logs")
    made_ward = Ward(tmp_path, keys, mosquitto.url, agents)
    yield made_ward
    for process in made_ward.started:
        if process.poll() is None:
            process.kill()
            process.wait()
    agents.stop()


PUBLISHED = "SELECT id, number FROM rounds WHERE phase = 'published' AND kind = 'training' ORDER BY number"
USED = "SELECT round, id, offer FROM devices WHERE status = 'accepted' ORDER BY id"
OPEN = "SELECT id FROM rounds WHERE phase NOT IN ('published', 'abandoned')"


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_tasks_come_to_their_ends_through_kills_each_with_its_own_model(ward: Ward, digits_bundle: bytes) -> None:
    ward.configure(odd=5, even=3)
    process = ward.serve()
    for task in ("even", "odd"):  # in the middle of a round of each
        ward.until(lambda task=task: ward.rows(task, OPEN), process)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
        (under_way,) = ward.rows(task, OPEN)[0]
        process = ward.serve("--log-format", "json")
        ward.until(lambda task=task, one=under_way: one in ids(ward.rows(task, PUBLISHED)), process)  # type: ignore[misc]
    assert process.wait(PATIENCE_S) == 0, ward.story()
    opened = [ward.rows(task, "SELECT opened_ms, id FROM rounds") for task in ("odd", "even")]
    order = [round_id.split(".")[0] for _, round_id in sorted([*opened[0], *opened[1]]) if ".e" not in round_id]
    assert order[:2] == ["ward-odd", "ward-even"]
    assert Counter(order[:4]) == {"ward-odd": 2, "ward-even": 2}
    for task, rounds in (("odd", 5), ("even", 3)):
        assert [number for _, number in ward.rows(task, PUBLISHED)] == list(range(1, rounds + 1))
        models_are_made_of_their_own_updates(ward, task, digits_bundle)
    # one that is said while nobody listens is lost
    why = ward.rows("odd", "SELECT DISTINCT reason FROM devices WHERE id = 'ward-3' AND progress = 'declined'")
    assert why == [("declined: this device has no data for task 'odd' ([data] in its agent.toml)",)]
    numbers_are_of_the_held_out_data(ward, digits_bundle)
    assert "even: evaluation of round 2/3 published: 3 of 3 updates, loss " in ward.out()
    assert "3 of 3 on held-out data" in ward.out()
    told = [json.loads(line) for line in (ward.folder / "err").read_text().splitlines() if line.startswith('{"time')]
    ends = {one["run"]: one["code"] for one in told if one["event"] == "run_ended"}
    assert ends == {"ward-odd": 0, "ward-even": 0}
    (last,) = [one for one in told if one["event"] == "round_ended" and ".e3." in one["round"]]
    assert [one["name"] for one in last["evaluation"]] == ["loss", "accuracy"]


def ids(rows: list[Any]) -> list[str]:
    return [row[0] for row in rows]


def models_are_made_of_their_own_updates(ward: Ward, task: str, bundle: bytes) -> None:
    opened, run = read_bundle(bundle), f"ward-{task}"
    store = RunStore(ward.folder / "runs" / run)
    engine = make_engine("direct", make_rule("mean"), opened.manifest.parameters)
    model = Model(opened).parameters()
    for round_id, number in ward.rows(task, PUBLISHED):
        used = [row[1:] for row in ward.rows(task, USED) if row[0] == round_id]
        counts = [msgspec.msgpack.decode(offer)["num_examples"] for _, offer in used]
        assert set(counts) == {60}
        updates = [store.read_update(round_id, name) for name, _ in used]
        model = engine.step(model, updates, counts, [name for name, _ in used]).parameters
        assert (store.checkpoints(run) / f"round-{number:05d}.f32").read_bytes() == model.tobytes()
    store.close()


def numbers_are_of_the_held_out_data(ward: Ward, bundle: bytes) -> None:
    """Every number of the newest evaluation, from the devices' files and the checkpoint."""
    model = Model(read_bundle(bundle))
    path = ward.folder / "runs" / "ward-even" / "checkpoints" / "ward-even" / "round-00003.f32"
    model.set_parameters(np.frombuffer(path.read_bytes(), "<f4"))
    values = np.array([model.evaluate(*ward.data(name, "even-test.npz")) for name in IDS], np.float32)
    found = ward.rows("even", "SELECT metric, mean, median, devices, held_out FROM evaluations WHERE number = 3")
    for metric, mean, median, devices, held_out in found:
        column = values[:, ("loss", "accuracy").index(metric)]
        assert median == pytest.approx(np.median(column), rel=1e-6)
        assert mean == pytest.approx(column.mean(), rel=1e-5)  # all have 30 examples there
        assert (devices, held_out) == (3, 3)
    assert len(found) == 2


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.timeout(900)
def test_one_task_is_paused_and_aborted_and_the_other_goes_on(ward: Ward) -> None:
    ward.configure(odd=1000, even=3)
    process = ward.serve()
    ward.until(lambda: ward.rows("odd", PUBLISHED), process)
    assert ward.covey("pause", "--task", "odd", "--reason", "a walk") == "ward-odd is paused: no new round is opened\n"
    ward.until(lambda: "odd: paused by the operator: a walk" in ward.out(), process)
    before = len(ward.rows("odd", PUBLISHED))
    ward.until(lambda: len(ward.rows("even", PUBLISHED)) == 3, process)
    assert len(ward.rows("odd", PUBLISHED)) == before
    ward.until(lambda: "even: all rounds are published" in ward.out(), process)
    states = {one["run"]: one["state"] for one in json.loads(ward.covey("status", "--json"))}
    assert states == {"ward-odd": "paused", "ward-even": "finished"}
    (only,) = [json.loads(ward.covey("status", "--task", "even", "--json"))]
    assert (only["rounds_published"], only["evaluation"]["number"]) == (3, 3)
    assert ward.covey("resume") == "ward-odd goes on\nward-even was not paused\n"
    ward.until(lambda: len(ward.rows("odd", PUBLISHED)) > before, process)
    assert ward.covey("abort", "--task", "odd", "--reason", "wrong data") == "ward-odd is aborted\n"
    assert process.wait(PATIENCE_S) == errors.EXIT_RUN, ward.story()
    assert "run ward-odd was aborted by the operator: wrong data" in ward.story()
    table = ward.covey("runs").splitlines()
    assert [line.split()[:3] for line in table[1:]] == [
        ["ward-even", "finished", "3/3"],
        ["ward-odd", "aborted", f"{len(ward.rows('odd', PUBLISHED))}/1000"],
    ]
    assert "accuracy 0." in table[1]
    assert "ward-even:" in ward.covey("devices")
