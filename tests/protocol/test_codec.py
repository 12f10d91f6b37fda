"""Messages: any value survives the wire, any other bytes end in PeerError."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_protocol import codec
from covey_protocol.codec import ReplayGuard, Sequence
from covey_protocol.errors import PeerError
from covey_protocol.messages import (
    MAX_CHUNKS,
    MAX_GRADIENT_NORM,
    MAX_PROXIMAL_WEIGHT,
    MAX_REASON_CHARS,
    Answer,
    BlobRef,
    Chunk,
    Envelope,
    Failure,
    Invitation,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    TrainingPlan,
    Verdict,
    reason_text,
)
from covey_protocol.seals import SealingKey

KEY = SealingKey.from_seed(bytes(32))
OTHER_KEY = SealingKey.from_seed(bytes([1]) * 32)
TOPIC = "covey/1/f/device/d/up"

hashes = st.binary(min_size=32, max_size=32)
counts = st.integers(0, 2**53)
round_ids = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,94}\Z")
device_ids = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")
reasons = st.text(max_size=MAX_REASON_CHARS)
names = st.text(max_size=64)
blobs = st.builds(
    lambda sha256, chunk_bytes, num_chunks, less: BlobRef(
        sha256, num_chunks * chunk_bytes - less % chunk_bytes, chunk_bytes
    ),
    hashes,
    st.integers(1, 2**20),
    st.integers(1, MAX_CHUNKS),
    st.integers(0, 2**20),
)
plans = st.builds(
    TrainingPlan,
    st.integers(1, 1000),
    st.floats(1e-6, 1000),
    counts,
    counts,
    st.floats(0, MAX_GRADIENT_NORM),
    st.floats(0, MAX_PROXIMAL_WEIGHT),
    evaluate=st.lists(names, max_size=3).map(tuple),
    task=st.one_of(st.just(""), device_ids),
    work=st.one_of(st.just("train"), names),
    steps=st.integers(0, 1_000_000),
)
invitations = st.builds(
    Invitation,
    round_ids,
    counts,
    counts,
    st.integers(1, 2**31),
    blobs,
    blobs,
    plans,
    st.lists(device_ids, max_size=20).map(tuple),
    st.lists(names, max_size=5).map(tuple),
    st.integers(0, 100),
    st.lists(round_ids, max_size=5).map(tuple),
    st.one_of(st.just(msgspec.UNSET), hashes),
    st.lists(blobs, max_size=4).map(tuple),
)
indices = st.lists(st.integers(0, MAX_CHUNKS - 1), min_size=1, max_size=50).map(tuple)
from_coordinator = st.one_of(
    invitations,
    st.builds(RoundClosed, round_ids, names, reasons),
    st.builds(Need, round_ids, hashes, indices),
    st.builds(Receipt, round_ids, hashes, st.booleans(), reasons),
    st.builds(Verdict, round_ids, names, reasons),
)
metrics = st.dictionaries(names, st.floats(allow_nan=False), max_size=5)
from_device = st.one_of(
    st.builds(Presence, st.booleans(), counts, names, names, st.lists(names, max_size=5).map(tuple)),
    st.builds(Answer, round_ids, st.booleans(), reasons),
    st.builds(Offer, round_ids, blobs, st.integers(1, 2**53), metrics),
    st.builds(Chunk, round_ids, hashes, st.integers(0, MAX_CHUNKS - 1), st.binary(min_size=1, max_size=200)),
    st.builds(Failure, round_ids, reasons),
)


@given(from_coordinator, counts)
def test_what_the_coordinator_says_arrives_unchanged(message: Any, sequence: int) -> None:
    data = codec.encode(message, topic=TOPIC, sender=codec.COORDINATOR, sequence=sequence, key=KEY)
    assert codec.decode_from_coordinator(data, topic=TOPIC, key=KEY.public) == (message, sequence)


@given(from_device, counts)
def test_what_a_device_says_arrives_unchanged(message: Any, sequence: int) -> None:
    data = codec.encode(message, topic=TOPIC, sender="d", sequence=sequence, key=KEY)
    assert codec.decode_from_device(data, topic=TOPIC, sender="d", key=KEY.public) == (message, sequence)


PLAN = {"epochs": 1, "learning_rate": 0.1}


@pytest.mark.parametrize("field", ["gradient_clip_norm", "proximal_weight"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, 1.1e9, "1"])
def test_a_plan_out_of_its_bounds_is_refused(field: str, value: object) -> None:
    encoded = msgspec.msgpack.encode({**PLAN, field: value})
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.msgpack.decode(encoded, type=TrainingPlan)


def test_a_plan_says_on_the_wire_only_what_it_asks_for() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(TrainingPlan(1, 0.1))) == PLAN
    asked = msgspec.msgpack.decode(msgspec.msgpack.encode(TrainingPlan(1, 0.1, proximal_weight=0.5)))
    assert asked == {**PLAN, "proximal_weight": 0.5}


@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_peer_error(data: bytes) -> None:
    with pytest.raises(PeerError):
        codec.decode_from_device(data, topic=TOPIC, sender="d", key=KEY.public)


@given(st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.text() | st.binary(), st.lists, max_leaves=20))
def test_any_sealed_msgpack_ends_in_a_message_or_a_peer_error(body: Any) -> None:
    """The seal is right, so only the body's own checks stand between a hostile device and us."""
    encoded = msgspec.msgpack.encode(body)
    sealed = codec._sealed_bytes(1, TOPIC, "d", 7, encoded)
    data = msgspec.msgpack.encode(Envelope(1, "d", 7, encoded, KEY.seal(sealed)))
    with pytest.raises(PeerError):
        codec.decode_from_device(data, topic=TOPIC, sender="d", key=KEY.public)


