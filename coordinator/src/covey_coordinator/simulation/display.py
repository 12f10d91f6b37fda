"""What `covey simulate` shows while it works: bars on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from covey_coordinator.grid.display import PLAIN_EVERY_S, Display, clock
from covey_coordinator.simulation import running
from covey_coordinator.simulation.sweep import Cell


class Rounds:
    """Counts rounds over all cells. The time left is estimated from the first round on: before it, processes start.

    total: rounds that are to be made. Rounds that a taken-up cell has behind it leave the total when it is heard of.
    """

    def __init__(self, cells: int, total: int) -> None:
        self.cells, self.total = cells, total
        self.finished_cells = self.finished = 0
        self._number: dict[str, int] = {}
        self._started = 0.0

    def advanced(self, cell: Cell, progress: running.Progress) -> None:
        before = self._number.get(cell.key)
        if before is None:
            self.total -= max(progress.number - 1, 0)
            before = max(progress.number - 1, 0)
        self.finished += progress.number - before
        self._number[cell.key] = progress.number
        if not self._started:
            self._started = time.monotonic()

    def ended(self, cell: Cell) -> None:
        """Finished or failed: what it did not do will not be done."""
        self.finished_cells += 1
        left = cell.settings.rounds - self._number.get(cell.key, 0)
        self.total -= left

    def left(self) -> str:
        if self.finished >= self.total:
            return "done" if self.finished_cells == self.cells else "finishing"
        if not self.finished:
            return "starting"
        seconds = (time.monotonic() - self._started) / self.finished * (self.total - self.finished)
        return f"about {clock(seconds)} left"


def said(cell: Cell, progress: running.Progress) -> str:
    accuracy = progress.record.evaluation.get("accuracy")
    told = "" if accuracy is None else f", accuracy {accuracy:.1%}"
    return f"{cell.said}: round {progress.number} of {progress.of}{told}"


class Show:
    """Told of every round and every end; `line` prints above what is shown."""

    def __init__(self, display: Display, rounds: Rounds) -> None:
        self._display, self.rounds = display, rounds

    def line(self, text: str) -> None:
        self._display.line(text)

    def advanced(self, cell: Cell, progress: running.Progress) -> None:
        self.rounds.advanced(cell, progress)
        self.show(cell, progress)

    def ended(self, cell: Cell) -> None:
        self.rounds.ended(cell)

    def show(self, cell: Cell, progress: running.Progress) -> None:
        raise NotImplementedError


class PlainShow(Show):
    def __init__(self, display: Display, rounds: Rounds, every_s: float) -> None:
        super().__init__(display, rounds)
        self._every_s, self._shown = every_s, time.monotonic()

    def show(self, cell: Cell, progress: running.Progress) -> None:
        now = time.monotonic()
        if now - self._shown >= self._every_s or self.rounds.finished == self.rounds.total:
            self._shown = now
            rounds = self.rounds
            head = f"  {rounds.finished_cells}/{rounds.cells} runs, {rounds.finished}/{rounds.total} rounds"
            self.line(f"{head}, {rounds.left()}; {said(cell, progress)}")


class BarShow(Show):
    """A bar for all rounds, and one for each run under way."""

    def __init__(self, display: Display, rounds: Rounds, bars: Progress) -> None:
        super().__init__(display, rounds)
        self._bars = bars
        self._all = bars.add_task("all rounds", total=rounds.total, told="starting")
        self._tasks: dict[str, int] = {}

    def show(self, cell: Cell, progress: running.Progress) -> None:
        accuracy = progress.record.evaluation.get("accuracy")
        told = {} if accuracy is None else {"told": f"{accuracy:.1%}"}
        if cell.key not in self._tasks:
            self._tasks[cell.key] = self._bars.add_task(cell.said, total=progress.of, told="")
        self._bars.update(self._tasks[cell.key], completed=progress.number, **told)  # type: ignore[arg-type]
        self._show_all()

    def ended(self, cell: Cell) -> None:
        super().ended(cell)
        self._bars.refresh()  # a last look at its bar
        if cell.key in self._tasks:
            self._bars.remove_task(self._tasks.pop(cell.key))  # type: ignore[arg-type]
        self._show_all()

    def _show_all(self) -> None:
        rounds = self.rounds
        told = f"{rounds.left()}; {rounds.finished_cells}/{rounds.cells} runs"
        self._bars.update(self._all, completed=rounds.finished, total=rounds.total, told=told)


@contextmanager
def shown(display: Display, cells: int, total: int, every_s: float = PLAIN_EVERY_S) -> Iterator[Show]:
    """Bars where the display is a terminal."""
    rounds = Rounds(cells, total)
    if not display.console.is_terminal:
        yield PlainShow(display, rounds, every_s)
        return
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}", markup=False),
    )
    with Progress(*columns, console=display.console) as bars:
        yield BarShow(display, rounds, bars)
