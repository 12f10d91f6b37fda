"""Updates encrypted from a device to the coordinator, so that whoever owns the broker reads nothing of them.

docs/protocol.md, section 8.2: X25519 with a fresh key pair of the round and a fresh one of the update, HKDF-SHA256,
ChaCha20-Poly1305. Nothing here proves who encrypted: the sealed Offer does, which names the hash of the bytes.
Where keys are kept is the coordinator's matter; this file reads and writes no files. The cryptography package (9 MB of
memory) is loaded where it is first needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from covey_protocol import PROTOCOL_VERSION
from covey_protocol.errors import ConfigError, PeerError
from covey_protocol.messages import MAX_METRICS, Invitation, Name

ENCRYPTION = "encryption"  # the capability
CONTEXT = b"covey encrypted update\x00"
KEY_BYTES = 32
TAG_BYTES = 16
HEADER_BYTES = 512  # whatever the metrics are, so that the size says nothing of them; covey's own take about 130
ENCRYPTION_BYTES = KEY_BYTES + HEADER_BYTES + TAG_BYTES  # what an encrypted update has more than a plain one
_LENGTH_BYTES = 2
# every key encrypts one message, so the nonce need not differ
_NONCE = bytes(12)

Entropy = Callable[[int], bytes]


class Header(Struct, frozen=True):
    """What a plain Offer would say beside the update."""

    num_examples: Annotated[int, Meta(ge=1, le=2**53)]
    metrics: Annotated[dict[Name, float], Meta(max_length=MAX_METRICS)] = {}


class KeyPair(NamedTuple):
    """Of one round or one update. Its repr never shows the secret."""

    private: bytes
    public: bytes

    @classmethod
    def made(cls, entropy: Entropy = os.urandom) -> KeyPair:
        return cls.of(entropy(KEY_BYTES))

    @classmethod
    def of(cls, private: bytes) -> KeyPair:
        """ValueError for anything but 32 bytes."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return cls(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"KeyPair({self.public.hex()[:16]}...)"


def refusal(invitation: Invitation, required: bool) -> str:
    """Why a device must not send an update for this round; "" where it may.

    required: whether the device's owner wants updates encrypted.
    """
    public = invitation.encryption_key
    if not public:
        if ENCRYPTION in invitation.requires:
            return "the round asks for encrypted updates and brings no key"
        return "this device sends updates only encrypted (privacy.require_encryption)" if required else ""
    try:
        _shared(KeyPair.made(), public)
    except PeerError as exc:
        return exc.what
    return ""


def encrypted(
    invitation: Invitation,
    device_id: str,
    update: bytes,
    num_examples: int,
    metrics: Mapping[str, float],
    entropy: Entropy = os.urandom,
) -> bytes:
    """The bytes that travel for `update`: ephemeral public key, ciphertext, tag.

    PeerError where the round has no usable key, ConfigError for metrics that do not fit into the header.
    """
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    public, ephemeral = invitation.encryption_key, KeyPair.made(entropy)
    if not public:
        raise PeerError(f"round {invitation.round_id} brings no key to encrypt with")
    key = _key(_shared(ephemeral, public), public, ephemeral.public, invitation.round_id, device_id)
    plain = _padded(Header(num_examples, dict(metrics))) + update
    return ephemeral.public + ChaCha20Poly1305(key).encrypt(_NONCE, plain, None)


def decrypted(private: bytes, round_id: str, device_id: str, data: bytes) -> tuple[Header, bytes]:
    """What a device said beside its update, and the update. PeerError where it is not encrypted for this round by
    this device, or says what an Offer must not."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    if len(data) < ENCRYPTION_BYTES:
        raise PeerError(f"an encrypted update of {len(data)} bytes", section=8)
    pair, ephemeral = KeyPair.of(private), data[:KEY_BYTES]
    key = _key(_shared(pair, ephemeral), pair.public, ephemeral, round_id, device_id)
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, memoryview(data)[KEY_BYTES:], None)
    except InvalidTag as exc:
        raise PeerError("the update is not encrypted for this round by this device", section=8) from exc
    return _header(plain[:HEADER_BYTES]), plain[HEADER_BYTES:]


def _shared(own: KeyPair, public: bytes) -> bytes:
    """PeerError for a point of low order: with it everybody would know the secret."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        return X25519PrivateKey.from_private_bytes(own.private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as exc:
        raise PeerError("the key to encrypt with is none (a point of low order)", section=8) from exc


def _key(shared: bytes, round_public: bytes, ephemeral: bytes, round_id: str, device_id: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    # msgpack of a list is unambiguous where plain concatenation would not be
    bound = msgspec.msgpack.encode([PROTOCOL_VERSION, round_public, ephemeral, round_id, device_id])
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=CONTEXT + bound).derive(shared)


def _padded(header: Header) -> bytes:
    encoded = msgspec.msgpack.encode(header)
    if len(encoded) > HEADER_BYTES - _LENGTH_BYTES:
        raise ConfigError(
            f"metrics of {len(encoded)} bytes do not fit an encrypted update ({HEADER_BYTES - _LENGTH_BYTES})",
            "report fewer, or with shorter names",
        )
    return (len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded).ljust(HEADER_BYTES, b"\x00")


def _header(padded: bytes) -> Header:
    end = _LENGTH_BYTES + int.from_bytes(padded[:_LENGTH_BYTES], "little")
    if end > HEADER_BYTES or any(padded[end:]):
        raise PeerError("the header of an encrypted update is not padded with zeros", section=8)
    try:
        return msgspec.msgpack.decode(padded[_LENGTH_BYTES:end], type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise PeerError(f"the header of an encrypted update breaks the protocol ({exc})", section=8) from exc
