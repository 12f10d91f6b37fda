"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from covey_protocol.errors import ConfigError, StorageError


class Busy(ConfigError):
    """Another process works there."""


@contextlib.contextmanager
def alone_in(folder: Path, command: str, remedy: str = "wait for it") -> Iterator[None]:
    """For this process alone: two would spoil each other's results. A process that dies lets go.

    command: who works there, for the error: Busy where another does. StorageError where the folder cannot be used.
    """
    try:
        lock = (folder / ".lock").open("w")
    except OSError as exc:
        raise StorageError(f"cannot use {folder} ({exc.strerror})", "check its permissions") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise Busy(f"another {command} works in {folder}", remedy) from exc
        yield
