"""When devices are asked for their updates: not faster than what they send is taken. Sans-IO; knows nothing of rounds.

Much can wait in a broker and in the inbox for a coordinator that is behind, and every offer of a fleet may come in the
same second. So a Need waits until the coordinator has nothing else to do; then some go, as many as ask for
LET_GO_BYTES. Where that never comes (repeated offers alone can keep it busy), as many go every BUSY_S. On slow links
the coordinator is idle between two chunks, and all go soon; a busy one asks for no more than it can take. A device
whose Need waits offers again; it is asked once all the same, also where that offer was waiting in the broker when the
Need went.
"""

from __future__ import annotations

from covey_protocol.messages import BlobRef, Need

# how many bytes are asked for at once, and how soon again: 160 MB/s, more than one coordinator takes
LET_GO_BYTES, LET_GO_S = 8 << 20, 0.05
BUSY_S = 1.0
ASK_AGAIN_S = 4.0  # below a device's RESEND_S: an offer that it repeats because nothing came is answered


class UploadGate:
    """Needs that wait, in the order in which their devices first came."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Need, int]] = {}
        self._asked: dict[str, tuple[bytes, float]] = {}  # device -> which update was asked for, when
        self._let_go_at = float("-inf")

    def add(self, device_id: str, need: Need, update: BlobRef, now: float) -> None:
        """update: of which it asks for chunks. A newer Need of a device takes the place of one that waits."""
        sha256, asked_at = self._asked.get(device_id, (b"", 0.0))
        if sha256 != need.sha256 or now - asked_at >= ASK_AGAIN_S:
            self._waiting[device_id] = (need, min(update.size, len(need.indices) * update.chunk_bytes))

    def let_go(self, now: float, idle: bool) -> list[tuple[str, Need]]:
        """What may be sent now. idle: nothing else waits."""
        if now - self._let_go_at < (LET_GO_S if idle else BUSY_S):
            return []
        gone: list[tuple[str, Need]] = []
        asked = 0
        for device_id, (need, size) in self._waiting.items():
            if gone and asked + size > LET_GO_BYTES:
                break
            gone.append((device_id, need))
            asked += size
        for device_id, need in gone:
            del self._waiting[device_id]
            self._asked[device_id] = (need.sha256, now)
            self._let_go_at = now
        return gone

    def clear(self) -> None:
        """The round is over."""
        self._waiting.clear()
        self._asked.clear()
