"""Real Mosquittos for tests."""

from __future__ import annotations

import datetime
import ipaddress
import os
import queue
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion
from patience import PATIENCE_S

from covey_deploy.broker_run import takes_hangup


@dataclass(frozen=True)
class RunningBroker:
    host: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"mqtt://{self.host}:{self.port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def mosquitto_binary() -> str:
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        if os.environ.get("COVEY_REQUIRE_MOSQUITTO"):
            pytest.fail("mosquitto is not installed, and COVEY_REQUIRE_MOSQUITTO asks for it")
        pytest.skip("mosquitto is not installed (Debian: apt install mosquitto)")
    return found


def start_mosquitto(folder: Path, lines: tuple[str, ...] = (), port: int = 0) -> RunningBroker:
    port = port or free_port()
    config = folder / f"mosquitto-{port}.conf"
    body = [f"listener {port} 127.0.0.1", *(lines or ("allow_anonymous true",)), "persistence false"]
    config.write_text("\n".join(body) + "\n")
    log = (folder / f"mosquitto-{port}.log").open("ab")
    process = subprocess.Popen([mosquitto_binary(), "-c", str(config)], stdout=log, stderr=log)
    log.close()
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        with socket.socket() as probe:
            # it listens a moment before it has read its certificates, and takes signals after that
            if probe.connect_ex(("127.0.0.1", port)) == 0 and takes_hangup(process.pid):
                return RunningBroker("127.0.0.1", port, process)
        if process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    raise AssertionError(f"mosquitto did not start: {(folder / f'mosquitto-{port}.log').read_text()}")


def stop_broker(broker: RunningBroker) -> None:
    broker.process.terminate()
    try:
        broker.process.wait(5)
    except subprocess.TimeoutExpired:
        broker.process.kill()
        broker.process.wait()


def retained(port: int, *topics: str) -> dict[str, bytes]:
    """What the broker keeps on these topics: all that comes before our own message."""
    came: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_subscribe = lambda *_: client.publish("end", b"end", qos=1)
    client.on_connect = lambda *_: client.subscribe([(topic, 1) for topic in (*topics, "end")])
    client.on_message = lambda client, userdata, message: came.put((message.topic, message.payload))
    client.connect("127.0.0.1", port)
    client.loop_start()
    found = dict(iter(lambda: came.get(timeout=PATIENCE_S), ("end", b"end")))
    client.disconnect()
    client.loop_stop()
    return found


def tls_lines(files: dict[str, Path]) -> tuple[str, ...]:
    """Settings of a Mosquitto that asks for client certificates."""
    return (
        f"cafile {files['ca.crt']}",
        f"certfile {files['server.crt']}",
        f"keyfile {files['server.key']}",
        "require_certificate true",
        "use_identity_as_username true",
        "allow_anonymous false",
    )


Dates = tuple[datetime.datetime, datetime.datetime]


def certificates(folder: Path, client_dates: Dates | None = None, server_dates: Dates | None = None) -> dict[str, Path]:
    """A throw-away authority with a server and a client certificate, valid from an hour ago for a day."""
    now = datetime.datetime.now(datetime.timezone.utc)
    today = (now - datetime.timedelta(hours=1), now + datetime.timedelta(days=1))
    dates = {"client": client_dates or today, "server": server_dates or today, "ca": today}

    def make(name: str, issuer: tuple[x509.Name, Any] | None, ca: bool) -> tuple[x509.Name, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{name} of {folder.name}")])
        issuer_name, issuer_key = issuer or (subject, key)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(dates[name][0])
            .not_valid_after(dates[name][1])
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        )
        certificate = builder.sign(issuer_key, hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}.key").write_bytes(pem)
        (folder / f"{name}.key").chmod(0o644)  # Mosquitto drops to its own user before it reads
        return subject, key

    authority = make("ca", None, True)
    make("server", authority, False)
    make("client", authority, False)
    return {name: folder / name for name in ("ca.crt", "server.crt", "server.key", "client.crt", "client.key")}
