"""A real agent, a real coordinator and a real Mosquitto, and a phone made up of commands that print what a test wants.

The agent takes it for Android in Termux. What a change does to its work is read from logs, /proc and the coordinator.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import RunningBroker
from patience import PATIENCE_S

from covey_coordinator.demo.devices import Shard, make_device
from covey_edge.local_socket import NotRunning, ask
from covey_protocol.seals import SealingKey

BATTERY = '{{"percentage": 80, "plugged": "{0}", "status": "{1}"}}'
EXAMPLES = 20_000
LONG = 1000  # epochs that nobody waits for
ON_MAINS, ON_BATTERY = ("PLUGGED_AC", "CHARGING"), ("UNPLUGGED", "DISCHARGING")
COORDINATOR = """
fleet = "home"
run = "digits"
rounds = 1
bundle = "digits.covey"
key_file = "coordinator.pem"
[broker]
url = "{url}"
[round]
devices = 1
quorum = 1
duration_s = {duration_s}
answer_s = 100
{round}
[aggregation]
rule = "mean"
[training]
learning_rate = 0.05
epochs = {epochs}
[devices]
phone = "{key}"
"""


class Phone:
    """An agent whose battery a test plugs in and out, beside a coordinator of one round."""

    def __init__(self, folder: Path, url: str, bundle: bytes, key: SealingKey) -> None:
        self.folder, self.url, self.key = folder, url, key
        (folder / "digits.covey").write_bytes(bundle)
        (folder / "coordinator.pem").write_bytes(key.pem())
        self.state = folder / "battery"
        commands = folder / "bin"
        commands.mkdir()
        (commands / "termux-battery-status").write_text(f"#!/bin/sh\ncat '{self.state}'\n")
        (commands / "termux-battery-status").chmod(0o755)
        self.environment = {**os.environ, "TERMUX_VERSION": "0.118.0", "PATH": f"{commands}:{os.environ['PATH']}"}
        self.battery(*ON_MAINS)
        self.running: list[subprocess.Popen[bytes]] = []

    def battery(self, plugged: str, status: str) -> None:
        new = self.state.with_suffix(".new")
        new.write_text(BATTERY.format(plugged, status))
        new.rename(self.state)

    def start(self, epochs: int, duration_s: float = 600.0, round: str = "", **conditions: Any) -> None:
        rng = np.random.default_rng(0)
        shard = Shard(rng.random((EXAMPLES, 8, 8, 1), np.float32), rng.integers(0, 10, EXAMPLES).astype(np.int32))
        asked = {"charging": True, "check_every_s": 1.0, **conditions}
        tables: Any = {"conditions": asked, "training": {"max_epochs": LONG, "nice": 0}}
        files = make_device("phone", self.folder / "phone", "home", {"url": self.url}, self.key.public, shard, **tables)
        text = COORDINATOR.format(
            url=self.url, duration_s=duration_s, epochs=epochs, key=files.public.hex(), round=round
        )
        (self.folder / "coordinator.toml").write_text(text)
        self._run("agent", str(files.config))
        self._run("serve", str(self.folder / "coordinator.toml"))

    def _run(self, command: str, config: str) -> None:
        with (self.folder / f"{command}.log").open("wb") as log:
            covey = [sys.executable, "-m", "covey_edge", command, "--config", config]
            self.running.append(subprocess.Popen(covey, stdout=log, stderr=log, env=self.environment))

    def log(self, name: str = "agent") -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, happens: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not happens():
            in_vain = time.monotonic() > end or any(process.poll() for process in self.running)
            assert not in_vain, f"{self.log()}\n{self.log('serve')}"
            time.sleep(0.05)

    def child(self) -> tuple[str, int]:
        """State and processor time (ticks) of the training child; nothing where there is none."""
        agent = self.running[0].pid
        for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if b"covey_edge.trainer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return words[0], int(words[11])
        return "", 0

    def trains(self) -> bool:
        """Whether the child has worked for a second for the round, by what the agent tells its owner."""
        try:
            facts = ask(self.folder / "phone" / "state", "status")
        except NotRunning:
            return False  # not yet
        return facts["state"] == "training" and (facts["working_s"] or 0.0) >= 1.0

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()


@pytest.fixture
def phone(
    tmp_path: Path, mosquitto: RunningBroker, dense_bundle: bytes, coordinator_key: SealingKey
) -> Iterator[Phone]:
    made = Phone(tmp_path, mosquitto.url, dense_bundle, coordinator_key)
    yield made
    made.close()


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.slow
def test_a_phone_that_is_unplugged_pauses_its_training_and_delivers_when_it_is_plugged_in_again(phone: Phone) -> None:
    phone.start(epochs=60)
    phone.until(phone.trains)
    phone.battery(*ON_BATTERY)
    phone.until(lambda: "paused" in phone.log())
    phone.until(lambda: phone.child()[0] == "T")
    before = phone.child()
    time.sleep(3.0)
    assert phone.child() == before
    phone.battery(*ON_MAINS)
    phone.until(lambda: "goes on" in phone.log())
    phone.until(lambda: phone.running[1].poll() is not None)
    assert phone.running[1].returncode == 0
    assert "1 of 1 updates" in phone.log("serve")
    lines = [line.split(" INFO ")[1] for line in phone.log().splitlines() if "conditions:" in line]
    assert lines == ["conditions: on battery", "conditions: all hold"]


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.slow
def test_a_phone_whose_owner_wants_no_pause_says_why_it_does_not_deliver(phone: Phone) -> None:
    phone.start(epochs=LONG, when_lost="abort")
    phone.until(phone.trains)
    phone.battery(*ON_BATTERY)
    phone.until(lambda: "failed: this device's conditions do not hold: not charging" in phone.log("serve"))
    phone.until(lambda: phone.child()[0] == "")
    assert phone.running[0].poll() is None


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.slow
def test_a_paused_phone_gives_up_before_the_rounds_end(phone: Phone) -> None:
    phone.start(epochs=LONG, duration_s=90.0)
    phone.until(phone.trains)
    phone.battery(*ON_BATTERY)
    phone.until(lambda: "failed: this device's conditions do not hold: not charging" in phone.log("serve"))
    assert re.search(r"round \S+: paused", phone.log())


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.slow
def test_a_phone_that_declined_joins_the_same_round_when_it_is_plugged_in(phone: Phone) -> None:
    """In a round that stays open until an update comes. It looks again after a minute."""
    phone.battery(*ON_BATTERY)
    phone.start(epochs=1, round="goal = 1\nmax_staleness = 1")
    phone.until(lambda: "declined, this device's conditions do not hold: not charging" in phone.log())
    phone.battery(*ON_MAINS)
    phone.until(lambda: phone.running[1].poll() is not None)
    assert "1 of 1 updates" in phone.log("serve"), phone.log("serve")
    declined = re.findall(r"round (\S+): declined", phone.log())
    assert re.findall(r"round (\S+): trained", phone.log()) == declined


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.slow
def test_a_run_outlasts_the_hours_in_which_no_device_can(phone: Phone) -> None:
    """Rounds that only wait for owners' conditions are not among the ten after which a run is given up."""
    phone.battery(*ON_BATTERY)
    phone.start(epochs=1, duration_s=2.0)
    phone.until(lambda: phone.log("serve").count("abandoned") > 12)
    phone.battery(*ON_MAINS)
    phone.until(lambda: phone.running[1].poll() is not None)
    assert phone.running[1].returncode == 0, phone.log("serve")
    assert "1 of 1 updates" in phone.log("serve")
