"""What `covey capture` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from covey_coordinator.capture.taking import ended, taken
from covey_coordinator.tasks import read_tasks
from covey_coordinator.watching.commands import runs_to_order
from covey_edge.config import read_file
from covey_edge.files import write_atomic
from covey_protocol.captures import CAPTURE_SUFFIX, Capture, sealed
from covey_protocol.errors import ConfigError
from covey_protocol.seals import SealingKey

LOOK_S = 1.0


class _Task(Struct):
    """What of coordinator.toml a capture needs; `covey serve` checks the rest."""

    fleet: str
    run: str
    bundle: str
    key_file: str
    task: str = ""


class Request(NamedTuple):
    """As `covey capture` is asked."""

    config_path: Path
    runs_dir: Path | None = None
    run: str | None = None
    task: str | None = None
    number: int | None = None
    wait: bool = False
    output: Path | None = None


def capture(request: Request, say: Callable[[str], None], check: Callable[[], None] = lambda: None) -> Path:
    """Write the file, readable by its owner alone, and say what is in it. check: may raise to end the waiting."""
    if request.wait and request.number is not None:
        raise ConfigError("--next with --round", "give one of them")
    (folder,) = runs_to_order(request.config_path, request.runs_dir, request.run, request.task)
    task = _task(request.config_path, folder.name)
    base = request.config_path.parent
    key = SealingKey.from_pem(read_file(base / task.key_file), task.key_file)
    if request.wait:
        _await_next(folder, say, check)
    found = taken(folder, task.fleet, read_file(base / task.bundle), request.number, time.time_ns() // 1_000_000)
    path = request.output or Path(f"{found.invitation.round_id}{CAPTURE_SUFFIX}")
    write_atomic(path, sealed(found, key), mode=0o600)
    for line in _lines(found, path):
        say(line)
    return path


def _task(config_path: Path, run: str) -> _Task:
    tasks = [task for task, _ in read_tasks(config_path, _Task)]
    own = [task for task in tasks if task.run == run]
    if not own:
        raise ConfigError(
            f"{run} is not a run of {config_path}, so its bundle and key are not known",
            f"give the file of that run with --config; here: {', '.join(task.run for task in tasks)}",
        )
    return own[0]


def _await_next(folder: Path, say: Callable[[str], None], check: Callable[[], None]) -> None:
    before = ended(folder)
    say(f"waiting for a round of {folder.name} to end")
    while ended(folder) == before:
        check()
        time.sleep(LOOK_S)


def _lines(found: Capture, path: Path) -> list[str]:
    lines = [f"{path}: round {found.invitation.round_id}, {len(found.updates)} updates"]
    lines += [f"  {one.device_id}: {one.num_examples} examples, {one.status or 'not judged'}" for one in found.updates]
    return lines + [f"  {device_id} is not in it: {why}" for device_id, why in found.left_out.items()]
