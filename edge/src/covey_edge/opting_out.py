"""The owner's opt-out: while its file is in state_dir, the device declines every round and delivers nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import msgspec
from msgspec import Struct

from covey_edge.files import DISK, Disk, sync_folder
from covey_protocol.errors import StorageError

NAME = "left.json"  # in state_dir
LEFT = "the owner of this device has opted out"


class _Left(Struct, frozen=True):
    since_ms: int


class OptOut:
    """now_ms: Unix time. Looked up when it is asked for: the command may change it while the agent runs."""

    def __init__(
        self, folder: Path, disk: Disk = DISK, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    ) -> None:
        self._path, self._disk, self._now_ms = folder / NAME, disk, now_ms

    def since_ms(self) -> Optional[int]:
        """Unix time of the opt-out; None where there is none, 0 where the file cannot be read: it still holds."""
        data = self._disk.read(self._path)
        if data is None and NAME not in self._disk.names(self._path.parent):
            return None
        try:
            return msgspec.json.decode(data or b"", type=_Left).since_ms
        except msgspec.MsgspecError:
            return 0

    def leave(self) -> None:
        """Durable when this returns; keeps the time of an earlier one. Raises StorageError."""
        if self.since_ms() is None:
            self._disk.write(self._path, msgspec.json.encode(_Left(self._now_ms())) + b"\n", mode=0o600)

    def join(self) -> None:
        """Durable when this returns. Raises StorageError."""
        self._disk.remove(self._path)
        if self._path.parent.is_dir():
            try:
                sync_folder(self._path.parent)
            except OSError as exc:
                raise StorageError(f"cannot sync {self._path.parent} ({exc.strerror or exc})", "try again") from exc
