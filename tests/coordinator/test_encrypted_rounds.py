"""Rounds whose updates come encrypted: a round's own key, opened before the rule, stored as acknowledged, mended."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from brokers import RunningBroker
from scripted import D, Scripted, manifest, numbers

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator, RoundResult, Timing
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import Fleet
from covey_coordinator.records import ACCEPTED, MISSING
from covey_coordinator.serve import _resume
from covey_coordinator.store import KEEP_ROUNDS, RunStore
from covey_coordinator.watching.history import opened
from covey_edge.inbox import Inbox
from covey_edge.mqtt import Incoming, MqttTransport, parse_broker
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle, write_bundle
from covey_protocol.compression import encode
from covey_protocol.encryption import ENCRYPTION, KeyPair, encrypted
from covey_protocol.forms import Compression, update_seed
from covey_protocol.messages import Invitation, TrainingPlan
from covey_protocol.seals import SealingKey
from covey_protocol.transcript import Judge, Record, violations, write_record

BUNDLE = write_bundle(manifest(), b"model", SealingKey.from_seed(bytes(32)))
START = np.zeros(D, np.float32)
FLOAT32, ROTATED = Compression(), Compression("rotated-8bit")


def plan(form: Compression) -> TrainingPlan:
    return TrainingPlan(1, 0.1, compression=form.name, kept_fraction=form.kept_fraction)


def sends(update: np.ndarray, device_id: str, examples: int, **metrics: float) -> Callable[[Invitation], bytes]:
    def make(invitation: Invitation) -> bytes:
        form = Compression(invitation.plan.compression, invitation.plan.kept_fraction)
        data = encode(update, form, update_seed(invitation.round_id, device_id))
        return encrypted(invitation, device_id, data, examples, metrics)

    return make


def engine() -> Any:
    return make_engine("direct", make_rule("mean", 0), manifest().parameters, "adam", 0.1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    made = RunStore(tmp_path / "run")
    yield made
    made.close()


def scripted_round(
    store: RunStore,
    fleet: Scripted,
    form: Compression = FLOAT32,
    number: int = 1,
    parameters: np.ndarray = START,
    rule: Any = None,
) -> RoundResult:
    return Coordinator(fleet, store).run_round(
        run_id="run",
        number=number,
        bundle=BUNDLE,
        parameters=parameters,
        plan=plan(form),
        device_ids=fleet.online(),
        quorum=1,
        engine=rule if rule is not None else engine(),
        timing=Timing(5.0, 1.0, 0.1),
        encrypt=True,
    )


def keys(store: RunStore) -> list[Path]:
    return sorted((store.folder / "keys").iterdir())


@pytest.mark.parametrize("form", [FLOAT32, ROTATED, Compression("top-k", 0.1)], ids=lambda form: form.name)
def test_the_rule_hears_what_was_encrypted_and_the_disk_keeps_what_came(form: Compression, store: RunStore) -> None:
    fleet = Scripted(
        {
            "a": sends(numbers(1), "a", 30, training_loss=0.5),
            "b": sends(numbers(2), "b", 10, training_loss=1.5),
        }
    )
    result = scripted_round(store, fleet, form, rule=make_engine("direct", make_rule("mean", 0), manifest().parameters))
    assert fleet.invitation is not None
    assert ENCRYPTION in fleet.invitation.requires
    assert {v.device_id: v.status for v in result.verdicts} == {"a": ACCEPTED, "b": ACCEPTED}
    said = {name: (offer.num_examples, offer.metrics) for name, offer in result.offers.items()}
    assert said == {"a": (30, {"training_loss": 0.5}), "b": (10, {"training_loss": 1.5})}
    round_id = fleet.invitation.round_id
    a, b = (store.read_update(round_id, name) for name in "ab")
    np.testing.assert_allclose(result.parameters, (30 * a + 10 * b) / 40, rtol=1e-5, atol=1e-7)
    kept = store.kept_updates(round_id)
    assert {name: (offer.num_examples, offer.metrics) for name, (offer, _) in kept.items()} == said
    stored = {path.read_bytes() for path in (store.folder / "updates").iterdir()}
    assert stored == set(fleet._updates.values())
    assert keys(store)[0].stat().st_mode & 0o777 == 0o600
    with opened(store.folder) as history:
        assert history.status()["last_rounds"][0]["median_training_loss"] == 1.0


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


NOT_OPENED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a flipped ephemeral key": (flipped(3), "not encrypted for this round by this device"),
    "a flipped header": (flipped(40), "not encrypted for this round by this device"),
    "a flipped update": (flipped(600), "not encrypted for this round by this device"),
    "a flipped tag": (flipped(-1 + 560 + 4 * D), "not encrypted for this round by this device"),
    "an ephemeral key of low order": (lambda data: bytes(32) + data[32:], "low order"),
    "plain float32 of the right size": (lambda data: bytes(len(data)), "low order"),
    "plain float32": (lambda data: bytes(4 * D), "the model needs 1760"),
}


@pytest.mark.parametrize("what", NOT_OPENED)
def test_what_does_not_decrypt_is_refused_with_a_reason_and_leaves_nothing(what: str, store: RunStore) -> None:
    spoil, words = NOT_OPENED[what]
    bad = sends(numbers(2), "b", 5)
    fleet = Scripted({"a": sends(numbers(1), "a", 5), "b": lambda invitation: spoil(bad(invitation))})
    verdicts = {v.device_id: v for v in scripted_round(store, fleet).verdicts}
    assert (verdicts["a"].status, verdicts["b"].status) == (ACCEPTED, MISSING)
    assert words in verdicts["b"].reason
    assert not fleet.receipts["b"].kept
    assert len(list((store.folder / "updates").iterdir())) == 1


def test_a_device_that_sends_anothers_bytes_is_refused(store: RunStore) -> None:
    """What b overhears of a's it can send as its own, and it does not open as b's."""
    copied: list[bytes] = []

    def a(invitation: Invitation) -> bytes:
        copied.append(sends(numbers(1), "a", 5)(invitation))
        return copied[0]

    fleet = Scripted({"a": a, "b": lambda invitation: copied[0]})
    verdicts = {v.device_id: v for v in scripted_round(store, fleet).verdicts}
    assert (verdicts["a"].status, verdicts["b"].status) == (ACCEPTED, MISSING)


def test_every_round_has_a_key_of_its_own_that_goes_with_its_updates(store: RunStore) -> None:
    publics = set()
    for number in range(1, KEEP_ROUNDS + 4):
        fleet = Scripted({"a": sends(numbers(number), "a", 5)})
        scripted_round(store, fleet, number=number)
        assert fleet.invitation is not None
        publics.add(fleet.invitation.encryption_key)
        store.prune("run", 0)
    assert len(publics) == KEEP_ROUNDS + 3
    assert len(keys(store)) == KEEP_ROUNDS
    assert len(list((store.folder / "updates").iterdir())) == KEEP_ROUNDS
    assert {KeyPair.of(path.read_bytes()).public for path in keys(store)} <= publics


def test_the_key_is_on_disk_before_the_invitation_goes_out(store: RunStore) -> None:
    there: list[bool] = []

    class Watched(Scripted):
        def publish_round(self, message: Any, in_use: Any = ()) -> None:
            if isinstance(message, Invitation):
                path = store.folder / "keys" / f"{message.round_id}.x25519"
                there.append(KeyPair.of(path.read_bytes()).public == message.encryption_key)
            super().publish_round(message, in_use)

    scripted_round(store, Watched({"a": sends(numbers(1), "a", 5)}))
    assert there == [True]


def three_rounds(store: RunStore) -> list[np.ndarray]:
    made, parameters, models = engine(), START, []
    for number in (1, 2, 3):
        fleet = Scripted({name: sends(numbers(number * at), name, 5 * at) for at, name in enumerate("abc", 1)})
        parameters = scripted_round(store, fleet, ROTATED, number, parameters, made).parameters
        models.append(parameters)
    return models


def test_a_damaged_checkpoint_of_encrypted_rounds_is_computed_again_to_the_same_bits(store: RunStore) -> None:
    models, said = three_rounds(store), []
    for number in (2, 3):
        (store.checkpoints("run") / f"round-{number:05d}.f32").write_bytes(b"damaged")
    parameters, done = _resume(store, engine(), "run", START, said.append)
    assert (done, parameters.tobytes()) == (3, models[2].tobytes())
    assert "the model of round 3 was damaged; it is computed again from the stored updates" in said


def test_without_the_rounds_key_its_model_is_not_mended_and_the_run_says_so(store: RunStore) -> None:
    models, said = three_rounds(store), []
    (store.checkpoints("run") / "round-00003.f32").write_bytes(b"damaged")
    keys(store)[2].write_bytes(bytes(32))
    parameters, done = _resume(store, engine(), "run", START, said.append)
    assert (done, parameters.tobytes()) == (2, models[1].tobytes())
    assert "the model of round 3 is damaged and cannot be computed again: its updates are lost" in said


class Interrupted(BaseException):
    pass


class Dying(Scripted):
    """The coordinator dies when it would acknowledge the second update."""

    def send(self, device_id: str, message: Any) -> None:
        super().send(device_id, message)
        if len(self.receipts) == 2:
            raise Interrupted


SPOILT_KEYS: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:16]),
    "another": lambda path: path.write_bytes(bytes([9]) * 32),
}


def interrupted(folder: Path) -> RunStore:
    store = RunStore(folder)
    fleet = Dying({name: sends(numbers(at), name, 5 * at) for at, name in enumerate("abc", 1)})
    with pytest.raises(Interrupted):
        Coordinator(fleet, store, leave_open=True).run_round(
            run_id="run",
            number=1,
            bundle=BUNDLE,
            parameters=START,
            plan=plan(FLOAT32),
            device_ids=["a", "b", "c"],
            quorum=2,
            engine=engine(),
            timing=Timing(5.0, 1.0, 0.1),
            encrypt=True,
        )
    store.close()
    return RunStore(folder)


def resumed(store: RunStore) -> RoundResult:
    fleet = Scripted({})
    result = Coordinator(fleet, store).resume_round(run_id="run", bundle=BUNDLE, parameters=START, engine=engine())
    assert result is not None
    return result


def test_an_encrypted_round_goes_on_with_what_was_stored(tmp_path: Path) -> None:
    store = interrupted(tmp_path / "run")
    result = resumed(store)
    assert result.outcome == "published"
    stored = sorted(result.offers)  # c's came in time, too, where it was taken together with the others'
    assert stored in (["a", "b"], ["a", "b", "c"])
    sent = {"a": (numbers(1), 5.0), "b": (numbers(2), 10.0), "c": (numbers(3), 15.0)}
    assert {name: offer.num_examples for name, offer in result.offers.items()} == {
        name: sent[name][1] for name in stored
    }
    direct = engine().step(START, [sent[name][0] for name in stored], [sent[name][1] for name in stored], stored)
    assert result.parameters.tobytes() == direct.parameters.tobytes()
    store.close()


@pytest.mark.parametrize("what", SPOILT_KEYS)
def test_a_round_whose_key_is_lost_is_abandoned_with_that_reason(what: str, tmp_path: Path) -> None:
    store = interrupted(tmp_path / "run")
    SPOILT_KEYS[what](keys(store)[0])
    result = resumed(store)
    assert (result.outcome, result.reason) == (
        "abandoned",
        "the key that opens the round's updates cannot be read any more",
    )
    store.close()


# --- real agents over Mosquitto, and an onlooker at the broker


class Onlooker:
    """Hears all that the broker hears, as its owner does."""

    def __init__(self, url: str) -> None:
        self._inbox = Inbox()
        self._transport = MqttTransport(parse_broker(url), "onlooker", self._inbox)
        self._transport.subscribe(["covey/1/#"])
        self._transport.connect()

    def heard(self) -> list[Record]:
        self._transport.close()
        items = []
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._inbox.get(timeout=0))
        return [Record(0, item.topic, item.payload) for item in items if isinstance(item, Incoming)]


@pytest.mark.broker
@pytest.mark.fleet
def test_an_onlooker_at_the_broker_finds_no_trace_of_updates_or_metrics(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey, mosquitto: RunningBroker
) -> None:
    x = np.random.default_rng(0).random((40, 8, 8, 1), np.float32)
    shard = Shard(x, np.arange(40, dtype=np.int32) % 10)
    devices = [
        make_device(name, tmp_path / name, "clinic", {"url": mosquitto.url}, coordinator_key.public, shard)
        for name in ("open", "strict", "few")
    ]
    with (tmp_path / "strict" / "agent.toml").open("a") as file:
        file.write("\n[privacy]\nrequire_encryption = true\n")
    with (tmp_path / "few" / "agent.toml").open("a") as file:
        file.write("\n[privacy]\nmin_examples = 1000\n")
    onlooker = Onlooker(mosquitto.url)
    agents = AgentProcesses({device.device_id: device.config for device in devices}, tmp_path / "logs")
    roster = {device.device_id: device.public for device in devices}
    fleet = Fleet(parse_broker(mosquitto.url), "clinic", coordinator_key, roster)
    store = RunStore(tmp_path / "run")
    initial = Model(read_bundle(digits_bundle)).parameters()
    secret: list[bytes] = []
    try:
        fleet.connect()
        coordinator = Coordinator(fleet, store)
        coordinator.wait_for(3, 60)

        def a_round(number: int, form: Compression, encrypt: bool) -> RoundResult:
            return coordinator.run_round(
                run_id="r",
                number=number,
                bundle=digits_bundle,
                parameters=initial,
                plan=plan(form),
                device_ids=["few", "open", "strict"],
                quorum=1,
                engine=None,
                encrypt=encrypt,
            )

        for number, form in enumerate((FLOAT32, ROTATED, Compression("top-k-8bit", 0.1)), 1):
            result = a_round(number, form, True)
            statuses = {v.device_id: v.status for v in result.verdicts}
            assert statuses == {"few": MISSING, "open": ACCEPTED, "strict": ACCEPTED}
            (why,) = (v.reason for v in result.verdicts if v.device_id == "few")
            assert why == "failed: TrainingError; in an encrypted round the reason is in the device's log alone"
            for name, offer in result.offers.items():
                assert offer.num_examples == 40
                assert offer.metrics["training_loss"] > 0
                update = store.read_update(offer.round_id, name)
                secret.append(update.astype("<f4").tobytes())
                secret += [msgspec.msgpack.encode(value)[1:] for value in offer.metrics.values()]
        heard = onlooker.heard()
        again = Onlooker(mosquitto.url)
        plain = a_round(4, FLOAT32, False)
        readable = b"\n".join(record.payload for record in again.heard())
        sent = store.read_update(plain.offers["open"].round_id, "open").astype("<f4").tobytes()
        reasons = {v.device_id: v.reason for v in plain.verdicts}
        assert "only encrypted" in reasons["strict"]
        assert reasons["open"] == ""
        assert "40 examples are fewer" in reasons["few"]
    finally:
        agents.stop()
        fleet.close()
        store.close()
    up = [record.payload for record in heard if record.topic.endswith("/up")]
    assert len(up) >= 12
    everything = b"\n".join(up)
    assert b"training_loss" not in everything
    found = [one for one in secret if any(piece in everything for piece in pieces(one))]
    assert found == []
    assert b"training_loss" in readable  # of the round that was not encrypted, the same look finds all
    assert all(piece in readable for piece in pieces(sent)[:100])
    judge = Judge("clinic", coordinator_key.public, roster)
    assert list(violations(judge, map(write_record, heard))) == []


def pieces(secret: bytes) -> list[bytes]:
    """16 bytes of every place of an update that are not zeros; a metric whole."""
    cut = [secret[at : at + 16] for at in range(0, max(1, len(secret) - 15), 16)]
    return [piece for piece in cut if len(set(piece)) > 4]
