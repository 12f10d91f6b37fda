"""A fleet of one emulated device, made with the commands a user would type: folder, broker, kit, card, coordinator."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from brokers import free_port

from covey_deploy.emulator import HOST_FROM_INSIDE, JOURNAL_ON_CONSOLE, Hardware, Machine
from covey_protocol.seals import SealingKey

DEVICE = "kitchen-pi"
# the memory of a Raspberry Pi Zero 2 or an old 3 would be 512 and 1024
HARDWARE = Hardware(memory_mb=1024, cpus=2, kernel_arguments=JOURNAL_ON_CONSOLE)
START_S = 900.0  # TensorFlow's import alone took two minutes at a load of twenty
EPOCHS = 100  # so that a training lasts long enough to be cut in its middle; as many as devices allow


@dataclass(frozen=True)
class House:
    """folder: of all its files. port: of the broker."""

    folder: Path
    port: int

    @property
    def fleet(self) -> Path:
        return self.folder / "home"

    @property
    def runs(self) -> Path:
        return self.fleet / "coordinator" / "runs"

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What the coordinator's store holds of the run, read as anybody may."""
        path = self.runs / "first" / "coordinator.sqlite"
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as store:
            return store.execute(query).fetchall()


def covey(*arguments: str, cwd: Path) -> str:
    """One command, which must succeed; what it printed."""
    ended = subprocess.run(
        [sys.executable, "-m", "covey_edge", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"covey {' '.join(arguments)}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def make_house(folder: Path, rounds: int) -> House:
    """A fleet, its model and its data. Devices reach the broker on this machine as qemu's user network shows it."""
    house = House(folder, free_port())
    hosts = ("--broker-host", HOST_FROM_INSIDE, "--broker-host", "127.0.0.1", "--port", str(house.port))
    covey("provision", "init", "home", *hosts, "--devices", "1", cwd=folder)
    covey("provision", "device", DEVICE, "--fleet-folder", "home", cwd=folder)
    seal = SealingKey.from_pem((house.fleet / "coordinator" / "seal.pem").read_bytes())
    (house.fleet / "coordinator" / "model.covey").write_bytes(small_model(seal))
    (folder / "data.npz").write_bytes(digits(1700))
    settings = house.fleet / "coordinator" / "coordinator.toml"
    text = settings.read_text().replace(HOST_FROM_INSIDE, "127.0.0.1")  # the coordinator is not in the machine
    text = re.sub(r"^rounds = \d+", f"rounds = {rounds}", text, flags=re.M)
    text = text.replace(
        "[round]\n", f"[training]\nepochs = {EPOCHS}\nlearning_rate = 0.01\n\n[round]\nduration_s = 3600\n"
    )
    settings.write_text(text)
    release_key = house.fleet / "release" / "release.pem"
    covey("bundle", "--target", "debian-12-arm64", "--key", str(release_key), "--out", "agent.kit", cwd=folder)
    return house


def flash(house: House, *image: str) -> Path:
    """The device's card. image: which system."""
    card = ("--fleet-folder", "home", "--id", DEVICE, "--kit", "agent.kit", "--data", "data.npz")
    covey("flash", *image, *card, "--output", "card.img", cwd=house.folder)
    return house.folder / "card.img"


def small_model(key: SealingKey) -> bytes:
    """The smallest bundle for digits: one dense layer, 650 parameters."""
    import covey_models
    from covey_models._tensorflow import import_tensorflow

    tf = import_tensorflow()
    start = tf.keras.initializers.GlorotUniform(0)
    layers = [
        tf.keras.layers.Flatten(input_shape=(8, 8, 1), name="flat"),
        tf.keras.layers.Dense(10, kernel_initializer=start, name="logits"),
    ]
    return covey_models.export(
        tf.keras.Sequential(layers), name="small", batch_size=16, input_range=(0.0, 1.0), key=key
    )


def digits(count: int) -> bytes:
    """So many handwritten digits as the device's data."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    buffer = io.BytesIO()
    np.savez(buffer, x=(x[:count] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y=y[:count].astype(np.int32))
    return buffer.getvalue()


@contextlib.contextmanager
def running(house: House, name: str, *arguments: str, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """A covey command in the background, from when it has printed `ready` on; its output is NAME.log."""
    log = house.folder / f"{name}.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "covey_edge", *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=house.folder, stdout=output, stderr=output, env=environment)
    try:
        until(lambda: ready in log.read_text() or process.poll() is not None, START_S, ready)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def booting(house: House, card: Path) -> Iterator[Machine]:
    """The card's machine, from when its power is on."""
    with Machine(card, house.folder / "console.log", HARDWARE) as machine:
        machine.start()
        yield machine


def until(holds: Any, timeout_s: float, what: str) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.2)


def verdicts(house: House) -> list[dict[str, Any]]:
    """`covey devices --json` of the run."""
    told = covey("devices", "--config", "home/coordinator/coordinator.toml", "--json", cwd=house.folder)
    found: list[dict[str, Any]] = json.loads(told)
    return found
