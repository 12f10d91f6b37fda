"""Rounds with real agents, real training and a real Mosquitto, and what happens when parts of it break."""

from __future__ import annotations

import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import psutil
import pytest
from brokers import RunningBroker, free_port, start_mosquitto, stop_broker
from patience import PATIENCE_S

from covey_coordinator import serve
from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator, RoundResult, Timing
from covey_coordinator.demo.devices import DeviceFiles, Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import Fleet
from covey_coordinator.records import ACCEPTED, MISSING, REJECTED
from covey_coordinator.store import RunStore
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_protocol import codec
from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import RunError, TransportError
from covey_protocol.messages import Answer, Chunk, Offer, Presence, TrainingPlan
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

IDS = ["a", "b", "c"]
PLAN = TrainingPlan(epochs=1, learning_rate=0.1)
LONG_PLAN = TrainingPlan(epochs=100, learning_rate=0.0001)  # several seconds of training
TIMING = Timing(duration_s=PATIENCE_S, answer_s=PATIENCE_S, grace_s=1.0)


@pytest.fixture(scope="module")
def shards() -> list[Shard]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return [Shard(x[i::10][:100], y[i::10][:100].astype(np.int32)) for i in range(3)]


@dataclass
class Setup:
    """A coordinator and its agents on one broker."""

    folder: Path
    bundle: bytes
    key: SealingKey
    url: str
    shards: list[Shard]
    tls: dict[str, Path] = field(default_factory=dict)
    fleet: Fleet | None = None
    agents: AgentProcesses | None = None
    coordinator: Coordinator | None = None

    def start(self, ids: list[str] = IDS, **options: Any) -> Coordinator:
        table = {"url": self.url, **{name: str(path) for name, path in self.tls.items()}}
        devices: list[DeviceFiles] = [
            make_device(name, self.folder / name, "test", table, self.key.public, shard)
            for name, shard in zip(ids, self.shards)
        ]
        roster = {device.device_id: device.public for device in devices} | options.pop("roster", {})
        self.agents = AgentProcesses({device.device_id: device.config for device in devices}, self.folder / "logs")
        self.fleet = Fleet(parse_broker(self.url, **self.tls), "test", self.key, roster, **options)
        self.fleet.connect()
        self.coordinator = Coordinator(self.fleet, RunStore(self.folder / "run"))
        self.coordinator.wait_for(len(ids), PATIENCE_S)
        return self.coordinator

    def parameters(self) -> np.ndarray:
        return Model(read_bundle(self.bundle)).parameters()

    def run(self, plan: TrainingPlan = PLAN, rule: str = "mean", **options: Any) -> RoundResult:
        assert self.coordinator is not None
        specs = read_bundle(self.bundle).manifest.parameters
        engine = make_engine("direct", make_rule(rule, options.pop("num_byzantine", 0)), specs)
        values: dict[str, Any] = {
            "run_id": "run",
            "number": 1,
            "bundle": self.bundle,
            "parameters": self.parameters(),
            "plan": plan,
            "device_ids": IDS,
            "quorum": 2,
            "engine": engine,
            "timing": TIMING,
        }
        return self.coordinator.run_round(**{**values, **options})

    def log(self, device_id: str) -> str:
        return (self.folder / "logs" / f"{device_id}.log").read_text()

    def close(self) -> None:
        if self.agents is not None:
            self.agents.stop()
        if self.fleet is not None:
            self.fleet.close()


@pytest.fixture
def setup(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker, shards: list[Shard]
) -> Iterator[Setup]:
    made = Setup(tmp_path, digits_bundle, coordinator_key, mosquitto.url, shards)
    yield made
    made.close()


def statuses(result: RoundResult) -> dict[str, str]:
    return {verdict.device_id: verdict.status for verdict in result.verdicts}


def during(action: Callable[[], None], condition: Callable[[], bool]) -> threading.Thread:
    """Run `action` in a thread as soon as `condition` holds."""

    def watch() -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_round_is_the_mean_of_what_the_devices_sent(setup: Setup) -> None:
    setup.start()
    result = setup.run()
    assert (result.outcome, statuses(result)) == ("published", dict.fromkeys(IDS, ACCEPTED))
    assert setup.coordinator is not None
    round_id = result.offers["a"].round_id
    updates = np.stack([setup.coordinator.store.read_update(round_id, name) for name in IDS]).astype(np.float64)
    counts = np.array([result.offers[name].num_examples for name in IDS], float)
    expected = setup.parameters() + np.average(updates, axis=0, weights=counts)
    np.testing.assert_allclose(result.parameters, expected, atol=1e-6)
    end = time.monotonic() + PATIENCE_S
    while "update accepted" not in setup.log("a") and time.monotonic() < end:  # the verdict travels after the round
        time.sleep(0.05)
    assert "update delivered" in setup.log("a")
    assert "update accepted" in setup.log("a")


