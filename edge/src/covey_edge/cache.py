"""Blobs on disk, named by their sha256: a bundle is fetched once, not every round."""

from __future__ import annotations

import hashlib
from pathlib import Path

from covey_edge.files import write_atomic
from covey_protocol.messages import BlobRef

KEEP = 4  # the current bundle and parameters, and those before


class BlobCache:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, sha256: bytes) -> Path:
        return self._folder / sha256.hex()

    def has(self, ref: BlobRef) -> bool:
        """Whether the blob is here, whole and unchanged."""
        path = self.path(ref.sha256)
        try:
            return path.stat().st_size == ref.size and hashlib.sha256(path.read_bytes()).digest() == ref.sha256
        except OSError:
            return False

    def put(self, data: bytes, sha256: bytes) -> None:
        write_atomic(self.path(sha256), data)

    def prune(self, keep: set[bytes]) -> None:
        """Drop the oldest blobs beyond KEEP, never one in `keep`."""
        names = {sha256.hex() for sha256 in keep}
        files = [path for path in self._folder.glob("?" * 64) if path.name not in names]
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[max(0, KEEP - len(names)) :]:
            path.unlink(missing_ok=True)
