"""Rounds whose updates travel compressed: decoded before the rule, stored as acknowledged, refused where malformed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from brokers import RunningBroker
from proxy import Proxy
from scripted import D, Scripted, manifest, numbers

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator, RoundResult, Timing
from covey_coordinator.demo.devices import DeviceFiles, Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses, BrokerProcess
from covey_coordinator.fleet import Fleet
from covey_coordinator.records import ACCEPTED, MISSING
from covey_coordinator.store import RunStore
from covey_edge.mqtt import parse_broker
from covey_edge.runtime import Model
from covey_edge.withheld import Withheld
from covey_models.traffic import traffic
from covey_protocol.bundle import read_bundle, write_bundle
from covey_protocol.compression import encode
from covey_protocol.errors import TrainingError
from covey_protocol.forms import Compression, update_seed, update_sizes
from covey_protocol.messages import Invitation, TrainingPlan
from covey_protocol.seals import SealingKey

FORMS = {
    "none": Compression(),
    "rotated-8bit": Compression("rotated-8bit"),
    "rotated-4bit": Compression("rotated-4bit"),
    "top-k": Compression("top-k", 0.1),
    "top-k-8bit": Compression("top-k-8bit", 0.01),
}


def plan(form: Compression, **others: Any) -> TrainingPlan:
    return TrainingPlan(epochs=1, learning_rate=0.1, compression=form.name, kept_fraction=form.kept_fraction, **others)


# --- the coordinator alone, with devices that say what a test tells them to


def honest(update: np.ndarray, device_id: str) -> Any:
    def make(invitation: Invitation) -> bytes:
        form = Compression(invitation.plan.compression, invitation.plan.kept_fraction)
        return encode(update, form, update_seed(invitation.round_id, device_id))

    return make


def scripted_round(store: RunStore, fleet: Scripted, form: Compression) -> RoundResult:
    engine = make_engine("direct", make_rule("mean", 0), manifest().parameters)
    return Coordinator(fleet, store).run_round(
        run_id="run",
        number=1,
        bundle=write_bundle(manifest(), b"model", SealingKey.from_seed(bytes(32))),
        parameters=np.zeros(D, np.float32),
        plan=plan(form),
        device_ids=fleet.online(),
        quorum=1,
        engine=engine,
        timing=Timing(5.0, 1.0, 0.1),
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    made = RunStore(tmp_path / "run")
    yield made
    made.close()


@pytest.mark.parametrize("name", FORMS)
def test_the_rule_sees_decoded_updates_and_the_disk_keeps_what_came(name: str, store: RunStore) -> None:
    form, updates = FORMS[name], {"a": numbers(1), "b": numbers(2)}
    fleet = Scripted({device_id: honest(update, device_id) for device_id, update in updates.items()})
    result = scripted_round(store, fleet, form)
    assert {v.device_id: v.status for v in result.verdicts} == {"a": ACCEPTED, "b": ACCEPTED}
    round_id = fleet.invitation.round_id if fleet.invitation else ""
    kept = {device_id: store.read_update(round_id, device_id) for device_id in updates}
    np.testing.assert_allclose(result.parameters, (kept["a"] + kept["b"]) / 2, rtol=1e-6, atol=1e-7)
    for device_id, offer in result.offers.items():
        stored = (store.folder / "updates" / f"{offer.update.sha256.hex()}.f32").read_bytes()
        assert stored == honest(updates[device_id], device_id)(fleet.invitation)
        assert hashlib.sha256(stored).digest() == offer.update.sha256
        assert len(stored) in range(update_sizes(form, D)[0], update_sizes(form, D)[1] + 1)
    again = {device_id: update for device_id, (_, update) in store.kept_updates(round_id).items()}
    for device_id, update in kept.items():
        np.testing.assert_array_equal(again[device_id], update)


MALFORMED = {
    "a foreign form": ("rotated-8bit", lambda good: b"\x12" + good[1:], "starts with 0x12"),
    "a scale that is not a number": ("rotated-8bit", lambda good: good[:1] + b"\xff" * 4 + good[5:], "scale"),
    "indices beyond the model": ("top-k", lambda good: good[:1] + b"\x7f" * 30 + good[-120:], "beyond its 300"),
    "a size that the form does not have": ("rotated-4bit", lambda good: good + b"\x00", "the model needs 169"),
    "plain float32": ("top-k-8bit", lambda good: bytes(4 * D), "the model needs 11 to 23"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_update_is_refused_with_a_reason_and_leaves_nothing(what: str, store: RunStore) -> None:
    name, spoil, words = MALFORMED[what]
    bad = honest(numbers(2), "b")
    fleet = Scripted({"a": honest(numbers(1), "a"), "b": lambda invitation: spoil(bad(invitation))})
    result = scripted_round(store, fleet, FORMS[name])
    verdicts = {v.device_id: v for v in result.verdicts}
    assert (verdicts["a"].status, verdicts["b"].status) == (ACCEPTED, MISSING)
    assert words in verdicts["b"].reason
    assert not fleet.receipts["b"].kept
    assert words in fleet.receipts["b"].reason
    assert len(list((store.folder / "updates").iterdir())) == 1


def test_a_compressed_round_asks_for_the_capability_by_its_name(store: RunStore) -> None:
    fleet = Scripted({"a": honest(numbers(1), "a")})
    scripted_round(store, fleet, FORMS["rotated-8bit"])
    assert fleet.invitation is not None
    assert fleet.invitation.requires == ("train", "float32", "rotated-8bit")


def test_a_model_whose_moving_statistics_travel_is_not_compressed(store: RunStore) -> None:
    bundle = write_bundle(manifest(trainable=False), b"model", SealingKey.from_seed(bytes(32)))
    with pytest.raises(TrainingError, match="moving statistics"):
        Coordinator(Scripted({}), store).run_round(
            run_id="run",
            number=1,
            bundle=bundle,
            parameters=np.zeros(D, np.float32),
            plan=plan(FORMS["rotated-8bit"]),
            device_ids=["a"],
            quorum=1,
            engine=None,
        )


# --- real agents and real training over the embedded broker

IDS = ("a", "b", "c")


class Lab:
    """Three agents on the embedded broker. c adds noise; b refuses top-k in its agent.toml."""

    def __init__(self, folder: Path, bundle: bytes, key: SealingKey) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32)
        self.folder, self.bundle, self.number = folder, bundle, 0
        self.broker = BrokerProcess(folder / "broker.log")
        table = {"url": self.broker.url}
        devices: list[DeviceFiles] = [
            make_device(name, folder / name, "lab", table, key.public, Shard(x[i::10][:80], y[i::10][:80]))
            for i, name in enumerate(IDS)
        ]
        for name, more in {
            "b": '[wire]\ncompression = ["rotated-8bit", "rotated-4bit"]',
            "c": "[privacy]\nclip_norm = 1.0\nnoise_multiplier = 0.01",
        }.items():
            path = folder / name / "agent.toml"
            path.write_text(f"{path.read_text()}\n{more}\n")
        self.agents = AgentProcesses({device.device_id: device.config for device in devices}, folder / "logs")
        roster = {device.device_id: device.public for device in devices}
        self.fleet = Fleet(parse_broker(self.broker.url), "lab", key, roster)
        self.fleet.connect()
        self.store = RunStore(folder / "run")
        self.coordinator = Coordinator(self.fleet, self.store)
        self.coordinator.wait_for(len(IDS), 60)
        self.initial = Model(read_bundle(bundle)).parameters()

    def round(self, form: Compression, run: str = "lab", engine: Any = None, **others: Any) -> RoundResult:
        self.number += 1
        return self.coordinator.run_round(
            run_id=run,
            number=self.number,
            bundle=self.bundle,
            parameters=self.initial,
            plan=plan(form, **others),
            device_ids=IDS,
            quorum=1,
            engine=engine,
            timing=Timing(60.0, 20.0, 1.0),
        )

    def updates(self, result: RoundResult) -> dict[str, np.ndarray]:
        return {name: self.store.read_update(offer.round_id, name) for name, offer in result.offers.items()}

    def close(self) -> None:
        self.agents.stop()
        self.fleet.close()
        self.store.close()
        self.broker.stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"), digits_bundle, coordinator_key)
    yield made
    made.close()


def relative_error(update: np.ndarray, truth: np.ndarray) -> float:
    return float(np.square(update - truth).sum() / np.square(truth).sum())


@pytest.mark.fleet
def test_real_rounds_in_every_form_say_nearly_the_same(lab: Lab) -> None:
    """Device a trains the same each time: same model, data and seed. Errors as docs/protocol.md 8.1 has them."""
    engine = make_engine("direct", make_rule("mean", 0), read_bundle(lab.bundle).manifest.parameters)
    truth = lab.updates(lab.round(FORMS["none"], engine=engine))["a"]
    for name, most in {"rotated-8bit": 3e-4, "rotated-4bit": 0.06}.items():
        result = lab.round(FORMS[name], engine=engine)
        assert result.outcome == "published"
        assert {v.device_id: v.status for v in result.verdicts} == dict.fromkeys(IDS, ACCEPTED)
        update = lab.updates(result)["a"]
        assert 0 < relative_error(update, truth) < most
        assert result.offers["a"].update.size == update_sizes(FORMS[name], len(truth))[1]
    result = lab.round(FORMS["top-k"], run="fresh", engine=engine)
    update = lab.updates(result)["a"]
    kept = np.flatnonzero(update)
    assert len(kept) == int(0.1 * len(truth))
    np.testing.assert_array_equal(update[kept], truth[kept])
    reasons = {v.device_id: v.reason for v in result.verdicts}
    assert "does not send updates as top-k" in reasons["b"]
    assert "adds noise" in reasons["c"]


@pytest.mark.fleet
def test_what_top_k_withholds_comes_later_and_is_forgotten_with_the_run(lab: Lab) -> None:
    """The model stays as it is, so a's update u is the same in every round: after n rounds n u minus what is withheld
    has been sent."""
    truth = lab.updates(lab.round(FORMS["none"]))["a"]
    sent = [lab.updates(lab.round(FORMS["top-k"], run="feedback"))["a"] for _ in range(4)]
    np.testing.assert_array_equal(sent[0][sent[0] != 0], truth[sent[0] != 0])
    withheld = np.float32(4) * truth - np.sum(sent, axis=0)
    kept = msgspec.msgpack.decode((lab.folder / "a" / "state" / "withheld.msgpack").read_bytes(), type=Withheld)
    np.testing.assert_allclose(np.frombuffer(kept.numbers, "<f4"), withheld, atol=1e-5)
    places = [set(np.flatnonzero(update)) for update in sent]
    assert places[1] != places[0]
    assert relative_error(np.mean(sent, axis=0), truth) < relative_error(sent[0], truth)
    other = lab.updates(lab.round(FORMS["top-k"], run="another"))["a"]
    np.testing.assert_array_equal(other, sent[0])


@pytest.mark.fleet
def test_a_device_that_adds_noise_declines_an_evaluation_and_the_others_send_its_numbers(lab: Lab) -> None:
    engine = make_engine("direct", make_rule("mean", 0), read_bundle(lab.bundle).manifest.parameters)
    result = lab.round(FORMS["none"], engine=engine, evaluate=("accuracy", "loss"))
    verdicts = {v.device_id: v for v in result.verdicts}
    assert (verdicts["a"].status, verdicts["b"].status, verdicts["c"].status) == (ACCEPTED, ACCEPTED, MISSING)
    assert "this device adds noise, and metrics have none" in verdicts["c"].reason
    model, found = Model(read_bundle(lab.bundle)), lab.updates(result)
    for name in "ab":
        with np.load(lab.folder / name / "data.npz") as data:
            loss, accuracy = model.evaluate(data["x"], data["y"])
        np.testing.assert_array_equal(found[name], np.array([accuracy, loss], np.float32))
    accuracy, _ = result.evaluation
    assert (accuracy.name, accuracy.devices, accuracy.held_out) == ("accuracy", 2, 0)
    assert accuracy.median == pytest.approx(np.mean([found[name][0] for name in "ab"]))


# --- counted on the wire


@pytest.mark.broker
@pytest.mark.fleet
def test_the_bytes_of_a_real_round_are_4_d_then_d_then_half_of_d(
    tmp_path: Path, coordinator_key: SealingKey, mosquitto: RunningBroker
) -> None:
    import tensorflow as tf

    import covey_models

    layers = [
        tf.keras.layers.InputLayer((64,)),
        tf.keras.layers.Dense(1500, activation="relu"),
        tf.keras.layers.Dense(10),
    ]
    bundle = covey_models.export(
        tf.keras.Sequential(layers), name="wide", batch_size=16, num_classes=10, key=coordinator_key
    )
    details = read_bundle(bundle).manifest
    d = details.dimension
    assert d == 64 * 1500 + 1500 + 15_010
    x = np.random.default_rng(0).random((64, 64), np.float32)
    proxy = Proxy(mosquitto.port)
    table = {"url": proxy.url, "protocol": "3.1.1"}
    device = make_device(
        "kitchen-pi-2",
        tmp_path / "pi",
        "living-room",
        table,
        coordinator_key.public,
        Shard(x, np.arange(64, dtype=np.int32) % 10),
    )
    agents = AgentProcesses({device.device_id: device.config}, tmp_path / "logs")
    fleet = Fleet(parse_broker(mosquitto.url), "living-room", coordinator_key, {device.device_id: device.public})
    store = RunStore(tmp_path / "run")
    up = {}
    try:
        fleet.connect()
        coordinator = Coordinator(fleet, store)
        coordinator.wait_for(1, 60)
        for number, name in enumerate(
            ["none", "none", "rotated-8bit", "rotated-4bit"], 1
        ):  # the first fetches the bundle
            before, _ = proxy.settled()
            result = coordinator.run_round(
                run_id="living-room",
                number=number,
                bundle=bundle,
                parameters=Model(read_bundle(bundle)).parameters() + np.float32(number / 1000),
                plan=plan(FORMS[name]),
                device_ids=[device.device_id],
                quorum=1,
                engine=None,
            )
            assert result.outcome == "published"
            up[name] = proxy.settled()[0] - before
    finally:
        agents.stop()
        fleet.close()
        store.close()
        proxy.close()
    print({name: (count, count / d) for name, count in up.items()})
    assert up["none"] == pytest.approx(4 * d, rel=0.02)
    assert up["rotated-8bit"] == pytest.approx(d, rel=0.03)
    assert up["rotated-4bit"] == pytest.approx(d / 2, rel=0.05)
    for name, count in up.items():
        computed = traffic(details, len(bundle), compression=FORMS[name])
        assert count == pytest.approx(computed.up, abs=1000)  # an Offer may be repeated, the client may ping
