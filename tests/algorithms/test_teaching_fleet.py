"""`covey serve` with machine teaching: real agents and Mosquitto against the numpy reference, also through kills."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from algorithms import teachers
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses, Process
from covey_coordinator.serve import serve
from covey_coordinator.teaching.reference import comt
from covey_edge.recording import check_file
from covey_protocol import codec
from covey_protocol.errors import ConfigError
from covey_protocol.messages import Chunk, Offer
from covey_protocol.seals import SealingKey
from covey_protocol.teaching import Settings

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

ROUNDS = 5
LOSS = "mean_squared_error"
CONFIG = """
fleet = "home"
run = "run"
rounds = {rounds}
bundle = "linear.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[aggregation]
rule = "mean"
[round]
devices = 3
quorum = 3
[training]
algorithm = "comt"
[teaching]
{teaching}
[devices]
{devices}
"""
DATA = {"a": teachers.numbers(1, 20), "b": teachers.numbers(2, 25, 2.0), "c": teachers.numbers(3, 17, 2.0)}
TRUSTED = teachers.numbers(8, 6)


class Fleet:
    """Three agents, of which c holds trusted instances, and a recorder."""

    def __init__(self, folder: Path, url: str, key: SealingKey, bundle: bytes) -> None:
        self.folder, self.url, self._agents = folder, url, {}
        (folder / "linear.covey").write_bytes(bundle)
        (folder / "coordinator.pem").write_bytes(key.pem())
        self.keys = {}
        for name, data in DATA.items():
            own = {"source": "npz", "path": "data.npz", **({"trusted_path": "trusted.npz"} if name == "c" else {})}
            shard = Shard(data.x, data.y)
            made = make_device(name, folder / name, "home", {"url": url}, key.public, shard, data=own)
            self.keys[name] = (made.public,)
        teachers.write(folder / "c" / "trusted.npz", TRUSTED)

    def start(self, name: str) -> None:
        config = {name: self.folder / name / "agent.toml"}
        self._agents[name] = AgentProcesses(config, self.folder / "logs")

    def kill(self, name: str) -> None:
        agent = self._agents.pop(name)
        os.kill(agent.pids()[name], signal.SIGKILL)
        agent.stop()  # collects it

    def stop(self) -> None:
        for agent in self._agents.values():
            agent.stop()

    def configure(self, teaching: str, rounds: int = ROUNDS) -> list[str]:
        devices = "\n".join(f'{name} = "{key.hex()}"' for name, (key,) in self.keys.items())
        text = CONFIG.format(url=self.url, devices=devices, teaching=teaching, rounds=rounds)
        (self.folder / "coordinator.toml").write_text(text)
        return [sys.executable, "-m", "covey_edge", "serve", "--config", str(self.folder / "coordinator.toml")]

    def models(self) -> list[Any]:
        """After each exchange."""
        folder = self.folder / "runs" / "run" / "checkpoints" / "run"
        return [np.frombuffer(path.read_bytes(), "<f4") for path in sorted(folder.glob("*.f32"))]

    def reports(self) -> dict[str, Path]:
        return {name: self.folder / name / "state" / "teaching" for name in DATA}


@pytest.fixture(scope="module")
def bundle(coordinator_key: SealingKey) -> bytes:
    return teachers.linear(coordinator_key, LOSS)


@pytest.fixture
def fleet(tmp_path: Path, bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker) -> Iterator[Fleet]:
    made = Fleet(tmp_path, mosquitto.url, coordinator_key, bundle)
    for name in DATA:
        made.start(name)
    yield made
    made.stop()


@pytest.fixture
def recorded(fleet: Fleet) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Ends the recording of all that the broker delivers and gives its lines."""
    path = fleet.folder / "all.jsonl"
    arguments = ["protocol", "record", "--broker", fleet.url, "--fleet", "home", "--output", str(path)]
    recorder = Process("recorder", arguments, fleet.folder / "recorder.log")

    def lines() -> list[dict[str, Any]]:
        recorder.terminate()
        recorder.wait(PATIENCE_S)
        return [json.loads(line) for line in path.read_text().splitlines()]

    yield lines
    recorder.terminate()


def toml_of(constants: dict[str, float]) -> str:
    return "\n".join(f"{name} = {value}" for name, value in constants.items())


def reference(rounds: int) -> Any:
    data = [teachers.with_intercept(one) for one in DATA.values()]
    nothing = tuple(part[:0] for part in data[0])
    told = Settings(**teachers.CONSTANTS, rounds=rounds, tolerance=0.0)
    return comt(data, [nothing, nothing, teachers.with_intercept(TRUSTED)], teachers.problem(LOSS), told).theta


