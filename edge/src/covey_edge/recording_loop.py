"""Recording for long: readings that wait for space or for a batch, lines as they come, commands run now and then.

Nothing polls: the loop sleeps until a line comes, a batch is due, or a signal ends it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import click

from covey_edge.record_lines import LineParser
from covey_edge.recorder import TIME, BadReading, Recorder, Value
from covey_protocol.errors import DataError, StorageError

MOST_WAITING = 10_000  # readings, while there is no space; then the oldest are lost, and counted
RETRY_S = 5.0
TELL_S = 600.0  # between two lines of progress, where nobody looks at a terminal
LINE_BYTES = 2**20
READ_BYTES = 2**16


class Waiting:
    """Readings on their way into the table. batch: so many are added at once; batch_s: or those that wait so long."""

    def __init__(self, recorder: Recorder, batch: int = 1, batch_s: float = 60.0, *, quiet: bool = False) -> None:
        self._recorder, self._batch, self._batch_s, self._quiet = recorder, batch, batch_s, quiet
        self._readings: deque[dict[str, Value]] = deque()
        self._due: Optional[float] = None  # when the oldest has waited long enough
        self._full = False
        self._singly = 0  # of the readings that wait so many are added one by one: one of them is bad
        self._told = 0.0
        self.recorded = self.bad = self.lost = 0

    @property
    def sleep_s(self) -> Optional[float]:
        """How long nothing needs to be done; None for ever."""
        return None if self._due is None else max(0.0, self._due - time.monotonic())

    def take(self, reading: dict[str, Value]) -> None:
        """DataError for other columns than the table's; BadReading is counted and told."""
        self._readings.append({TIME: time.time(), **reading})
        if len(self._readings) > MOST_WAITING:
            self._readings.popleft()
            self.lost += 1
        if self._due is None:
            self._due = time.monotonic() + self._batch_s
        if not self._full and len(self._readings) >= self._batch:
            self.flush()

    def skip(self, exc: BadReading) -> None:
        self.bad += 1
        warn(f"left out: {exc}")

    def work(self) -> None:
        """Add what is due."""
        if self._due is not None and time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Add what waits. Without space it goes on waiting, and the next try is a little later."""
        while self._readings:
            before = self.recorded
            try:
                self._add_next()
            except StorageError as exc:
                if not self._full:
                    warn(f"{exc}; readings wait in memory, up to {MOST_WAITING}")
                self._full, self._due = True, time.monotonic() + RETRY_S
                return
            if self._full and self.recorded > before:
                lost = f"; {self.lost} readings are lost" if self.lost else ""
                warn(f"there is space again, recording goes on{lost}")
                self._full = False
        self._due = None
        self._tell()

    def _add_next(self) -> None:
        """All that waits in one transaction; where one reading is bad, one by one. DataError leaves that one out."""
        part = [self._readings[0]] if self._singly else list(self._readings)
        bad: Optional[DataError] = None
        try:
            self._recorder.add(part)
        except DataError as exc:
            if len(part) > 1:
                self._singly = len(part)
                return
            bad = exc
        for _ in part:
            self._readings.popleft()
        self._singly = max(0, self._singly - len(part))
        if bad is None:
            self.recorded += len(part)
        elif isinstance(bad, BadReading):
            self.skip(bad)
        else:
            raise bad

    def _tell(self) -> None:
        if self._quiet:
            return
        if sys.stderr.isatty():
            click.echo(f"\r{self.recorded} readings recorded", nl=False, err=True)
        elif not self._told or time.monotonic() - self._told >= TELL_S:
            click.echo(f"{self.recorded} readings recorded", err=True)
            self._told = time.monotonic()

    def end(self) -> None:
        """Add all that waits. StorageError where there is still no space for it."""
        self.flush()
        if self._readings:
            raise StorageError(
                f"{len(self._readings)} readings are lost: there is no space for them", "free some space"
            )
        if not self._quiet:
            more = f", {self.bad} left out" if self.bad else ""
            click.echo(("\r" if sys.stderr.isatty() else "") + f"{self.recorded} readings recorded{more}", err=True)


def warn(text: str) -> None:
    click.echo(f"covey record: {text}", err=True)


class Stop:
    """SIGINT, SIGTERM and SIGHUP end a recording in order: what has come is added. Wakes whatever sleeps."""

    def __init__(self) -> None:
        self.asked = False
        self._reader, writer = os.pipe()
        for one in (self._reader, writer):
            os.set_blocking(one, False)
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def wait(self, seconds: Optional[float], source: Optional[int] = None) -> bool:
        """Whether there is something to read from source, within so many seconds."""
        ready, _, _ = select.select([self._reader, *([] if source is None else [source])], [], [], seconds)
        return source in ready and not self.asked


def lines_of(source: int, stop: Stop, waiting: Waiting) -> Iterator[str]:
    """The lines of a file descriptor as they come, until its end or a signal; what waits is added meanwhile."""
    rest = b""
    while not stop.asked:
        if not stop.wait(waiting.sleep_s, source):
            waiting.work()
            continue
        data = os.read(source, READ_BYTES)
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
        if not data:
            break
        if len(rest) > LINE_BYTES:
            waiting.skip(BadReading(f"a line is longer than {LINE_BYTES} bytes"))
            rest = b""
    if rest:
        yield rest.decode(errors="replace")


def record_lines(source: int, waiting: Waiting, parser: LineParser) -> None:
    stop = Stop()
    for line in lines_of(source, stop, waiting):
        _take(line, waiting, parser)
        waiting.work()
    waiting.end()


def record_every(seconds: float, command: Sequence[str], waiting: Waiting, parser: LineParser, times: int = 0) -> None:
    """times: how often, 0 for until a signal. A command that fails or takes too long costs its reading."""
    stop, due, done = Stop(), time.monotonic(), 0
    while not stop.asked and (not times or done < times):
        parser.begin()
        for line in output_of(command, max(seconds, 10.0), waiting):
            _take(line, waiting, parser)
        done += 1
        due = max(due + seconds, time.monotonic())
        while not stop.asked and (not times or done < times) and (left := due - time.monotonic()) > 0:
            stop.wait(min(left, left if waiting.sleep_s is None else waiting.sleep_s))
            waiting.work()
    waiting.end()


def output_of(command: Sequence[str], timeout_s: float, waiting: Waiting) -> list[str]:
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, timeout=timeout_s, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as exc:
        waiting.skip(BadReading(str(exc)))
        return []
    return ended.stdout.decode(errors="replace").splitlines()


def _take(line: str, waiting: Waiting, parser: LineParser) -> None:
    try:
        reading = parser.parse(line)
        if reading is not None:
            waiting.take(reading)
    except BadReading as exc:
        waiting.skip(exc)
    except DataError:  # another table's readings: what came before them is kept, and the recording ends
        waiting.flush()
        raise
