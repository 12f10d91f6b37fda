"""The file of a backup: a plain tar with a header first, hashes and a seal last. Docs: docs/backup.md.

    covey-backup.json     Header
    folder/...            files that lie beside coordinator.toml, by their names there
    outside/N/NAME        files that coordinator.toml names elsewhere
    runs/...              of runs_dir: databases, updates, models, and the fleet's own files
    keys.encrypted        secret files, where they were asked for (passphrase.py)
    manifest.json         Manifest: size and SHA-256 of all members above
    seal                  64 bytes: the coordinator's key over SEALED + manifest.json

This file knows neither where the files come from nor what they mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import msgspec
from msgspec import Struct

from covey_edge.files import make_folder, sync_folder, write_all
from covey_protocol.errors import ConfigError, DataError, StorageError
from covey_protocol.seals import SEAL_BYTES, PublicKey, SealingKey
from covey_protocol.topics import check_name

FORMAT = 1
HEADER, MANIFEST, SEAL, KEYS = "covey-backup.json", "manifest.json", "seal", "keys.encrypted"
SEALED = b"covey backup\0"
BLOCK_BYTES = 2**20
MOST_NOTE_BYTES = 2**28  # of header, manifest and keys, which are held in memory; a manifest has 150 bytes per file
TOP = ("folder", "outside", "runs")

T = TypeVar("T")


class Header(Struct, frozen=True):
    """runs_dir: where it was, absolute; runs_in: its name beside coordinator.toml, where it will be restored.
    config: name of coordinator.toml. moved: path as the file has it -> where it lies now, relative. secret: the
    secret files that are named, relative, whether they are here or not. schema: version of the stores. created_ms: Unix
    time. key: the coordinator's public key. salt: "" without keys.
    """

    format: int
    covey: str
    fleet: str
    runs: tuple[str, ...]
    created_ms: int
    schema: int
    runs_dir: str
    runs_in: str
    config: str
    key: str
    moved: dict[str, str] = {}
    secret: tuple[str, ...] = ()
    salt: str = ""
    scrypt_n: int = 0


class _Version(Struct, frozen=True):
    """What every format says of itself, now and later."""

    format: int
    covey: str


class Entry(Struct, frozen=True):
    size: int
    sha256: str


class Manifest(Struct, frozen=True):
    files: dict[str, Entry]


class Writer:
    """One backup that is being written. Use `written`."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._files: dict[str, Entry] = {}

    def add_bytes(self, name: str, data: bytes) -> None:
        self._add(name, io.BytesIO(data), len(data))

    def add_file(self, name: str, path: Path) -> None:
        """FileNotFoundError where there is none (any more); a file that is replaced meanwhile is one of the two."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise StorageError(f"cannot read {path} ({exc.strerror or exc})", "check its permissions") from exc
        with file:
            self._add(name, file, os.fstat(file.fileno()).st_size)

    def count(self) -> int:
        return len(self._files)

    def has(self, name: str) -> bool:
        return name in self._files

    def _add(self, name: str, file: BinaryIO, size: int) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o600
        hashing = _Hashing(file)
        self._tar.addfile(info, hashing)
        self._files[name] = Entry(size, hashing.sha256.hexdigest())

    def finish(self, key: SealingKey) -> None:
        manifest = msgspec.json.encode(Manifest(self._files))
        self.add_bytes(MANIFEST, manifest)
        self.add_bytes(SEAL, key.seal(SEALED + manifest))


class _Hashing:
    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data


@contextlib.contextmanager
def written(path: Path) -> Iterator[Writer]:
    """Whole and durable under its name after the with block, or not there; mode 600.

    ConfigError where there is a file already. StorageError where it cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already", "give --out another name, or remove it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        try:
            sink = _Sink(temporary)
            try:
                with tarfile.open(fileobj=sink, mode="w|", bufsize=BLOCK_BYTES) as tar:  # type: ignore[call-overload]
                    yield Writer(tar)
                os.fsync(sink.descriptor)
            finally:
                os.close(sink.descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(
            f"cannot write {path} ({exc.strerror or exc})", "free some space or check the folder's permissions"
        ) from exc


class _Sink:
    """A new file that is written from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)  # of a killed process that had our number: not written into, whosever it is
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, data: bytes) -> int:
        write_all(self.descriptor, data)
        return len(data)


class Checked(Struct, frozen=True):
    """What `read` found. keys: the encrypted ones, b"" where there are none. header_bytes: what they are bound to."""

    header: Header
    header_bytes: bytes
    keys: bytes
    names: tuple[str, ...]


def read(path: Path, take: Callable[[str, BinaryIO, Header], None], sealed_by: PublicKey | None = None) -> Checked:
    """Hand every file to `take` as it comes, and check them all; what was taken is good only when this returns.

    take: called with the name (safe: relative, below `folder`, `outside` or `runs`), the content and the header.
    Raises DataError for what is no backup, not whole or changed; ConfigError for one of a newer covey or another key.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|", bufsize=BLOCK_BYTES) as tar:
            return _Reading(path, tar).read(take, sealed_by)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as exc:
        raise _damaged(path, "it cannot be read to its end") from exc
    except FileNotFoundError as exc:
        raise ConfigError(f"there is no {path}", "check its name") from exc
    except OSError as exc:
        raise StorageError(f"cannot read {path} ({exc.strerror or exc})", "check it and its permissions") from exc


class _Reading:
    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self._path, self._tar = path, tar
        self._found: dict[str, Entry] = {}

    def read(self, take: Callable[[str, BinaryIO, Header], None], sealed_by: PublicKey | None) -> Checked:
        first = self._tar.next()
        if first is None or first.name != HEADER:
            raise DataError(f"{self._path} is not a backup of a coordinator", "give a file that covey backup made")
        encoded = self._note(first)
        header = self._header(encoded)
        if sealed_by is not None and sealed_by.hex() != header.key:
            raise ConfigError(
                f"{self._path} is of the coordinator with the key {header.key}, not of {sealed_by.hex()[:16]}...",
                "take that coordinator's backup, or correct --sealed-by",
            )
        keys, manifest, seal = b"", b"", b""
        while (member := self._tar.next()) is not None:
            if manifest and member.name != SEAL:
                raise _damaged(self._path, f"{member.name!r} stands behind the hashes")
            if member.name == KEYS:
                keys = self._note(member)
            elif member.name == MANIFEST:
                manifest = self._note(member)
            elif member.name == SEAL:
                seal = self._note(member)
            else:
                self._take(member, header, take)
        self._check(header, manifest, seal)
        return Checked(header, encoded, keys, tuple(self._found))

    def _header(self, encoded: bytes) -> Header:
        version = self._decoded(encoded, _Version)
        if version.format > FORMAT:
            raise ConfigError(
                f"{self._path} was made by covey {version.covey} in format {version.format}, this one reads {FORMAT}",
                "update covey",
            )
        header = self._decoded(encoded, Header)
        for name in (header.fleet, *header.runs):
            check_name(name, f"in {self._path} the name")
        for place in (header.config, header.runs_in):
            if not is_place(place):
                raise _damaged(self._path, f"it would write {place[:80]!r}, outside of its folder")
        return header

    def _decoded(self, encoded: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(encoded, type=kind)
        except msgspec.DecodeError as exc:
            raise _damaged(self._path, f"its notes cannot be read ({exc})") from exc

    def _take(self, member: tarfile.TarInfo, header: Header, take: Callable[[str, BinaryIO, Header], None]) -> None:
        if not member.isreg() or not is_file_name(member.name):
            raise _damaged(self._path, f"it holds {member.name!r}, which no backup has")
        hashing = _Hashing(self._content(member))
        take(member.name, hashing, header)  # type: ignore[arg-type]  # it only reads
        while hashing.read(BLOCK_BYTES):
            pass  # what was not wanted
        self._keep(member, hashing.sha256.hexdigest())

    def _note(self, member: tarfile.TarInfo) -> bytes:
        if member.size > MOST_NOTE_BYTES:
            raise _damaged(self._path, f"{member.name} has {member.size} bytes")
        data = self._content(member).read()
        self._keep(member, hashlib.sha256(data).hexdigest())
        return data

    def _content(self, member: tarfile.TarInfo) -> BinaryIO:
        content = self._tar.extractfile(member) if member.isreg() else None
        if content is None:
            raise _damaged(self._path, f"{member.name!r} is no file")
        return content  # type: ignore[return-value]

    def _keep(self, member: tarfile.TarInfo, sha256: str) -> None:
        if member.name in self._found:
            raise _damaged(self._path, f"it holds {member.name!r} twice")
        self._found[member.name] = Entry(member.size, sha256)

    def _check(self, header: Header, encoded: bytes, seal: bytes) -> None:
        if not encoded or len(seal) != SEAL_BYTES:
            raise _damaged(self._path, "its end is missing")
        named = self._decoded(encoded, Manifest).files
        found = {name: entry for name, entry in self._found.items() if name not in (MANIFEST, SEAL)}
        wrong = sorted(name for name in {*named, *found} if named.get(name) != found.get(name))
        if wrong:
            raise _damaged(self._path, f"{wrong[0]} is not as it was written")
        if not PublicKey.from_hex(header.key).verifies(seal, SEALED + encoded):
            raise _damaged(self._path, "its seal is not that of the coordinator's key")


def is_file_name(name: str) -> bool:
    """Whether a backup may hold a file of this name: relative, below `folder`, `outside` or `runs`."""
    parts = PurePosixPath(name).parts
    return is_place(name) and len(parts) > 1 and parts[0] in TOP


def is_place(name: str) -> bool:
    """Whether a path, as a backup has it, stays in the folder that it is restored to."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and ".." not in parts and "\0" not in name


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"the backup {path} is damaged: {what}", "take another one")
