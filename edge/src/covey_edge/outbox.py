"""The outbox: the one update this device still owes, durable until the coordinator says it is kept or refused.

And the message numbers it has reserved, so that a device without a clock battery never repeats one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import msgspec

from covey_edge.files import write_atomic
from covey_protocol.messages import Invitation, Offer


class Entry(msgspec.Struct, frozen=True):
    invitation: Invitation
    offer: Offer
    update: bytes


class Outbox:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "outbox.msgpack"

    def keep(self, entry: Entry) -> None:
        """Durable when this returns. StorageError if it cannot be."""
        write_atomic(self._path, msgspec.msgpack.encode(entry), mode=0o600)

    def load(self) -> Optional[Entry]:
        """What is owed, or None. A file that cannot be read is set aside, not deleted."""
        try:
            return msgspec.msgpack.decode(self._path.read_bytes(), type=Entry)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError:
            self._path.replace(self._path.with_suffix(".damaged"))
            return None

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)


class NumberFile:
    """One number on disk: the highest message number a run may have used."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> int:
        """0 where nothing readable is there."""
        try:
            return int(self._path.read_text())
        except (OSError, ValueError):
            return 0

    def store(self, number: int) -> None:
        write_atomic(self._path, str(number).encode(), mode=0o600)
