"""Bytes onto a card: written once, synced, and read back from the card itself.

Linux. The disk is opened exclusively (O_EXCL: the kernel refuses a disk that is mounted or held) and locked (flock: a
second `covey flash` and udev stay off). The first MiB, with the partition table, is emptied first and written last, so
a card whose writing was broken off has no partitions and starts nothing. Errors name the card and the state it is in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from covey_deploy.disks import Disk, Machine
from covey_deploy.images import CHUNK
from covey_deploy.prepared import Prepared, write_sparse
from covey_protocol.errors import ConfigError, StorageError

MIB = 2**20
SYNC_BYTES = 16 * CHUNK  # what may be unwritten, so that progress is the card's and not the memory's
_BLKFLSBUF, _BLKRRPART = 0x1261, 0x125F
_GONE = (errno.ENODEV, errno.ENXIO, errno.ENOMEDIUM, errno.ESHUTDOWN)
Tell = Callable[[int], None]


class Written:
    """An open, locked disk."""

    def __init__(self, disk: Disk, descriptor: int) -> None:
        self.disk, self.descriptor = disk, descriptor
        self.state = "nothing was written to it"


@contextlib.contextmanager
def opened(disk: Disk, machine: Machine) -> Iterator[Written]:
    """For this program alone. ConfigError where somebody has it, or where another disk has come under its name since
    `disk` was judged and confirmed; StorageError, with the card's state, for what fails while it is open."""
    descriptor = _open(disk)
    card = Written(disk, descriptor)
    try:
        _check_same(disk, machine)
        yield card
    except OSError as exc:
        raise StorageError(*_trouble(card, exc, machine)) from exc
    finally:
        with contextlib.suppress(OSError):  # what is lost here was reported by fsync
            os.close(descriptor)


def _open(disk: Disk) -> int:
    try:
        descriptor = os.open(disk.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except PermissionError as exc:
        raise ConfigError(f"{disk.path} may not be written by this user", "run it with sudo") from exc
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise ConfigError(f"{disk.path} is in use", "unmount it, or wait for the program that writes it") from exc
        if exc.errno == errno.EROFS:
            raise ConfigError(f"{disk.path} is read-only", "slide the card's lock, or take another reader") from exc
        raise StorageError(f"{disk.path} cannot be opened ({exc.strerror})", "put the card in again") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(descriptor)
        raise ConfigError(f"another covey flash is writing {disk.path}", "wait for it, or take another card") from exc
    return descriptor


def _check_same(disk: Disk, machine: Machine) -> None:
    now = machine.disk(disk.name)
    if replace(now, partitions=disk.partitions) != disk:
        raise ConfigError(
            f"{disk.path} is another disk now ({now.described()}); nothing was written", "look at it and begin again"
        )


def _trouble(card: Written, exc: OSError, machine: Machine) -> tuple[str, str]:
    path = card.disk.path
    now = machine.disk(card.disk.name)
    if exc.errno in _GONE or now.size != card.disk.size:
        return f"{path} was pulled out or lost its connection; {card.state}", "put the card in and begin again"
    return f"{path} failed ({exc.strerror}); {card.state}", "begin again; if it fails again, take another card"


def write(card: Written, chunks: Iterable[bytes], tell: Tell) -> str:
    """All of it, durably; returns its SHA-256. tell: called with the bytes that the card has."""
    digest, at, first = hashlib.sha256(), 0, b""
    card.state = "it holds a part of the image and does not start"
    _write_at(card.descriptor, 0, bytes(MIB))
    os.fsync(card.descriptor)
    for piece in chunks:
        digest.update(piece)
        if at == 0:
            first, piece = piece[:MIB], piece[MIB:]
            at = len(first)
        _write_at(card.descriptor, at, piece)
        at += len(piece)
        if at % SYNC_BYTES < CHUNK:
            os.fdatasync(card.descriptor)
            tell(at - len(first))
    if at + MIB <= card.disk.size:  # an old GPT's second table is in the last sectors
        _write_at(card.descriptor, card.disk.size - MIB, bytes(MIB))
    os.fsync(card.descriptor)
    _write_at(card.descriptor, 0, first)
    os.fsync(card.descriptor)
    card.state = "it holds all of the image, but was not read back"
    tell(at)
    return digest.hexdigest()


def _write_at(descriptor: int, at: int, piece: bytes) -> None:
    left = memoryview(piece)
    while left:
        count = os.pwrite(descriptor, left, at)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left, at = left[count:], at + count


def verify(card: Written, size: int, expected_sha256: str, tell: Tell) -> None:
    """Read `size` bytes back from the card, not from memory, and compare."""
    digest, done = hashlib.sha256(), 0
    for piece in _read_back(card, size):
        digest.update(piece)
        done += len(piece)
        tell(done)
    if digest.hexdigest() != expected_sha256:
        card.state = "it does not hold what was written to it"
        raise StorageError(
            f"{card.disk.path} gives back other bytes than were written to it", "do not use this card; take another one"
        )


def _read_back(card: Written, size: int) -> Iterator[bytes]:
    """Past the memory's copies: O_DIRECT, or where a disk refuses that, after they were dropped."""
    fcntl.ioctl(card.descriptor, _BLKFLSBUF)
    os.posix_fadvise(card.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        descriptor = os.open(card.disk.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        descriptor = os.open(card.disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, CHUNK) as memory:  # aligned, as O_DIRECT wants it
            for at in range(0, size, CHUNK):
                count = os.preadv(descriptor, [memory], at)
                if count < min(CHUNK, size - at):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                yield memory[: min(CHUNK, size - at)]
    finally:
        os.close(descriptor)


def finish(card: Written) -> None:
    """Let the kernel see the new partitions; a desktop may mount them then, which does no harm any more."""
    card.state = "it is complete"
    with contextlib.suppress(OSError):
        fcntl.ioctl(card.descriptor, _BLKRRPART)


def write_file(path: Path, prepared: Prepared, tell: Tell) -> str:
    """An image file (mode 600: a device's keys are in it), whole or not there; returns its SHA-256."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest, done = hashlib.sha256(), 0
    try:
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with cast(BinaryIO, os.fdopen(descriptor, "r+b")) as file:
                for piece in prepared.chunks():
                    digest.update(piece)
                    write_sparse(file, piece)
                    done += len(piece)
                    tell(done)
                file.truncate(done)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as exc:
        raise StorageError(
            f"cannot write {path} ({exc.strerror}); nothing is left of it", "free some space or choose another folder"
        ) from exc
    return digest.hexdigest()
