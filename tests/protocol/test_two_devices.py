"""The device that was written from the specification and covey's own state table say the same, whatever happens.

Random conversations, also such as no honest coordinator leads: late and repeated messages, wrong hashes, asynchronous
rounds, restarts. Both get the same events at the same times, and after each the bytes of what they say are compared.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import clean_room_device as clean
import msgspec
import pytest

from covey_protocol import device
from covey_protocol.blobs import blob_ref, chunk
from covey_protocol.messages import (
    Chunk,
    Failure,
    FromDevice,
    Invitation,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    TrainingPlan,
    Verdict,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "v1.json").read_text())
BUNDLE = bytes.fromhex(GOLDEN["vectors"]["bundle"]["hex"])
ME = "kitchen-pi"
CHUNK_BYTES = 16  # an update of 12 numbers has three
ROUNDS = 14  # more than an outbox holds
SEEDS = 40


class Wire:
    """In place of the broker: keeps what the device says, in order, as bodies."""

    up = True

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def say(self, channel: str, message: dict[str, Any]) -> None:
        assert channel == "up"
        self.said.append(clean.encode_body(without_why(message)))

    def subscribe(self, topics: list[str]) -> None: ...

    def unsubscribe(self, topics: list[str]) -> None: ...


def without_why(message: dict[str, Any]) -> dict[str, Any]:
    """Everybody gives up in words of his own."""
    return {**message, "reason": ""} if message["type"] == "failure" else message


class Both:
    """The two devices. `ours` is covey's table, with an outbox and a cache that cannot fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1000.0
        self.kept: dict[str, tuple[Offer, bytes]] = {}  # the oldest first
        self.damaged: set[str] = set()
        self.ever_said: collections.Counter[str] = collections.Counter()
        self.ever_waited = False
        self.start()

    def start(self) -> None:
        """Both begin (again) with what is on disk."""
        for round_id in self.damaged:  # what cannot be read at the start is not owed
            del self.kept[round_id]
        self.damaged.clear()
        self.wire = Wire()
        settings = argparse.Namespace(
            id=ME, fleet="golden", state=self.folder, coordinator_key=[GOLDEN["coordinator_key"]], max_message_bytes=0,
            training_waits_for=self.folder / "trained", hold_after_keeping=False,
            task=[],
        )  # fmt: skip
        self.theirs = clean.Device(settings, self.wire)
        self.theirs.now = self.now
        self.ours = device.DeviceMachine(ME, tuple(clean.CAN))
        self.ours.restore([offer for offer, _ in self.kept.values()], self.now)
        self.said: list[bytes] = []
        self.theirs.connected()
        self.handle(device.Connected())

    # covey's side: the effects, as the agent performs them

    def handle(self, event: device.Event) -> None:
        for effect in self.ours.handle(event, self.now):
            if isinstance(effect, device.Send):
                self.say(effect.message)
            elif isinstance(effect, device.CheckConditions):
                self.handle(device.ConditionsChecked(effect.invitation.round_id, True))
            elif isinstance(effect, device.Fetch):
                for ref in effect.blobs:
                    if (self.theirs.blobs / ref.sha256.hex()).exists():
                        self.handle(device.BlobReady(ref.sha256))
            elif isinstance(effect, device.Keep):
                self.kept[effect.round_id] = (effect.offer, effect.update)
            elif isinstance(effect, device.SendChunks):
                if effect.offer.round_id in self.damaged:
                    self.handle(device.Lost(effect.offer.round_id, ""))
                    continue
                for index in effect.indices:
                    data = chunk(self.kept[effect.offer.round_id][1], effect.offer.update, index)
                    self.say(Chunk(effect.offer.round_id, effect.offer.update.sha256, index, data))
            elif isinstance(effect, device.Forget):
                del self.kept[effect.round_id]
                self.damaged.discard(effect.round_id)

    def say(self, message: FromDevice) -> None:
        plain = Failure(message.round_id, "") if isinstance(message, Failure) else message
        self.said.append(msgspec.msgpack.encode(plain))

    # what happens to both

    def hear(self, event: device.Event, message: Any) -> None:
        self.theirs.take(clean.decode_body(msgspec.msgpack.encode(message), clean.FROM_COORDINATOR))
        self.handle(event)

    def blobs_come(self) -> None:
        invitation = self.ours.invitation
        if invitation is None or self.ours.state is not device.State.FETCHING:
            return
        for blob in (BUNDLE, parameters(invitation.round_id)):
            ref = blob_ref(blob, CHUNK_BYTES)
            for index in range(ref.num_chunks):
                topic = f"covey/1/golden/blob/{ref.sha256.hex()}/{index}"
                self.theirs.hear(topic, chunk(blob, ref, index))
            self.handle(device.BlobReady(ref.sha256))

    def training_ends(self) -> None:
        if self.ours.state is not device.State.TRAINING:
            return
        self.theirs.train()
        self.theirs.admit_the_waiting()
        assert self.ours.invitation is not None
        if self.ours.invitation.plan.gradient_clip_norm:  # the golden bundle takes none
            self.handle(device.TrainingFailed(self.ours.round_id, ""))
            return
        update = clean.to_bytes(clean.make_update(parameters(self.ours.round_id), ME))
        self.handle(device.Trained(self.ours.round_id, update, 10, {"seconds": 0.5}))

    def time_passes(self) -> None:
        self.theirs.tick()
        self.handle(device.Tick())

    def the_disk_spoils_an_update(self, round_id: str) -> None:
        self.theirs.outbox.file(round_id).write_bytes(b"nothing like it")
        self.damaged.add(round_id)

    def connection_comes_back(self) -> None:
        self.theirs.connected()
        self.handle(device.Connected())

    def agree(self) -> None:
        assert self.wire.said == self.said
        self.ever_said.update(msgspec.msgpack.decode(body)["type"] for body in self.said)
        self.ever_waited |= bool(self.theirs.waiting)
        self.wire.said, self.said = [], []
        assert list(self.theirs.owed) == list(self.ours.owed) == list(self.kept)
        assert self.theirs.state == self.ours.state.value
        assert {path.stem for path in self.theirs.outbox.folder.iterdir()} == set(self.kept)


