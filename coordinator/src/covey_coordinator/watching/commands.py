"""What `covey status`, `devices`, `runs`, `pause`, `resume`, `abort`, `revoke` and `readmit` do.

They need no broker and no TensorFlow. The first three only read.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from msgspec import Struct

from covey_coordinator.orders import Orders, Revocations
from covey_coordinator.records import FleetMetric
from covey_coordinator.store import EVALUATION, is_held
from covey_coordinator.tasks import NamedTask, runs_in
from covey_coordinator.watching.display import duration, evaluation_text, printable
from covey_coordinator.watching.history import Facts, History, opened, run_folders
from covey_coordinator.watching.leakage import leakage_lines, leakage_page
from covey_edge.config import read_toml
from covey_edge.files import DISK
from covey_protocol.errors import ConfigError
from covey_protocol.topics import check_name

T = TypeVar("T")


class _Place(Struct):
    """What of coordinator.toml says where its store is; `covey serve` checks the rest."""

    run: str
    fleet: str = ""
    runs_dir: str = "runs"
    devices: dict[str, Any] = {}
    tasks: list[NamedTask] = []


def status(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, as_json: bool) -> None:
    folders, _ = _find(config_path, runs_dir, run, task)
    found = [_read(folder, lambda history: history.status()) for folder in _present(folders)]
    if len(folders) == 1:
        _print(found[0], as_json, _status_lines)
    else:
        _print(found, as_json, lambda facts: [line for one in facts for line in _status_lines(one)])


def devices(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, as_json: bool) -> None:
    folders, roster = _find(config_path, runs_dir, run, task)
    found = {folder.name: _read(folder, lambda history: history.devices(roster)) for folder in _present(folders)}
    revoked = _revocations(config_path).standing() if runs_dir is None else {}
    for one in (line for lines in found.values() for line in lines):
        order = revoked.get(one["device"])
        one["revoked"] = {"asked_ms": order.asked_ms, "reason": order.reason} if order is not None else None
    if len(folders) == 1:
        _print(found[folders[0].name], as_json, _device_lines)
    else:
        _print(
            found, as_json, lambda facts: [line for run in facts for line in (f"{run}:", *_device_lines(facts[run]))]
        )


def leakage(
    config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, out: Path | None, as_json: bool
) -> None:
    folders, _ = _find(config_path, runs_dir, run, task)
    found = {folder.name: _read(folder, lambda history: history.leakage()) for folder in _present(folders)}
    if out is not None:
        if len(found) > 1:
            raise ConfigError(f"--out with {len(found)} tasks", "choose one with --task")
        for name, rounds in found.items():
            DISK.write(out, leakage_page(name, rounds).encode())
    _print(found, as_json, lambda facts: [line for name in facts for line in leakage_lines(name, facts[name])])


def _read(folder: Path, what: Callable[[History], T]) -> T:
    with opened(folder) as history:
        return what(history)


def runs(config_path: Path, runs_dir: Path | None, as_json: bool) -> None:
    found = []
    for folder in run_folders(runs_dir if runs_dir is not None else _place(config_path)[0]):
        with opened(folder) as history:
            found.append(history.run())
    _print(found, as_json, _run_lines)


def pause(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, reason: str) -> None:
    for folder in runs_to_order(config_path, runs_dir, run, task, bears_more=True):
        Orders(folder).pause(reason)
        click.echo(f"{folder.name} is paused: no new round is opened{_when(folder)}")


def resume(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None) -> None:
    for folder in runs_to_order(config_path, runs_dir, run, task, bears_more=True):
        lifted = Orders(folder).resume()
        click.echo(f"{folder.name} goes on{_when(folder)}" if lifted else f"{folder.name} was not paused")


def abort(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, reason: str) -> None:
    for folder in runs_to_order(config_path, runs_dir, run, task):
        Orders(folder).abort(reason)
        click.echo(f"{folder.name} is aborted{_when(folder)}")


def revoke(config_path: Path, device_id: str, reason: str) -> None:
    place = _place(config_path)[1]
    if device_id not in place.devices:
        close = difflib.get_close_matches(device_id, place.devices, n=1, cutoff=0.0)
        raise ConfigError(
            f"{device_id!r} is not in [devices] of {config_path}",
            f"did you mean {close[0]!r}?" if close else "it is ignored anyway",
        )
    _revocations(config_path).revoke(device_id, reason)
    click.echo(f"{device_id} is revoked{_when(*_own_runs(config_path))}")


def readmit(config_path: Path, device_id: str) -> None:
    lifted = _revocations(config_path).readmit(device_id)
    click.echo(
        f"{device_id} is readmitted{_when(*_own_runs(config_path))}" if lifted else f"{device_id} was not revoked"
    )


def _revocations(config_path: Path) -> Revocations:
    """Of the fleet that the file names."""
    runs, place = _place(config_path)
    return Revocations(runs, check_name(place.fleet, "fleet"))


def _own_runs(config_path: Path) -> list[Path]:
    return _find(config_path, None, None, None)[0]


def _when(*folders: Path) -> str:
    return "" if any(map(is_held, folders)) else "; no coordinator runs now, so this holds from its next start"


# --- which run


def _place(config_path: Path) -> tuple[Path, _Place]:
    """Where its runs are kept, and the file's settings."""
    place = read_toml(config_path, _Place)
    return config_path.parent / place.runs_dir, place


