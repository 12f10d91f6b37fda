"""What this device's updates have left out so far (top-k), kept for its next update of the same task.

A task is a run and a bundle: another run, or another bundle (so another model's shape), starts with nothing. The file
is written before the update that it belongs to is kept. So a crash between the two, or a rejected update, loses what
that update held; nothing is ever sent twice.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from covey_edge.files import DISK, Disk
from covey_protocol.messages import Invitation

NO_WITHHELD_NOISE = (
    "this device adds noise, and a form that sends the largest numbers only would send mostly noise",
    'use "rotated-8bit" or "rotated-4bit" in the coordinator\'s [wire]',
)


class Withheld(msgspec.Struct, frozen=True):
    """run: of the coordinator. bundle: its sha256. numbers: 4 d bytes, float32 little-endian."""

    run: str
    bundle: bytes
    numbers: bytes


class WithheldFile:
    """One task's numbers, mode 600: they tell as much about the data as an update does."""

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self._path, self._disk = path, disk

    def load(self, invitation: Invitation) -> bytes:
        """b"" where nothing readable is there for this round's task and size."""
        data = self._disk.read(self._path)
        try:
            kept = msgspec.msgpack.decode(data or b"", type=Withheld)
        except msgspec.MsgspecError:
            return b""
        same = (kept.run, kept.bundle) == (_run(invitation), invitation.bundle.sha256)
        return kept.numbers if same and len(kept.numbers) == invitation.parameters.size else b""

    def store(self, invitation: Invitation, numbers: bytes) -> None:
        """Durable when this returns, in place of what was there. StorageError if it cannot be."""
        kept = Withheld(_run(invitation), invitation.bundle.sha256, numbers)
        self._disk.write(self._path, msgspec.msgpack.encode(kept), mode=0o600)


def _run(invitation: Invitation) -> str:
    """Of a round id RUN.NUMBER.TIME; a coordinator that names its rounds otherwise gets a task for each."""
    parts = invitation.round_id.rsplit(".", 2)
    return parts[0] if len(parts) == 3 else invitation.round_id
