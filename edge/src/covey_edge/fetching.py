"""Fetches blobs into a cache: asks the broker for the chunks that lack, and again where none come for a while.

To subscribe again makes a broker send what it retains once more, which mends lost and corrupted chunks. Not while some
still come, or a slow link would carry them twice. What is whole is durable in the cache before anybody hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from covey_edge.cache import BlobCache
from covey_protocol.blobs import BlobAssembly
from covey_protocol.messages import BlobRef
from covey_protocol.topics import Topics


class Subscribes(Protocol):
    """Of `MqttTransport`. forget: do not ask for these again after a reconnection."""

    def subscribe(self, topics: Iterable[str]) -> None: ...

    def unsubscribe(self, topics: Iterable[str]) -> None: ...

    def forget(self, topics: Iterable[str]) -> None: ...


class Fetching:
    """patience_s: without a chunk for so long, what lacks is asked for again; doubled each time up to most_s, as a
    broker that is behind must not send twice. paused: whether nothing is to be asked for now."""

    def __init__(
        self,
        cache: BlobCache,
        topics: Topics,
        transport: Subscribes,
        patience_s: float,
        most_s: float,
        clock: Callable[[], float],
        *,
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        self._cache, self._topics, self._transport = cache, topics, transport
        self._first_s, self._most_s, self._paused, self._clock = patience_s, most_s, paused, clock
        self._assemblies: dict[bytes, BlobAssembly] = {}
        self._progress, self._patience_s = 0.0, patience_s

    def __len__(self) -> int:
        """How many blobs are under way."""
        return len(self._assemblies)

    def fetch(self, blobs: Iterable[BlobRef]) -> list[BlobRef]:
        """Those that are in the cache already. The others are asked for, unless they are under way."""
        here = []
        for ref in blobs:
            if self._cache.has(ref):
                here.append(ref)
            elif ref.sha256 not in self._assemblies:
                self._assemblies[ref.sha256] = BlobAssembly(ref)
                self._ask(self._assemblies[ref.sha256])
        return here

    def take(self, sha256: bytes, index: int, payload: bytes) -> bool:
        """Take a chunk; whether its blob is in the cache with it. False also for chunks that were cleared, or are of
        blobs that are not wanted (any more).

        PeerError for a wrong chunk; StorageError where the blob cannot be kept: then it is not fetched any more.
        """
        assembly = self._assemblies.get(sha256)
        if assembly is None or not payload:
            return False
        whole = assembly.add(index, payload)
        self._progress, self._patience_s = self._clock(), self._first_s
        self._transport.forget([self._topics.blob(sha256, index)])
        if whole is None:
            return False
        self._leave(self._assemblies.pop(sha256))
        self._cache.put(whole, sha256)
        return True

    def tick(self) -> None:
        """About once a second."""
        if self._assemblies and not self._paused() and self._clock() - self._progress > self._patience_s:
            self._patience_s = min(2 * self._patience_s, self._most_s)
            self.go_on()

    def pause(self) -> None:
        """Leave the topics of what lacks, until `go_on`. What has come stays."""
        for assembly in self._assemblies.values():
            self._leave(assembly)

    def go_on(self) -> None:
        """Ask for what lacks (again)."""
        for assembly in self._assemblies.values():
            self._ask(assembly)

    def stop(self) -> None:
        """Nothing is wanted any more."""
        while self._assemblies:
            self._leave(self._assemblies.popitem()[1])

    def _ask(self, assembly: BlobAssembly) -> None:
        if self._paused():
            return
        self._progress = self._clock()
        self._transport.subscribe([self._topics.blob(assembly.ref.sha256, index) for index in assembly.missing()])

    def _leave(self, assembly: BlobAssembly) -> None:
        ref = assembly.ref
        self._transport.unsubscribe([self._topics.blob(ref.sha256, index) for index in range(ref.num_chunks)])
