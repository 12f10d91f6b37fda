"""What `covey grid` shows while it works: a bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

PLAIN_EVERY_S = 10.0


class Display:
    """file: for tests; None is standard output."""

    def __init__(self, file: IO[str] | None = None, plain_every_s: float = PLAIN_EVERY_S) -> None:
        self.console = Console(file=file, highlight=False, soft_wrap=True)
        self._plain_every_s = plain_every_s

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def cells(self, done: int, total: int, things: str = "cells") -> Iterator[Ticker]:
        """Show how cells, or other things, finish. done: those that were there before."""
        if not self.console.is_terminal:
            yield PlainTicker(self, done, total, self._plain_every_s, things)
            return
        columns = (
            TextColumn(f"  {things}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[last]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=total, completed=done, left="starting", last="")
            yield BarTicker(progress, task, done, total)


class Ticker:
    """Counts finished cells. The time left is estimated from the first on: before it, workers import TensorFlow."""

    def __init__(self, done: int, total: int) -> None:
        self._first, self._done, self._total = done + 1, done, total
        self._started = time.monotonic()

    def finished(self, said: str) -> None:
        """said: what finished and how, in a few words."""
        self._done += 1
        if self._done == self._first:
            self._started = time.monotonic()
        self.show(said)

    def show(self, last: str) -> None:
        raise NotImplementedError

    def left(self) -> str:
        if self._done == self._total:
            return "done"
        if self._done == self._first:
            return "started"
        seconds = (time.monotonic() - self._started) / (self._done - self._first) * (self._total - self._done)
        return f"about {clock(seconds)} left"


class PlainTicker(Ticker):
    def __init__(self, display: Display, done: int, total: int, every_s: float, things: str) -> None:
        super().__init__(done, total)
        self._display, self._every_s, self._things, self._shown = display, every_s, things, time.monotonic()

    def show(self, last: str) -> None:
        now = time.monotonic()
        if now - self._shown >= self._every_s or self._done == self._total:
            self._shown = now
            self._display.line(f"  {self._done}/{self._total} {self._things}, {self.left()}; {last}")


class BarTicker(Ticker):
    def __init__(self, progress: Progress, task: TaskID, done: int, total: int) -> None:
        super().__init__(done, total)
        self._progress, self._task = progress, task

    def show(self, last: str) -> None:
        self._progress.update(self._task, completed=self._done, left=self.left(), last=last)


def said_of(result: dict[str, Any]) -> str:
    """A finished cell, for a ticker."""
    said = f"{result['accuracy']:.1%}" if not result["refused"] else "refused"
    return f"{result['rule']} / {result['attack']} / {result['num_hostile']} corrupted: {said}"


def clock(seconds: float) -> str:
    """5:07 or 1:05:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
