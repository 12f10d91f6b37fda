"""What was read, what was left out and why, in plain words: for the device's owner alone. No NumPy here.

Written to `data-report.txt` in the state folder (of a task `data-report-TASK.txt`), mode 600, one part for each place
of data.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from msgspec import Struct

from covey_edge.files import DISK
from covey_protocol.errors import StorageError

FIRST = 5  # rows that are named of each reason
MOST_COLUMNS, MOST_LABELS = 30, 20
HEAD = "== "


class LeftOut(Struct, frozen=True):
    """Rows with one thing wrong. column: "" where it is none in particular. first: where the first are, as the source
    names them: line, row or file."""

    reason: str
    column: str
    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        where = ", ".join(self.first) + (", ..." if self.count > len(self.first) else "")
        return f"{self.count} rows: {self.what} ({where})"

    @property
    def what(self) -> str:
        return f"{self.column}: {self.reason}" if self.column else self.reason


class Tally:
    """Counts what is left out while it is read; bounded, however much it is."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {}

    def add(self, reason: str, place: object, column: str = "") -> None:
        count, first = self._found.get((reason, column), (0, ()))
        self._found[reason, column] = count + 1, first if count >= FIRST else (*first, str(place))

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return tuple(LeftOut(*key, *found) for key, found in self._found.items())

    @property
    def count(self) -> int:
        return sum(count for count, _ in self._found.values())


class ColumnFacts(Struct, frozen=True):
    name: str
    minimum: float
    mean: float
    maximum: float


class DataReport(Struct, frozen=True):
    """rows: that were read. examples: what is left of them, both sides of the split. notes: what the owner should
    know. labels: number of examples by label."""

    place: str
    source: str
    what: str
    rows: int
    examples: int
    held_out: int = 0
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    columns: tuple[ColumnFacts, ...] = ()
    labels: dict[str, int] = {}

    def text(self) -> str:
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> list[str]:
        lines = [
            f"{HEAD}{self.place} ({self.source}, for {self.what})",
            f"{self.rows:,} rows read, {self.examples:,} examples" + self._held(),
        ]
        lines += [f"left out: {one}" for one in self.left_out]
        lines += [f"note: {one}" for one in self.notes]
        if self.labels:
            shown = list(self.labels.items())[:MOST_LABELS]
            more = f" and {len(self.labels) - MOST_LABELS} more" if len(self.labels) > MOST_LABELS else ""
            lines.append("labels: " + ", ".join(f"{label}: {count}" for label, count in shown) + more)
        lines += [
            f"{one.name}: from {one.minimum:.6g} to {one.maximum:.6g}, mean {one.mean:.6g}"
            for one in self.columns[:MOST_COLUMNS]
        ]
        if len(self.columns) > MOST_COLUMNS:
            lines.append(f"and {len(self.columns) - MOST_COLUMNS} more columns")
        return lines

    def _held(self) -> str:
        return f", of which {self.held_out:,} are held out" if self.held_out else ""

    @property
    def summary(self) -> str:
        """One line for the log at its usual level: counts alone."""
        lost = self.rows - self.examples
        return f"{self.examples:,} examples" + self._held() + (f", {lost:,} rows left out" if lost else "")


def write_report(path: Path, report: DataReport) -> None:
    """Put this part in the place of the one with the same head. A full disk costs the report, nothing else."""
    text = report.text()
    head = text.split("\n", 1)[0]
    before = (DISK.read(path) or b"").decode(errors="replace")
    parts = [part for part in before.split(f"\n{HEAD}") if part]
    whole = [part if part.startswith(HEAD) else HEAD + part for part in parts]
    kept = [part.rstrip("\n") + "\n" for part in whole if part.split("\n", 1)[0] != head]
    with contextlib.suppress(StorageError):
        DISK.write(path, "\n".join([*kept, text]).encode(), mode=0o600)
