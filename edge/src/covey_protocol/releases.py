"""Releases of the agent: what their maker seals, and who installs one. docs/protocol.md, section 12.

A release travels as a retained message (`Topics.release`) that names wheels by hash, whose bytes are blobs; or as one
file with the wheels behind it. Both begin with the same sealed bytes. The key is the maker's, neither the coordinator's
nor a device's. This file reads no wheel and installs nothing.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Union

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from covey_protocol.errors import ReleaseError, UsageError
from covey_protocol.messages import BlobRef, Count, DeviceId, Reason
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.versions import fits, version_of

FORMAT = 1
SEAL_CONTEXT = b"covey release\x00"
MAX_SEALED_BYTES = 64 * 1024
MAX_WHEELS = 16
MAX_RELEASE_BYTES = 16 * 2**20  # of all wheels; covey-edge's own has 0.2 MB, and a small device holds them in memory
MAX_NAMED = 500  # devices that one release names: 64 bytes each keeps its description under MAX_SEALED_BYTES
MAGIC = b"covey release file 1\n"
_LENGTH_BYTES = 4

VersionText = Annotated[str, Meta(pattern=r"\A[0-9]{1,6}(?:\.[0-9]{1,6}){0,3}\Z")]
Least = Annotated[str, Meta(pattern=r"\A(?:[0-9]{1,6}(?:\.[0-9]{1,6}){0,3})?\Z")]
Specifier = Annotated[str, Meta(max_length=64)]
WheelName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.+-]{0,119}\.whl\Z")]


class Wheel(Struct, frozen=True):
    """name: its file name, whose tags say which machines it is for."""

    name: WheelName
    blob: BlobRef


class Release(Struct, frozen=True, tag="release"):
    """serial: grows with every sealing, Unix time in ms by habit; of two the larger one holds, and a device never goes
    back to a smaller one. version: of covey-edge. requires_python: as in a wheel. minimum_version: an older agent does
    not step to this one. share: of the fleet's devices that take it now; sealing again with a larger one goes on.
    devices: that take it whatever the share; agents older than this field go by the share alone.
    """

    version: VersionText
    serial: Annotated[int, Meta(ge=1, le=2**53)]
    wheels: Annotated[tuple[Wheel, ...], Meta(min_length=1, max_length=MAX_WHEELS)]
    requires_python: Specifier = ""
    minimum_version: Least = ""
    share: Annotated[float, Meta(ge=0, le=1)] = 1.0
    notes: Reason = ""
    devices: Union[Annotated[tuple[DeviceId, ...], Meta(min_length=1, max_length=MAX_NAMED)], UnsetType] = UNSET

    def __post_init__(self) -> None:
        names = {wheel.name for wheel in self.wheels}
        if len(names) < len(self.wheels) or len({wheel.blob.sha256 for wheel in self.wheels}) < len(self.wheels):
            raise ValueError("a release that names a wheel twice")
        if self.size > MAX_RELEASE_BYTES:
            raise ValueError(f"a release of {self.size} bytes, the limit is {MAX_RELEASE_BYTES}")

    @property
    def size(self) -> int:
        return sum(wheel.blob.size for wheel in self.wheels)


class _Sealed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    format: Count
    body: bytes
    seal: Annotated[bytes, Meta(min_length=64, max_length=64)]


_sealed = msgspec.msgpack.Decoder(_Sealed)
_release = msgspec.msgpack.Decoder(Release)


def seal_release(release: Release, key: SealingKey) -> bytes:
    body = msgspec.msgpack.encode(release)
    return msgspec.msgpack.encode(_Sealed(FORMAT, body, key.seal(SEAL_CONTEXT + body)))


def open_release(data: bytes, key: PublicKey) -> Release:
    """ReleaseError for anything but a release that this key has sealed, whatever the bytes."""
    sealed = _opened(data)
    if not key.verifies(sealed.seal, SEAL_CONTEXT + sealed.body):
        raise ReleaseError("the release is not sealed by the pinned release_key", "fetch it from its maker again")
    return _read(sealed)


def described_unverified(data: bytes) -> Release:
    """For looking at one without its maker's key: everything is checked but the seal."""
    return _read(_opened(data))


