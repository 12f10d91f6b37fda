"""Keeps in the store which devices are connected and when each was last heard, for `covey devices`."""

from __future__ import annotations

import time

from covey_coordinator.store import RunStore
from covey_coordinator.watching import events

KEEP_S = 2.0  # a commit costs a sync, and a device can send a lot


class PresenceKeeper:
    """A watcher that gathers; `keep` writes, in the store's thread, at most every KEEP_S."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._online: dict[str, bool] = {}
        self._seen_ms: dict[str, int] = {}
        self._changed: set[str] = set()
        self._kept_at = float("-inf")

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, (events.DeviceRevoked, events.DeviceReadmitted)):
            self._online[event.device] = isinstance(event, events.DeviceReadmitted) and event.online
            self._changed.add(event.device)
        if not isinstance(event, events.MessageCame):
            return
        device_id = event.device
        self._online[device_id] = event.online if event.online is not None else self._online.get(device_id, False)
        if event.online is not False:  # that somebody is away is the broker's word, perhaps an old one
            self._seen_ms[device_id] = time.time_ns() // 1_000_000
        self._changed.add(device_id)

    def keep(self) -> None:
        """Raises StorageError."""
        if not self._changed or time.monotonic() - self._kept_at < KEEP_S:
            return
        self._store.keep_presence({name: (self._online[name], self._seen_ms.get(name, 0)) for name in self._changed})
        self._changed.clear()
        self._kept_at = time.monotonic()
