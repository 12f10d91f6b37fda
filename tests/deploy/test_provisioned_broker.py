"""A provisioned fleet on a real Mosquitto: who gets in, and certificates that are renewed while an agent runs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import RunningBroker, free_port, start_mosquitto, stop_broker
from cryptography import x509
from patience import PATIENCE_S

from covey_deploy import provisioning
from covey_deploy.fleet_folder import FleetFolder, Lifetimes
from covey_deploy.provisioning import NewDevice, add_devices
from covey_edge.config import load_agent
from covey_edge.inbox import Inbox
from covey_edge.local_socket import NotRunning, ask
from covey_edge.mqtt import ConnectionDown, ConnectionUp, MqttTransport, tls_context
from covey_protocol.errors import EXIT_TRANSPORT, CoveyError

pytestmark = [
    pytest.mark.broker,
    # paho leaves the socket of a failed handshake to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def fleet(tmp_path: Path) -> FleetFolder:
    return provisioning.init(tmp_path / "home", "home", ["127.0.0.1"], free_port())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[FleetFolder], RunningBroker]]:
    """A Mosquitto with the fleet's broker files, at the fleet's port."""
    running: list[RunningBroker] = []

    def serve(fleet: FleetFolder) -> RunningBroker:
        own = fleet.broker
        lines = [
            f"cafile {own / 'ca.pem'}",
            f"certfile {own / 'cert.pem'}",
            f"keyfile {own / 'key.pem'}",
            f"crlfile {own / 'crl.pem'}",
            "require_certificate true",
            "use_identity_as_username true",
            *(["user root"] if os.geteuid() == 0 else []),  # the files are ours alone
        ]
        running.append(start_mosquitto(tmp_path, tuple(lines), fleet.settings.broker.port))
        return running[-1]

    yield serve
    for broker in running:
        stop_broker(broker)
    gc.collect()


def refusal(fleet: FleetFolder, who: str, **changes: Any) -> str:
    """What an agent with this device's folder hears; "" where it gets in."""
    agent = load_agent(fleet.path / "devices" / who / "agent.toml")
    try:
        transport = MqttTransport(dataclasses.replace(agent.broker, **changes), f"covey-home-{who}", Inbox())
        transport.connect()
    except CoveyError as exc:
        return str(exc)
    transport.close()
    return ""


def test_the_fleets_own_get_in_and_nobody_else(
    fleet: FleetFolder, tmp_path: Path, start: Callable[[FleetFolder], RunningBroker]
) -> None:
    add_devices(fleet.path, [NewDevice("kitchen-pi"), NewDevice("porch-pi")])
    provisioning.revoke(fleet.path, "porch-pi", "key-compromise")
    start(fleet)
    assert refusal(fleet, "kitchen-pi") == ""
    assert "was revoked: get another" in refusal(fleet, "porch-pi")
    other = provisioning.init(tmp_path / "other", "home", ["127.0.0.1"], fleet.settings.broker.port)
    add_devices(other.path, [NewDevice("kitchen-pi")])
    assert "is not the authority that signed the broker's certificate" in refusal(other, "kitchen-pi")
    ours = fleet.ca / "ca.pem"
    assert "does not know the authority of broker.cert_file" in refusal(other, "kitchen-pi", ca_file=ours)
    assert "broker.cert_file and broker.key_file" in refusal(fleet, "kitchen-pi", cert_file=None, key_file=None)


# --- over a fleet's life


@dataclasses.dataclass
class RunningAgent:
    """A copy of its folder, as it would be on the device."""

    folder: Path
    process: Any

    def status(self) -> dict[str, Any]:
        facts: dict[str, Any] = ask(self.folder / "state", "status")
        return facts

    def log(self) -> str:
        return (self.folder / "agent.log").read_text()

    def wait_for(self, what: Callable[[dict[str, Any]], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(NotRunning):
                if what(self.status()):
                    return
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.1)


def install(fleet: FleetFolder, who: str, folder: Path) -> None:
    """What the operator copies to the device, the key before the certificate."""
    folder.mkdir(exist_ok=True)
    for path in sorted(fleet.device(who).iterdir(), reverse=True):
        shutil.copy(path, folder / path.name)
    text = (folder / "agent.toml").read_text()
    text = text.replace("/var/lib/covey-data/data.npz", "data.npz").replace('"/var/lib/covey"', '"state"')
    (folder / "agent.toml").write_text(text)


def start_agent(folder: Path) -> RunningAgent:
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.random((16, 4), np.float32), y=np.zeros(16, np.int32))
    command = [sys.executable, "-m", "covey_edge", "agent", "--config", str(folder / "agent.toml")]
    with (folder / "agent.log").open("ab") as log:
        return RunningAgent(folder, subprocess.Popen(command, stdout=log, stderr=log))