def test_an_agent_and_its_training_child_stay_small_and_without_tensorflow(setup: Setup) -> None:
    setup.start()
    setup.run()
    assert setup.agents is not None
    for pid in setup.agents.pids().values():
        for process in (agent := psutil.Process(pid), *agent.children()):
            assert process.memory_info().rss < 80e6, process.cmdline()
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "/tensorflow/" not in maps


def test_a_killed_agent_does_not_stop_the_round(setup: Setup) -> None:
    setup.start()
    assert setup.agents is not None
    agents = setup.agents
    killer = during(lambda: os.kill(agents.pids()["b"], signal.SIGKILL), lambda: bool(list_updates(setup)))
    result = setup.run(LONG_PLAN)
    killer.join()
    assert result.outcome == "published"
    assert statuses(result)["b"] in (MISSING, ACCEPTED)  # it may have delivered just before
    assert statuses(result)["a"] == statuses(result)["c"] == ACCEPTED


def list_updates(setup: Setup) -> list[Path]:
    return list((setup.folder / "run" / "updates").glob("*.f32"))


def test_an_agent_killed_while_it_trains_is_missing_with_its_reason(setup: Setup) -> None:
    setup.start()
    assert setup.agents is not None
    agents = setup.agents
    trains = lambda: bool(list((setup.folder / "b" / "state" / "blobs").glob("?" * 64)))  # noqa: E731
    killer = during(lambda: os.kill(agents.pids()["b"], signal.SIGKILL), trains)
    result = setup.run(LONG_PLAN)
    killer.join()
    assert statuses(result) == {"a": ACCEPTED, "b": MISSING, "c": ACCEPTED}
    assert next(v for v in result.verdicts if v.device_id == "b").reason == "connection lost"


def test_a_training_child_that_is_killed_costs_the_device_one_round_only(setup: Setup) -> None:
    setup.start()
    setup.run()
    assert setup.agents is not None
    agent = psutil.Process(setup.agents.pids()["b"])
    (child,) = agent.children()
    child.kill()
    child.wait(PATIENCE_S)
    # the dead child is noticed when it is needed: a new one is started, and the round is whole
    assert statuses(setup.run(number=2)) == dict.fromkeys(IDS, ACCEPTED)


def test_a_broker_that_restarts_in_mid_round_costs_nothing(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, shards: list[Shard]
) -> None:
    port = free_port()
    brokers = [start_mosquitto(tmp_path, port=port)]
    setup = Setup(tmp_path, digits_bundle, coordinator_key, brokers[0].url, shards)

    def restart() -> None:
        stop_broker(brokers[0])
        time.sleep(0.5)
        brokers.append(start_mosquitto(tmp_path, port=port))

    try:
        setup.start()
        trains = lambda: bool(list((tmp_path / "b" / "state" / "blobs").glob("?" * 64)))  # noqa: E731
        restarter = during(restart, trains)
        # a device whose connection is down longer than the grace would be given up, so be patient here
        result = setup.run(LONG_PLAN, timing=Timing(duration_s=PATIENCE_S, answer_s=PATIENCE_S, grace_s=20.0))
        restarter.join()
        assert statuses(result) == dict.fromkeys(IDS, ACCEPTED)
    finally:
        setup.close()
        for broker in brokers:
            stop_broker(broker)


def test_a_broker_that_stays_away_is_an_error_that_names_it(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, shards: list[Shard]
) -> None:
    broker = start_mosquitto(tmp_path)
    setup = Setup(tmp_path, digits_bundle, coordinator_key, broker.url, shards)
    try:
        setup.start(patience_s=2.0)
        stop_broker(broker)  # before any device can have trained
        with pytest.raises(TransportError, match=f"{broker.url} went away"):
            setup.run(LONG_PLAN)
    finally:
        setup.close()
        stop_broker(broker)


def test_devices_that_never_come_are_counted_and_named(setup: Setup) -> None:
    coordinator = setup.start(["a"])
    with pytest.raises(RunError, match=r"only 1 of 2 devices came online within 0\.5 s \(a\)"):
        coordinator.wait_for(2, 0.5)


def test_small_broker_limits_are_respected_by_smaller_chunks(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, shards: list[Shard]
) -> None:
    broker = start_mosquitto(tmp_path, ("allow_anonymous true", "message_size_limit 5000"))
    setup = Setup(tmp_path, digits_bundle, coordinator_key, broker.url, shards)
    try:
        setup.start(chunk_bytes=4096)
        assert statuses(setup.run()) == dict.fromkeys(IDS, ACCEPTED)
    finally:
        setup.close()
        stop_broker(broker)


