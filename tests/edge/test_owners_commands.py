"""What a device's owner can ask and order, with a real agent on a real Mosquitto: status, sent, leave, join, forget."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import RunningBroker
from click.testing import CliRunner, Result
from lone_coordinator import LoneCoordinator
from patience import PATIENCE_S

from covey_edge import preflight
from covey_edge.cli_agent import agent as command
from covey_edge.files import write_atomic
from covey_edge.forgetting import unknown
from covey_edge.local_socket import NAME, NotRunning, ask
from covey_edge.opting_out import LEFT
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import ConfigError
from covey_protocol.messages import Answer, Seen, TrainingPlan
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

CONFIG = """
device_id = "pi"
fleet = "home"
[broker]
url = "{url}"
[identity]
key_file = "device.pem"
coordinator_key = "{coordinator}"
[data]
path = "data.npz"
[privacy]
clip_norm = 0.5
noise_multiplier = 0.1
exact_evaluation = true
[capture]
keep_records = 2
"""


@dataclass
class Home:
    """One device's folder, its agent, and whoever coordinates it."""

    folder: Path
    coordinator: LoneCoordinator
    bundle: bytes
    parameters: bytes
    process: Any = None

    def start(self) -> None:
        log = (self.folder / "agent.log").open("ab")
        arguments = [sys.executable, "-m", "covey_edge", "agent", "--config", str(self.folder / "agent.toml")]
        self.process = subprocess.Popen(arguments, stdout=log, stderr=log)
        log.close()
        end = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(NotRunning):
                ask(self.folder / "state", "status")
                return
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        return (self.folder / "agent.log").read_text()

    def run(self, *arguments: str, give: str | None = None) -> Result:
        return CliRunner().invoke(command, [*arguments, "--config", str(self.folder / "agent.toml")], input=give)

    def says(self, *arguments: str) -> str:
        ended = self.run(*arguments)
        assert ended.exit_code == 0, (ended.output, ended.exception)
        return ended.output

    def status(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.says("status", "--json"))
        return facts

    def invite(self, **plan: Any) -> Any:
        return self.coordinator.invite(
            self.bundle, self.parameters, TrainingPlan(**{"epochs": 1, "learning_rate": 0.1, **plan})
        )


@pytest.fixture
def home(tmp_path: Path, mosquitto: RunningBroker, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Home]:
    rng = np.random.default_rng(0)
    x, y = rng.random((120, 8, 8, 1), np.float32), rng.integers(0, 10, 120, np.int32)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    key = SealingKey.from_seed(b"device".ljust(32, b"."))
    write_atomic(tmp_path / "device.pem", key.pem(), mode=0o600)
    (tmp_path / "agent.toml").write_text(CONFIG.format(url=mosquitto.url, coordinator=coordinator_key.public.hex()))
    parameters = Model(read_bundle(digits_bundle)).parameters().astype("<f4").tobytes()
    with LoneCoordinator(mosquitto.url, "home", "pi", coordinator_key, key.public) as coordinator:
        made = Home(tmp_path, coordinator, digits_bundle, parameters)
        made.start()
        yield made
        made.process.kill()
        made.process.wait()


def lines(home: Home, kind: str) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in home.says("sent", "--json").splitlines()]
    return [line for line in told if line["kind"] == kind]


def test_an_owner_sees_what_left_and_has_it_end_and_forgotten(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    # a round, from the invitation to the verdict
    first = home.invite()
    _, update = home.coordinator.take(first)
    home.coordinator.wait_for(lambda one: isinstance(one, Seen))
    facts = home.status()
    assert (facts["state"], facts["outbox"], facts["connected"]) == ("idle", [], True)
    assert facts["privacy"]["noised"] == 1
    assert [line["kind"] for line in facts["rounds"]] == ["update", "verdict"]
    assert f"privacy    1 noised updates, epsilon {facts['privacy']['epsilon']:.4g}" in home.says("status")
    (told,) = lines(home, "update")
    assert told["bytes"] == len(update)
    numbers = len(update) // 4
    assert told["words"].startswith(
        f"update of {numbers:,} numbers, clipped to 0.5, noise 0.1 times that, not encrypted; 120 examples"
    )
    assert [line["round"] for line in lines(home, "chunks") + lines(home, "offer")] == [first.round_id] * 2
    assert "accepted" in lines(home, "verdict")[0]["words"]

    # an evaluation, of which the numbers are in the log
    evaluation = home.invite(evaluate=("loss", "accuracy"))
    home.coordinator.take(evaluation)
    (told,) = lines(home, "evaluation")
    assert told["words"].startswith("evaluation: loss, accuracy of the model, exact, not encrypted; 120 examples")

    # while it runs, nothing is deleted under it
    refused = home.run("forget", "--yes")
    assert isinstance(refused.exception, ConfigError)
    assert str(home.process.pid) in str(refused.exception)

    # the preflight, beside an agent that stays connected
    monkeypatch.setattr(preflight, "RETAINED_S", 0.3)
    told_check = home.says("check")
    assert f"an agent runs here (process {home.process.pid})" in told_check
    assert "WRONG" not in told_check
    assert "has the shape, the types and the ranges" in told_check  # of the model that the agent has fetched
    assert home.status()["connection"] == facts["connection"]

    # opting out in mid-training; what lies in the outbox is not delivered
    owed = home.invite()
    home.coordinator.wait_for(lambda one: getattr(one, "round_id", "") == owed.round_id and hasattr(one, "update"))
    long = home.invite(epochs=100)
    home.coordinator.wait_for(lambda one: isinstance(one, Answer) and one.round_id == long.round_id)
    assert "declines every round" in home.says("leave")
    assert home.coordinator.failure(long) == LEFT
    assert home.coordinator.failure(owed) == LEFT
    assert home.status()["left_ms"] is not None
    assert home.status()["outbox"] == []

    # and that holds over a restart
    home.process.send_signal(signal.SIGTERM)
    assert home.process.wait(PATIENCE_S) == 0
    assert "does not run" in home.says("status")
    home.start()
    declined = home.invite()
    answer = home.coordinator.wait_for(lambda one: isinstance(one, Answer) and one.round_id == declined.round_id)
    assert (answer.accept, answer.reason) == (False, LEFT)
    assert "takes part again" in home.says("join")
    home.coordinator.take(home.invite())

    # deleting
    refused = home.run("forget", "--stop", give="n\n")
    assert refused.exit_code == 1  # asked, and not wanted
    assert home.process.wait(PATIENCE_S) == 0
    assert any((home.folder / "state" / "blobs").iterdir())
    assert unknown(home.folder / "state") == []  # every file that an agent makes is in a table
    told_plan = home.says("forget", "--yes")
    assert "gone    3 updates and 1 evaluations left this device between" in told_plan
    assert "blobs" in told_plan
    assert set(names(home)) == {"agent.lock", "ledger.json", "sent.jsonl", "sequence"}
    assert unknown(home.folder / "state") == []
    assert (home.folder / "data.npz").exists()
    home.says("forget", "--data", "--everything", "--yes")
    assert names(home) == ["agent.lock", "sequence"]
    assert not (home.folder / "data.npz").exists()


def names(home: Home) -> list[str]:
    return sorted(path.name for path in (home.folder / "state").iterdir())


def test_a_killed_agent_leaves_nothing_in_the_way_of_the_next(home: Home) -> None:
    home.process.kill()
    home.process.wait()
    assert (home.folder / "state" / NAME).exists()
    assert "does not run" in home.says("status")
    with pytest.raises(NotRunning):
        ask(home.folder / "state", "status")
    home.start()
    assert home.status()["state"] == "idle"