@pytest.mark.slow
@pytest.mark.fleet
def test_a_running_agent_reads_its_renewed_certificate_at_its_next_connection(
    tmp_path: Path, start: Callable[[FleetFolder], RunningBroker]
) -> None:
    """Two devices whose certificates end in a minute; one is renewed, with a new key, and its connection is cut."""
    lifetimes = Lifetimes(device=60 / 86400)
    fleet = provisioning.init(tmp_path / "home", "home", ["127.0.0.1"], free_port(), lifetimes)
    add_devices(fleet.path, [NewDevice("kitchen-pi"), NewDevice("porch-pi")])
    ends = {one.id: one.not_after.timestamp() for one in fleet.issued()}
    broker = start(fleet)
    agents = {}
    try:
        for name in ("kitchen-pi", "porch-pi"):
            install(fleet, name, tmp_path / name)
            agents[name] = start_agent(tmp_path / name)
        for agent in agents.values():
            agent.wait_for(lambda facts: bool(facts["connected"]))
        assert time.time() < ends["kitchen-pi"], "the machine is too slow for this test"
        kitchen, porch = agents["kitchen-pi"], agents["porch-pi"]
        assert "ends in 0 days" in kitchen.status()["sections"]["certificate"]
        assert "ends in 0 days" in kitchen.log()
        text = (fleet.path / "fleet.toml").read_text()
        (fleet.path / "fleet.toml").write_text(text.replace(f"device = {lifetimes.device:.12g}", "device = 730"))
        provisioning.renew(fleet.path, ["kitchen-pi"], new_key=True)
        install(fleet, "kitchen-pi", tmp_path / "kitchen-pi")
        assert "valid until" in kitchen.status()["sections"]["certificate"]
        time.sleep(max(0.0, ends["porch-pi"] - time.time()) + 1)
        assert kitchen.status()["connected"]  # an open connection outlives its certificate
        stop_broker(broker)
        for agent in agents.values():
            agent.wait_for(lambda facts: not facts["connected"])
        start(fleet)
        kitchen.wait_for(lambda facts: bool(facts["connected"]))
        porch.wait_for(lambda facts: "expired on" in facts["connection"])
        assert "expired on" in porch.status()["sections"]["certificate"]
    finally:
        for agent in agents.values():
            agent.process.send_signal(signal.SIGTERM)
            agent.process.wait()


@pytest.mark.slow
def test_a_clock_that_is_behind_costs_time_and_no_visit(
    fleet: FleetFolder, tmp_path: Path, start: Callable[[FleetFolder], RunningBroker]
) -> None:
    """An agent that starts ends with the code after which systemd starts it again; one that runs tries by itself."""
    add_devices(fleet.path, [NewDevice("kitchen-pi")])
    broker = start(fleet)
    agent = load_agent(fleet.device("kitchen-pi") / "agent.toml")
    inbox = Inbox()
    running = MqttTransport(agent.broker, "covey-home-kitchen-pi", inbox)
    running.connect()
    present = (fleet.device("kitchen-pi") / "cert.pem").read_bytes()
    listed = (fleet.broker / "crl.pem").read_bytes()
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=3)
    provisioning.renew(fleet.path, ["kitchen-pi"], now=later)
    (fleet.broker / "crl.pem").write_bytes(listed)  # the new one begins later, too
    install(fleet, "kitchen-pi", tmp_path / "kitchen-pi")
    assert start_agent(tmp_path / "kitchen-pi").process.wait(PATIENCE_S) == EXIT_TRANSPORT
    log = (tmp_path / "kitchen-pi" / "agent.log").read_text()
    assert "is valid only from" in log
    assert "set this machine's clock" in log
    stop_broker(broker)
    start(fleet)
    said = ""
    while "valid only from" not in said:
        item = inbox.get(timeout=PATIENCE_S)
        said = item.reason if isinstance(item, ConnectionDown) else ""
    (fleet.device("kitchen-pi") / "cert.pem").write_bytes(present)  # as if the clock had been set
    while not isinstance(inbox.get(timeout=50), ConnectionUp):  # sooner than what an operator has to mend: 60 s
        pass
    running.close()


