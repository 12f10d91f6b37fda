"""Files in a FAT16 or FAT32 file system inside an image or a disk, read and added without mounting it.

Enough for a boot partition: looking up, reading, adding files with long names in folders, replacing whole files. No
renaming, no deleting, no FAT12 (no boot partition has it). Layout: Microsoft's FAT specification, version 1.03.

What is added is written in an order that leaves the old files whole if it is cut off: data, then the tables, then the
folders, then what replaced files had is freed. docs/adr/0043 says why this is not a library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Optional

from covey_deploy.partitions import read_at
from covey_protocol.errors import DataError, StorageError

_FOLDER, _VOLUME, _LONG = 0x10, 0x08, 0x0F
_FREE, _END_OF_FOLDER = 0xE5, 0x00
_SLOT = 32
# 1 January 2024, 00:00: the same files give the same bytes whenever they are written
_DATE, _TIME = ((2024 - 1980) << 9) | (1 << 5) | 1, 0
_SHORT_CHARACTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")
_FORBIDDEN = frozenset('\\/:*?"<>|')
_DAMAGED = "take the image from its maker again; fsck.vfat tells more"


@dataclass(frozen=True)
class Entry:
    """One file or folder. slot: byte of the volume where its 32-byte record lies. cluster: 0 where nothing is in it."""

    name: str
    short: bytes
    is_folder: bool
    cluster: int
    size: int
    slot: int


class Fat:
    """One volume. file: open for reading, and for writing where `write` is used; offset: of its first byte."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self._offset = file, offset
        boot = self._read(0, 512)
        if len(boot) < 512 or boot[510:] != b"\x55\xaa" or not boot[13] or boot[0] not in (0xEB, 0xE9):
            raise DataError("the boot partition holds no FAT file system", "is this an image of Raspberry Pi OS?")
        (self._sector,) = struct.unpack_from("<H", boot, 11)
        reserved, self._num_tables, root_slots, sectors16 = struct.unpack_from("<HBHH", boot, 14)
        fat16, sectors32 = struct.unpack_from("<H", boot, 22)[0], struct.unpack_from("<I", boot, 32)[0]
        self._is32 = fat16 == 0  # as the Linux kernel decides
        table_sectors = struct.unpack_from("<I", boot, 36)[0] if self._is32 else fat16
        if self._sector not in (512, 1024, 2048, 4096) or not table_sectors or not 1 <= self._num_tables <= 2:
            raise DataError("the boot partition's FAT file system is damaged", _DAMAGED)
        self.cluster_size: int = boot[13] * self._sector
        self._tables_at, self._table_size = reserved * self._sector, table_sectors * self._sector
        self._root_at = self._tables_at + self._num_tables * self._table_size
        self._root_size = root_slots * _SLOT
        self._data_at: int = self._root_at + self._root_size
        sectors = sectors16 or sectors32
        self._num_clusters = (sectors * self._sector - self._data_at) // self.cluster_size
        width = 4 if self._is32 else 2
        if not self._is32 and self._num_clusters < 4085:
            raise DataError("the boot partition is FAT12", "use an image whose boot partition is FAT16 or FAT32")
        if self._num_clusters < 1 or (self._num_clusters + 2) * width > self._table_size:
            raise DataError("the boot partition's FAT file system is damaged", _DAMAGED)
        self._root_cluster, info = struct.unpack_from("<IH", boot, 44) if self._is32 else (0, 0)
        self._info_at = info * self._sector if 0 < info < reserved else 0
        self._table = bytearray(self._read(self._tables_at, self._table_size))
        self._next_free = 2

    # -- reading

    def read(self, path: str) -> Optional[bytes]:
        """The whole file; None where there is none of that name (case does not matter). DataError for a folder."""
        entry = self._find(path)
        if entry is None:
            return None
        if entry.is_folder:
            raise DataError(f"{path} of the boot partition is a folder", _DAMAGED)
        return self._content(entry.cluster)[: entry.size] if entry.size else b""

    def names(self, path: str = "") -> list[str]:
        """What a folder holds; the root's for an empty path, nothing where there is no such folder."""
        if not path:
            return [entry.name for entry in self._entries(self._root_cluster)]
        entry = self._find(path)
        if entry is None or not entry.is_folder:
            return []
        return [entry.name for entry in self._entries(entry.cluster) if entry.name not in (".", "..")]

    def free_bytes(self) -> int:
        return sum(1 for cluster in range(2, self._num_clusters + 2) if not self._get(cluster)) * self.cluster_size

    # -- writing

    def write(self, files: Mapping[str, bytes]) -> None:
        """Add files, or replace them whole, and make the folders they lie in. Nothing is written if they do not fit.

        StorageError where there is too little room. OSError from the file is left to the caller, who knows the disk.
        """
        needed = sum(-(-len(content) // self.cluster_size) for content in files.values())
        needed += len(files) // 4 + 16  # folders: at least four slots of long names for each file, and a margin
        if needed * self.cluster_size > (free := self.free_bytes()):
            raise StorageError(
                f"the boot partition has {free // 2**20} MiB free, not {needed * self.cluster_size // 2**20 + 1}",
                "use an image with a larger boot partition, or put the data on the device in another way",
            )
        placed = {path: self._place(content) for path, content in files.items()}
        self._write_tables()
        freed: list[int] = []
        for path, content in files.items():
            freed.append(self._enter(path, placed[path], len(content)))
        for cluster in freed:
            self._release(cluster)
        self._write_tables()
        self._write_info()
        self._file.flush()

    def _place(self, content: bytes) -> int:
        """Write a file's data into free clusters and link them; returns the first, 0 for an empty file."""
        clusters = self._allocate(-(-len(content) // self.cluster_size))
        for first, count, skipped in _runs(clusters):
            piece = content[skipped * self.cluster_size : (skipped + count) * self.cluster_size]
            self._write(self._at(first), piece + bytes(-len(piece) % self.cluster_size))
        return clusters[0] if clusters else 0

    def _enter(self, path: str, cluster: int, size: int) -> int:
        """Point a name to data; returns the first cluster it had before."""
        *folders, name = path.split("/")
        _check_name(name, path)
        folder = self._root_cluster
        for part in folders:
            folder = self._folder(folder, part, path)
        entry = self._look(folder, name)
        if entry is None:
            self._add(folder, name, 0x20, cluster, size)
            return 0
        if entry.is_folder:
            raise DataError(f"{path} is a folder in the boot partition", _DAMAGED)
        record = bytearray(self._read(entry.slot, _SLOT))
        _set_place(record, cluster, size)
        self._write(entry.slot, bytes(record))
        return entry.cluster

    def _folder(self, parent: int, name: str, path: str) -> int:
        """The first cluster of a folder, which is made where it is missing."""
        _check_name(name, path)
        entry = self._look(parent, name)
        if entry is not None:
            if not entry.is_folder:
                raise DataError(f"{name} is a file in the boot partition, and {path} needs a folder", _DAMAGED)
            return entry.cluster
        (cluster,) = self._allocate(1)
        above = 0 if parent == self._root_cluster else parent  # the root is 0 here, also in FAT32
        dots = _record(b".          ", _FOLDER, cluster, 0) + _record(b"..         ", _FOLDER, above, 0)
        self._write(self._at(cluster), dots + bytes(self.cluster_size - len(dots)))
        self._add(parent, name, _FOLDER, cluster, 0)
        return cluster

    def _add(self, folder: int, name: str, attributes: int, cluster: int, size: int) -> None:
        short = _short_name(name, {entry.short for entry in self._entries(folder)})
        records = [*_long_records(name, short), _record(short, attributes, cluster, size)]
        for slot, record in reversed(list(zip(self._free_slots(folder, len(records)), records))):
            self._write(slot, record)  # the short record, which makes the name valid, is last in place and first here

    def _free_slots(self, folder: int, count: int) -> list[int]:
        run: list[int] = []
        for slot, record in self._records(folder):
            run = [*run, slot] if record[0] in (_FREE, _END_OF_FOLDER) else []
            if len(run) == count:
                return run
        if folder == 0:
            raise StorageError("the boot partition's main folder is full", "use an image with a FAT32 boot partition")
        (more,) = self._allocate(1)
        self._write(self._at(more), bytes(self.cluster_size))
        self._set(self._chain(folder)[-1], more)
        return self._free_slots(folder, count)

    # -- folders

    def _find(self, path: str) -> Optional[Entry]:
        folder, entry = self._root_cluster, None
        for index, part in enumerate(path.split("/")):
            if index and (entry is None or not entry.is_folder):
                return None
            entry = self._look(folder, part)
            folder = entry.cluster if entry else 0
        return entry

    def _look(self, folder: int, name: str) -> Optional[Entry]:
        return next((entry for entry in self._entries(folder) if entry.name.lower() == name.lower()), None)

    def _records(self, folder: int) -> Iterator[tuple[int, bytes]]:
        """The 32-byte records of a folder, with the byte of the volume where each lies."""
        if folder == 0:
            places = [(self._root_at, self._root_size)]
        else:
            places = [(self._at(cluster), self.cluster_size) for cluster in self._chain(folder)]
        for at, size in places:
            content = self._read(at, size)
            for start in range(0, size, _SLOT):
                yield at + start, content[start : start + _SLOT]

    def _entries(self, folder: int) -> Iterator[Entry]:
        long: list[bytes] = []
        for slot, record in self._records(folder):
            if record[0] == _END_OF_FOLDER:
                return
            if record[0] == _FREE:
                long = []
            elif record[11] & 0x3F == _LONG:
                long = [record] if record[0] & 0x40 else [*long, record]
            elif record[11] & _VOLUME:
                long = []
            else:
                high, low, size = *struct.unpack_from("<H4xH", record, 20), struct.unpack_from("<I", record, 28)[0]
                cluster = (high << 16 | low) if self._is32 else low
                yield Entry(
                    _name(record, long),
                    record[:11],
                    bool(record[11] & _FOLDER),
                    self._first_cluster(record, cluster),
                    size,
                    slot,
                )
                long = []

    def _first_cluster(self, record: bytes, cluster: int) -> int:
        """`..` of a folder of the root says 0, which FAT32's root is not."""
        return self._root_cluster if record[11] & _FOLDER and not cluster else cluster

    # -- clusters

    def _at(self, cluster: int) -> int:
        return self._data_at + (cluster - 2) * self.cluster_size

    def _chain(self, cluster: int) -> list[int]:
        chain: list[int] = []
        end = 0x0FFFFFF8 if self._is32 else 0xFFF8
        while cluster < end:
            if not 2 <= cluster < self._num_clusters + 2 or len(chain) > self._num_clusters:
                raise DataError("the boot partition's FAT file system is damaged", _DAMAGED)
            chain.append(cluster)
            cluster = self._get(cluster)
        return chain

    def _content(self, cluster: int) -> bytes:
        runs = _runs(self._chain(cluster))
        return b"".join(self._read(self._at(first), count * self.cluster_size) for first, count, _ in runs)

    def _allocate(self, count: int) -> list[int]:
        """Free clusters, linked to a chain."""
        found: list[int] = []
        while len(found) < count:
            if self._next_free >= self._num_clusters + 2:
                raise StorageError("the boot partition is full", "use an image with a larger boot partition")
            if not self._get(self._next_free):
                found.append(self._next_free)
            self._next_free += 1
        for cluster, following in zip(found, [*found[1:], 0x0FFFFFFF]):
            self._set(cluster, following)
        return found

    def _release(self, cluster: int) -> None:
        for each in self._chain(cluster) if cluster else ():
            self._set(each, 0)

    def _get(self, cluster: int) -> int:
        if self._is32:
            return int(struct.unpack_from("<I", self._table, cluster * 4)[0]) & 0x0FFFFFFF
        return int(struct.unpack_from("<H", self._table, cluster * 2)[0])

    def _set(self, cluster: int, value: int) -> None:
        if self._is32:
            kept = struct.unpack_from("<I", self._table, cluster * 4)[0] & 0xF0000000
            struct.pack_into("<I", self._table, cluster * 4, kept | value)
        else:
            struct.pack_into("<H", self._table, cluster * 2, value & 0xFFFF)

    def _write_tables(self) -> None:
        for number in range(self._num_tables):
            self._write(self._tables_at + number * self._table_size, bytes(self._table))

    def _write_info(self) -> None:
        """FAT32 keeps the number of free clusters beside the tables; fsck complains if it is wrong."""
        if not self._info_at or self._read(self._info_at, 4) != b"RRaA":
            return
        free = self.free_bytes() // self.cluster_size
        self._write(self._info_at + 488, struct.pack("<II", free, min(self._next_free, self._num_clusters + 1)))

    # -- bytes

    def _read(self, at: int, size: int) -> bytes:
        return read_at(self._file, self._offset + at, size)

    def _write(self, at: int, content: bytes) -> None:
        self._file.seek(self._offset + at)
        self._file.write(content)


def _runs(clusters: list[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours together: the first cluster, how many, and how many came before."""
    start = 0
    for index in range(1, len(clusters) + 1):
        if index == len(clusters) or clusters[index] != clusters[index - 1] + 1:
            yield clusters[start], index - start, start
            start = index


def _check_name(name: str, path: str) -> None:
    bad = not name or len(name) > 255 or name != name.strip(" .") or _FORBIDDEN & set(name) or not name.isprintable()
    if bad:
        raise DataError(f"{path!r} cannot be a name in a FAT file system", "rename it")


def _name(record: bytes, long: list[bytes]) -> str:
    if long and all(piece[13] == _checksum(record[:11]) for piece in long):
        units = b"".join(piece[1:11] + piece[14:26] + piece[28:32] for piece in reversed(long))
        return units.decode("utf-16-le", errors="replace").split("\0")[0]
    base, extension = record[:8].rstrip().decode("cp437"), record[8:11].rstrip().decode("cp437")
    # Windows NT and Linux keep lower case of a short name in two bits
    base, extension = (part.lower() if record[12] & bit else part for part, bit in ((base, 0x08), (extension, 0x10)))
    return f"{base}.{extension}" if extension else base


def _long_records(name: str, short: bytes) -> list[bytes]:
    """The records that hold a long name, in the order in which they lie: the last piece first."""
    units = name.encode("utf-16-le")
    if len(units) % 26:
        units += b"\0\0"
    units += b"\xff" * (-len(units) % 26)
    pieces = [units[start : start + 26] for start in range(0, len(units), 26)]
    records = []
    for number, piece in reversed(list(enumerate(pieces, 1))):
        order = number | (0x40 if number == len(pieces) else 0)
        head = struct.pack("<B10sBBB", order, piece[:10], _LONG, 0, _checksum(short))
        records.append(head + piece[10:22] + b"\0\0" + piece[22:])
    return records


def _checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = ((total >> 1) + ((total & 1) << 7) + byte) & 0xFF
    return total


def _short_name(name: str, taken: set[bytes]) -> bytes:
    """An 8.3 name of its own, such as NUMPY-~1WHL: every name gets a long one beside it."""
    text, _, end = name.upper().rpartition(".") if "." in name.lstrip(".") else (name.upper(), "", "")
    base, extension = _short_part(text), _short_part(end)[:3]
    for number in range(1, 1_000_000):
        tail = b"~%d" % number
        short = (base[: 8 - len(tail)] + tail).ljust(8) + extension.ljust(3)
        if short not in taken:
            return short
    raise StorageError(f"there are too many names like {name}", "use fewer files")


def _short_part(text: str) -> bytes:
    return bytes(
        byte if byte in _SHORT_CHARACTERS else ord("_") for byte in text.encode("ascii", "replace") if byte not in b" ."
    )


def _record(short: bytes, attributes: int, cluster: int, size: int) -> bytes:
    record = bytearray(
        struct.pack("<11sBBBHHHHHHHI", short, attributes, 0, 0, _TIME, _DATE, _DATE, 0, _TIME, _DATE, 0, 0)
    )
    _set_place(record, cluster, size)
    return bytes(record)


def _set_place(record: bytearray, cluster: int, size: int) -> None:
    struct.pack_into("<H", record, 20, cluster >> 16)
    struct.pack_into("<H", record, 26, cluster & 0xFFFF)
    struct.pack_into("<I", record, 28, size)
