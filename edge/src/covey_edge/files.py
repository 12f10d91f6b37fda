"""Durable files: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from covey_protocol.errors import StorageError


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` so that a crash at any moment leaves the old file or the new one, and it survives power loss.

    Makes missing folders. Raises StorageError naming the file (full disk, read-only file system, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(
            f"cannot write {path} ({exc.strerror or exc})", "free some space or check the folder's permissions"
        ) from exc


def _sync_folder(folder: Path) -> None:
    # the rename itself is only durable once the folder is
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
