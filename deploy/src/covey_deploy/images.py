"""Images of cards: plain or compressed (xz, gz, zst), their real size before a byte is written, their bytes in order.

What a file is, its first bytes say, not its name. xz and gz are read by the standard library (xz of several streams,
as Raspberry Pi's are, too), zst by the program zstd.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Optional, cast

from covey_deploy.partitions import SECTOR, read_at
from covey_protocol.errors import ConfigError, DataError, MachineError

CHUNK = 4 * 2**20
_MAGICS = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PK\x03\x04": "zip"}
_AGAIN = "download it again"


@dataclass(frozen=True)
class Image:
    """size: bytes when it is decompressed. kind: raw, xz, gz or zst. sha256: of the file as it lies there, hex."""

    path: Path
    kind: str
    size: int
    sha256: str

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its decompressed bytes, from the first, to be read only. DataError for a damaged file, at the latest at its
        end."""
        try:
            with _opened(self.path, self.kind) as stream:
                yield stream
        except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as exc:
            raise DataError(f"{self.path} is damaged ({exc})", _AGAIN) from exc
        except OSError as exc:
            raise DataError(f"{self.path} cannot be read ({exc.strerror})", _AGAIN) from exc

    def chunks(self, skip: int = 0) -> Iterator[bytes]:
        """All of it but the first `skip` bytes, CHUNK bytes at a time and the rest."""
        with self.open() as stream:
            done = 0
            while done < skip and (piece := read_fully(stream, min(CHUNK, skip - done))):
                done += len(piece)
            while piece := read_fully(stream, CHUNK):
                done += len(piece)
                yield piece
        if done != self.size:  # lzma and gzip take what is no compressed stream for an end
            raise DataError(f"{self.path} is damaged: {done} bytes came out of it, not {self.size}", _AGAIN)


def find_image(path: Path, expected_sha256: str = "", tell: Optional[Callable[[int], None]] = None) -> Image:
    """Look at an image file. expected_sha256: as its maker publishes it, of the file as it was downloaded.

    tell: called with the bytes read while the checksum is made. ConfigError where the file is none.
    """
    try:
        with path.open("rb") as file:
            kind = _kind(file, path)
            sha256 = _sha256(file, tell)
            if expected_sha256 and sha256 != expected_sha256.strip().lower():
                raise DataError(f"{path} has the SHA-256 {sha256}, not {expected_sha256}", _AGAIN)
            if kind == "raw":
                size = path.stat().st_size
            elif kind == "xz":
                size = _xz_size(file, path)
            else:
                size = _counted(path, kind)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read ({exc.strerror})", "give an image file") from exc
    if not size or size % SECTOR:
        raise DataError(f"{path} is no image of a disk: {size} bytes are no whole sectors", _AGAIN)
    return Image(path, kind, size, sha256)


def read_fully(stream: BinaryIO, size: int) -> bytes:
    """size bytes, or what is left: a decompressor or a pipe may give less at a time."""
    pieces = []
    while size and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _kind(file: BinaryIO, path: Path) -> str:
    start = read_at(file, 0, SECTOR)
    found = next((kind for magic, kind in _MAGICS.items() if start.startswith(magic)), "raw")
    if found == "zip":
        raise ConfigError(f"{path} is a zip file", "unzip it and give the .img in it")
    if found == "raw" and start[510:] != b"\x55\xaa":
        raise DataError(f"{path} is no image of a disk: it has no partition table", "give an .img, .img.xz or .img.zst")
    return found


def _sha256(file: BinaryIO, tell: Optional[Callable[[int], None]]) -> str:
    digest, done = hashlib.sha256(), 0
    file.seek(0)
    while piece := file.read(CHUNK):
        digest.update(piece)
        done += len(piece)
        if tell:
            tell(done)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[BinaryIO]:
    if kind == "zst":
        with _zstd(path) as stream:
            yield stream
        return
    with path.open("rb") as file:
        if kind == "xz":
            with lzma.LZMAFile(file) as decompressed:
                yield cast(BinaryIO, decompressed)
        elif kind == "gz":
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield cast(BinaryIO, unzipped)
        else:
            yield file


@contextlib.contextmanager
def _zstd(path: Path) -> Iterator[BinaryIO]:
    if shutil.which("zstd") is None:
        raise MachineError(f"{path} is compressed with zstd, which is not installed", "apt install zstd")
    with subprocess.Popen(["zstd", "-dcq", "--", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        try:
            yield cast(BinaryIO, running.stdout)
            ended = running.stdout.read(1) == b""
        except BaseException:
            running.kill()
            raise
        if not ended:  # the reader had enough
            running.kill()
        elif running.wait():
            raise DataError(f"{path} is damaged ({running.stderr.read().decode().strip()})", _AGAIN)


def _counted(path: Path, kind: str) -> int:
    """gz and zst do not tell their size reliably: read through them once."""
    total = 0
    with Image(path, kind, 0, "").open() as stream:
        while piece := read_fully(stream, CHUNK):
            total += len(piece)
    return total


def _xz_size(file: BinaryIO, path: Path) -> int:
    """The uncompressed size, from the indexes at the ends of the streams (.xz file format 1.1.0, 2 and 4).

    Padding between streams is refused, because Python's lzma does not read past it.
    """
    end, total = file.seek(0, 2), 0
    while end:
        footer = read_at(file, max(end - 12, 0), 12)
        if end < 32 or footer[10:] != b"YZ":
            raise DataError(f"{path} is damaged: it is not a whole xz file", _AGAIN)
        index_size = (int.from_bytes(footer[4:8], "little") + 1) * 4
        index = read_at(file, max(end - 12 - index_size, 0), index_size)
        count, at = _number(index, 1)
        blocks = 0
        for _ in range(count):
            unpadded, at = _number(index, at)
            size, at = _number(index, at)
            blocks += unpadded + -unpadded % 4
            total += size
        end -= 12 + index_size + blocks + 12
        if end < 0:
            raise DataError(f"{path} is damaged: its index does not fit", _AGAIN)
    return total


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the low ones first, and where the next thing is."""
    value = shift = 0
    while at < len(data) and shift < 63:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
    raise DataError("the image's xz index is damaged", _AGAIN)
