"""Which blobs a fleet's coordinator has put on the broker, on disk: who is killed cannot take them off again.

Noted durably before the first chunk is published, and forgotten when the broker has acknowledged that they are gone.
The next start of a coordinator of this fleet clears what it has not published itself.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from covey_edge.files import DISK, Disk
from covey_protocol.messages import BlobRef


class RetainedNote:
    """A file, beside that of the message numbers; without a path nothing is noted. Used by one thread."""

    def __init__(self, path: Path | None = None, disk: Disk = DISK) -> None:
        self._path, self._disk = path, disk
        self.noted = {ref.sha256: ref for ref in self._read()}

    def add(self, ref: BlobRef) -> None:
        """Raises StorageError."""
        if self.noted.get(ref.sha256) != ref:
            self.noted[ref.sha256] = ref
            self._write()

    def remove(self, sha256: bytes) -> None:
        """Raises StorageError."""
        if self.noted.pop(sha256, None) is not None:
            self._write()

    def _read(self) -> list[BlobRef]:
        """A file that cannot be read costs at most chunks that stay on the broker."""
        data = self._disk.read(self._path) if self._path is not None else None
        try:
            return msgspec.msgpack.decode(data, type=list[BlobRef]) if data is not None else []
        except msgspec.MsgspecError:
            return []

    def _write(self) -> None:
        if self._path is not None:
            self._disk.write(self._path, msgspec.msgpack.encode(list(self.noted.values())), mode=0o600)