# --- hostile devices


class Mallory:
    """A device that has a key and says whatever it likes."""

    def __init__(self, url: str, key: SealingKey, device_id: str = "m") -> None:
        self.key, self.id, self.topics = key, device_id, Topics("test")
        self.sequence = codec.Sequence(time.time_ns())
        self.inbox: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        self.client.on_message = lambda client, data, message: self.inbox.put((message.topic, bytes(message.payload)))
        broker = parse_broker(url)
        self.client.connect(broker.host, broker.port)
        self.client.loop_start()
        self.client.subscribe([(self.topics.round, 1), (self.topics.down(device_id), 1)])

    def say(self, message: Any, channel: str = "up", key: SealingKey | None = None) -> None:
        topic = getattr(self.topics, channel)(self.id)
        data = codec.encode(message, topic=topic, sender=self.id, sequence=self.sequence.next(), key=key or self.key)
        self.client.publish(topic, data, qos=1, retain=channel == "presence").wait_for_publish(5)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def deliver(mallory: Mallory, coordinator_key: SealingKey, update: bytes, num_examples: int = 10) -> None:
    """Take part in the next round with these bytes as the update."""
    while True:
        topic, payload = mallory.inbox.get(timeout=PATIENCE_S)
        if not payload:
            continue
        message, _ = codec.decode_from_coordinator(payload, topic=topic, key=coordinator_key.public)
        kind = type(message).__name__
        if kind == "Invitation":
            mallory.say(Answer(message.round_id, True))  # type: ignore[union-attr]
            mallory.say(Offer(message.round_id, blob_ref(update), num_examples))  # type: ignore[union-attr]
        elif kind == "Need":
            ref = blob_ref(update)
            for index in message.indices:  # type: ignore[union-attr]
                data = update[index * ref.chunk_bytes :][: ref.chunk_bytes]
                mallory.say(Chunk(message.round_id, ref.sha256, index, data))  # type: ignore[union-attr]
        elif kind in ("Receipt", "RoundClosed"):
            return


