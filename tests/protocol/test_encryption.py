"""Encrypted updates: what comes back is what was sent, and nobody else's key, round, device or byte opens it."""

from __future__ import annotations

import hmac
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from covey_protocol.encryption import (
    ENCRYPTION,
    ENCRYPTION_BYTES,
    HEADER_BYTES,
    Header,
    KeyPair,
    _padded,
    decrypted,
    encrypted,
    refusal,
)
from covey_protocol.errors import ConfigError, PeerError
from covey_protocol.forms import Compression, offered_sizes, update_sizes
from covey_protocol.messages import UNSET, BlobRef, Invitation, TrainingPlan

GOLDEN = Path(__file__).parent.parent / "golden"
STORED = json.loads((GOLDEN / "encryption-v1.json").read_text())
ROUND = KeyPair.of(bytes(range(32)))
OTHER = KeyPair.of(bytes([7]) * 32)
BLOB = BlobRef(bytes(32), 400)
INVITATION = Invitation("run.1.a", 1, 0, 1, BLOB, BLOB, TrainingPlan(1, 0.5), encryption_key=ROUND.public)
UPDATE = bytes(range(200))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_encryption", GOLDEN / "generate_encryption.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(STORED["vectors"]))
def test_the_golden_vectors_hold_in_both_directions(name: str) -> None:
    vector = STORED["vectors"][name]
    assert generator().vectors()[name] == vector
    private, data = bytes.fromhex(STORED["round_private"]), bytes.fromhex(vector["encrypted"])
    header, update = decrypted(private, STORED["round_id"], STORED["device_id"], data)
    assert (header.num_examples, header.metrics, update.hex()) == (
        vector["num_examples"],
        vector["metrics"],
        vector["update"],
    )


names = st.text(min_size=1, max_size=12)
metrics = st.dictionaries(names, st.floats(allow_nan=False), max_size=6)


@given(st.binary(min_size=1, max_size=500), st.integers(1, 2**53), metrics)
def test_what_is_encrypted_comes_back_and_its_size_says_only_that_of_the_update(
    update: bytes, num_examples: int, said: dict[str, float]
) -> None:
    data = encrypted(INVITATION, "pi", update, num_examples, said)
    assert len(data) == len(update) + ENCRYPTION_BYTES
    assert decrypted(ROUND.private, "run.1.a", "pi", data) == (Header(num_examples, said), update)


@given(st.binary(max_size=700))
def test_any_bytes_end_in_a_peer_error(data: bytes) -> None:
    with pytest.raises(PeerError):
        decrypted(ROUND.private, "run.1.a", "pi", data)


SENT = encrypted(INVITATION, "pi", UPDATE, 77, {"training_loss": 0.25})


@pytest.mark.parametrize("place", [0, 31, 32, 33, 32 + HEADER_BYTES, len(SENT) - 17, len(SENT) - 16, len(SENT) - 1])
def test_a_changed_byte_of_any_part_is_noticed(place: int) -> None:
    """Ephemeral key, header, update, tag: first and last byte of each."""
    bad = bytearray(SENT)
    bad[place] ^= 1
    with pytest.raises(PeerError, match="not encrypted for this round by this device"):
        decrypted(ROUND.private, "run.1.a", "pi", bytes(bad))


OPENED_AS = {
    "another round": (ROUND.private, "run.1.b", "pi"),
    "another device": (ROUND.private, "run.1.a", "pi2"),
    "with another round's key": (OTHER.private, "run.1.a", "pi"),
    "ids cut elsewhere": (ROUND.private, "run.1.", "api"),
}


@pytest.mark.parametrize("what", OPENED_AS)
def test_it_opens_for_nothing_else(what: str) -> None:
    with pytest.raises(PeerError, match="not encrypted for this round by this device"):
        decrypted(*OPENED_AS[what], SENT)


@pytest.mark.parametrize("less", [1, 16, len(UPDATE), len(SENT) - 40, len(SENT)])
def test_a_cut_update_does_not_open(less: int) -> None:
    with pytest.raises(PeerError):
        decrypted(ROUND.private, "run.1.a", "pi", SENT[: len(SENT) - less])


def test_the_same_update_never_travels_as_the_same_bytes() -> None:
    first, second = (encrypted(INVITATION, "pi", UPDATE, 1, {}) for _ in range(2))
    assert first[:32] != second[:32]
    assert all(first[at : at + 16] != second[at : at + 16] for at in range(32, len(first), 16))


