"""What is on its way to the broker: a queue and a window of unacknowledged messages. Sans-IO; one thread uses it.

The broker says how many messages it takes before it acknowledges one (MQTT 5 Receive Maximum); more would end the
connection. Messages that a lost connection left unacknowledged go out again, in their old order, before all others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Optional

WINDOW = 20  # unacknowledged messages at once where the broker names no smaller number: Mosquitto's own limit


@dataclass(frozen=True)
class Outgoing:
    """expires_at: monotonic seconds after which the message is worth nothing; None for never."""

    number: int
    topic: str
    payload: bytes
    retain: bool
    expires_at: Optional[float] = None


class SendWindow:
    """add -> take -> sent -> acknowledged; `reset` after a lost connection."""

    def __init__(self) -> None:
        self.limit = WINDOW
        self._waiting: deque[Outgoing] = deque()
        self._under_way: dict[int, Outgoing] = {}  # by MQTT packet id, in order of sending

    def add(self, message: Outgoing) -> None:
        self._waiting.append(message)

    def take(self) -> Optional[Outgoing]:
        """The next message to send, if the window has room for one."""
        if not self._waiting or len(self._under_way) >= self.limit:
            return None
        return self._waiting.popleft()

    @property
    def empty(self) -> bool:
        return not self._waiting and not self._under_way

    def drop_largest(self) -> Optional[Outgoing]:
        """Forget the largest message under way; None if there is none."""
        largest = max(self._under_way.items(), key=lambda item: len(item[1].payload), default=None)
        return self._under_way.pop(largest[0]) if largest else None

    def sent(self, packet_id: int, message: Outgoing) -> None:
        self._under_way[packet_id] = message

    def acknowledged(self, packet_id: int) -> Optional[Outgoing]:
        return self._under_way.pop(packet_id, None)

    def reset(self) -> None:
        """The connection is gone: what it left unacknowledged goes out again first."""
        self._waiting.extendleft(reversed(list(self._under_way.values())))
        self._under_way.clear()
