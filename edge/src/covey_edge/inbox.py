"""What waits for a program's loop: one queue in which messages are counted, so that a flood does not fill the memory.

While more than `hold_bytes` of messages wait, those that come are taken but not acknowledged. The broker then sends at
most a window of them more and keeps the rest. The connection is read on, so that the broker's acknowledgements and
pings pass: nothing waits for itself. When there is room again the acknowledgements go out in the order of arrival, one
for each message that is looked at.

What would go beyond `most_bytes` is dropped. Only a broker without a window gets there, one that does not keep to it
(Mosquitto 2.0.11 was seen to send more while a slow receiver acknowledges), or one that comes back again and again.
Messages of QoS 0, which nothing holds back, are dropped from `hold_bytes` on.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Optional

from covey_edge.mqtt_window import WINDOW
from covey_protocol.codec import MAX_ENVELOPE_BYTES

log = logging.getLogger("covey.mqtt")

ITEM_BYTES = 512  # of a message beside its payload: topic, Python's objects, places in queues
HOLD_BYTES = 32 * 2**20  # 500 chunks of the default size; little even for a small device
MOST_BYTES = HOLD_BYTES + WINDOW * (MAX_ENVELOPE_BYTES + ITEM_BYTES)  # a broker that keeps to its window drops nothing


def waiting_bytes(payload: bytes) -> int:
    """What one message is counted as."""
    return len(payload) + ITEM_BYTES


class Inbox:
    """For one reader and any number of writers. Items that are no messages always get in."""

    def __init__(self, hold_bytes: int = HOLD_BYTES, most_bytes: int = MOST_BYTES) -> None:
        self._hold_bytes, self._most_bytes = hold_bytes, most_bytes
        self._items: queue.SimpleQueue[tuple[Any, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0  # bytes; with _lock held, like all below
        self._owed: deque[Callable[[], object]] = deque()  # acknowledgements of what waits
        self._dropping = False

    def put(self, item: Any) -> None:
        """Never blocks: safe from a signal handler."""
        self._items.put((item, 0))

    def put_message(self, item: Any, size: int, acknowledge: Optional[Callable[[], object]] = None) -> None:
        """size: `waiting_bytes`. acknowledge: called now or later, must not block; None for QoS 0."""
        with self._lock:
            most = self._hold_bytes if acknowledge is None else self._most_bytes
            if self._waiting + size > most:
                self._drop()
            else:
                self._waiting += size
                self._items.put((item, size))
                if acknowledge is not None and (self._owed or self._waiting > self._hold_bytes):
                    self._owed.append(acknowledge)
                    return
            if acknowledge is not None:
                acknowledge()  # also of a dropped one: a window full of these would never move again

    def get(self, timeout: Optional[float] = None) -> Any:
        """The next item. Raises queue.Empty where none came in time."""
        item, size = self._items.get(timeout=timeout)
        if size:
            self._took(size)
        return item

    def _took(self, size: int) -> None:
        with self._lock:
            self._waiting -= size
            if self._waiting <= self._hold_bytes:
                self._dropping = False
                # one for one: Mosquitto 2.0.11 may answer each with a whole window of messages
                for _ in range(min(len(self._owed), 1) if self._waiting else len(self._owed)):
                    self._owed.popleft()()

    def _drop(self) -> None:
        if not self._dropping:
            log.warning("messages come faster than they are looked at: some are dropped, and will be said again")
        self._dropping = True