def parameters(round_id: str) -> bytes:
    return hashlib.sha256(round_id.encode()).digest()[:24] + bytes(24)


def invitations(rng: random.Random) -> list[Invitation]:
    made: list[Invitation] = []
    for number in range(1, ROUNDS + 1):
        staleness = rng.choice([0, 3])
        round_id = f"run.{number}.abc"
        made.append(
            Invitation(
                round_id=round_id,
                number=number,
                issued_at_ms=0,
                duration_ms=rng.choice([20_000, 300_000]),
                bundle=blob_ref(BUNDLE, CHUNK_BYTES),
                parameters=blob_ref(parameters(round_id), CHUNK_BYTES),
                plan=TrainingPlan(1, 0.1, gradient_clip_norm=rng.choice([0.0, 0.0, 0.0, 1.0])),
                devices=rng.choice([(), (ME,), (ME, "other"), ("other",)]),
                requires=rng.choice([("train",), ("train", "late"), ("train", "magic")]),
                max_staleness=staleness,
                earlier=tuple(one.round_id for one in made[::-1][:3] if one.max_staleness) if staleness else (),
            )
        )
    return made


def something_said(rng: random.Random, both: Both, all_of_them: list[Invitation]) -> None:
    """One message of the coordinator, mostly about a round that matters just now."""
    invitation = rng.choice(all_of_them)
    near = [invitation.round_id, both.ours.round_id or invitation.round_id, *both.ours.owed[-2:]]
    round_id = rng.choice(near)
    offer = both.kept.get(round_id)
    sha = offer[0].update.sha256 if offer and rng.random() < 0.9 else bytes(32)
    kind = rng.choice(["invited", "invited", "closed", "need", "receipt", "verdict"])
    if kind == "invited":
        both.hear(device.Invited(invitation), invitation)
    elif kind == "closed":
        closed = RoundClosed(round_id, "published")
        both.hear(device.Closed(closed), closed)
    elif kind == "need":
        need = Need(round_id, sha, tuple(rng.choices(range(5), k=3)))
        both.hear(device.Needed(need), need)
    elif kind == "receipt":
        receipt = Receipt(round_id, sha, rng.random() < 0.8)
        both.hear(device.Received(receipt), receipt)
    else:
        verdict = Verdict(round_id, "accepted")
        both.hear(device.Judged(verdict), verdict)


