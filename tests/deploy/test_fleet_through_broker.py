"""A whole fleet as its owner runs it: `covey broker run`, `covey serve` and two agents, all from one fleet folder."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import free_port
from fleet_broker import BrokerRun
from patience import PATIENCE_S
from sklearn.datasets import load_digits

from covey_deploy import provisioning
from covey_deploy.provisioning import NewDevice
from covey_edge.local_socket import NotRunning, ask
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet, pytest.mark.slow]
COVEY = [sys.executable, "-m", "covey_edge"]
IDS = ("kitchen-pi", "porch-pi")


def covey(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COVEY, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def status(state: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = ask(state, "status")
        return facts
    except NotRunning:
        return {}


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_two_devices_train_and_are_looked_at_and_nobodys_connection_is_lost(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    port, path = free_port(), tmp_path / "home"
    fleet = provisioning.init(path, "home", ["127.0.0.1"], port, bundle_key=coordinator_key.public.hex())
    provisioning.add_devices(path, [NewDevice(name, data_path="data.npz") for name in IDS])
    (fleet.coordinator / "model.covey").write_bytes(digits_bundle)
    settings = fleet.coordinator / "coordinator.toml"
    text = settings.read_text().replace("rounds = 20", "rounds = 4")
    settings.write_text(text.replace("[round]", "[round]\npause_s = 4"))
    images, labels = load_digits(return_X_y=True)
    for number, name in enumerate(IDS):
        mine = slice(200 * number, 200 * number + 200)
        x, y = (images[mine] / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels[mine].astype(np.int32)
        np.savez(fleet.device(name) / "data.npz", x=x, y=y)
        toml, keys = fleet.device(name) / "agent.toml", (fleet.settings.coordinator_key, coordinator_key.public.hex())
        text = toml.read_text().replace('"/var/lib/covey"', '"state"')
        pinned = f"coordinator_key = {json.dumps(keys)}"  # also the one that sealed the tests' bundle
        toml.write_text(re.sub(r"^coordinator_key = .*", pinned, text, flags=re.MULTILINE))
    run = BrokerRun(fleet, port=port)
    logs = [(tmp_path / f"{name}.log").open("wb") for name in (*IDS, "serve")]
    agents = [
        subprocess.Popen([*COVEY, "agent", "--config", str(fleet.device(name) / "agent.toml")], stdout=log, stderr=log)
        for name, log in zip(IDS, logs)
    ]
    serve = None
    try:
        states = [fleet.device(name) / "state" for name in IDS]
        until(lambda: all(status(state).get("connected") for state in states))
        since = [status(state)["connection"] for state in states]
        serve = subprocess.Popen(
            [*COVEY, "serve", "--config", str(settings), "--plain"], stdout=logs[2], stderr=logs[2]
        )
        until(lambda: b"round 1" in (tmp_path / "serve.log").read_bytes() or serve.poll() is not None)
        desk = covey("doctor", "--fleet-folder", str(path))
        own_end = covey("doctor", "--coordinator", str(settings))
        device = covey("doctor", "--config", str(fleet.device(IDS[0]) / "agent.toml"))
        assert serve.wait(PATIENCE_S) == 0, (tmp_path / "serve.log").read_text()
        for looked in (desk, own_end, device):
            assert looked.returncode == 0, looked.stdout + looked.stderr
        assert "is sealed by the pinned key" in desk.stdout
        assert "a program that runs here uses coordinator's certificate" in own_end.stdout
        assert "the agent that runs here is connected since" in device.stdout
        assert [status(state)["connection"] for state in states] == since
        assert (tmp_path / "serve.log").read_text().count("connection lost") == 0
        for state in states:
            verdicts = [line for line in status(state)["rounds"] if "accepted" in str(line)]
            assert verdicts, status(state)["rounds"]
    finally:
        for process in (*agents, *([serve] if serve is not None else [])):
            process.send_signal(signal.SIGTERM)
            process.wait()
        run.process.send_signal(signal.SIGTERM)
        broker_log = run.ended()
        for log in logs:
            log.close()
    taken_over = set(re.findall(r"Client (\S+) already connected", broker_log))
    assert all(name.startswith("covey-doctor-") for name in taken_over), taken_over
