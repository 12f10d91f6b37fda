"""Both machines talk over a bad network: messages are lost, repeated and reordered, devices vanish and come back.

Whatever happens, the round ends, and what a device was told is what happened to its update.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from covey_protocol import device
from covey_protocol import round as rounds
from covey_protocol.blobs import chunk
from covey_protocol.device import DeviceMachine, State
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    Invitation,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    Seen,
    TrainingPlan,
    Verdict,
)
from covey_protocol.round import Phase, RoundMachine, RoundSettings

NAMES = ["a", "b", "c", "d"]
DURATION_S = 60
INVITATION = Invitation(
    "run.1", 1, 0, DURATION_S * 1000, BlobRef(bytes(32), 8), BlobRef(bytes([1]) * 32, 64, 16), TrainingPlan(1, 0.1)
)
TO_DEVICE = {RoundClosed: device.Closed, Need: device.Needed, Receipt: device.Received, Verdict: device.Judged}
FROM_DEVICE = {Answer: rounds.Answered, Offer: rounds.Offered, Chunk: rounds.ChunkArrived, Failure: rounds.Failed}


def update_of(name: str) -> bytes:
    return name.encode() * 64


class World:
    """One round over a network that loses `loss` of all messages and repeats and reorders the others."""

    def __init__(self, seed: int, loss: float) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.now = 0.0
        self.round = RoundMachine(INVITATION, NAMES, RoundSettings(2, 20.0, 5.0, 64))
        self.devices = {name: DeviceMachine(name) for name in NAMES}
        self.flying: list[tuple[str, Any]] = []  # ("a", message to device a) or ("", (device, message))
        self.told: dict[str, list[bool]] = {name: [] for name in NAMES}
        self.stored: dict[str, bytes] = {}
        self.aggregated: tuple[str, ...] | None = None
        self.finished = False

    def send(self, to: str, content: Any) -> None:
        for _ in range(self.rng.choice([1, 1, 1, 2])):
            if self.rng.random() >= self.loss:
                self.flying.append((to, content))

    def coordinator(self, event: rounds.Event) -> None:
        for effect in self.round.handle(event, self.now):
            if isinstance(effect, rounds.PublishRound):
                for name in NAMES:
                    self.send(name, effect.message)
            elif isinstance(effect, rounds.SendTo):
                self.send(effect.device_id, effect.message)
            elif isinstance(effect, rounds.Recall):
                self.recall(effect)
            elif isinstance(effect, rounds.Store):
                self.stored[effect.device_id] = effect.data
                self.coordinator(rounds.Stored(effect.device_id))
            elif isinstance(effect, rounds.Aggregate):
                assert self.aggregated is None, "aggregated twice"
                self.aggregated = effect.device_ids
                self.coordinator(rounds.Aggregated(dict.fromkeys(effect.device_ids, "")))
            elif isinstance(effect, rounds.Finished):
                self.finished = True

    def recall(self, effect: rounds.Recall) -> None:
        kept = self.round.progress()[effect.device_id] is rounds.Progress.STORED
        status = "accepted" if self.aggregated else "rejected"
        offer = effect.offer
        over = Receipt(offer.round_id, offer.update.sha256, False, "that round is over")
        self.send(effect.device_id, Verdict(offer.round_id, status) if kept else over)

    def device(self, name: str, event: device.Event) -> None:
        if isinstance(event, device.Received):
            self.told[name].append(event.receipt.kept)
        for effect in self.devices[name].handle(event, self.now):
            if isinstance(effect, device.Send):
                self.send("", (name, effect.message))
            elif isinstance(effect, device.SendChunks):
                ref, update = effect.offer.update, update_of(name)
                for index in effect.indices:
                    self.send("", (name, Chunk("run.1", ref.sha256, index, chunk(update, ref, index))))
            elif isinstance(effect, device.CheckConditions):
                self.device(name, device.ConditionsChecked("run.1", True))
            elif isinstance(effect, device.Fetch):
                for ref in effect.blobs:
                    self.device(name, device.BlobReady(ref.sha256))
            elif isinstance(effect, device.Train):
                self.device(name, device.Trained("run.1", update_of(name), 3))

    def step(self) -> None:
        if self.flying and self.rng.random() < 0.8:
            to, content = self.flying.pop(self.rng.randrange(len(self.flying)))
            if to == "":
                name, message = content
                if not isinstance(message, Seen):
                    self.coordinator(FROM_DEVICE[type(message)](name, message))
            elif isinstance(content, Invitation):
                self.device(to, device.Invited(content))
            else:
                self.device(to, TO_DEVICE[type(content)](content))
            return
        self.now += 0.5
        self.coordinator(rounds.Tick())
        for name in NAMES:
            self.device(name, device.Tick())
        if self.rng.random() < 0.1:  # a connection breaks and comes back: retained messages come again
            name = self.rng.choice(NAMES)
            self.coordinator(rounds.PresenceChanged(name, False))
            self.coordinator(rounds.PresenceChanged(name, True))
            if not self.finished:
                self.send(name, INVITATION)
            self.device(name, device.Connected())


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.4]))
@settings(max_examples=150, deadline=None)
def test_every_round_ends_and_receipts_are_true(seed: int, loss: float) -> None:
    world = World(seed, loss)
    world.coordinator(rounds.Opened())
    for _ in range(20_000):
        if world.finished and not world.flying:
            break
        world.step()
    assert world.finished
    assert world.round.phase in (Phase.PUBLISHED, Phase.ABANDONED)
    assert all(data == update_of(name) for name, data in world.stored.items())
    if world.aggregated is not None:
        assert set(world.aggregated) == set(world.stored)
    for name, told in world.told.items():
        if True in told:
            assert name in world.stored, "told kept, but not stored"
        if loss == 0.0 and name in world.stored and world.devices[name].state is State.IDLE:
            assert False not in told or True in told


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_without_losses_every_device_is_aggregated(seed: int) -> None:
    world = World(seed, 0.0)
    world.coordinator(rounds.Opened())
    while not world.finished:
        world.step()
    assert world.aggregated == tuple(NAMES)
