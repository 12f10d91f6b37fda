"""Captures: a round as the coordinator saw it, and records: what one device did in it. docs/captures.md.

Both are files for later study, sealed by who wrote them; neither travels by MQTT. A capture holds updates of devices
whose owners allow it. A record holds a device's examples, and stays on the device until its owner takes it elsewhere.
Without NumPy, which the agent's own process does not load; this file reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Optional, TypeVar, Union

import msgspec
from msgspec import Meta, Struct

from covey_protocol.errors import DataError
from covey_protocol.messages import DeviceId, Invitation, Name, Reason, RoundId, Sha256, TrainingPlan
from covey_protocol.seals import KEY_BYTES, SEAL_BYTES, PublicKey, SealingKey

ALLOWED = "capture_allowed"  # the metric by which a device says that its owner lets this update be captured
CAPTURE, RECORD = b"covey capture 1\x00", b"covey record 1\x00"
MAX_BYTES = 2 * 1024**3
CAPTURE_SUFFIX, RECORD_SUFFIX = ".covey-capture", ".covey-record"


class Array(Struct, frozen=True):
    """Numbers of any shape, row-major, little-endian. dtype: as NumPy names it."""

    dtype: Annotated[str, Meta(pattern=r"\A(?:float32|float64|u?int(?:8|16|32|64)|bool)\Z")]
    shape: Annotated[tuple[int, ...], Meta(max_length=16)]
    data: bytes


class Work(Struct, frozen=True):
    """What the training child did. x, y: the examples in the order the data source gave them, which the order of
    training is drawn from. trained: the update before clipping, noise and compression, 4 d bytes. sent_sha256: of the
    update as whoever receives it reads it, 4 d bytes."""

    x: Array
    y: Array
    trained: bytes
    sent_sha256: Sha256
    order_name: Name
    runtime: Name


class DeviceRecord(Struct, frozen=True):
    """What one device did in one round. work: an encoded Work, b"" where the child gave none that can be read."""

    device_id: DeviceId
    fleet: Name
    round_id: RoundId
    bundle_sha256: Sha256
    parameters_sha256: Sha256
    plan: TrainingPlan
    clip_norm: float
    noise_multiplier: float
    work: bytes
    sealed_by: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class CapturedUpdate(Struct, frozen=True):
    """One device's update before any rule. update: 4 d bytes, decrypted and decoded. sha256: of the bytes offered."""

    device_id: DeviceId
    num_examples: int
    metrics: dict[Name, float]
    sha256: Sha256
    update: bytes
    status: Name = ""
    reason: Reason = ""


class Capture(Struct, frozen=True):
    """A round that is over. invitation, bundle, parameters: as they were sent. aggregate: the model that came of it,
    4 d bytes, b"" where none did. left_out: devices whose update is not in it, and why."""

    fleet: Name
    run: Name
    invitation: Invitation
    bundle: bytes
    parameters: bytes
    updates: tuple[CapturedUpdate, ...]
    left_out: dict[DeviceId, Reason]
    aggregate: bytes
    captured_at_ms: int
    sealed_by: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


Sealed = TypeVar("Sealed", bound=Union[Capture, DeviceRecord])
_KINDS: Mapping[bytes, type] = {CAPTURE: Capture, RECORD: DeviceRecord}


def with_consent(metrics: Mapping[str, float], allowed: bool) -> dict[str, float]:
    """What an offer says beside the update. A training child that was taken over must not consent for the owner."""
    own = {name: value for name, value in metrics.items() if name != ALLOWED}
    return {**own, ALLOWED: 1.0} if allowed else own


def is_allowed(metrics: Mapping[str, float]) -> bool:
    return metrics.get(ALLOWED) == 1.0


def sealed(content: Union[Capture, DeviceRecord], key: SealingKey) -> bytes:
    """The file: 16 or 15 bytes of magic, an Ed25519 seal over magic and content, the content as MessagePack."""
    magic = CAPTURE if isinstance(content, Capture) else RECORD
    body = msgspec.msgpack.encode(msgspec.structs.replace(content, sealed_by=key.public.raw))
    return magic + key.seal(magic + body) + body


def opened(data: bytes, kind: type[Sealed], name: str, sealed_by: Optional[PublicKey] = None) -> Sealed:
    """What a file holds. name: of the file, for errors. sealed_by: whose seal it must have; without one the seal is
    held against the key that the file itself names, which finds damage and proves nothing of who wrote it.

    DataError for anything else than a whole file of this kind.
    """
    magic = CAPTURE if kind is Capture else RECORD
    what = "capture" if kind is Capture else "device record"
    if not data.startswith(magic):
        other = next((one for start, one in _KINDS.items() if data.startswith(start)), None)
        raise DataError(f"{name} is no {what}" + (" but the other of the two" if other else ""), "give the right file")
    if len(data) > MAX_BYTES:
        raise DataError(f"{name} has {len(data)} bytes", f"a {what} has at most {MAX_BYTES}")
    seal, body = data[len(magic) : len(magic) + SEAL_BYTES], data[len(magic) + SEAL_BYTES :]
    try:
        content = msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f"{name} is damaged ({exc})", "copy it again") from exc
    own = PublicKey(content.sealed_by)
    if not own.verifies(seal, magic + body):
        raise DataError(f"{name} is damaged or changed: its seal does not fit", "copy it again from where it was made")
    if sealed_by is not None and own != sealed_by:
        raise DataError(f"{name} is sealed by {own.hex()}, not by {sealed_by.hex()}", "ask whose it is")
    return content


def work_of(record: DeviceRecord, name: str) -> Work:
    """DataError where the training child gave nothing that can be read."""
    try:
        return msgspec.msgpack.decode(record.work, type=Work)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f"{name} holds no readable examples ({exc})", "take the record of another round") from exc
