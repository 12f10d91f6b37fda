"""From what a data source gives to what a model trains on: bad rows, the split, normalisation, the model's types.

Runs in the training child. Everything that is left out is counted in a report for the owner.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt

from covey_edge import normalising
from covey_edge.data_report import FIRST, ColumnFacts, DataReport, LeftOut, write_report
from covey_edge.data_sources import (
    Examples,
    Fault,
    as_the_model_takes,
    check_shapes,
    input_faults,
    label_faults,
    not_finite,
    read_source,
    refusal,
)
from covey_edge.reading import ALL, HELD_OUT, Reading, What
from covey_edge.splitting import holdout_of, split_key
from covey_edge.table_rows import MISSING, NO_CODE, NO_LABEL, NO_NUMBER, Table
from covey_protocol.bundle import Manifest
from covey_protocol.errors import DATA, DataError, UsageError

# reasons for a bad row that others may hear: another one may quote a file, or be a source's that is not ours
TOLD = (NO_NUMBER, NO_CODE, MISSING, NO_LABEL)
LABELS_COUNTED = 1000  # different ones; more are numbers to be predicted, not classes


class Prepared(NamedTuple):
    """All examples of a place: those to train on, then those held out. report: for the owner."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    num_held: int
    report: DataReport

    def part(self, name: str) -> Examples:
        """ALL, TRAINING or HELD_OUT, without a copy. DataError where there are none."""
        border = len(self.x) - self.num_held
        rows = {ALL: slice(None), HELD_OUT: slice(border, None)}.get(name, slice(border))
        x, y = self.x[rows], self.y[rows]
        if not len(x):
            what = "held out" if name == HELD_OUT else "left to train on"
            raise DataError.at(
                self.report.place, f": none of {len(self.x)} examples is {what}", "record more, or mend `holdout`"
            )
        return x, y


def prepared(source: str, path: Path, reading: Reading, manifest: Optional[Manifest] = None) -> Prepared:
    """Read a place of data. Without a manifest, as before the first round, nothing is held against a model: x and y are
    what the source gives, and the statistics are only made.

    DataError for bad rows that are refused, for more than half of them, and where nothing is left. The report is in the
    state folder also then.
    """
    if (reading.holdout or reading.normalise) and not reading.state_dir:
        raise UsageError("holdout and normalise need a state_dir")
    work = _Work(source, path, reading, read_source(source, path, reading.options))
    try:
        return work.done(manifest)
    finally:
        if reading.state_dir and reading.keeps:
            write_report(reading.file("data-report", "txt"), work.report())


def examine(source: str, path: Path, reading: Reading, manifest: Optional[Manifest] = None) -> DataReport:
    """What these data are, and whether they can be used: see `prepared` for the errors."""
    return prepared(source, path, reading, manifest).report


def other_examples(source: str, path: Path, reading: Reading, manifest: Manifest, what: What) -> Examples:
    """All of a place beside the data that are trained on (trusted instances, a shard), read in the same way."""
    return prepared(source, path, reading.beside(what), manifest).part(ALL)


