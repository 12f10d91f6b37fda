"""The data source `csv`: a table in a text file, read row by row."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from covey_edge.source_options import CsvOptions
from covey_edge.table_rows import Number, Rows, Table
from covey_protocol.errors import DATA, DataError


def read_csv(path: Path, options: CsvOptions) -> Table:
    """DataError for a file that is no such table; bad rows are left out and tallied by their line."""
    with _opened(path, options) as reader:
        return _read(path, reader, options)


def column_names(path: Path, options: CsvOptions) -> list[str]:
    """Of a table that may lack the columns of labels."""
    with _opened(path, options) as reader:
        return _names(path, next(_filled(path, reader), None), options)


@contextlib.contextmanager
def _opened(path: Path, options: CsvOptions) -> Iterator[Any]:
    try:
        with path.open(encoding=_codec(options.encoding), newline="") as file:
            yield csv.reader(
                file,
                delimiter=options.delimiter,
                quotechar=options.quote or None,
                quoting=csv.QUOTE_MINIMAL if options.quote else csv.QUOTE_NONE,
                strict=True,
            )
    except FileNotFoundError as exc:
        raise DataError.at(path, " does not exist", "check data.path in agent.toml") from exc
    except OSError as exc:
        raise DataError.at(path, f" cannot be read ({exc.strerror})", "check its permissions") from exc
    except UnicodeError as exc:
        remedy = 'set `encoding`, perhaps to "latin-1"'
        raise DataError.at(path, f" is not text in {options.encoding}", remedy) from exc


def _codec(encoding: str) -> str:
    """utf-8 with or without the mark that some programs put before it."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def _read(path: Path, reader: Any, options: CsvOptions) -> Table:
    rows = _filled(path, reader)
    first = next(rows, None)
    names = _names(path, first, options)
    table = Rows(path, names, options, _number(options), options.missing)
    if not options.header and first is not None:
        table.add(reader.line_num, first)
    for row in rows:
        table.add(reader.line_num, row)
    return table.table()


def _names(path: Path, first: Optional[list[str]], options: CsvOptions) -> list[str]:
    if first is None:
        raise DataError.at(path, " holds no rows", "record some data first")
    names = [cell.strip() for cell in first] if options.header else [str(place) for place in range(len(first))]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        remedy = "rename one, or set `header = false`"
        raise DataError(f"{path} has two columns {twice[0]!r}", remedy, told=f"{DATA} has a column twice")
    return names


def _number(options: CsvOptions) -> Number:
    return float if options.decimal == "." else lambda cell: float(cell.replace(",", "."))


def _filled(path: Path, reader: Any) -> Iterator[list[str]]:
    """The rows that are not blank lines."""
    while True:
        try:
            row = next(reader, None)
        except csv.Error as exc:
            raise DataError(
                f"{path}, line {reader.line_num}: {exc}",
                "check the quotes, or set `quote` and `delimiter`",
                told=f"{DATA} is no table that can be read",
            ) from exc
        if row is None:
            return
        if row:
            yield row
