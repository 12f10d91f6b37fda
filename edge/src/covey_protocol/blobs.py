"""Content-addressed blobs: cutting data into chunks and putting them together again, in any order, repeatedly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Optional

from covey_protocol.errors import PeerError, UsageError
from covey_protocol.messages import DEFAULT_CHUNK_BYTES, BlobRef


def blob_ref(data: bytes, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> BlobRef:
    """The address of `data`. UsageError if it is empty or needs more than MAX_CHUNKS chunks."""
    if not data:
        raise UsageError("nothing to send")
    try:
        return BlobRef(hashlib.sha256(data).digest(), len(data), chunk_bytes)
    except ValueError as exc:
        raise UsageError(f"{len(data)} bytes cannot travel so ({exc})", "use a larger chunk size") from exc


def chunks(data: bytes, ref: BlobRef) -> Iterator[tuple[int, bytes]]:
    """All (index, bytes) of `data`."""
    for index in range(ref.num_chunks):
        yield index, chunk(data, ref, index)


def chunk(data: bytes, ref: BlobRef, index: int) -> bytes:
    start = index * ref.chunk_bytes
    return data[start : start + ref.chunk_bytes]


class BlobAssembly:
    """Collects the chunks of one blob.

    Holds at most ref.size bytes. Chunks may come in any order and repeatedly. When the last one is in, the sha256
    decides: if it does not match, everything is forgotten and `corrupt` counts up, so that they can be fetched again.
    """

    def __init__(self, ref: BlobRef) -> None:
        self.ref = ref
        self.corrupt = 0
        self.received_bytes = 0
        self._chunks: dict[int, bytes] = {}

    def missing(self) -> tuple[int, ...]:
        return tuple(index for index in range(self.ref.num_chunks) if index not in self._chunks)

    def add(self, index: int, data: bytes) -> Optional[bytes]:
        """Take one chunk; the whole blob when it is complete and its hash is right, else None.

        Raises PeerError for a chunk that does not exist or has the wrong size.
        """
        if not 0 <= index < self.ref.num_chunks or len(data) != self.ref.chunk_size(index):
            raise PeerError(f"chunk {index} with {len(data)} bytes does not fit a blob of {self.ref.size} bytes")
        self.received_bytes += len(data) if index not in self._chunks else 0
        self._chunks[index] = data
        if len(self._chunks) < self.ref.num_chunks:
            return None
        whole = b"".join(self._chunks[i] for i in range(self.ref.num_chunks))
        if hashlib.sha256(whole).digest() == self.ref.sha256:
            return whole
        self.corrupt += 1
        self._chunks.clear()
        self.received_bytes = 0
        return None