class _Work:
    """What has become of a table so far. Each step drops what it has used: two copies of it are the most there are."""

    def __init__(self, source: str, path: Path, reading: Reading, table: Table) -> None:
        self._source, self._path, self._reading = source, path, reading
        self._x, self._y, self._columns, self._places = table.x, table.y, table.columns, table.places
        self._kept: Optional[npt.NDArray[np.intp]] = None  # rows of the table, None for all
        self._left_out, self._notes = list(table.left_out), list(table.notes)
        self._rows = len(table.x) + sum(one.count for one in table.left_out)
        self._num_held, self._owned = 0, False
        self._facts: tuple[ColumnFacts, ...] = ()
        self._labels: dict[str, int] = {}

    def done(self, manifest: Optional[Manifest]) -> Prepared:
        self._refuse_left_out()
        self._leave_out(not_finite(self._x, self._y))
        if manifest is not None:
            check_shapes(self._x, self._y, manifest, self._path)
            self._leave_out(label_faults(self._y, manifest))
            if not self._reading.normalise:
                self._leave_out(input_faults(self._x, manifest))
        self._split()
        self._facts, self._labels = self._found()
        if self._reading.normalise:
            self._normalise(manifest)
        if manifest is not None:
            self._x = as_the_model_takes(self._x, manifest.input)
            self._y = as_the_model_takes(self._y, manifest.label)
        return Prepared(self._x, self._y, self._num_held, self.report())

    # --- bad rows

    def _refuse_left_out(self) -> None:
        """Rows that the source could not read."""
        if not self._left_out:
            return
        worst = max(self._left_out, key=lambda one: one.count)
        lost = sum(one.count for one in self._left_out)
        where = f", first in {self._named(worst.first[0])}" if worst.first[0].isdecimal() else ""
        rows = f"in {worst.count} of {self._rows} rows"
        told = f"{DATA}: {worst.reason if worst.reason in TOLD else 'what is no example'} {rows}"
        remedy = 'mend them, or set bad_rows = "drop" in [data]'
        error = DataError(f"{self._path}: {worst.what} {rows}{where}", remedy, told=told)
        if self._reading.bad_rows == "refuse":
            raise error
        self._check_most(lost, error)

    def _leave_out(self, faults: Iterable[Fault]) -> None:
        bad, worst = np.zeros(len(self._x), np.bool_), None
        for fault in faults:
            fresh = fault.rows & ~bad  # a row is counted once, with what was found first
            if fresh.any():
                named = tuple(str(self._place(int(row))) for row in np.flatnonzero(fresh)[:FIRST])
                self._left_out.append(LeftOut(fault.what, "", int(fresh.sum()), named))
                bad, worst = bad | fault.rows, worst or fault
        if worst is None:
            return
        first = self._named(self._place(int(np.argmax(worst.rows)))) if self._numbered else ""
        error = refusal(worst, self._path, first)
        if self._reading.bad_rows == "refuse":
            raise error
        self._check_most(sum(one.count for one in self._left_out), error)
        self._num_held -= int(bad[len(bad) - self._num_held :].sum())
        self._keep(np.flatnonzero(~bad))

    def _check_most(self, lost: int, error: DataError) -> None:
        """error: what was found most often."""
        if 2 * lost > self._rows:
            more = f"; {lost} of {self._rows} rows would be left out, more than half"
            remedy = "such data are refused: data-report.txt in the state folder has the reasons"
            raise DataError(f"{error.what}{more}", remedy, told=f"{error.told}{more}")

    def _keep(self, rows: npt.NDArray[np.intp]) -> None:
        self._x, self._y, self._owned = self._x[rows], self._y[rows], True
        self._kept = rows if self._kept is None else self._kept[rows]

    def _place(self, row: int) -> object:
        """Where a row that is still here is, for the owner."""
        row = row if self._kept is None else int(self._kept[row])
        return row if self._places is None else self._places[row]

    def _named(self, place: object) -> str:
        return f"{'line' if self._source == 'csv' else 'row'} {place}"

    @property
    def _numbered(self) -> bool:
        """Whether rows have numbers. Names of files are in the report."""
        return self._places is None or all(isinstance(one, int) for one in self._places[:1])

    # --- the split and the scale

    def _split(self) -> None:
        if not self._reading.holdout:
            return
        key = split_key(Path(self._reading.state_dir), make=self._reading.keeps)
        held = holdout_of(self._x, self._reading.holdout, key)
        self._keep(np.argsort(held, kind="stable"))
        self._num_held = int(held.sum())
        if self._num_held in (0, len(self._x)):
            self._notes.append("all examples are on one side of the split: they are few, or equal to each other")

    def _normalise(self, manifest: Optional[Manifest]) -> None:
        path = self._reading.file("normalisation", "json")
        used = normalising.kept(path)
        trained_on = self._x[: len(self._x) - self._num_held]
        if self._reading.what == "training" and len(trained_on):
            now = normalising.measured(trained_on, self._source, self._columns)
            before, used = used, normalising.to_use(used, now)
            if used != before:
                if self._reading.keeps:
                    normalising.keep(path, used)
                self._notes.append(f"the inputs are normalised by new statistics, of {used.count} examples")
            drifted = [f"drift: {text}" for text in normalising.drift(used, now)]
            self._notes += drifted
            if drifted:
                self._notes.append(f"the statistics are made anew where {path.name} is deleted")
        if used is None:
            raise DataError.at(
                self._path,
                ": there are no statistics to normalise by",
                "they are made from the data to train on when the agent starts",
            )
        if manifest is not None:
            out = self._x if self._owned and self._x.dtype == np.float32 else None
            self._x = normalising.scaled(self._x, used, self._reading.normalise, manifest.input, out)
            self._owned = True
            self._leave_out(input_faults(self._x, manifest))

    # --- the report

    def report(self) -> DataReport:
        examples = self._rows - sum(one.count for one in self._left_out)
        return DataReport(
            str(self._path),
            self._source,
            self._reading.what,
            self._rows,
            examples,
            self._num_held,
            tuple(self._left_out),
            tuple(self._notes),
            self._facts,
            self._labels,
        )

    def _found(self) -> tuple[tuple[ColumnFacts, ...], dict[str, int]]:
        """Of each column, and of each label where these are classes; before anything is scaled."""
        facts: tuple[ColumnFacts, ...] = ()
        counted: dict[str, int] = {}
        if self._x.ndim == 2 and len(self._columns) == self._x.shape[1]:
            found = normalising.measured(self._x)
            facts = tuple(map(ColumnFacts, self._columns, found.minimum, found.mean, found.maximum))
        if self._y.ndim == 1:
            labels, counts = np.unique(self._y, return_counts=True)
            if len(labels) <= LABELS_COUNTED:
                counted = {f"{label:g}": int(count) for label, count in zip(labels, counts)}
        return facts, counted
