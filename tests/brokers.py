"""Real Mosquittos for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest


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
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return RunningBroker("127.0.0.1", port, process)
        if process.poll() is not None:
            break
        time.sleep(0.05)
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
