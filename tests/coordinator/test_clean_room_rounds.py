"""Rounds of a real coordinator, real agents and a device that was written from docs/protocol.md alone, judged by `covey protocol check`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from brokers import RunningBroker
from coordinator.test_rounds import PLAN, Setup, shards, statuses  # noqa: F401 - a fixture
from patience import PATIENCE_S
from protocol import clean_room_device

from covey_coordinator.demo.devices import Shard
from covey_coordinator.records import ACCEPTED
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

AGENTS, CLEAN = ["a", "b"], "clean-pi"
ALL = [*AGENTS, CLEAN]
COVEY = [sys.executable, "-m", "covey_edge", "protocol"]


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


class Place(Setup):
    """A coordinator, two agents, the device of another make, and a recording of all they say."""

    def open(self) -> None:
        self.key_file = self.folder / "clean.pem"
        device_key = SealingKey.from_seed(CLEAN.encode().ljust(32, b"."))
        self.key_file.write_bytes(device_key.pem())
        self.state = self.folder / "clean"
        self.state.mkdir()
        self.device_log = self.folder / "clean.log"
        self.record = self.folder / "record.jsonl"
        recording = [*COVEY, "record", "--broker", self.url, "--fleet", "test", "--output", str(self.record)]
        self.recorder = subprocess.Popen(recording)
        until(self.record.exists, "the recording began")
        self.start_device()
        assert self.start(AGENTS, roster={CLEAN: device_key.public})
        assert self.coordinator is not None
        self.coordinator.wait_for(len(ALL), PATIENCE_S)

    def start_device(self, *options: str) -> None:
        host, port = self.url.removeprefix("mqtt://").split(":")
        settings = {
            "--host": host,
            "--port": port,
            "--fleet": "test",
            "--id": CLEAN,
            "--key": str(self.key_file),
            "--coordinator-key": self.key.public.hex(),
            "--state": str(self.state),
        }
        words = [word for pair in settings.items() for word in pair]
        with self.device_log.open("ab") as log:
            command = [sys.executable, clean_room_device.__file__, *words, *options]
            self.device = subprocess.Popen(command, stdout=log, stderr=log)

    def stop_device(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.device.send_signal(how)
        self.device.wait(PATIENCE_S)

    def said(self, words: str) -> bool:
        return words in self.device_log.read_text()

    def judged(self) -> str:
        """What the judge of recordings says."""
        self.recorder.send_signal(signal.SIGINT)
        self.recorder.wait(PATIENCE_S)
        roster = self.folder / "roster.toml"
        assert self.fleet is not None
        keys = {name: key.hex() for name, key in self.fleet.roster.items()}
        roster.write_text("[devices]\n" + "".join(f'{name} = "{key}"\n' for name, key in keys.items()))
        command = [*COVEY, "check", str(self.record), "--coordinator-key", self.key.public.hex(), "--roster", str(roster)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def shut(self) -> None:
        for process in (self.device, self.recorder):
            if process.poll() is None:
                process.kill()
                process.wait()
        self.close()


@pytest.fixture
def place(
    tmp_path: Path,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    mosquitto: RunningBroker,
    shards: list[Shard],  # noqa: F811
) -> Iterator[Place]:
    made = Place(tmp_path, digits_bundle, coordinator_key, mosquitto.url, shards)
    try:
        made.open()
        yield made
    finally:
        made.shut()


def expected_update(parameters: np.ndarray) -> np.ndarray:
    return np.array(clean_room_device.make_update(parameters.astype("<f4").tobytes(), CLEAN), "<f4")


def test_its_updates_are_taken_plain_and_compressed_and_nobody_breaks_the_protocol(place: Place) -> None:
    plain = place.run(device_ids=ALL, quorum=3)
    assert statuses(plain) == dict.fromkeys(ALL, ACCEPTED)
    assert place.coordinator is not None
    expected = expected_update(place.parameters())
    stored = place.coordinator.store.read_update(plain.offers[CLEAN].round_id, CLEAN)
    np.testing.assert_array_equal(stored, expected)
    compressed = place.run(
        TrainingPlan(epochs=1, learning_rate=0.1, compression="rotated-8bit"), number=2, device_ids=ALL, quorum=3
    )
    assert statuses(compressed) == dict.fromkeys(ALL, ACCEPTED)
    assert compressed.offers[CLEAN].update.size < len(expected) * 1.02
    stored = place.coordinator.store.read_update(compressed.offers[CLEAN].round_id, CLEAN)
    np.testing.assert_allclose(stored, expected, atol=0.02 * np.abs(expected).max())
    assert np.any(stored != expected)
    until(lambda: place.device_log.read_text().count("accepted") == 2, "the device heard both verdicts")
    place.stop_device()
    assert place.device.returncode == 0
    assert "0 violations" in place.judged()