def check_models(fleet: Fleet) -> None:
    models = fleet.models()
    assert len(models) == 2 * ROUNDS
    assert all(np.array_equal(models[place], models[place - 1]) for place in range(2, 2 * ROUNDS, 2))
    for rounds in range(1, ROUNDS + 1):
        right = reference(rounds)
        assert np.abs(models[2 * rounds - 1] - right).max() <= 1e-4 * np.abs(right).max()


def test_a_fleet_is_the_reference_and_reports_stay_on_the_devices(
    fleet: Fleet, recorded: Callable[[], list[dict[str, Any]]], coordinator_key: SealingKey
) -> None:
    command = fleet.configure(f'holders = ["c"]\n{toml_of(teachers.CONSTANTS)}')
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    assert "round 9/10 (teach) published: 3 of 3" in done.stdout
    assert "round 10/10 (teach-correct) published: 1 of 1" in done.stdout
    check_models(fleet)

    for name, folder in fleet.reports().items():
        told = json.loads((folder / "report.json").read_text())
        assert len(told["instances"]) == len(DATA[name].x)
        assert (folder / "report.html").stat().st_mode & 0o777 == 0o600
    lines = recorded()
    check_traffic(lines)
    said: list[str] = []
    assert check_file(fleet.folder / "all.jsonl", "home", (coordinator_key.public,), fleet.keys, said.append) == 0, said


def check_traffic(lines: list[dict[str, Any]]) -> None:
    """Devices have sent d numbers in each exchange and known metrics, and no word of the report."""
    offers = sent = 0
    for line in lines:
        payload = base64.b64decode(line["payload"])
        assert not any(word in payload for word in (b"suspicion", b"expected", b"crafted", b"<html"))
        if not line["topic"].endswith("/up"):
            continue
        name = line["topic"].split("/")[4]
        message, _ = codec.decode_unverified(payload, topic=line["topic"], sender=name)
        if isinstance(message, Offer):
            assert message.update.size == 4 * (teachers.FEATURES + 1)
            assert set(message.metrics) <= {"loss_before", "accuracy_before", "seconds"}
            offers += 1
        if isinstance(message, Chunk):
            assert len(message.data) == 4 * (teachers.FEATURES + 1)
            sent += 1
    assert offers >= 4 * ROUNDS
    assert sent >= 4 * ROUNDS


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_a_coordinator_that_is_killed_goes_on_to_the_same_models(after: int, fleet: Fleet) -> None:
    """Between shares and corrections, and between two steps of the model."""
    command = fleet.configure(f'holders = ["c"]\n{toml_of(teachers.CONSTANTS)}')
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith(f"round {after}/10"):
                break
        first.send_signal(signal.SIGKILL)
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert second.returncode == 0, second.stderr[-2000:] + second.stdout
    assert "going on after round" in second.stdout
    check_models(fleet)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", ["b", "c"])
def test_a_device_that_is_killed_again_and_again_goes_on_from_what_it_kept(victim: str, fleet: Fleet) -> None:
    command = fleet.configure(f'holders = ["c"]\n{toml_of(teachers.CONSTANTS)}')
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "published" in line and line.startswith(("round 2/", "round 4/", "round 5/", "round 8/")):
                fleet.kill(victim)
                fleet.start(victim)
    assert running.returncode == 0
    check_models(fleet)


BAD = {
    "nobody who trusts": ("lambda_w = 1.0", "teaching.holders"),
    "a stranger": ('holders = ["z"]', "names z"),
    "one twice": ('holders = ["a", "a"]', "a device twice"),
    "a constant out of bounds": ('holders = ["a"]\nlambda_y = 0.4', "lambda_y"),
    "a misspelt one": ('holders = ["a"]\nlambda_v = 0.4', "did you mean `lambda_"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_go_together_is_said_before_anything_starts(
    what: str, tmp_path: Path, bundle: bytes, coordinator_key: SealingKey
) -> None:
    teaching, expected = BAD[what]
    Fleet(tmp_path, "mqtt://127.0.0.1:9", coordinator_key, bundle).configure(teaching)
    with pytest.raises(ConfigError) as refused:
        serve(tmp_path / "coordinator.toml", print)
    assert expected in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_teaching_without_its_table_is_refused(tmp_path: Path, bundle: bytes, coordinator_key: SealingKey) -> None:
    made = Fleet(tmp_path, "mqtt://127.0.0.1:9", coordinator_key, bundle)
    made.configure("")
    path = tmp_path / "coordinator.toml"
    path.write_text(path.read_text().replace("[teaching]\n", ""))
    with pytest.raises(ConfigError, match="without \\[teaching\\]"):
        serve(path, print)
