"""What an agent keeps in its state_dir, and how its owner has it deleted.

Every file that an agent makes is in one of the tables here; what is in neither is not covey's and is never touched
(state_dir may be any folder). Deleting unlinks; on flash memory the old bytes stay where they were until the card
writes over them, which no program can force.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from covey_edge.config import AgentConfig
from covey_edge.files import DISK, sync_folder
from covey_edge.policy import places
from covey_edge.sent_log import EVALUATION, UPDATE, VERDICT, Line, entries, read_summary
from covey_protocol.errors import StorageError

ACCEPTED = "accepted"  # a verdict's status
ACCEPTED_KIND = f"{VERDICT}: {ACCEPTED}"  # of a summary
# pattern in state_dir -> what it is. A new file of the agent's that holds data or what was made of them belongs here.
FORGOTTEN = {
    "blobs": "models that were fetched",
    "outbox": "updates without a verdict",
    "outbox.msgpack": "an update of an older agent",
    "outbox.damaged": "an update that could not be read",
    "withheld*.msgpack": "what compressed updates have left out",
    "control*.msgpack": "this device's part of SCAFFOLD",
    "teacher*.msgpack": "the state of a teacher",
    "teaching": "reports on your data",
    "stopped": "what stopped updates would have told",
    "records": "what this device did in its rounds, examples and all",
    "models": "models kept for use on this device, your own copies among them",
    "data-report*.txt": "what was found in your data",
    "normalisation*.json": "how your data are scaled",
}
# with --everything; and why not without
KEPT = {
    "ledger.json": "the privacy ledger: without it this device would take what it has spent for unspent",
    "sent*.json*": "the log of what left this device: it tells nothing more than that",
    "split.key": "which of your data are held out: with another one, examples that were trained on would be",
}
# always: they tell nothing, and protect
STAYS = {
    "sequence": "the message numbers, so that none is used twice",
    "retired.json": "the coordinator's keys that are not taken any more",
    "left.json": "that you have opted out",
    "agent.lock": "the lock",
    "*.sock": "local sockets",
    "releases": "releases of the agent itself",
}
FOLDERS = ("blobs", "teaching", "stopped", "records")  # outbox, models and releases are swept by who writes them


class Doomed(NamedTuple):
    """size: bytes of all files in it."""

    path: Path
    what: str
    size: int


def plan(folder: Path, config: AgentConfig, state_dir: Path, *, data: bool, everything: bool) -> list[Doomed]:
    """All that is there to be deleted. folder: of agent.toml, beside which the data lie."""
    tables = {**FORGOTTEN, **(KEPT if everything else {})}
    found = [Doomed(path, what, _size(path)) for name, what in tables.items() for path in sorted(state_dir.glob(name))]
    found += [Doomed(path, "what a crash left unfinished", _size(path)) for path in _unfinished(state_dir)]
    if data:
        paths = dict.fromkeys(path for path in _data(folder, config) if path.exists())
        found += [Doomed(path, "your data", _size(path)) for path in paths]
    return found


def sweep(state_dir: Path) -> None:
    """Remove what crashes have left of unfinished writes: each names its own process, so no later write does. Only for
    who holds the lock."""
    own = [state_dir / name for name in FOLDERS if not (state_dir / name).is_symlink()]
    for path in (*_unfinished(state_dir), *(path for folder in own for path in folder.rglob(".*.tmp"))):
        DISK.remove(path)


def _unfinished(state_dir: Path) -> list[Path]:
    """In state_dir itself; only what is named like a file of ours."""
    return sorted({path for name in (*FORGOTTEN, *KEPT, *STAYS) for path in state_dir.glob(f".{name}.*.tmp")})


def _data(folder: Path, config: AgentConfig) -> Iterator[Path]:
    """Of every source that reads data from a file or a folder, also where a link leads to it; programs (source =
    "python") stay."""
    for place in places(config.data):
        if place.source != "python":
            named = folder / place.path
            for path in (named, named.resolve()) if named.is_symlink() else (named,):
                yield from (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal")))


def unknown(state_dir: Path) -> list[str]:
    """Names in state_dir that no table has."""
    known = {path for name in (*FORGOTTEN, *KEPT, *STAYS) for path in state_dir.glob(name)}
    return sorted(path.name for path in state_dir.glob("*") if path not in known and not path.name.startswith("."))


def delete(doomed: list[Doomed]) -> None:
    """Durable when this returns. Raises StorageError naming what could not be deleted; the rest is gone by then."""
    problem = None
    for one in doomed:
        try:
            if one.path.is_dir() and not one.path.is_symlink():
                shutil.rmtree(one.path)
            else:
                one.path.unlink(missing_ok=True)
            if one.path.parent.is_dir():  # else it went before, with what lies in it
                sync_folder(one.path.parent)
        except OSError as exc:
            problem = problem or StorageError(
                f"cannot delete {one.path} ({exc.strerror or exc})", "check its permissions, then forget again"
            )
    if problem is not None:
        raise problem


class Gone(NamedTuple):
    """What nobody can call back. accepted: of both kinds, those with this verdict."""

    updates: int
    evaluations: int
    accepted: int
    first: str
    last: str


def gone(state_dir: Path) -> Gone:
    """From the log of what left; updates that were never offered do not count. Of months that are summed up, all do."""
    lines = [entry for entry in entries(state_dir) if isinstance(entry, Line)]
    left = {line.sha256 for line in lines if line.kind == "offer"}
    made = [line for line in lines if line.kind in (UPDATE, EVALUATION) and line.sha256 in left]
    counts = {kind: sum(line.kind == kind for line in made) for kind in (UPDATE, EVALUATION)}
    accepted = sum(line.kind == VERDICT and line.words.startswith(ACCEPTED) for line in lines)
    times = [line.at for line in made]
    for kinds in read_summary(DISK, state_dir).months.values():
        for kind in counts:
            if kind in kinds:
                counts[kind] += kinds[kind].lines
                times += [kinds[kind].first, kinds[kind].last]
        if ACCEPTED_KIND in kinds:
            accepted += kinds[ACCEPTED_KIND].lines
    return Gone(counts[UPDATE], counts[EVALUATION], accepted, min(times, default=""), max(times, default=""))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(one.lstat().st_size for one in files if one.is_file())
