"""What an agent says of itself over the local socket, and what its files say where it does not run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional

from msgspec import Struct

from covey_protocol.device import State

NEXT = {
    State.IDLE: "waits for the next round",
    State.INVITED: "looks whether this round suits its owner",
    State.FETCHING: "fetches the model",
    State.TRAINING: "trains",
    State.REPORTING: "hands over its update",
}


class Privacy(Struct, frozen=True, kw_only=True):
    """Of the ledger. epsilon: of the noised updates, at delta."""

    noised: int
    exact_updates: int
    exact_evaluations: int
    epsilon: float
    delta: float
    epsilon_limit: Optional[float] = None
    rounds_left: Optional[int] = None


class Status(Struct, frozen=True, kw_only=True):
    """One agent. Of one that does not run, what only a running one knows is None.

    state: of the machine, or "stopped". doing: the same in words, and why. working_s: since the child began.
    outbox: rounds whose updates it owes. left_ms: Unix time at which the owner opted out. sections: of other parts, by
    name; each is a value that JSON can hold.
    """

    device_id: str
    fleet: str
    version: str
    state: str
    doing: str
    outbox: tuple[str, ...]
    broker: str
    left_ms: Optional[int] = None
    privacy: Optional[Privacy] = None
    pid: Optional[int] = None
    uptime_s: Optional[float] = None
    connected: Optional[bool] = None
    connection: str = ""
    mqtt: str = ""
    runtime: str = ""
    round_id: str = ""
    task: str = ""
    ends_in_s: Optional[float] = None
    working_s: Optional[float] = None
    memory_mb: Optional[float] = None
    child_memory_mb: Optional[float] = None
    sections: dict[str, Any] = {}


def resident_mb(pid: Optional[int]) -> Optional[float]:
    """Resident memory of a process in MB (10^6 bytes); None where there is none, or no /proc."""
    if pid is None:
        return None
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