def _find(config_path: Path, runs_dir: Path | None, run: str | None, task: str | None) -> tuple[list[Path], list[str]]:
    """The folder of the run, or of each task's; and the roster where a configuration file is read for its own runs."""
    if runs_dir is None:
        kept, place = _place(config_path)
        if task is not None or run is None:
            own = _of_tasks(config_path, runs_in(place.run, place.tasks), task)
        else:
            own = [run]
        known = {place.run, *runs_in(place.run, place.tasks).values()}
        return [kept / name for name in own], list(place.devices) if known.issuperset(own) else []
    if task is not None:
        raise ConfigError("--task with --runs-dir", "give --run: a task's run is named RUN-TASK")
    if run is not None:
        return [runs_dir / run], []
    folders = run_folders(runs_dir)
    if len(folders) > 1:
        raise ConfigError(f"{runs_dir} holds {len(folders)} runs", f"add --run: {', '.join(f.name for f in folders)}")
    return folders, []


def _present(folders: list[Path]) -> list[Path]:
    """Without those of tasks that no coordinator has started yet, as long as any was."""
    return [folder for folder in folders if (folder / "coordinator.sqlite").is_file()] or folders[:1]


def _of_tasks(config_path: Path, runs: Mapping[str, str], task: str | None) -> list[str]:
    if task is None:
        return list(runs.values())
    if task not in runs or not task:
        raise ConfigError(f"{config_path} has no task {task!r}", f"it has {', '.join(filter(None, runs)) or 'none'}")
    return [runs[task]]


def runs_to_order(
    config_path: Path, runs_dir: Path | None, run: str | None, task: str | None, *, bears_more: bool = False
) -> list[Path]:
    """Folders of runs that exist: an order for a mistyped name would wait for ever.

    bears_more: of all tasks, where none is named; what cannot be taken back must name one. A task whose run was aborted
    or is not there yet is then passed over.
    """
    folders, _ = _find(config_path, runs_dir, run, task)
    if len(folders) > 1 and not bears_more:
        raise ConfigError(f"{config_path} has {len(folders)} tasks", "say which with --task")
    folders = _present(folders)
    if len(folders) > 1:
        folders = [one for one in folders if Orders(one).aborted() is None] or folders[:1]
    for folder in folders:
        with opened(folder):
            pass
    return folders


# --- lines


def _print(facts: Any, as_json: bool, lines: Callable[[Any], list[str]]) -> None:
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(printable(line) for line in lines(facts)))


