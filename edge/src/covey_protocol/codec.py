"""Bytes <-> sealed messages: the only place where messages are encoded, decoded, sealed and verified.

Encoding is msgpack. The seal covers the protocol version, the topic, the sender, the sequence number and the body, so a
message cannot be moved to another topic, fleet or sender, nor its number changed (docs/protocol.md, section 3).
Decoding any bytes ends in a message or a PeerError, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import msgspec

from covey_protocol import PROTOCOL_VERSION
from covey_protocol.errors import NotSealed, PeerError
from covey_protocol.messages import Envelope, FromCoordinator, FromDevice, Message
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import RESERVED_ID

COORDINATOR = RESERVED_ID  # the coordinator's sender name; no device may have it
MAX_ENVELOPE_BYTES = 2 * 1024 * 1024  # a chunk of the largest size, or an invitation that names 10,000 devices
# of an MQTT packet that brings a chunk, what is not the chunk: longest topic, envelope, the message's other fields
CHUNK_ROOM_BYTES = 512
SEAL_CONTEXT = b"covey message\x00"

_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)
_from_device: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDevice)
_from_coordinator: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromCoordinator)


def encode(message: Message, *, topic: str, sender: str, sequence: int, key: SealingKey) -> bytes:
    """The sealed bytes of `message` for `topic`."""
    body = _encoder.encode(message)
    seal = key.seal(_sealed_bytes(PROTOCOL_VERSION, topic, sender, sequence, body))
    return _encoder.encode(Envelope(PROTOCOL_VERSION, sender, sequence, body, seal))


def decode_from_device(data: bytes, *, topic: str, sender: str, key: PublicKey) -> tuple[FromDevice, int]:
    """The message and its sequence number, if `sender`'s device key sealed it for this topic. Else PeerError."""
    return _decode(data, topic, sender, key, _from_device)


def decode_from_coordinator(data: bytes, *, topic: str, key: PublicKey) -> tuple[FromCoordinator, int]:
    """The message and its sequence number, if the pinned coordinator sealed it for this topic. Else PeerError."""
    return _decode(data, topic, COORDINATOR, key, _from_coordinator)


def decode_unverified(data: bytes, *, topic: str, sender: str) -> tuple[Message, int]:
    """For looking at recorded messages whose sender's key is not known: everything is checked but the seal."""
    envelope = _open(data, topic, sender)
    decoder = _from_coordinator if sender == COORDINATOR else _from_device
    return _body(envelope, decoder), envelope.sequence


def _decode(
    data: bytes, topic: str, sender: str, key: PublicKey, decoder: msgspec.msgpack.Decoder[Any]
) -> tuple[Any, int]:
    envelope = _open(data, topic, sender)
    sealed = _sealed_bytes(envelope.version, topic, envelope.sender, envelope.sequence, envelope.body)
    if not key.verifies(envelope.seal, sealed):
        raise NotSealed(f"a message on {topic} is not sealed by the key known for {sender}", section=3)
    return _body(envelope, decoder), envelope.sequence


def _open(data: bytes, topic: str, sender: str) -> Envelope:
    if len(data) > MAX_ENVELOPE_BYTES:
        raise PeerError(f"a message of {len(data)} bytes on {topic}", section=10)
    try:
        envelope = _envelopes.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise PeerError(f"not a covey message on {topic} ({exc})", section=3) from exc
    if envelope.version != PROTOCOL_VERSION:
        raise PeerError(f"{topic} speaks protocol {envelope.version}, this side speaks {PROTOCOL_VERSION}", section=9)
    if envelope.sender != sender:
        raise PeerError(f"{topic} carries a message of {envelope.sender!r}", section=3)
    return envelope


def _body(envelope: Envelope, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    try:
        return decoder.decode(envelope.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise PeerError(f"{envelope.sender} sent a message that breaks the protocol ({exc})", section=4) from exc


def _sealed_bytes(version: int, topic: str, sender: str, sequence: int, body: bytes) -> bytes:
    # msgpack of a list is unambiguous where plain concatenation would not be
    parts: list[Union[int, str]] = [version, topic, sender, sequence]
    return SEAL_CONTEXT + _encoder.encode(parts) + body


class Sequence:
    """Numbers the messages of one sender: strictly growing, also over restarts and where the clock jumps back.

    now_ns: Unix time in nanoseconds at the start; numbers begin there, in microseconds. reserved: the value an earlier
    run gave to `reserve`, which wins where the clock says less. reserve: called with a number before any up to it is
    used, to be remembered for the next run.
    """

    BLOCK = 2**20  # numbers reserved at once: about a second of the clock, more messages than most runs send

    def __init__(self, now_ns: int, reserved: int = 0, reserve: Callable[[int], None] = lambda number: None) -> None:
        self._last = max(now_ns // 1000, reserved)
        self._reserve = reserve
        self._reserved = self._last

    def next(self) -> int:
        if self._last >= self._reserved:
            self._reserved = self._last + self.BLOCK
            self._reserve(self._reserved)
        self._last += 1
        return self._last


class ReplayGuard:
    """Lets each sequence number of a sender pass once.

    Remembers a window of the newest `WINDOW` numbers, so that MQTT's redelivery and slight reordering are harmless, and
    refuses everything older.
    """

    WINDOW = 1024

    def __init__(self) -> None:
        self._highest = -1
        self._seen: set[int] = set()

    def accept(self, sequence: int) -> bool:
        """True the first time a number is shown, False for repeats and for numbers older than the window."""
        if sequence <= self._highest - self.WINDOW or sequence in self._seen:
            return False
        self._seen.add(sequence)
        if sequence > self._highest:
            self._highest = sequence
            if len(self._seen) > 2 * self.WINDOW:
                self._seen = {number for number in self._seen if number > self._highest - self.WINDOW}
        return True
