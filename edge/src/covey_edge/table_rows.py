"""Rows of a table into arrays: what the CSV and the SQLite source share. Rows that are no examples are tallied.

The numbers are kept as they come in one growing array, so a table of n rows costs its own size and a little: no list of
rows is ever held.
"""

from __future__ import annotations

import difflib
import math
import operator
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import numpy.typing as npt

from covey_edge.data_report import LeftOut, Tally
from covey_edge.source_options import Codes, TableOptions
from covey_protocol.errors import DATA, DataError

Number = Callable[[Any], float]
NO_NUMBER, NO_CODE, MISSING, NO_LABEL = "not a number", "a text without a code", "no value", "no label"


class Table(NamedTuple):
    """What a source gives. x, y: (n, ...). columns: the names of x's features. places: where each example is, as the
    owner finds it (line, row id, file); None for its index. left_out: rows that are no examples. notes: for the
    report."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    columns: tuple[str, ...] = ()
    places: Optional[Sequence[object]] = None
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()


class Rows:
    """Takes rows of all columns of a table.

    names: the table's columns. skip: those that are no input unless they are asked for. number: what makes a cell a
    number. missing: cells that mean that there is no value.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        options: TableOptions,
        number: Number = float,
        missing: Collection[object] = (None,),
        skip: Collection[str] = (),
    ) -> None:
        self._names, self._options, self._missing = names, options, frozenset(missing)
        inputs = options.columns or tuple(one for one in names if one not in (*options.labels, *skip))
        places = {name: place for place, name in enumerate(names)}
        for name in (*options.labels, *inputs, *options.codes):
            if name not in places:
                raise _no_column(path, name, names)
        if not inputs:
            raise DataError.at(path, " has no column beside its label", "name the inputs in options.columns")
        self._inputs, self._labels = [places[one] for one in inputs], [places[one] for one in options.labels]
        self.columns = inputs
        self._shape = options.shape or (len(inputs),)
        if math.prod(self._shape) != len(inputs):
            raise DataError.at(
                path, f": {len(inputs)} columns do not make examples of shape {self._shape}", "mend `shape`"
            )
        self._numbers = [_converter(options.codes.get(name), number) for name in names]
        self._plain = [one is number for one in self._numbers]
        self._pick = operator.itemgetter(*self._inputs, self._inputs[0])  # the last, so that it is always a tuple
        self._number, self._simple = number, all(self._plain[place] for place in self._inputs)
        self._x, self._y, self._places = array("d" if options.precise else "f"), array("d"), array("q")
        # cells that mean nothing and are numbers all the same, as -999 and nan
        self._deceiving = frozenset(cell for cell in self._missing if _is_number(cell, number))
        self.tally = Tally()

    def add(self, place: int, row: Sequence[Any]) -> None:
        """One row. place: its line or row id."""
        if len(row) != len(self._names):
            self.tally.add(f"{len(row)} cells in place of {len(self._names)}", place)
            return
        size_x, size_y = len(self._x), len(self._y)
        try:
            self._take(row)
        except (ValueError, KeyError, TypeError):
            del self._x[size_x:], self._y[size_y:]
            if not self._mended(place, row):
                del self._x[size_x:], self._y[size_y:]
                return
        self._places.append(place)

    def _take(self, row: Sequence[Any]) -> None:
        """The quick way, for a row in which all is well."""
        if self._deceiving and not self._deceiving.isdisjoint(row):
            raise ValueError
        cells = self._pick(row)[:-1]
        if self._simple:
            self._x.extend(map(self._number, cells))
        else:
            self._x.extend([self._numbers[place](row[place]) for place in self._inputs])
        self._y.extend([self._numbers[place](row[place]) for place in self._labels])

    def _mended(self, place: int, row: Sequence[Any]) -> bool:
        """Cell by cell; False where one of them makes the row a bad one, which is tallied."""
        for column in (*self._inputs, *self._labels):
            is_label = column in self._labels
            cell = row[column].strip() if isinstance(row[column], str) else row[column]
            if cell in self._missing:
                if is_label or self._options.fill is None:
                    self.tally.add(NO_LABEL if is_label else MISSING, place, self._names[column])
                    return False
                value = self._options.fill
            else:
                try:
                    value = self._numbers[column](cell)
                except (ValueError, KeyError, TypeError):
                    self.tally.add(NO_NUMBER if self._plain[column] else NO_CODE, place, self._names[column])
                    return False
            (self._y if is_label else self._x).append(value)
        return True

    def table(self, notes: Sequence[str] = ()) -> Table:
        """The arrays are those that the rows were read into, without a copy."""
        x = np.frombuffer(self._x, np.float64 if self._options.precise else np.float32) if self._x else np.zeros(0)
        y = np.frombuffer(self._y, np.float64) if self._y else np.zeros(0)
        x = x.reshape(len(self._places), *self._shape)
        if not isinstance(self._options.label, str):
            y = y.reshape(len(self._places), len(self._labels))
        return Table(x, y, self.columns, self._places, self.tally.left_out, tuple(notes))


def _converter(codes: Optional[Codes], number: Number) -> Number:
    if codes is None:
        return number
    return (codes if isinstance(codes, dict) else {text: float(place) for place, text in enumerate(codes)}).__getitem__


def _is_number(cell: object, number: Number) -> bool:
    try:
        number(cell)
    except (ValueError, TypeError):
        return False
    return True


def _no_column(path: Path, name: str, names: Sequence[str]) -> DataError:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    remedy = f"did you mean {close[0]!r}? it has: {shown}" if close else ""
    return DataError(f"{path} has no column {name!r}", remedy, told=f"{DATA} lacks a column that is named")