def converse(seed: int, folder: Path, steps: int = 300) -> Both:
    rng = random.Random(seed)
    both, all_of_them = Both(folder), invitations(rng)
    for _ in range(steps):
        both.now += rng.choice([0.01, 1.0, 6.0, 31.0])
        both.theirs.now = both.now
        draw = rng.random()
        if draw < 0.5:
            something_said(rng, both, all_of_them)
        elif draw < 0.65:
            both.blobs_come()
        elif draw < 0.8:
            both.training_ends()
        elif draw < 0.95:
            both.time_passes()
        elif draw < 0.97:
            both.connection_comes_back()
        elif draw < 0.98:
            if both.kept:
                both.the_disk_spoils_an_update(rng.choice(list(both.kept)))
        else:
            both.start()
        both.agree()
    return both


def converse_often(folder: Path) -> list[Both]:
    for seed in range(SEEDS):
        (folder / str(seed)).mkdir()
    return [converse(seed, folder / str(seed)) for seed in range(SEEDS)]


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without syncs, which take most of the time."""
    monkeypatch.setattr(clean, "write_durably", lambda path, data: path.write_bytes(data))


@pytest.mark.usefixtures("fast_disk")
def test_both_say_the_same_in_any_conversation(tmp_path: Path) -> None:
    conversations = converse_often(tmp_path)
    said = sum((both.ever_said for both in conversations), collections.Counter[str]())
    waited = sum(both.ever_waited for both in conversations)
    assert set(said) == {"answer", "offer", "chunk", "failure", "seen"}
    assert min(said.values()) > SEEDS  # the conversations get somewhere
    assert waited > SEEDS / 4


def settles_without_discarding_what_waits(self: clean.Device, message: dict[str, Any]) -> None:
    waiting = self.waiting
    ORIGINAL["invitation"](self, message)
    self.waiting = self.waiting or waiting


def hears_no_hash(self: clean.Device, message: dict[str, Any]) -> bool:
    return message["round_id"] in self.owed


def forgets_at_the_receipt(self: clean.Device, message: dict[str, Any]) -> None:
    ORIGINAL["receipt"](self, message)
    if message["kept"] and self.owes(message):
        self.forget(message["round_id"])


def stops_when_closed(self: clean.Device, message: dict[str, Any]) -> None:
    if self.works_for(message["round_id"]):
        self.settle(message["round_id"])


ORIGINAL = {name: getattr(clean.Device, name) for name in ("invitation", "receipt")}
MISTAKES = {
    "an invitation that waits outlives a newer one": ("invitation", settles_without_discarding_what_waits),
    "the hash of the update is not looked at": ("owes", hears_no_hash),
    "the outbox is emptied at the receipt": ("receipt", forgets_at_the_receipt),
    "an asynchronous round that is closed is given up": ("closed", stops_when_closed),
    "an excuse is said once": ("answer_again", lambda self: None),
}


@pytest.mark.usefixtures("fast_disk")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_device_that_reads_the_table_wrongly_is_found_out(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean.Device, *MISTAKES[mistake])
    with pytest.raises(AssertionError):
        converse_often(tmp_path)
