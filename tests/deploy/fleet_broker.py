"""A fleet's folder, its Mosquitto as `covey broker run` starts it, and plain MQTT clients with any certificate."""

from __future__ import annotations

import contextlib
import queue
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import psutil
from brokers import free_port, mosquitto_binary
from paho.mqtt.enums import CallbackAPIVersion
from patience import PATIENCE_S

from covey_deploy import authority, broker_run, provisioning
from covey_deploy.authority import Authority, Dates
from covey_deploy.fleet_folder import FleetFolder

END = b"the end"  # the payload after which a client has had everything that was for it
TAKEN = {"No matching subscribers": "Success"}  # the broker took the message, though nobody listens
ROOT = "root"  # a user of the tests alone, who may everything


def now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class Identity:
    """Files of one who connects. cert: None for nobody's."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, folder: Path) -> Identity:
        return cls(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        if self.cert is not None:
            context.load_cert_chain(str(self.cert), str(self.key))
        return context


def make_fleet(
    folder: Path, name: str = "home", devices: tuple[str, ...] = ("kitchen-pi", "porch-pi"), port: int = 8883
) -> FleetFolder:
    provisioning.init(folder, name, ["127.0.0.1", "localhost"], port, num_devices=len(devices) or 1)
    if devices:
        provisioning.add_devices(folder, [provisioning.NewDevice(one) for one in devices])
    return FleetFolder.open(folder)


def own_authority(fleet: FleetFolder) -> Authority:
    pem = (fleet.ca / "ca.key").read_bytes()
    (certificate,) = authority.read_certificates((fleet.ca / "ca.pem").read_bytes(), "ca.pem")
    return Authority(certificate, authority.read_key(pem, "ca.key"))


def issue(
    fleet: FleetFolder,
    name: str,
    folder: Path,
    *,
    role: str = "device",
    dates: tuple[float, float] = (-1, 1),
    by: Authority | None = None,
    hosts: tuple[str, ...] = (),
) -> Identity:
    """A certificate that `covey provision` would not make. dates: days from now."""
    folder.mkdir(parents=True)
    key = authority.new_key()
    days = Dates(now() + timedelta(days=dates[0]), now() + timedelta(days=dates[1]))
    signer = by or own_authority(fleet)
    certificate = authority.issue(signer, fleet.name, role, name, key.public_key(), days, hosts)
    (folder / "cert.pem").write_bytes(authority.certificate_pem(certificate))
    (folder / "key.pem").write_bytes(authority.key_pem(key))
    (folder / "ca.pem").write_bytes((fleet.ca / "ca.pem").read_bytes())
    return Identity.of(folder)


@dataclass(frozen=True)
class FleetBroker:
    """port: on 127.0.0.1. config: the file that Mosquitto runs with."""

    fleet: FleetFolder
    port: int
    config: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"mqtts://127.0.0.1:{self.port}"

    @property
    def is_open(self) -> bool:
        return _open(self.port)

    def reload(self) -> None:
        """SIGHUP, until it is done: Mosquitto logs it."""
        log = self.config.with_suffix(".log")
        before = log.read_text().count("Reloading config")
        self.process.send_signal(1)
        wait_for(lambda: log.read_text().count("Reloading config") > before)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def fleet_broker(fleet: FleetFolder, edit: Any = None, *, root: bool = True) -> Iterator[FleetBroker]:
    """Mosquitto with exactly what `covey broker run` writes. edit: changes the configuration's text, for faults. root:
    with one more user in the access rules, for the tests' own part; that changes nothing for the others."""
    port = free_port()
    config = broker_run.write_run_config(fleet.name, fleet.broker, "127.0.0.1", port)
    if root:
        with (fleet.broker / "acl").open("a") as acl:
            acl.write(f"user {ROOT}\ntopic readwrite #\ntopic readwrite $SYS/#\n")
    if edit is not None:
        config.write_text(edit(config.read_text()))
    with config.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([mosquitto_binary(), "-c", str(config)], stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or (_open(port) and broker_run.takes_hangup(process.pid)))
        assert process.poll() is None, config.with_suffix(".log").read_text()
        yield FleetBroker(fleet, port, config, process)
    finally:
        process.terminate()
        process.wait()


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answer(broker: FleetBroker, identity: Identity, client_id: str = "") -> str:
    """What becomes of a connection: "taken", or what TLS said, in the names that OpenSSL has for alerts.

    By TLS 1.2, whose handshake ends with the verdict; in 1.3 the alert comes after it, and may be lost with a reset.
    """
    context = identity.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    name = client_id.encode() or b"probe"
    packet = b"\x00\x04MQTT\x04\x02\x00\x14" + len(name).to_bytes(2, "big") + name
    try:
        raw = socket.create_connection(("127.0.0.1", broker.port), PATIENCE_S)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as wrapped:
            wrapped.sendall(bytes([0x10, len(packet)]) + packet)
            said = wrapped.recv(4)
    except ssl.SSLError as exc:
        return str(exc.reason).lower()
    return "taken" if said == b"\x20\x02\x00\x00" else f"answered {said.hex()}"


