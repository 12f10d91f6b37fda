"""Seals, topics and blobs."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_protocol.blobs import BlobAssembly, blob_ref, chunk, chunks
from covey_protocol.errors import ConfigError, PeerError, UsageError
from covey_protocol.messages import MAX_CHUNKS
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import Topics


def test_a_seal_holds_for_its_data_and_its_key_only() -> None:
    key, other = SealingKey.generate(), SealingKey.generate()
    seal = key.seal(b"data")
    assert key.public.verifies(seal, b"data")
    assert not key.public.verifies(seal, b"datb")
    assert not other.public.verifies(seal, b"data")
    assert not key.public.verifies(b"", b"data")


def test_keys_survive_their_files_and_hide_their_secret() -> None:
    key = SealingKey.generate()
    again = SealingKey.from_pem(key.pem())
    assert again.public == key.public == PublicKey.from_hex(key.public.hex())
    assert key.pem().decode().splitlines()[1] not in repr(key)


@pytest.mark.parametrize("text", ["", "zz", "ab" * 31, "ab" * 33])
def test_what_is_not_a_public_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        PublicKey.from_hex(text)


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN PRIVATE KEY-----\nxx\n-----END PRIVATE KEY-----\n"])
def test_what_is_not_a_private_key_is_refused_by_name(pem: bytes) -> None:
    with pytest.raises(ConfigError, match=r"device\.pem"):
        SealingKey.from_pem(pem, "device.pem")


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "-a", "x" * 64, "ä"])
def test_names_that_would_break_a_topic_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        Topics(name)


def test_topics_are_parsed_as_they_are_built() -> None:
    topics = Topics("home")
    assert topics.parse_blob(topics.blob(bytes(range(32)), 17)) == (bytes(range(32)), 17)
    for channel, topic in (("up", topics.up("pi")), ("down", topics.down("pi")), ("presence", topics.presence("pi"))):
        assert topics.parse_device(topic) == ("pi", channel)


@given(st.text(max_size=120))
def test_any_topic_is_parsed_or_ignored(topic: str) -> None:
    topics = Topics("home")
    for text in (topic, f"{topics.root}/{topic}", f"{topics.root}/device/{topic}", f"{topics.root}/blob/{topic}"):
        blob, device = topics.parse_blob(text), topics.parse_device(text)
        assert blob is None or topics.blob(*blob) == text
        assert device is None or f"{topics.root}/device/{device.device_id}/{device.channel}" == text


@given(st.binary(min_size=1, max_size=500), st.integers(1, 64), st.randoms(use_true_random=False))
def test_chunks_make_the_blob_in_any_order_with_any_repeats(data: bytes, size: int, rng: random.Random) -> None:
    ref = blob_ref(data, size)
    pieces = list(chunks(data, ref)) * 2
    rng.shuffle(pieces)
    assembly = BlobAssembly(ref)
    results = []
    for index, piece in pieces:
        results.append(assembly.add(index, piece))
        if results[-1] is not None:
            break
    assert results[-1] == data
    assert all(result is None for result in results[:-1])


def test_a_corrupt_blob_is_forgotten_counted_and_can_come_again() -> None:
    ref = blob_ref(b"abcdef", 2)
    assembly = BlobAssembly(ref)
    for index, piece in ((0, b"ab"), (1, b"cX"), (2, b"ef")):
        assert assembly.add(index, piece) is None
    assert assembly.corrupt == 1
    assert assembly.missing() == (0, 1, 2)
    assert [assembly.add(i, chunk(b"abcdef", ref, i)) for i in range(3)][-1] == b"abcdef"


def test_received_bytes_count_every_chunk_once() -> None:
    assembly = BlobAssembly(blob_ref(b"abcde", 2))
    for index, data in ((0, b"ab"), (0, b"ab"), (2, b"e")):
        assembly.add(index, data)
    assert assembly.received_bytes == 3
    assembly.add(1, b"xx")  # not what was promised: all is forgotten
    assert assembly.received_bytes == 0


@pytest.mark.parametrize(("index", "data"), [(3, b"ab"), (-1, b"ab"), (0, b"a"), (2, b"ef1"), (0, b"")])
def test_a_chunk_that_does_not_fit_is_refused(index: int, data: bytes) -> None:
    with pytest.raises(PeerError):
        BlobAssembly(blob_ref(b"abcdef", 2)).add(index, data)


def test_what_cannot_travel_is_refused_before_it_is_cut() -> None:
    with pytest.raises(UsageError):
        blob_ref(b"")
    with pytest.raises(UsageError):
        blob_ref(bytes(MAX_CHUNKS + 1), 1)
