"""What an agent says of itself over the local socket, and what its files say where it does not run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional

from msgspec import Struct

from covey_edge import __version__
from covey_edge.config import Agent, PrivacySettings
from covey_edge.files import DISK
from covey_edge.ledger import Ledger
from covey_edge.opting_out import OptOut
from covey_edge.outbox import Outbox
from covey_edge.sent_log import EVALUATION, FAILURE, NAME, UPDATE, VERDICT, Line, read_lines
from covey_protocol.device import State

STOPPED = "stopped"
LAST = 6  # lines of the log that a status shows
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

    @classmethod
    def of(cls, ledger: Ledger, privacy: PrivacySettings) -> Privacy:
        """Raises StorageError where the ledger cannot be read."""
        book = ledger.book()
        return cls(
            noised=sum(book.noised.values()),
            exact_updates=book.exact_updates,
            exact_evaluations=book.exact_evaluations,
            epsilon=book.epsilon(privacy.delta),
            delta=privacy.delta,
            epsilon_limit=privacy.epsilon_limit or None,
            rounds_left=ledger.rounds_left(book),
        )


class Status(Struct, frozen=True, kw_only=True):
    """One agent. Of one that does not run, what only a running one knows is None.

    state: of the machine, or "stopped". doing: the same in words, and why. working_s: since the child began.
    outbox: rounds whose updates it owes. left_ms: Unix time at which the owner opted out. rounds: the newest lines of
    the log of what left that say what was made, what failed and what became of it. sections: of other parts, by name;
    each is a value that JSON can hold. problem: why the newest work failed, in full, for the owner alone; "" where it
    did not.
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
    rounds: tuple[Line, ...] = ()
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
    problem: str = ""


def doing(state: State, left_ms: Optional[int], connected: bool) -> str:
    """In words, with what keeps the device from more."""
    if left_ms is not None:
        return "declines every round"
    return NEXT[state] if connected else f"{NEXT[state]}; tries to reach the broker"


def stopped_status(agent: Agent, why: str) -> Status:
    """From the files of an agent that does not run. Raises StorageError."""
    left_ms = OptOut(agent.state_dir).since_ms()
    return Status(
        device_id=agent.config.device_id,
        fleet=agent.config.fleet,
        version=__version__,
        state=STOPPED,
        doing=why,
        outbox=tuple(offer.round_id for offer in Outbox(agent.state_dir).look()),
        broker=str(agent.broker),
        left_ms=left_ms,
        privacy=Privacy.of(Ledger(agent.state_dir, agent.config.privacy), agent.config.privacy),
        rounds=last_lines(agent.state_dir),
    )


def last_lines(folder: Path) -> tuple[Line, ...]:
    """Of the log of what left, those that a status shows; of its newest file only."""
    lines, _ = read_lines(DISK, folder / NAME)
    return tuple(line for line in lines if line.kind in (UPDATE, EVALUATION, FAILURE, VERDICT))[-LAST:]


def resident_mb(pid: Optional[int]) -> Optional[float]:
    """Resident memory of a process in MB (10^6 bytes); None where there is none, or no /proc."""
    if pid is None:
        return None
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
