"""The outbox: the one update this device still owes, durable until the coordinator says it is kept or refused."""

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