@pytest.mark.slow
def test_a_fleet_moves_to_its_next_authority_without_a_day_on_which_nobody_gets_in(
    fleet: FleetFolder, tmp_path: Path, start: Callable[[FleetFolder], RunningBroker]
) -> None:
    """The order of docs/provisioning.md, a restart of the broker for each of its steps."""
    add_devices(fleet.path, [NewDevice("kitchen-pi"), NewDevice("porch-pi")])
    old_ca = tmp_path / "old-ca.pem"
    shutil.copy(fleet.ca / "ca.pem", old_ca)
    old_porch = Path(shutil.copytree(fleet.device("porch-pi"), tmp_path / "old-porch"))
    old = {"cert_file": old_porch / "cert.pem", "key_file": old_porch / "key.pem"}
    old_server = (fleet.broker / "cert.pem").read_bytes()

    provisioning.next_authority(fleet.path)
    provisioning.renew(fleet.path, ["kitchen-pi", "porch-pi", "broker", "coordinator", "operator"])
    new_server = (fleet.broker / "cert.pem").read_bytes()
    (fleet.broker / "cert.pem").write_bytes(old_server)  # the broker has both authorities, and its old certificate
    broker = start(fleet)
    assert refusal(fleet, "porch-pi", ca_file=old_ca, **old) == ""  # as it was
    assert refusal(fleet, "kitchen-pi") == ""  # renewed
    stop_broker(broker)

    (fleet.broker / "cert.pem").write_bytes(new_server)
    broker = start(fleet)
    assert refusal(fleet, "kitchen-pi") == ""
    assert refusal(fleet, "porch-pi", **old) == ""  # has got the new ca.pem alone
    assert "is not the authority" in refusal(fleet, "porch-pi", ca_file=old_ca, **old)  # was forgotten
    stop_broker(broker)

    provisioning.retire_authority(fleet.path)
    start(fleet)
    assert refusal(fleet, "kitchen-pi") == ""
    assert refusal(fleet, "porch-pi") == ""
    assert refusal(fleet, "porch-pi", **old) != ""


@pytest.mark.slow
def test_what_a_mosquitto_reads_again_without_a_restart(
    fleet: FleetFolder, start: Callable[[FleetFolder], RunningBroker]
) -> None:
    """With Mosquitto 2.0.11: the list of the revoked and its own certificate, for new connections."""
    add_devices(fleet.path, [NewDevice("kitchen-pi"), NewDevice("porch-pi")])
    broker = start(fleet)
    porch = MqttTransport(load_agent(fleet.device("porch-pi") / "agent.toml").broker, "covey-home-porch-pi", Inbox())
    porch.connect()
    provisioning.revoke(fleet.path, "porch-pi", "unspecified")
    provisioning.renew(fleet.path, ["broker"])
    broker.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + PATIENCE_S
    (serial,) = [one.serial for one in fleet.newest() if one.id == "broker"]
    while serial != shown(fleet):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert porch.connected  # who is in stays in: docs/provisioning.md says to restart where that matters
    porch.close()
    assert "was revoked" in refusal(fleet, "porch-pi")
    assert refusal(fleet, "kitchen-pi") == ""


def shown(fleet: FleetFolder) -> str:
    """The serial number of the certificate that the broker shows."""
    broker = load_agent(fleet.device("kitchen-pi") / "agent.toml").broker
    context = tls_context(broker)
    assert context is not None
    with (
        socket.create_connection((broker.host, broker.port)) as raw,
        context.wrap_socket(raw, server_hostname=broker.host) as wrapped,
    ):
        data = wrapped.getpeercert(binary_form=True)
    assert data is not None
    return f"{x509.load_der_x509_certificate(data).serial_number:x}"
