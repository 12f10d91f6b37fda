"""Rounds of a real coordinator, real agents and a device that was written from docs/protocol.md alone.

What they all say is recorded and judged by `covey protocol check`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from brokers import RunningBroker, start_mosquitto, stop_broker
from coordinator.test_rounds import Setup, during, shards, statuses  # noqa: F401 - a fixture
from patience import PATIENCE_S
from protocol import clean_room_device

from covey_coordinator.coordinator import Coordinator, RoundResult, Timing
from covey_coordinator.demo.devices import Shard
from covey_coordinator.fleet import Fleet
from covey_coordinator.records import ACCEPTED, MISSING
from covey_edge.mqtt import parse_broker
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

    broker: RunningBroker
    started: list[subprocess.Popen[bytes]]

    def open(self, *options: str, agents: list[str] = AGENTS) -> None:
        self.key_file = self.folder / "clean.pem"
        device_key = SealingKey.from_seed(CLEAN.encode().ljust(32, b"."))
        self.key_file.write_bytes(device_key.pem())
        self.state = self.folder / "clean"
        self.state.mkdir()
        self.device_log = self.folder / "clean.log"
        self.record = self.folder / "record.jsonl"
        recording = [*COVEY, "record", "--broker", self.url, "--fleet", "test", "--output", str(self.record)]
        self.recorder = subprocess.Popen(recording)
        self.started.append(self.recorder)
        until(self.record.exists, "the recording began")
        self.start_device(*options)
        self.agent_ids = agents
        coordinator = self.start(agents, roster={CLEAN: device_key.public}, chunk_bytes=4096)
        coordinator.wait_for(len(agents) + 1, PATIENCE_S)

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
        self.started.append(self.device)

    def stop_device(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.device.send_signal(how)
        self.device.wait(PATIENCE_S)

    def said(self, words: str) -> bool:
        return words in self.device_log.read_text()

    def judged(self, *next_keys: SealingKey) -> str:
        """What the judge of recordings says."""
        self.recorder.send_signal(signal.SIGINT)
        self.recorder.wait(PATIENCE_S)
        roster = self.folder / "roster.toml"
        files = {CLEAN: self.key_file, **{name: self.folder / name / "device.pem" for name in self.agent_ids}}
        lines = [f'{name} = "{SealingKey.from_pem(path.read_bytes()).public.hex()}"' for name, path in files.items()]
        roster.write_text("\n".join(["[devices]", *lines]))
        command = [*COVEY, "check", str(self.record), "--roster", str(roster)]
        for key in (self.key, *next_keys):
            command += ["--coordinator-key", key.public.hex()]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def shut(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.close()


@pytest.fixture
def place(
    tmp_path: Path,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    shards: list[Shard],  # noqa: F811
) -> Iterator[Place]:
    broker = start_mosquitto(tmp_path)
    made = Place(tmp_path, digits_bundle, coordinator_key, broker.url, shards)
    made.broker, made.started = broker, []
    try:
        yield made
    finally:
        made.shut()
        stop_broker(made.broker)


def expected_update(parameters: np.ndarray) -> np.ndarray:
    return np.array(clean_room_device.make_update(parameters.astype("<f4").tobytes(), CLEAN), "<f4")


def stored_update(place: Place, round_id: str) -> np.ndarray:
    assert place.coordinator is not None
    return place.coordinator.store.read_update(round_id, CLEAN)


def test_its_updates_are_taken_plain_and_compressed_and_nobody_breaks_the_protocol(place: Place) -> None:
    place.open()
    plain = place.run(device_ids=ALL, quorum=3)
    assert statuses(plain) == dict.fromkeys(ALL, ACCEPTED)
    expected = expected_update(place.parameters())
    np.testing.assert_array_equal(stored_update(place, plain.offers[CLEAN].round_id), expected)

    rotated = TrainingPlan(epochs=1, learning_rate=0.1, compression="rotated-8bit")
    compressed = place.run(rotated, number=2, device_ids=ALL, quorum=3)
    assert statuses(compressed) == dict.fromkeys(ALL, ACCEPTED)
    assert compressed.offers[CLEAN].update.size < len(expected) * 1.02
    stored = stored_update(place, compressed.offers[CLEAN].round_id)
    np.testing.assert_allclose(stored, expected, atol=0.02 * np.abs(expected).max())
    assert np.any(stored != expected)

    top_k = TrainingPlan(epochs=1, learning_rate=0.1, compression="top-k", kept_fraction=0.1)
    foreign = place.run(top_k, number=3, device_ids=ALL)
    assert statuses(foreign) == {"a": ACCEPTED, "b": ACCEPTED, CLEAN: MISSING}
    assert "this device cannot top-k" in next(v for v in foreign.verdicts if v.device_id == CLEAN).reason

    until(lambda: place.device_log.read_text().count("accepted") == 2, "the device heard both verdicts")
    place.stop_device()
    assert place.device.returncode == 0
    assert place.judged().endswith(", 0 violations\n")


def test_it_sends_metrics_where_a_round_evaluates_and_keeps_to_its_tasks(place: Place) -> None:
    place.open("--task", "faces")
    evaluation = place.run(TrainingPlan(1, 0.1, evaluate=("accuracy", "loss")), device_ids=ALL, quorum=3, encrypt=True)
    assert statuses(evaluation) == dict.fromkeys(ALL, ACCEPTED)
    loss = clean_room_device.make_metrics(place.parameters().astype("<f4").tobytes())["loss"]
    stored = stored_update(place, evaluation.offers[CLEAN].round_id)
    np.testing.assert_allclose(stored, [0.25, loss], rtol=1e-6)
    for number, (task, status) in enumerate({"faces": ACCEPTED, "voices": MISSING}.items(), start=1):
        result = place.run(TrainingPlan(1, 0.1, task=task), number=number, device_ids=[CLEAN], quorum=1)
        assert statuses(result) == {CLEAN: status}
    assert "no part in the task voices" in result.verdicts[0].reason
    place.stop_device()
    assert place.judged().endswith(", 0 violations\n")


def test_it_takes_part_in_both_exchanges_of_federated_svrg(place: Place) -> None:
    place.open()
    gradients = place.run(TrainingPlan(1, 0.1, work="gradient"), device_ids=ALL, quorum=3)
    assert statuses(gradients) == dict.fromkeys(ALL, ACCEPTED)
    vector = np.full(len(place.parameters()), 0.01, np.float32)
    plan = TrainingPlan(1, 0.1, work="svrg", steps=2)
    local = place.run(plan, number=2, device_ids=ALL, quorum=3, vectors=[vector])
    assert statuses(local) == dict.fromkeys(ALL, ACCEPTED)
    foreign = place.run(plan, number=3, device_ids=ALL, quorum=2, vectors=[vector, vector, vector])
    assert {verdict.status for verdict in foreign.verdicts} == {MISSING}  # every device refuses a third vector
    place.stop_device()
    assert place.judged().endswith(", 0 violations\n")


def test_its_encrypted_updates_open(place: Place) -> None:
    place.open()
    plans = [TrainingPlan(1, 0.1), TrainingPlan(1, 0.1, compression="rotated-4bit")]
    expected = expected_update(place.parameters())
    for number, plan in enumerate(plans, start=1):
        result = place.run(plan, number=number, device_ids=ALL, quorum=3, encrypt=True)
        assert statuses(result) == dict.fromkeys(ALL, ACCEPTED)
        assert (result.offers[CLEAN].num_examples, result.offers[CLEAN].metrics) == (10, {"seconds": 0.5})
        error = np.abs(stored_update(place, result.offers[CLEAN].round_id) - expected).max()
        assert error <= (0.0 if plan.compression == "none" else 0.5 * np.abs(expected).max())
    place.stop_device()
    assert place.judged().endswith(", 0 violations\n")


def test_it_follows_the_coordinator_to_its_next_key(place: Place) -> None:
    next_key = SealingKey.from_seed(b"the next one".ljust(32, b"."))
    place.open("--coordinator-key", next_key.public.hex(), agents=[])
    assert statuses(place.run(device_ids=[CLEAN], quorum=1)) == {CLEAN: ACCEPTED}
    assert place.fleet is not None
    assert place.coordinator is not None
    place.fleet.close()
    assert not (place.state / "retired").exists()
    place.fleet = Fleet(parse_broker(place.url), "test", next_key, place.fleet.roster)
    place.fleet.connect()
    place.coordinator = Coordinator(place.fleet, place.coordinator.store)
    place.coordinator.wait_for(1, PATIENCE_S)
    assert statuses(place.run(number=2, device_ids=[CLEAN], quorum=1)) == {CLEAN: ACCEPTED}
    assert (place.state / "retired").read_text() == place.key.public.hex()
    place.stop_device()
    assert place.judged(next_key).endswith(", 0 violations\n")


def test_an_update_that_is_on_its_disk_survives_kill_9_and_is_delivered_after_a_restart(place: Place) -> None:
    place.open("--hold-after-keeping")

    def kill_and_restart() -> None:
        place.stop_device(signal.SIGKILL)
        assert len(list((place.state / "outbox").iterdir())) == 1
        place.start_device()

    killer = during(kill_and_restart, lambda: place.said("holding"))
    patient = Timing(duration_s=PATIENCE_S, answer_s=PATIENCE_S, grace_s=PATIENCE_S)
    result = place.run(device_ids=ALL, quorum=3, timing=patient)
    killer.join()
    assert statuses(result) == dict.fromkeys(ALL, ACCEPTED)
    assert place.device_log.read_text().count("training") == 1  # the restarted device only delivered
    until(lambda: place.said("verdict"), "the device heard its verdict")
    until(lambda: not list((place.state / "outbox").iterdir()), "the outbox is empty")
    place.stop_device()
    assert place.judged().endswith(", 0 violations\n")


def test_it_goes_on_when_an_asynchronous_round_is_closed_and_a_later_round_takes_its_update(place: Place) -> None:
    trained = place.folder / "trained"
    place.open("--training-waits-for", str(trained))
    rotated = TrainingPlan(epochs=1, learning_rate=0.1, compression="rotated-8bit")
    options = {"plan": rotated, "device_ids": ALL, "max_staleness": 5, "encrypt": True}

    def run(number: int, goal: int, parameters: np.ndarray) -> RoundResult:
        return place.run(number=number, goal=goal, parameters=parameters, **options)

    first = run(1, 2, place.parameters())
    until(lambda: place.said("training"), "it trains for the first round")
    until(lambda: place.said("goes on"), "it heard that the first round is closed")
    finisher = during(trained.touch, lambda: place.said("waits"))
    second = run(2, 3, first.parameters)
    finisher.join()
    late = second.offers[CLEAN]
    assert statuses(second) == dict.fromkeys(ALL, ACCEPTED)
    assert late.round_id == first.offers["a"].round_id
    taken, expected = stored_update(place, second.offers["a"].round_id), expected_update(place.parameters())
    weight = np.float32(2**-0.5)  # it is behind by one model
    np.testing.assert_allclose(taken, expected * weight, atol=0.02 * np.abs(expected).max())
    third = run(3, 3, second.parameters)
    assert statuses(third) == dict.fromkeys(ALL, ACCEPTED)
    until(lambda: place.device_log.read_text().count("accepted") >= 2, "it heard two verdicts")
    place.stop_device()
    assert place.judged().endswith(", 0 violations\n")


def test_it_comes_back_after_a_broker_that_restarted_and_forgot(place: Place) -> None:
    trained = place.folder / "trained"
    place.open("--training-waits-for", str(trained))

    def restart_broker() -> None:
        stop_broker(place.broker)
        place.broker = start_mosquitto(place.folder, port=place.broker.port)
        trained.touch()

    restarter = during(restart_broker, lambda: place.said("training"))
    patient = Timing(duration_s=PATIENCE_S, answer_s=PATIENCE_S, grace_s=PATIENCE_S)
    result = place.run(device_ids=ALL, quorum=3, timing=patient)
    restarter.join()
    assert statuses(result) == dict.fromkeys(ALL, ACCEPTED)
    assert place.device_log.read_text().count("training") == 1
