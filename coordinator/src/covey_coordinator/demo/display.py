"""What the demo shows while it works: bars on a terminal, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from covey_coordinator.records import ACCEPTED, MISSING, RoundRecord
from covey_protocol.round import FINAL
from covey_protocol.round import Progress as DeviceProgress

TITLE_WIDTH = 32


class Display:
    """Everything the demo says goes through here. file: for tests; None is standard output."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self.console = Console(file=file, highlight=False, soft_wrap=True)
        self.bars = self.console.is_terminal

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    def fact(self, name: str, text: str) -> None:
        self.line(f"  {name:<10} {text}")

    @contextmanager
    def run(self, title: str, rounds: int) -> Iterator[RunDisplay]:
        """Show one training run."""
        if not self.bars:
            yield PlainRun(self, title, rounds)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            yield BarRun(progress, progress.add_task(f"{title:<{TITLE_WIDTH}}", total=rounds, status="starting"))


class RunDisplay:
    """One run's lines or bar."""

    def devices(self, progress: dict[str, DeviceProgress]) -> None:
        """How far the devices of the current round are."""

    def round(self, record: RoundRecord) -> None:
        """A round is over."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Something an operator should see."""
        raise NotImplementedError


class PlainRun(RunDisplay):
    def __init__(self, display: Display, title: str, rounds: int) -> None:
        self._display, self._title, self._rounds = display, title, rounds

    def round(self, record: RoundRecord) -> None:
        self._display.line(f"  {self._title:<{TITLE_WIDTH}} round {record.number}/{self._rounds}  {status(record)}")

    def note(self, text: str) -> None:
        self._display.line(f"  {self._title:<{TITLE_WIDTH}} {text}")


class BarRun(RunDisplay):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._status = ""

    def devices(self, progress: dict[str, DeviceProgress]) -> None:
        done = sum(state in FINAL for state in progress.values())
        self._progress.update(self._task, status=f"{self._status}  {done}/{len(progress)} devices")

    def round(self, record: RoundRecord) -> None:
        self._status = status(record)
        self._progress.update(self._task, completed=record.number, status=self._status)

    def note(self, text: str) -> None:
        self._progress.console.print(f"  {text}", markup=False)


def status(record: RoundRecord) -> str:
    """One round in a line: accuracy, and who is not part of it."""
    text = f"accuracy {record.accuracy:6.1%}"
    if record.outcome != "published":
        return f"{text}  abandoned: {record.note}"
    rejected = [verdict.device_id for verdict in record.verdicts if verdict.status not in (ACCEPTED, MISSING)]
    missing = [verdict.device_id for verdict in record.verdicts if verdict.status == MISSING]
    text += f"  rejected {_short(rejected)}" if rejected else ""
    return text + (f"  missing {_short(missing)}" if missing else "")


def _short(device_ids: list[str]) -> str:
    """device-01, device-04 -> device-01,04"""
    first, *others = device_ids
    return ",".join([first, *(name.removeprefix("device-") for name in others)])


def why_rejected(records: list[RoundRecord]) -> list[str]:
    """Who was rejected or missing in how many rounds of a run, with the newest reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for verdict in record.verdicts:
            if verdict.status != ACCEPTED:
                reasons.setdefault((verdict.device_id, verdict.status), []).append(verdict.reason)
    return [
        f"{device_id} {status} in {len(said)} of {len(records)} rounds, last: {said[-1]}"
        for (device_id, status), said in sorted(reasons.items())
    ]