def _status_lines(facts: Facts) -> list[str]:
    asked = f" of {facts['rounds_asked']}" if facts["rounds_asked"] is not None else ""
    lines = [f"{facts['run']}: {facts['state']}, {facts['rounds_published']}{asked} rounds published"]
    for word in ("paused", "aborted"):
        order = facts[word]
        if order is not None:
            lines.append(f"  {word} {_ago(order['asked_ms'])}{_because(order['reason'])}")
    if not facts["running"] and facts["ended_ms"] is not None:
        lines.append(f"  ended {_ago(facts['ended_ms'])} with code {facts['code']}{_because(facts['reason'])}")
    if facts["running"]:
        lines.append(f"  online: {', '.join(facts['devices_online']) or 'no device'}")
    if facts["evaluation"] is not None:
        lines.append(
            f"  evaluation of round {facts['evaluation']['number']}: {_metrics(facts['evaluation']['metrics'])}"
        )
    lines += _round_lines(facts["round"]) if facts["round"] is not None else []
    return lines + [line for ended in facts["last_rounds"] for line in _ended_lines(ended)]


def _round_lines(facts: Facts) -> list[str]:
    left_s = max(0.0, facts["deadline_ms"] / 1000 - time.time())
    head = f"{_what(facts)} {facts['number']} {facts['phase']}, {duration(left_s)} left, quorum {facts['quorum']}"
    return [head, *(f"  {one['device']} {one['progress']}{_because(one['reason'])}" for one in facts["devices"])]


def _ended_lines(facts: Facts) -> list[str]:
    loss = facts["median_training_loss"]
    shown = f", median training loss {loss:.4f}" if loss is not None else ""
    shown += f", {_metrics(facts['evaluation'])}" if facts["evaluation"] else ""
    shown += f", {leakage_text(facts['leakage'])}" if facts["leakage"] else ""
    head = (
        f"{_what(facts)} {facts['number']} {facts['outcome']}: {facts['accepted']} of {facts['invited']} updates{shown}"
    )
    why = f" ({facts['reason']})" if facts["reason"] else ""
    return [head + why, *(f"  {d['device']} {d['status']}{_because(d['reason'])}" for d in facts["not_used"])]


def _what(facts: Facts) -> str:
    return "evaluation of round" if facts["kind"] == EVALUATION else "round"


def _metrics(rows: list[Facts]) -> str:
    """As the lines of `covey serve` have it."""
    return evaluation_text([FleetMetric(*row.values()) for row in rows])


def _device_lines(found: list[Facts]) -> list[str]:
    names = ("invited", "delivered", "accepted", "rejected", "missing")
    rows = [("device", "now", "last heard", *names, "last rejection")]
    for one in found:
        seen = _ago(one["last_seen_ms"]) if one["last_seen_ms"] is not None else "never"
        now, last = {True: "online", False: "offline", None: "unknown"}[one["online"]], one["last_rejection"]
        order = one["revoked"]
        if order is not None:
            now, last = "revoked", f"revoked {_ago(order['asked_ms'])}{_because(order['reason'])}"
        rows.append((one["device"], now, seen, *(str(one[name]) for name in names), last))
    return _aligned(rows)


def _run_lines(found: list[Facts]) -> list[str]:
    rows = [("run", "state", "published", "abandoned", "evaluation", "leakage", "started", "end")]
    for one in found:
        published = str(one["rounds_published"])
        published += f"/{one['rounds_asked']}" if one["rounds_asked"] is not None else ""
        leakage = leakage_text(one["leakage"]) if one["leakage"] else ""
        started = _ago(one["started_ms"]) if one["started_ms"] is not None else ""
        end = f"code {one['code']}{_because(one['reason'])}" if one["code"] is not None else ""
        rows.append(
            (one["run"], one["state"], published, str(one["rounds_abandoned"]), _medians(one), leakage, started, end)
        )
    return _aligned(rows)


def leakage_text(facts: Facts) -> str:
    """How much can be read off a round's updates, in a few words."""
    parts = [f"rank one {facts['max_rank_one']:.2f}"] if "max_rank_one" in facts else []
    parts += [f"readable {facts['max_separable']:.0f}"] if facts.get("max_separable") else []
    parts += [f"linkable {facts['linkability_auc']:.2f}"] if "linkability_auc" in facts else []
    return ", ".join(parts)


def _medians(facts: Facts) -> str:
    evaluation = facts["evaluation"]
    if evaluation is None:
        return ""
    values = " ".join(f"{row['metric']} {row['median']:.4g}" for row in evaluation["metrics"])
    return f"{values} (round {evaluation['number']})"


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _ago(unix_ms: int) -> str:
    return f"{duration(max(0.0, time.time() - unix_ms / 1000))} ago"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