@given(from_device, st.integers(0, 10**6), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_noticed(message: Any, position: int, flip: int) -> None:
    data = bytearray(codec.encode(message, topic=TOPIC, sender="d", sequence=5, key=KEY))
    data[position % len(data)] ^= flip
    with pytest.raises(PeerError):
        codec.decode_from_device(bytes(data), topic=TOPIC, sender="d", key=KEY.public)


WRONG = {
    "sealed by another key": {"key": OTHER_KEY},
    "moved to another topic": {"topic": "covey/1/f/device/e/up"},
    "moved to another fleet": {"topic": "covey/1/g/device/d/up"},
    "sent in another device's name": {"sender": "e"},
}


@pytest.mark.parametrize("how", WRONG)
def test_a_message_that_is_not_what_its_topic_says_is_refused(how: str) -> None:
    values: dict[str, Any] = {"topic": TOPIC, "sender": "d", "sequence": 1, "key": KEY, **WRONG[how]}
    data = codec.encode(Answer("r", True), **values)
    with pytest.raises(PeerError):
        codec.decode_from_device(data, topic=TOPIC, sender="d", key=KEY.public)


BROKEN = {
    "a device sends a coordinator's message": RoundClosed("r", "published"),
    "an empty need": msgspec.structs.replace(Need("r", bytes(32), (1,)), indices=()),
    "a round id with a slash": Answer("a/b", True),
    "a round id with a wildcard": Answer("#", True),
    "a reason that is too long": Failure("r", "x" * (MAX_REASON_CHARS + 1)),
    "a chunk without data": Chunk("r", bytes(32), 0, b""),
    "a chunk number beyond the bound": Chunk("r", bytes(32), MAX_CHUNKS, b"x"),
    "a short hash": Chunk("r", bytes(31), 0, b"x"),
    "an offer of nothing": Offer("r", BlobRef(bytes(32), 0), 1),
    "an offer from no examples": Offer("r", BlobRef(bytes(32), 4), 0),
    "too many metrics": Offer("r", BlobRef(bytes(32), 4), 1, {str(i): 0.0 for i in range(33)}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_message_outside_its_bounds_is_refused(what: str) -> None:
    data = codec.encode(BROKEN[what], topic=TOPIC, sender="d", sequence=1, key=KEY)
    with pytest.raises(PeerError):
        codec.decode_from_device(data, topic=TOPIC, sender="d", key=KEY.public)


def test_a_blob_of_millions_of_chunks_is_refused_when_it_is_read() -> None:
    ref = BlobRef(bytes(32), MAX_CHUNKS, 1)
    data = codec.encode(Offer("r", ref, 1), topic=TOPIC, sender="d", sequence=1, key=KEY)
    assert codec.decode_from_device(data, topic=TOPIC, sender="d", key=KEY.public)[0] == Offer("r", ref, 1)
    body = msgspec.msgpack.decode(msgspec.msgpack.encode(Offer("r", ref, 1)))
    body["update"]["size"] = 2**34
    encoded = msgspec.msgpack.encode(body)
    seal = KEY.seal(codec._sealed_bytes(1, TOPIC, "d", 1, encoded))
    with pytest.raises(PeerError, match="chunks"):
        codec.decode_from_device(
            msgspec.msgpack.encode(Envelope(1, "d", 1, encoded, seal)), topic=TOPIC, sender="d", key=KEY.public
        )


def test_another_protocol_version_is_refused_by_number() -> None:
    data = msgspec.msgpack.encode(Envelope(2, "d", 1, b"", bytes(64)))
    with pytest.raises(PeerError, match="speaks protocol 2"):
        codec.decode_from_device(data, topic=TOPIC, sender="d", key=KEY.public)


def test_sequence_numbers_grow_also_over_a_restart_and_where_the_clock_jumps_back() -> None:
    kept = [0]
    sent: list[int] = []
    for now_ns in (1_700_000_000 * 10**9, 10**9, 0, 1_700_000_000 * 10**9 + 2 * 10**9):
        sequence = Sequence(now_ns, kept[-1], kept.append)
        for _ in range(1000):
            sent.append(sequence.next())
            assert sent[-1] <= kept[-1], "used before it was reserved"
    assert sent == sorted(set(sent))


def test_numbers_are_reserved_in_blocks_not_one_by_one() -> None:
    kept: list[int] = []
    sequence = Sequence(0, 0, kept.append)
    for _ in range(Sequence.BLOCK + 1):
        sequence.next()
    assert kept == [Sequence.BLOCK, 2 * Sequence.BLOCK]


def test_a_number_passes_once_and_late_ones_pass_within_the_window() -> None:
    guard = ReplayGuard()
    assert guard.accept(5000)
    assert not guard.accept(5000)
    assert guard.accept(5000 - ReplayGuard.WINDOW + 1)
    assert not guard.accept(5000 - ReplayGuard.WINDOW)
    assert guard.accept(5001)


@given(st.lists(st.integers(0, 5000), max_size=3000))
def test_no_number_ever_passes_twice(numbers: list[int]) -> None:
    guard = ReplayGuard()
    passed = [number for number in numbers if guard.accept(number)]
    assert len(passed) == len(set(passed))


def test_a_reason_is_cut_to_one_bounded_line() -> None:
    text = reason_text("a\nb  c" + "x" * 1000)
    assert text.startswith("a b c")
    assert len(text) == MAX_REASON_CHARS
