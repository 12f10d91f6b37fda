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
from lone_coordinator import LoneCoordinator
from patience import PATIENCE_S
from proxy import Proxy

from covey_coordinator.demo.devices import Shard, make_device
from covey_edge.local_socket import NotRunning, ask
from covey_edge.runtime import Model
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.bundle import read_bundle
from covey_protocol.messages import Answer, BlobRef, Chunk, Need, Offer, TrainingPlan
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
        wifi = folder / "wifi"
        for name, file in (("termux-battery-status", self.state), ("termux-wifi-connectioninfo", wifi)):
            (commands / name).write_text(f"#!/bin/sh\ncat '{file}'\n")
            (commands / name).chmod(0o755)
        (commands / "termux-telephony-deviceinfo").write_text('#!/bin/sh\necho \'{"data_state": "connected"}\'\n')
        (commands / "termux-telephony-deviceinfo").chmod(0o755)
        self.environment = {**os.environ, "TERMUX_VERSION": "0.118.0", "PATH": f"{commands}:{os.environ['PATH']}"}
        self.battery(*ON_MAINS)
        self.running: list[subprocess.Popen[bytes]] = []

    def battery(self, plugged: str, status: str) -> None:
        new = self.state.with_suffix(".new")
        new.write_text(BATTERY.format(plugged, status))
        new.rename(self.state)

    def wifi(self, *, connected: bool) -> None:
        """Else it is on mobile data."""
        new = self.folder / "wifi.new"
        new.write_text(f'{{"supplicant_state": "{"COMPLETED" if connected else "DISCONNECTED"}"}}')
        new.rename(self.folder / "wifi")

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


class InTwoParts(LoneCoordinator):
    """Publishes every second chunk of a blob when it invites, and the others when it is told to."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._later: list[tuple[str, bytes]] = []

    def _blob(self, data: bytes) -> BlobRef:
        ref = blob_ref(data, 4096)
        for index, payload in chunks(data, ref):
            topic = self._topics.blob(ref.sha256, index)
            if index % 2:
                self._later.append((topic, payload))
            else:
                self._transport.publish(topic, payload, retain=True)
        return ref

    def publish_the_rest(self) -> int:
        """How many bytes that are."""
        sent = [self._transport.publish(topic, payload, retain=True) for topic, payload in self._later]
        assert self._transport.flush(sent, PATIENCE_S)
        return sum(len(payload) for _, payload in self._later)


@pytest.mark.broker
@pytest.mark.slow
def test_on_mobile_data_neither_the_model_comes_nor_the_update_goes(
    phone: Phone, mosquitto: RunningBroker, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    """Over a real connection whose bytes are counted: a pause leaves only small messages on it."""
    proxy = Proxy(mosquitto.port)
    rng = np.random.default_rng(0)
    shard = Shard(rng.random((50, 8, 8, 1), np.float32), rng.integers(0, 10, 50).astype(np.int32))
    tables: Any = {"conditions": {"unmetered": True, "check_every_s": 1.0}}
    files = make_device(
        "phone", phone.folder / "phone", "home", {"url": proxy.url}, coordinator_key.public, shard, **tables
    )
    parameters = Model(read_bundle(digits_bundle)).parameters().tobytes()
    phone.wifi(connected=True)
    phone._run("agent", str(files.config))
    try:
        with InTwoParts(mosquitto.url, "home", "phone", coordinator_key, files.public) as coordinator:
            invitation = coordinator.invite(digits_bundle, parameters, TrainingPlan(1, 0.1))
            coordinator.wait_for(lambda one: isinstance(one, Answer) and one.accept)
            proxy.settled()
            phone.wifi(connected=False)
            phone.until(lambda: "paused" in phone.log())
            before = proxy.settled()
            rest = coordinator.publish_the_rest()
            time.sleep(5.0)
            came = proxy.settled()[1] - before[1]
            assert came < 1000 < rest / 10
            phone.wifi(connected=True)
            phone.until(lambda: "trained on 50 examples" in phone.log())
            assert proxy.down - before[1] > rest
            phone.wifi(connected=False)
            time.sleep(3.0)  # a look at the network is good for a second
            offer = coordinator.wait_for(lambda one: isinstance(one, Offer))
            need = Need(offer.round_id, offer.update.sha256, tuple(range(offer.update.num_chunks)))
            coordinator.tell(need)
            phone.until(lambda: "its update waits for a network that is not metered" in phone.log())
            up = proxy.settled()[0]
            coordinator.tell(need)
            assert proxy.settled()[0] - up < 2000 < offer.update.size
            assert not any(isinstance(one, Chunk) for one in coordinator.heard)
            phone.wifi(connected=True)
            time.sleep(3.0)
            _, update = coordinator.take(invitation)
            assert len(update) == len(parameters)
    finally:
        proxy.close()
