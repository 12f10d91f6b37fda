"""Which partitions an image or a disk has: MBR (with its four primary entries) and GPT, read from the bytes themselves.

No program is asked and nothing is mounted, so that an image file needs no root. Logical partitions of an MBR are not
followed: no image that boots a Raspberry Pi has them. Nothing here writes.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import BinaryIO

from covey_protocol.errors import DataError

SECTOR = 512
FAT_TYPES = (0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E)
_PROTECTIVE = 0xEE
_GPT_FAT = {  # type GUIDs under which FAT partitions are found
    uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"),  # EFI system
    uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7"),  # basic data
}
_MAX_ENTRIES = 256


@dataclass(frozen=True)
class Partition:
    """number: as the kernel counts, from 1. start, size: bytes. may_be_fat: what the table says of its type."""

    number: int
    start: int
    size: int
    may_be_fat: bool

    @property
    def end(self) -> int:
        return self.start + self.size


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def read_partitions(file: BinaryIO) -> list[Partition]:
    """Of an image or a whole disk; empty where there is no partition table."""
    sector = read_at(file, 0, SECTOR)
    if len(sector) < SECTOR or sector[510:] != b"\x55\xaa":
        return []
    entries = [sector[446 + 16 * i : 462 + 16 * i] for i in range(4)]
    if any(entry[4] == _PROTECTIVE for entry in entries):
        return _gpt(file)
    found = []
    for number, entry in enumerate(entries, 1):
        start, sectors = struct.unpack("<II", entry[8:])
        if entry[4] and sectors:
            found.append(Partition(number, start * SECTOR, sectors * SECTOR, entry[4] in FAT_TYPES))
    return found


def _gpt(file: BinaryIO) -> list[Partition]:
    header = read_at(file, SECTOR, SECTOR)
    if header[:8] != b"EFI PART":
        return []
    at, count, size = struct.unpack_from("<QII", header, 72)
    if not (128 <= size <= 4096 and count <= _MAX_ENTRIES):
        raise DataError("the partition table (GPT) is damaged", "take the image from its maker again")
    table = read_at(file, at * SECTOR, count * size)
    found = []
    for index in range(len(table) // size):
        entry = table[index * size : (index + 1) * size]
        kind, first, last = uuid.UUID(bytes_le=entry[:16]), *struct.unpack_from("<QQ", entry, 32)
        if kind.int and last >= first:
            found.append(Partition(index + 1, first * SECTOR, (last - first + 1) * SECTOR, kind in _GPT_FAT))
    return found


def label(file: BinaryIO, partition: Partition) -> str:
    """What a FAT or ext file system in there is called; empty for others and for none. For people to read."""
    start = read_at(file, partition.start, 2048)
    if len(start) == 2048 and start[1024 + 0x38 : 1024 + 0x3A] == b"\x53\xef":
        return start[1024 + 0x78 : 1024 + 0x88].split(b"\0")[0].decode(errors="replace")
    for kind, at in ((b"FAT32", 71), (b"FAT16", 43)):
        if start[at + 11 : at + 16] == kind:
            return start[at : at + 11].decode("cp437").strip()
    return ""
