"""Blobs on disk, named by their sha256: a bundle is fetched once, not every round."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from covey_edge.files import write_atomic
from covey_protocol.messages import BlobRef

KEEP = 4  # the current bundle and parameters, and those before


class BlobCache:
    """keep: how many blobs `prune` leaves, the ones that were used last."""

    def __init__(self, folder: Path, keep: int = KEEP) -> None:
        self._folder, self._keep = folder, keep

    def path(self, sha256: bytes) -> Path:
        return self._folder / sha256.hex()

    def has(self, ref: BlobRef) -> bool:
        """Whether the blob is here, whole and unchanged."""
        path = self.path(ref.sha256)
        try:
            here = path.stat().st_size == ref.size and hashlib.sha256(path.read_bytes()).digest() == ref.sha256
            if here:
                os.utime(path)  # it is in use: another task's may go first
        except OSError:
            return False
        return here

    def put(self, data: bytes, sha256: bytes) -> None:
        write_atomic(self.path(sha256), data)

    def prune(self, keep: set[bytes]) -> None:
        """Drop what was not used for the longest time, never one in `keep`."""
        names = {sha256.hex() for sha256 in keep}
        files = [path for path in self._folder.glob("?" * 64) if path.name not in names]
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[max(0, self._keep - len(names)) :]:
            path.unlink(missing_ok=True)