class Client:
    """An MQTT client that says what happened, with none of covey's own adapter."""

    def __init__(
        self,
        broker: FleetBroker,
        identity: Identity,
        client_id: str = "some-client",
        *,
        will: str = "",
        protocol: int = paho.MQTTv5,
    ) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._acks: dict[int, str] = {}
        self._subs: dict[int, list[str]] = {}
        connected: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.paho = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=protocol, reconnect_on_failure=False
        )
        client.tls_set_context(identity.context())
        if will:
            client.will_set(will, b"gone", qos=1, retain=True)
        client.on_connect = lambda c, u, f, reason, p: connected.put(str(reason))
        client.on_disconnect = lambda c, u, f, reason, p: self._ended.put(str(reason))
        client.on_message = lambda c, u, message: self.heard.append((message.topic, message.payload))
        client.on_publish = lambda c, u, mid, reason, p: self._acks.__setitem__(mid, str(reason))
        client.on_subscribe = lambda c, u, mid, reasons, p: self._subs.__setitem__(mid, [str(one) for one in reasons])
        client.connect("127.0.0.1", broker.port, 30)
        client.loop_start()
        assert connected.get(timeout=PATIENCE_S) == "Success"

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> str:
        """The broker's reason; "Success" where it took it."""
        return self.publish_all({topic: payload}, retain=retain)[topic]

    def publish_all(self, messages: dict[str, bytes], *, retain: bool = False) -> dict[str, str]:
        sent = {topic: self.paho.publish(topic, data, qos=1, retain=retain).mid for topic, data in messages.items()}
        wait_for(lambda: self.ended or set(sent.values()) <= self._acks.keys())
        said = {topic: self._acks.get(mid, "the connection ended") for topic, mid in sent.items()}
        return {topic: TAKEN.get(reason, reason) for topic, reason in said.items()}

    def subscribe(self, *topics: str) -> list[str]:
        mid = self.paho.subscribe([(topic, 1) for topic in topics])[1]
        assert mid is not None
        wait_for(lambda: mid in self._subs)
        return self._subs[mid]

    def heard_until(self, topic: str) -> dict[str, set[bytes]]:
        """What came before END on this topic."""
        wait_for(lambda: (topic, END) in self.heard)
        told: dict[str, set[bytes]] = {}
        for one, payload in self.heard:
            if payload != END:
                told.setdefault(one, set()).add(payload)
        return told

    @property
    def ended(self) -> bool:
        return not self._ended.empty()

    def vanish(self) -> None:
        """The connection breaks without a goodbye: the last will is the broker's."""
        connection = self.paho.socket()
        assert connection is not None
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()


class BrokerRun:
    """`covey broker run` as a process."""

    def __init__(self, fleet: FleetFolder, port: int = 0) -> None:
        where = ["--host", "127.0.0.1", "--port", str(port)]
        arguments = ["broker", "run", "--fleet-folder", str(fleet.path), *where]
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", "covey_edge", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"listening on mqtts://127\.0\.0\.1:(\d+) for the fleet home\n", line)
        assert found, (line, self.process.stderr and self.process.stderr.read())
        self.broker = FleetBroker(fleet, int(found[1]), fleet.broker / broker_run.RUN_CONFIG, self.process)  # type: ignore[arg-type]

    def children(self) -> list[int]:
        return [one.pid for one in psutil.Process(self.process.pid).children()]

    def ended(self) -> str:
        _, log = self.process.communicate(timeout=PATIENCE_S)
        return log
