"""One process at a time in a folder of results."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from covey_protocol.errors import ConfigError, StorageError


@contextlib.contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """For this process alone: two would spoil each other's results. A process that dies lets go.

    command: who works there, for the error: ConfigError where another does. StorageError where the folder cannot be
    used.
    """
    try:
        lock = (folder / ".lock").open("w")
    except OSError as exc:
        raise StorageError(f"cannot use {folder} ({exc.strerror})", "check its permissions") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError(f"another {command} works in {folder}", "wait for it") from exc
        yield
