"""A run as its operator sees and steers it: the real commands, the embedded broker, real agents, all as processes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses, BrokerProcess
from covey_coordinator.watching import history
from covey_protocol import errors
from covey_protocol.seals import SealingKey

pytestmark = pytest.mark.fleet

IDS = ("ward-1", "ward-2", "ward-3")
PATIENCE_S = 120  # for one thing to happen on a loaded machine
CONFIG = """
fleet = "clinic"
run = "digits"
rounds = {rounds}
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[round]
devices = 3
quorum = 3
pause_s = 0.2
[aggregation]
rule = "multi-krum"
[metrics]
listen = "127.0.0.1:0"
[devices]
{devices}
"""


@dataclass
class Clinic:
    folder: Path
    keys: str
    url: str
    agents: AgentProcesses
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def configure(self, rounds: int) -> None:
        text = CONFIG.format(rounds=rounds, url=self.url, devices=self.keys)
        (self.folder / "coordinator.toml").write_text(text)

    def serve(self, *options: str) -> Serve:
        made = Serve(self.folder, options)
        self.started.append(made.process)
        return made

    def covey(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "covey_edge", name, "--config", str(self.folder / "coordinator.toml")]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    def facts(self, name: str) -> Any:
        ended = self.covey(name, "--json")
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)


class Serve:
    """`covey serve` with its output in files."""

    def __init__(self, folder: Path, options: tuple[str, ...]) -> None:
        self.out, self.err = folder / "serve.out", folder / "serve.err"
        command = [sys.executable, "-m", "covey_edge", "serve", "--config", str(folder / "coordinator.toml"), *options]
        with self.out.open("wb") as out, self.err.open("wb") as err:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def until(self, done: Callable[[], Any], what: str) -> Any:
        """What `done` gives, once it gives something."""
        end = time.monotonic() + PATIENCE_S
        while not (found := done()):
            told = f"{what}\n{self.out.read_text()}\n{self.err.read_text()}"
            assert time.monotonic() < end, told
            assert self.process.poll() is None, told
            time.sleep(0.1)
        return found

    def says(self, pattern: str) -> re.Match[str]:
        match = self.until(lambda: re.search(pattern, self.out.read_text(), re.MULTILINE), pattern)
        assert isinstance(match, re.Match)
        return match

    def ends(self) -> int:
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def clinic(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Clinic]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    broker = BrokerProcess(tmp_path / "broker.log")
    devices = []
    for place, name in enumerate(IDS):
        shard = Shard(x[place::15][:60], y[place::15][:60].astype(np.int32))
        table = {"url": broker.url}
        devices.append(make_device(name, tmp_path / name, "clinic", table, coordinator_key.public, shard))
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    (tmp_path / "coordinator.pem").write_bytes(coordinator_key.pem())
    agents = AgentProcesses({device.device_id: device.config for device in devices}, tmp_path / "logs")
    keys = "\n".join(f'{one.device_id} = "{one.public.hex()}"' for one in devices)
    made = Clinic(tmp_path, keys, broker.url, agents)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.wait()
    agents.stop()
    broker.stop()


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - our own loopback server
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@pytest.mark.timeout(600)
def test_a_running_coordinator_can_be_measured_paused_stopped_and_aborted(clinic: Clinic) -> None:
    clinic.configure(rounds=1000)
    serve = clinic.serve("--log-format", "json")
    url = serve.says(r"^metrics: (http://127\.0\.0\.1:\d+/metrics)$")[1]
    serve.says(r"^round 3/1000 published")
    check_metrics(scrape(url))
    status = clinic.facts("status")
    assert (status["state"], status["devices_online"], status["rounds_asked"]) == ("running", list(IDS), 1000)
    assert status["last_rounds"][-1]["median_training_loss"] > 0
    devices = clinic.facts("devices")
    assert [one["device"] for one in devices] == list(IDS)
    assert all(one["delivered"] >= 3 and one["online"] and one["last_seen_ms"] for one in devices)

    assert clinic.covey("pause", "--reason", "holidays").stdout == "digits is paused: no new round is opened\n"
    serve.says(r"^paused by the operator: holidays$")
    paused = clinic.facts("status")
    assert (paused["state"], paused["round"], paused["paused"]["reason"]) == ("paused", None, "holidays")

    serve.process.send_signal(signal.SIGTERM)
    assert serve.ends() == errors.EXIT_INTERRUPTED
    check_log(clinic, serve)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) != 0
    stopped = clinic.facts("status")
    assert (stopped["state"], stopped["code"], stopped["devices_online"]) == ("stopped", 130, [])

    again = clinic.serve()
    again.says(r"^paused by the operator: holidays$")
    published = clinic.facts("status")["rounds_published"]
    assert published == paused["rounds_published"]
    assert clinic.covey("resume").stdout == "digits goes on\n"
    again.says(rf"^round {published + 1}/1000 published")

    assert clinic.covey("abort", "--reason", "wrong data").returncode == 0
    assert again.ends() == errors.EXIT_RUN
    last = again.err.read_text().splitlines()[-1]
    assert last.startswith("covey: error: run digits was aborted by the operator: wrong data; an abort is for good")
    assert clinic.facts("runs")[0]["state"] == "aborted"
    assert clinic.facts("status")["round"] is None


def check_metrics(page: dict[str, float]) -> None:
    update_bytes = 4 * 3818
    assert page['covey_rounds_total{outcome="published"}'] >= 3
    assert page["covey_devices_online"] == 3
    assert page["covey_rounds_asked"] == 1000
    assert page["covey_updates_acknowledged_total"] >= 9
    assert page["covey_received_bytes_total"] > 9 * update_bytes
    assert page["covey_sent_bytes_total"] > 3 * update_bytes
    assert page["covey_store_bytes"] > 9 * update_bytes
    assert page['covey_phase_seconds_total{phase="collecting"}'] > 0
    assert page['covey_phases_total{phase="aggregating"}'] >= 3
    assert page['covey_rule_score{of="max"}'] >= page['covey_rule_score{of="median"}'] > 0
    assert page['covey_rule_measurement{name="aggregate_norm"}'] > 0


def check_log(clinic: Clinic, serve: Serve) -> None:
    """Every line but the last word is an object; the story is whole; nothing secret is in it."""
    text = serve.err.read_text()
    *objects, empty, last = text.splitlines()
    assert (empty, last) == ("", "covey: interrupted")
    lines = [json.loads(line) for line in objects]
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    first = next(line["round"] for line in lines if line["event"] == "round_opened")
    story = [line for line in lines if line.get("round") == first]
    assert {line["device"] for line in story if line["event"] == "verdict"} == set(IDS)
    assert [line["phase"] for line in story if line["event"] == "phase_began"] == [
        "inviting",
        "collecting",
        "aggregating",
        "published",
    ]
    assert story[-1]["event"] == "round_ended"
    assert (lines[-1]["event"], lines[-1]["code"]) == ("run_ended", 130)
    secret = (clinic.folder / "coordinator.pem").read_text().splitlines()[1]
    assert secret not in text
    assert max(map(len, text.splitlines())) < 2000  # no model, no update


@pytest.mark.slow  # every day an abort is in the test above, and its every moment in tests/simulation/test_orders.py
@pytest.mark.timeout(600)
@pytest.mark.parametrize("killed", [pytest.param(False, id="while it runs"), pytest.param(True, id="after a kill -9")])
def test_an_abort_ends_the_round_under_way_and_devices_hear_why(clinic: Clinic, killed: bool) -> None:
    clinic.configure(rounds=1000)
    serve = clinic.serve()
    serve.says(r"^round 1/1000 published")
    os.kill(clinic.agents.pids()["ward-3"], signal.SIGSTOP)  # the round under way waits for it
    try:
        serve.until(lambda: two_stored(clinic.folder), "ward-1 and ward-2 deliver")
        if killed:
            serve.process.kill()
            serve.process.wait()
        told = clinic.covey("abort", "--reason", "wrong data")
        assert ("no coordinator runs now" in told.stdout) == killed
        assert (clinic.serve() if killed else serve).ends() == errors.EXIT_RUN
    finally:
        os.kill(clinic.agents.pids()["ward-3"], signal.SIGCONT)
    status = clinic.facts("status")
    assert (status["state"], status["round"]) == ("aborted", None)
    ended = status["last_rounds"][-1]
    assert (ended["outcome"], ended["reason"]) == ("abandoned", "aborted by the operator: wrong data")
    for name in ("ward-1", "ward-2"):
        verdict = f"round {ended['id']}: update rejected"
        log = (clinic.folder / "logs" / f"{name}.log").read_text()
        assert re.search(rf"{re.escape(verdict)}.*aborted by the operator: wrong data", log), log[-2000:]
    assert clinic.serve().ends() == errors.EXIT_RUN
    assert clinic.facts("status")["last_rounds"][-1] == ended  # no other round was opened
    assert clinic.covey("resume").returncode == errors.EXIT_CONFIG


def two_stored(folder: Path) -> bool:
    with history.opened(folder / "runs" / "digits") as opened:
        under_way = opened.status()["round"]
    return under_way is not None and sum(one["progress"] == "stored" for one in under_way["devices"]) == 2


def test_on_a_terminal_there_is_a_live_picture(clinic: Clinic) -> None:
    clinic.configure(rounds=3)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "covey_edge", "serve", "--config", str(clinic.folder / "coordinator.toml")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    clinic.started.append(process)
    os.close(theirs)
    shown = read_all(ours, process)
    os.close(ours)
    assert process.wait(PATIENCE_S) == 0, shown
    last = shown[shown.rindex("clinic/digits  3 of 3 rounds done") :]  # a round may be too fast to see
    assert "devices: 3 of 3 online" in last
    assert re.search(r"ward-1 +online, stored +15.3 kB of 15.3 kB", last)
    assert "round 3 published: 3 of 3 updates, median loss" in last
    assert "round 3/3 published: 3 of 3 updates" in shown  # the plain line above the picture
    assert "Traceback" not in shown


def read_all(terminal: int, process: subprocess.Popen[bytes]) -> str:
    """What a process draws until it ends, without colours and movements of the cursor."""
    drawn, end = b"", time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 0.2)
        try:
            piece = os.read(terminal, 65536) if ready else b""
        except OSError:  # Linux, when the other side is closed
            break
        drawn += piece
        if not piece and process.poll() is not None:
            break
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode(errors="replace"))


ROLLOUT = """
[evaluation]
every = 2
[rollout]
rings = [["ward-1", "ward-2"]]
rounds = 2
baseline = 0.01
max_worse = 0.1
accept = {accept}
"""


@pytest.mark.timeout(2400)  # three starts of a coordinator, which take minutes each on a busy machine
@pytest.mark.slow
def test_a_real_model_stops_at_its_first_ring_until_the_operator_accepts_it(clinic: Clinic) -> None:
    def configure(accept: list[int]) -> None:
        clinic.configure(rounds=3)
        path = clinic.folder / "coordinator.toml"
        text = path.read_text().replace("devices = 3\nquorum = 3", "devices = 2\nquorum = 2")
        path.write_text(text.replace('"multi-krum"', '"mean"') + ROLLOUT.format(accept=accept))

    configure([])
    for _ in range(2):
        serving = clinic.serve()
        assert serving.process.wait(4 * PATIENCE_S) == 8, serving.out.read_text()
        assert "is worse than 0.01 of the baseline by more than 0.1" in serving.err.read_text()
        assert [one["device"] for one in clinic.facts("devices") if one["invited"]] == ["ward-1", "ward-2"]
    configure([2])
    serving = clinic.serve()
    assert serving.process.wait(4 * PATIENCE_S) == 0, serving.out.read_text()
    assert "rollout: ring 1 of 1 ends, accepted by the operator" in serving.out.read_text()
