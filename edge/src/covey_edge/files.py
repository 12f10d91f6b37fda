"""Durable files: written whole or not at all. `Disk` is the same as a value, so that tests can pass another."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Optional

from covey_protocol.errors import StorageError


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` so that a crash at any moment leaves the old file or the new one, and it survives power loss.

    Makes missing folders. Raises StorageError naming the file (full disk, read-only file system, no permission).
    """
    write_all_atomic({path: data}, mode)


def write_all_atomic(files: Mapping[Path, bytes], mode: int = 0o644) -> None:
    """Each as `write_atomic` does it, and all are durable when this returns; until then any of them may be.

    All are written before the first is synced, and each folder is synced once: for many files that is much faster.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    folders = {path.parent: path for path in files}
    path = Path()
    try:
        for path in folders.values():
            make_folder(path.parent)
        try:
            with contextlib.ExitStack() as stack:
                descriptors = []
                for path, data in files.items():
                    descriptors.append(stack.enter_context(_written(temporary[path], data, mode)))
                for descriptor in descriptors:
                    os.fsync(descriptor)
            for path in files:
                os.replace(temporary[path], path)
        except BaseException:
            for left in temporary.values():
                if os.path.exists(left):
                    os.unlink(left)
            raise
        for path in folders.values():
            sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(
            f"cannot write {path} ({exc.strerror or exc})", "free some space or check the folder's permissions"
        ) from exc


def append_to(path: Path, data: bytes, *, durable: bool) -> int:
    """Add to the end of a file (mode 600 where it is new) and return its size then.

    durable: synced, with all that was added before. Otherwise a power cut may take it, or a part of it. Where this
    raises StorageError (a full disk), the file is as it was.
    """
    try:
        make_folder(path.parent)
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, data)
                if durable:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if new:
            sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(f"cannot write {path} ({exc.strerror or exc})", "free some space") from exc
    return size + len(data)


class Disk:
    """The files of this machine. Errors of writing are StorageErrors; unreadable is None."""

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Durable when this returns: see `write_atomic`."""
        write_atomic(path, data, mode)

    def write_all(self, files: Mapping[Path, bytes], mode: int = 0o644) -> None:
        """All are durable when this returns: see `write_all_atomic`."""
        write_all_atomic(files, mode)

    def write_scratch(self, path: Path, data: bytes) -> None:
        """For what may be lost or torn by a crash: nothing is synced. Mode 600."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _written(path, data, 0o600):
                pass
        except OSError as exc:
            raise StorageError(f"cannot write {path} ({exc.strerror or exc})", "free some space") from exc

    def append(self, path: Path, data: bytes, *, durable: bool) -> int:
        """Add to the end of a file of mode 600; its size then. See `append_to`."""
        return append_to(path, data, durable=durable)

    def read(self, path: Path) -> Optional[bytes]:
        """None where there is no readable file."""
        try:
            return path.read_bytes()
        except OSError:
            return None

    def names(self, folder: Path) -> list[str]:
        """Names of the files and folders in `folder`, sorted, without temporary ones."""
        try:
            return sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError:
            return []

    def remove(self, path: Path) -> None:
        """Not durable: a file may come back after a power cut."""
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot remove {path} ({exc.strerror or exc})", "check its permissions") from exc

    def sweep(self, folder: Path) -> None:
        """Remove what crashes left of unfinished writes. Only for a folder that no other program writes to."""
        for path in folder.glob(".*.tmp"):
            self.remove(path)

    def remove_tree(self, folder: Path) -> None:
        """A folder of scratch files. What cannot be removed stays."""
        shutil.rmtree(folder, ignore_errors=True)

    def rename(self, path: Path, new: Path) -> None:
        try:
            os.replace(path, new)
        except OSError as exc:
            raise StorageError(f"cannot rename {path} ({exc.strerror or exc})", "check its permissions") from exc


DISK = Disk()


def told_of(error: Exception) -> str:
    """What others hear of a disk that failed: why, and not which of this device's files; its log has that."""
    cause = error if isinstance(error, OSError) else error.__cause__
    why = f" ({cause.strerror})" if isinstance(cause, OSError) and cause.strerror else ""
    return f"this device cannot keep or read a file{why}; its log says which"


def write_all(descriptor: int, data: bytes) -> None:
    """`os.write` may take a part; this goes on until all is taken. OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


@contextlib.contextmanager
def _written(path: Path, data: bytes, mode: int) -> Iterator[int]:
    """A new file with this content, and its descriptor: nothing is synced yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        write_all(descriptor, data)
        yield descriptor
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make the missing folders, each durable in the one above it."""
    if os.path.isdir(folder):
        return
    make_folder(folder.parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make durable which names the folder holds: a rename, or a removal, is only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