def test_nothing_of_update_or_metrics_is_in_the_bytes() -> None:
    said = {"training_loss": 0.123456789}
    data = encrypted(INVITATION, "pi", UPDATE, 2**40 + 12345, said)
    assert b"training_loss" not in data
    for plain in (UPDATE, msgspec.msgpack.encode(0.123456789)[1:], (2**40 + 12345).to_bytes(8, "big")):
        assert not any(plain[at : at + 6] in data for at in range(0, max(1, len(plain) - 6), 6))


# points of order 1, 2, 4, 8 and their doubles, as RFC 7748's implementations list them
LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_key_of_low_order_is_refused_on_both_sides(point: str) -> None:
    bad = msgspec.structs.replace(INVITATION, encryption_key=bytes.fromhex(point))
    assert "low order" in refusal(bad, required=False)
    with pytest.raises(PeerError, match="low order"):
        encrypted(bad, "pi", UPDATE, 1, {})
    with pytest.raises(PeerError, match="low order"):
        decrypted(ROUND.private, "run.1.a", "pi", bytes.fromhex(point) + SENT[32:])


def test_a_device_says_why_it_does_not_send() -> None:
    plain = msgspec.structs.replace(INVITATION, encryption_key=UNSET)
    assert refusal(plain, required=False) == ""
    assert refusal(INVITATION, required=True) == ""
    assert "only encrypted" in refusal(plain, required=True)
    asks = msgspec.structs.replace(plain, requires=(ENCRYPTION,))
    assert "brings no key" in refusal(asks, required=False)
    with pytest.raises(PeerError, match="brings no key"):
        encrypted(asks, "pi", UPDATE, 1, {})


def test_metrics_that_do_not_fit_are_an_error_and_are_not_cut() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        encrypted(INVITATION, "pi", UPDATE, 1, {f"{number:064d}": 0.0 for number in range(8)})


def crafted(header: bytes) -> bytes:
    """What a device encrypts that has only the specification: any 512 bytes in place of a header."""
    ephemeral = KeyPair.made()
    public = X25519PublicKey.from_public_bytes(ROUND.public)
    shared = X25519PrivateKey.from_private_bytes(ephemeral.private).exchange(public)
    bound = b"\x95\x01\xc4\x20" + ROUND.public + b"\xc4\x20" + ephemeral.public + b"\xa7run.1.a\xa2pi"
    extracted = hmac.digest(bytes(32), shared, "sha256")
    key = hmac.digest(extracted, b"covey encrypted update\x00" + bound + b"\x01", "sha256")
    plain = header.ljust(HEADER_BYTES, b"\x00") + UPDATE
    return ephemeral.public + ChaCha20Poly1305(key).encrypt(bytes(12), plain, None)


def packed(content: object, length: int | None = None) -> bytes:
    encoded = msgspec.msgpack.encode(content)
    return (len(encoded) if length is None else length).to_bytes(2, "little") + encoded


HOSTILE = {
    "no examples": packed({"num_examples": 0}),
    "too many examples": packed({"num_examples": 2**53 + 1}),
    "a fraction of an example": packed({"num_examples": 1.5}),
    "too many metrics": packed({"num_examples": 1, "metrics": {str(number): 0.0 for number in range(33)}}),
    "a metric that is no number": packed({"num_examples": 1, "metrics": {"a": "b"}}),
    "no map": packed([1, {}]),
    "a length beyond the header": packed({"num_examples": 1}, HEADER_BYTES - 1),
    "something behind it": packed({"num_examples": 1}) + b"\x01",
    "a name that is no text": b"\x04\x00\x81\xa1\xff\x01",
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_a_peer_error(what: str) -> None:
    with pytest.raises(PeerError, match="header"):
        decrypted(ROUND.private, "run.1.a", "pi", crafted(HOSTILE[what]))


def test_a_header_may_have_fields_of_later_versions() -> None:
    header, _ = decrypted(ROUND.private, "run.1.a", "pi", crafted(packed({"num_examples": 3, "later": [1]})))
    assert header == Header(3)
    assert len(_padded(header)) == HEADER_BYTES


@pytest.mark.parametrize("form", [Compression(), Compression("rotated-4bit"), Compression("top-k", 0.1)])
def test_an_encrypted_update_has_560_bytes_more(form: Compression) -> None:
    plan = TrainingPlan(1, 0.5, compression=form.name, kept_fraction=form.kept_fraction)
    asked = msgspec.structs.replace(INVITATION, plan=plan)
    least, most = update_sizes(form, asked.dimension)
    assert offered_sizes(asked) == (least + 560, most + 560)
    assert offered_sizes(msgspec.structs.replace(asked, encryption_key=UNSET)) == (least, most)


def test_a_secret_is_not_in_a_repr() -> None:
    assert ROUND.private.hex()[:8] not in repr(ROUND)
    assert repr(ROUND) == f"KeyPair({ROUND.public.hex()[:16]}...)"