HOSTILE = {
    "NaN": (lambda d: np.full(d, np.nan, "<f4"), REJECTED, "not finite|NaN|finite"),
    "far too long": (lambda d: np.zeros(d + 1, "<f4"), MISSING, "the model needs"),
    "huge": (lambda d: np.full(d, 1e6, "<f4"), REJECTED, "Krum"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_update_is_named_and_kept_out(what: str, setup: Setup, coordinator_key: SealingKey) -> None:
    make, status, reason = HOSTILE[what]
    key = SealingKey.generate()
    setup.shards = [*setup.shards, *setup.shards]
    ids = ["a", "b", "c", "d", "e"]
    setup.start(ids, roster={"m": key.public})
    mallory = Mallory(setup.url, key)
    try:
        mallory.say(Presence(True, 1), channel="presence")
        update = make(len(setup.parameters())).tobytes()
        thread = threading.Thread(target=deliver, args=(mallory, coordinator_key, update))
        thread.start()
        result = setup.run(rule="multi-krum", num_byzantine=1, device_ids=[*ids, "m"])
        thread.join()
    finally:
        mallory.close()
    verdict = next(v for v in result.verdicts if v.device_id == "m")
    assert verdict.status == status
    import re

    assert re.search(reason, verdict.reason), verdict.reason
    assert result.outcome == "published"
    assert np.abs(result.parameters - setup.parameters()).max() < 10


STARVING = {
    "two that send NaN": lambda d: [np.full(d, np.nan, "<f4")] * 2,
    "two that send too much": lambda d: [np.zeros(d + 1, "<f4")] * 2,
    "one that sends zeros, one that sends too little": lambda d: [np.zeros(d, "<f4"), np.ones(d - 1, "<f4")],
}


@pytest.mark.parametrize("what", STARVING)
def test_f_devices_that_are_refused_do_not_starve_a_round(what: str, setup: Setup, coordinator_key: SealingKey) -> None:
    """Multi-Krum bears two of seven, but no two of five."""
    keys = {name: SealingKey.generate() for name in ("m", "n")}
    setup.shards = [*setup.shards, *setup.shards]
    ids = ["a", "b", "c", "d", "e"]
    setup.start(ids, roster={name: key.public for name, key in keys.items()})
    mallories = [Mallory(setup.url, key, name) for name, key in keys.items()]
    updates = STARVING[what](len(setup.parameters()))
    threads = [
        threading.Thread(target=deliver, args=(mallory, coordinator_key, update.tobytes()))
        for mallory, update in zip(mallories, updates)
    ]
    try:
        for mallory, thread in zip(mallories, threads):
            mallory.say(Presence(True, 1), channel="presence")
            thread.start()
        result = setup.run(rule="multi-krum", num_byzantine=2, device_ids=[*ids, *keys], quorum=5)
        for thread in threads:
            thread.join()
    finally:
        for mallory in mallories:
            mallory.close()
    assert result.outcome == "published", result.reason
    assert {name for name, status in statuses(result).items() if status == ACCEPTED} == set(ids)
    assert setup.coordinator is not None
    stored = [setup.coordinator.store.read_update(result.offers["a"].round_id, name) for name in ids]
    np.testing.assert_allclose(result.parameters, setup.parameters() + np.mean(stored, axis=0), atol=1e-6)
    assert result.measurements["num_byzantine_left"] == 0
    head = serve._lines(1, 1, result)[0]
    assert head.startswith("round 1/1 published: 5 of 7 updates")
    assert head.endswith(", num_byzantine_left 0 of 2")


FAKES = {
    "NaN": ((np.nan, 1.0), REJECTED, 0),
    "1e30": ((1e30, 1.0), REJECTED, 0),
    "a perfect model": ((0.0, 1.0), ACCEPTED, 1),
}


@pytest.mark.parametrize("what", FAKES)
def test_one_device_cannot_fake_the_fleets_accuracy(what: str, setup: Setup, coordinator_key: SealingKey) -> None:
    """What the honest agents say, computed here from their data, bounds every number; the model stays as it is."""
    numbers, status, left = FAKES[what]
    key = SealingKey.generate()
    setup.start(roster={"m": key.public})
    mallory = Mallory(setup.url, key)
    lie = np.array(numbers, "<f4").tobytes()
    thread = threading.Thread(target=deliver, args=(mallory, coordinator_key, lie, 2**53))
    try:
        mallory.say(Presence(True, 1), channel="presence")
        thread.start()
        plan = TrainingPlan(epochs=1, learning_rate=0.1, evaluate=("loss", "accuracy"))
        result = setup.run(plan, rule="trimmed-mean", num_byzantine=1, device_ids=[*IDS, "m"], quorum=3)
        thread.join()
    finally:
        mallory.close()
    assert result.outcome == "published", result.reason
    assert statuses(result) == {**dict.fromkeys(IDS, ACCEPTED), "m": status}
    model = Model(read_bundle(setup.bundle))
    honest = np.array([model.evaluate(shard.x, shard.y) for shard in setup.shards], np.float32)
    for column, metric in zip(honest.T, result.evaluation):
        assert column.min() <= metric.median <= column.max()
        assert column.min() - 1e-6 <= metric.mean <= column.max() + 1e-6
        assert metric.spread <= np.ptp(column) + 1e-6
    if status == REJECTED:
        assert result.evaluation[1].median == pytest.approx(np.median(honest[:, 1]))
    assert result.measurements["num_byzantine_left"] == left
    np.testing.assert_array_equal(result.parameters, setup.parameters())


def test_strangers_forgers_and_nonsense_change_nothing(setup: Setup) -> None:
    setup.start()
    assert setup.fleet is not None
    stranger = Mallory(setup.url, SealingKey.generate(), "stranger")
    forger = Mallory(setup.url, SealingKey.generate(), "a")  # has a's topic, not a's key
    try:
        stranger.say(Presence(True, 2**50), channel="presence")
        forger.say(Presence(False, 2**50), channel="presence")
        for mallory in (stranger, forger):
            mallory.say(Answer("run.1", True))
            mallory.client.publish(mallory.topics.up(mallory.id), b"\x00nonsense" * 100, qos=1).wait_for_publish(5)
        result = setup.run()
    finally:
        stranger.close()
        forger.close()
    assert statuses(result) == dict.fromkeys(IDS, ACCEPTED)
    assert setup.fleet.refused["stranger"] >= 1


# --- TLS


def test_a_round_works_over_tls_with_client_certificates(
    tmp_path: Path,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    tls_broker: tuple[str, dict[str, Path]],
    shards: list[Shard],
) -> None:
    url, files = tls_broker
    tls = {"ca_file": files["ca.crt"], "cert_file": files["client.crt"], "key_file": files["client.key"]}
    setup = Setup(tmp_path, digits_bundle, coordinator_key, url, shards, tls=tls)
    try:
        setup.start()
        assert statuses(setup.run()) == dict.fromkeys(IDS, ACCEPTED)
    finally:
        setup.close()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # paho leaves that socket to the collector
def test_a_broker_whose_certificate_is_not_trusted_is_refused_by_name(
    tls_broker: tuple[str, dict[str, Path]], coordinator_key: SealingKey
) -> None:
    url, _ = tls_broker
    with pytest.raises(TransportError, match="TLS failed") as caught:
        Fleet(parse_broker(url), "test", coordinator_key, {}).connect()
    assert not caught.value.transient
    del caught
    gc.collect()
