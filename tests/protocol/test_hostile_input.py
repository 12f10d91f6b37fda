"""Hostile bytes and messages: each ends in a message or a PeerError, changes nothing, and costs little memory."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import Counter
from typing import Any

import hostile
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec import from_coordinator, from_device
from test_machines import OFFER, REF, TO_FETCHING, TO_REPORTING, TO_TRAINING, UPDATE, invitation

from covey_protocol import codec, device
from covey_protocol import round as rounds
from covey_protocol.blobs import blob_ref
from covey_protocol.device import DeviceMachine, State
from covey_protocol.errors import PeerError
from covey_protocol.messages import (
    MAX_CHUNKS,
    Answer,
    BlobRef,
    Chunk,
    Failure,
    FromCoordinator,
    FromDevice,
    Invitation,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    Seen,
    Verdict,
)
from covey_protocol.round import RoundMachine, RoundSettings


def read(payload: hostile.Hostile) -> FromCoordinator | FromDevice | None:
    """What a receiver makes of it: a message, or None where it refused by PeerError. Anything else comes out."""
    good = payload.good
    key = hostile.KEYS[good.sender].public
    try:
        if good.sender == codec.COORDINATOR:
            return codec.decode_from_coordinator(payload.data, topic=payload.topic, key=key)[0]
        return codec.decode_from_device(payload.data, topic=payload.topic, sender=good.sender, key=key)[0]
    except PeerError:
        return None


SEALED = {
    "a sealed mutated body",
    "a sealed body with a strange field",
    "a sealed promise of much",
    "sealed deep nesting",
}


def run(count: int, seed: int) -> Counter[str]:
    """How many of each kind were taken for messages. Only what the right key sealed for this topic may be."""
    taken: Counter[str] = Counter()
    for payload in hostile.payloads(count, seed):
        message = read(payload)
        if message is None:
            continue
        taken[payload.kind] += 1
        assert payload.topic == payload.good.topic
        assert payload.kind in SEALED or payload.data == payload.good.data, payload
    return taken


def test_twenty_thousand_malformed_payloads_each_end_in_a_message_or_a_peer_error() -> None:
    run(2000, seed=1)  # what is made once is made
    gc.collect()
    before = psutil.Process().memory_info().rss
    taken = run(20_000, seed=0)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 16e6
    assert set(taken) <= SEALED | {"a mutated message"}
    assert taken["a sealed body with a strange field"] > 100, "the bounds of the fields were reached"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_malformed_payloads_each_end_in_a_message_or_a_peer_error() -> None:
    run(2000, seed=1)
    gc.collect()
    before = psutil.Process().memory_info().rss
    taken = run(1_000_000, seed=2)
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    print(f"taken for messages: {dict(taken)}; memory grew by {grown / 1e6:.1f} MB")
    assert grown < 32e6


def test_what_a_payload_promises_is_not_allocated() -> None:
    """A few bytes that announce 4 GiB cost no more than a few bytes."""
    rng = random.Random(0)
    kinds = ("a promise of much", "a sealed promise of much")
    tracemalloc.start()
    try:
        for turn in range(2000):
            good = rng.choice(hostile.VECTORS)
            data = hostile.KINDS[kinds[turn % 2]](rng, good)
            tracemalloc.reset_peak()
            start, _ = tracemalloc.get_traced_memory()
            assert read(hostile.Hostile("", good, data, good.topic)) is None
            _, peak = tracemalloc.get_traced_memory()
            assert peak - start < 64_000, data[:40].hex()
    finally:
        tracemalloc.stop()


def test_the_largest_payload_costs_at_most_a_few_times_its_size() -> None:
    """An invitation of 10,000 devices, 20,000 numbers where a number belongs, and 2 MiB of ever deeper lists."""
    good = next(v for v in hostile.VECTORS if v.sender == codec.COORDINATOR)
    bodies = [
        b"\x82\xa4type\xa4need\xa7indices\xdd\x00\x10\x00\x00" + b"\x01" * 2**20,
        b"\x82\xa4type\xa4need\xa1x\xdd\x00\x10\x00\x00" + b"\x90" * 2**20,
        b"\x82\xa4type\xa4need\xa1x" + b"\x91" * (2**20),
        b"\x82\xa4type\xaainvitation\xa7devices\xdd\x00\x10\x00\x00" + b"\xa1a" * 2**19,
    ]
    tracemalloc.start()
    try:
        for body in bodies:
            data = hostile.sealed(good, body)
            tracemalloc.reset_peak()
            start, _ = tracemalloc.get_traced_memory()
            assert read(hostile.Hostile("", good, data, good.topic)) is None
            _, peak = tracemalloc.get_traced_memory()
            assert peak - start < 12 * len(data), body[:20]
    finally:
        tracemalloc.stop()


# --- messages that are well formed and mean harm, at both machines


def device_in(state: State) -> DeviceMachine:
    machine = DeviceMachine("a")
    events: dict[State, tuple[device.Event, ...]] = {
        State.IDLE: (),
        State.INVITED: TO_FETCHING[:1],
        State.FETCHING: TO_FETCHING,
        State.TRAINING: TO_TRAINING,
        State.REPORTING: TO_REPORTING,
    }
    for event in events[state]:
        machine.handle(event, 0.0)
    assert machine.state is state
    return machine


def image(machine: Any) -> str:
    """Everything a machine holds, as text: its own fields, those of its participants and of their assemblies."""
    if isinstance(machine, (str, bytes, int, float, type(None), frozenset, BlobRef)):
        return repr(machine)
    if isinstance(machine, dict):
        return "{" + ", ".join(f"{key!r}: {image(value)}" for key, value in machine.items()) + "}"
    if hasattr(machine, "__dict__") and type(machine).__module__.startswith("covey_protocol"):
        return f"{type(machine).__name__}{image(vars(machine))}"
    return repr(machine)


TO_DEVICE = {
    Invitation: device.Invited,
    RoundClosed: device.Closed,
    Need: device.Needed,
    Receipt: device.Received,
    Verdict: device.Judged,
}
SHA = REF.sha256
ABOUT_THIS_ROUND = st.one_of(
    from_coordinator,
    st.builds(Need, st.just("run.1"), st.just(SHA), st.lists(st.integers(0, MAX_CHUNKS - 1), min_size=1).map(tuple)),
    st.builds(
        Receipt, st.sampled_from(["run.1", "run.2"]), st.sampled_from([SHA, bytes(32)]), st.booleans(), st.text()
    ),
    st.builds(RoundClosed, st.sampled_from(["run.1", "run.2"]), st.text(), st.text()),
    st.builds(invitation, st.sampled_from(["run.1", "run.2"]), devices=st.sampled_from([(), ("a",), ("b",)])),
)


@given(st.sampled_from(State), st.lists(ABOUT_THIS_ROUND, max_size=8))
@settings(max_examples=200, deadline=None)
def test_no_message_of_a_coordinator_breaks_a_device(state: State, messages: list[Any]) -> None:
    machine = device_in(state)
    for number, message in enumerate(messages):
        before = held_by(machine)
        effects = machine.handle(TO_DEVICE[type(message)](message), float(number))
        if not effects:  # at most the time until the offer is repeated is counted afresh
            assert before == held_by(machine)
        sent = [effect.message for effect in effects if isinstance(effect, device.Send)]
        chunks = sum(len(effect.indices) for effect in effects if isinstance(effect, device.SendChunks))
        assert len(sent) <= 1
        assert chunks <= REF.num_chunks, "a message cannot make a device say more than its update"
        assert all(isinstance(message, (Answer, Offer, Seen)) for message in sent)


def held_by(machine: DeviceMachine) -> tuple[Any, ...]:
    return machine.state, machine.invitation, machine.owed, machine._settled_round


def test_a_need_that_names_a_chunk_sixteen_thousand_times_gets_it_once() -> None:
    machine = device_in(State.REPORTING)
    effects = machine.handle(device.Needed(Need("run.1", SHA, (1,) * MAX_CHUNKS)), 0.0)
    assert effects == [device.SendChunks(OFFER, (1,))]


HOSTILE_CHUNKS = st.builds(
    Chunk,
    st.sampled_from(["run.1", "run.2"]),
    st.sampled_from([SHA, bytes(32)]),
    st.integers(0, MAX_CHUNKS - 1),
    st.sampled_from([b"x", UPDATE[:16], UPDATE[16:32], UPDATE[32:], UPDATE, bytes(10_000)]),
)
REFS = st.sampled_from(
    [
        REF,
        blob_ref(UPDATE, 1),
        blob_ref(UPDATE, 39),
        BlobRef(bytes(32), 40, 16),
        BlobRef(SHA, 44, 16),
        BlobRef(SHA, 2**30),
    ]
)
ANY_UP = st.one_of(
    from_device.filter(lambda message: not isinstance(message, (Presence, Seen))),
    HOSTILE_CHUNKS,
    st.builds(Offer, st.sampled_from(["run.1", "run.2"]), REFS, st.just(2**53)),
    st.builds(Answer, st.just("run.1"), st.booleans(), st.text(max_size=500)),
    st.builds(Failure, st.just("run.1"), st.text(max_size=500)),
)
FROM = {Answer: rounds.Answered, Offer: rounds.Offered, Chunk: rounds.ChunkArrived, Failure: rounds.Failed}


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "stranger"]), ANY_UP), max_size=12), st.booleans())
@settings(max_examples=200, deadline=None)
def test_only_a_peer_error_comes_out_of_a_round_and_then_it_is_unchanged(
    messages: list[tuple[str, Any]], honest_first: bool
) -> None:
    machine = RoundMachine(invitation(), ["a", "b", "c"], RoundSettings(2, 20.0, 3.0, 40))
    machine.handle(rounds.Opened(), 0.0)
    if honest_first:
        machine.handle(rounds.Offered("a", OFFER), 0.0)
        machine.handle(rounds.ChunkArrived("a", Chunk("run.1", SHA, 0, UPDATE[:16])), 0.0)
    for sender, message in messages:
        before = image(machine)
        try:
            effects = machine.handle(FROM[type(message)](sender, message), 1.0)
        except PeerError:
            assert image(machine) == before
            continue
        stored = [effect for effect in effects if isinstance(effect, rounds.Store)]
        assert all(len(effect.data) == 40 for effect in stored)
        to_others = [e for e in effects if isinstance(e, rounds.SendTo) and e.device_id != sender]
        assert not to_others, "nobody speaks through us to another device"
        if sender == "stranger":
            assert image(machine) == before
    held = sum(
        len(data) for peer in machine._devices.values() if peer.assembly for data in peer.assembly._chunks.values()
    )
    assert held <= 3 * 40, "a device makes us hold at most its update"


def test_a_hostile_stream_moves_the_machines_only_by_what_is_sealed() -> None:
    """Malformed payloads through codec and machine together, in every state of a device."""
    rng = random.Random(5)
    for payload in hostile.payloads(3000, seed=5):
        if payload.good.sender != codec.COORDINATOR:
            continue
        machine = device_in(rng.choice(list(State)))
        before = image(machine)
        message = read(payload)
        if message is None:
            assert image(machine) == before
        else:
            machine.handle(TO_DEVICE[type(message)](message), 1.0)
