"""An image with one device's files in it, as a stream: what is written to a card, or to a file.

The part up to the end of the boot partition (the head, half a GB of a Raspberry Pi OS) is decompressed once into a
temporary file. A copy of it gets the device's files; the rest of the image follows unchanged. So all that can be wrong
with an image, a kit or a device is found before a card is touched, a card is written once from start to end, and what
is read back and compared is everything. Temporary files have no name: whatever ends the program, they are gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, Optional, cast

from covey_deploy.boot_partition import check, customise
from covey_deploy.card import Card, System
from covey_deploy.images import CHUNK, Image, read_fully
from covey_deploy.partitions import read_partitions
from covey_protocol.errors import DataError, StorageError


class Base:
    """The image as it was published, with its head at hand for any number of cards. Close it at the end."""

    def __init__(self, image: Image, system: Optional[System] = None, python: str = "") -> None:
        self.image, self._system, self._python = image, system, python
        with _kept(_temporary()) as self._head, image.open() as stream:
            _copy(stream, self._head, CHUNK)
            fat = [part for part in read_partitions(self._head) if part.may_be_fat]
            self.head_size = min(-(-(fat[0].end if fat else 0) // CHUNK) * CHUNK or CHUNK, image.size)
            if fat and fat[0].end > image.size:
                raise DataError(f"{image.path} ends before its boot partition does", "download it again")
            self._head.seek(min(CHUNK, image.size))
            _copy(stream, self._head, self.head_size - self._head.tell())

    def prepare(self, make: Callable[[System], Card]) -> Prepared:
        """A card's stream. Whatever the image, the kit or the device's folder lacks is an error here."""
        with _kept(_temporary()) as head:
            self._head.seek(0)
            _copy(self._head, head, self.head_size)
            made = customise(head, make, self._system, self._python)
            check(head, made)
            return Prepared(self.image, head, self.head_size, made)

    def close(self) -> None:
        self._head.close()


class Prepared:
    """size: of all of it, in bytes. Close it when it is written: its head holds the device's keys."""

    def __init__(self, image: Image, head: BinaryIO, head_size: int, made: Card) -> None:
        self._image, self._head, self._head_size = image, head, head_size
        self.card, self.size = made, image.size

    def chunks(self) -> Iterator[bytes]:
        """CHUNK bytes at a time, from the first to the last."""
        self._head.seek(0)
        for _ in range(0, self._head_size, CHUNK):
            yield self._head.read(CHUNK)
        yield from self._image.chunks(skip=self._head_size)

    def close(self) -> None:
        self._head.close()


@contextlib.contextmanager
def _kept(file: BinaryIO) -> Iterator[BinaryIO]:
    """Closed only where what is done with it fails."""
    try:
        yield file
    except BaseException:
        file.close()
        raise


def _temporary() -> BinaryIO:
    return cast(BinaryIO, tempfile.TemporaryFile(prefix="covey-flash-"))


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Exactly size bytes, with holes for zeros. StorageError where the temporary folder is full."""
    end = target.tell() + size
    while (left := end - target.tell()) > 0 and (piece := read_fully(source, min(left, CHUNK))):
        with _room():
            write_sparse(target, piece)
    with _room():
        target.truncate(target.tell())
        target.flush()


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        folder = tempfile.gettempdir()
        raise StorageError(
            f"{folder} cannot hold a boot partition ({exc.strerror}; {shutil.disk_usage(folder).free >> 20} MiB free)",
            "free some space, or name another folder in TMPDIR",
        ) from exc


def write_sparse(file: BinaryIO, piece: bytes) -> None:
    """Leaves a hole where all is zero. The caller ends with a truncate, which a hole at the end needs."""
    if piece.count(0) == len(piece):
        file.seek(len(piece), os.SEEK_CUR)
    else:
        file.write(piece)