def _opened(data: bytes) -> _Sealed:
    if len(data) > MAX_SEALED_BYTES:
        raise ReleaseError(f"a release's description of {len(data)} bytes", f"at most {MAX_SEALED_BYTES} are read")
    try:
        sealed = _sealed.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ReleaseError(f"this is not the description of a release ({exc})", "fetch it again") from exc
    if sealed.format != FORMAT:
        raise ReleaseError(f"a release of format {sealed.format}, this agent reads {FORMAT}", "update in smaller steps")
    return sealed


def _read(sealed: _Sealed) -> Release:
    try:
        return _release.decode(sealed.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ReleaseError(f"the release cannot be read ({exc})", "ask its maker for another") from exc


# --- who takes it


def place_of(version: str, device_id: str) -> float:
    """From 0 to 1: where in the order of a version's roll-out a device stands. Another order for each version."""
    digest = hashlib.sha256(f"{version}\x00{device_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_for(release: Release, device_id: str) -> bool:
    """Whether its maker means this device now."""
    named = release.devices is not UNSET and device_id in release.devices
    return named or place_of(release.version, device_id) < release.share


def is_newer(version: str, other: str) -> bool:
    return version_of(version) > version_of(other)


def refusal(release: Release, current: str, python: str, heard: int) -> str:
    """Why a device that runs version `current` on this Python and has heard serials up to `heard` does not install it;
    "" where it may. Its own version is none of these: there is nothing to do."""
    if release.serial < heard:
        return f"release {release.version} is older news (serial {release.serial}) than what was heard ({heard})"
    if is_newer(current, release.version):
        return f"release {release.version} is older than this agent ({current})"
    try:
        if not fits(python, release.requires_python):
            return f"release {release.version} needs Python {release.requires_python}, this one is {python}"
    except UsageError as exc:
        return f"release {release.version}: {exc}"
    if release.minimum_version and is_newer(release.minimum_version, current):
        return f"release {release.version} can follow {release.minimum_version} and newer; this agent is {current}"
    return ""


# --- as one file


def release_file(sealed: bytes, wheels: list[bytes]) -> bytes:
    return b"".join([MAGIC, len(sealed).to_bytes(_LENGTH_BYTES, "big"), sealed, *wheels])


def read_release_file(data: bytes, key: PublicKey) -> tuple[bytes, Release, list[bytes]]:
    """The sealed description, what it says, and the wheels, whose hashes are right. ReleaseError for all else."""
    sealed, rest = _head(data)
    release = open_release(sealed, key)
    if len(rest) != release.size:
        lacking = "ends too early" if len(rest) < release.size else "has more in it than it says"
        raise ReleaseError(
            f"the release file {lacking} ({len(rest)} bytes of wheels for {release.size})", "fetch it again"
        )
    wheels = []
    for wheel in release.wheels:
        wheels.append(rest[: wheel.blob.size])
        rest = rest[wheel.blob.size :]
        check_wheel(wheel, wheels[-1])
    return sealed, release, wheels


def sealed_part(data: bytes) -> bytes:
    """The description in a file, for a reader who has no key."""
    return _head(data)[0]


def check_wheel(wheel: Wheel, data: bytes) -> None:
    if len(data) != wheel.blob.size or hashlib.sha256(data).digest() != wheel.blob.sha256:
        raise ReleaseError(f"{wheel.name} is not what the release says", "fetch it again")


def _head(data: bytes) -> tuple[bytes, bytes]:
    if not data.startswith(MAGIC):
        raise ReleaseError("this is not a covey release", "give a file that `covey release make` wrote")
    start = len(MAGIC) + _LENGTH_BYTES
    length = int.from_bytes(data[len(MAGIC) : start], "big")
    if length > MAX_SEALED_BYTES or len(data) < start + length:
        raise ReleaseError("the release file ends too early or is damaged", "fetch it again")
    return data[start : start + length], data[start + length :]
