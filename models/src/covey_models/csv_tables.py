"""Tables of comma-separated values as data sets: a header, one example per line, one column with the class.

The whole table is read with Python's csv module and checked cell by cell: half a second for Spambase's 4601 x 58,
so some 20 s for ten million cells. A table whose header has a column `path` lists images instead (`image_folders`).
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from covey_models.datasets import Dataset, Reading, occurring_range, require_classes
from covey_models.names import no_such
from covey_protocol.errors import DataError

Array = np.ndarray[Any, Any]

LABEL_NAMES = ("label", "class", "target")
USER_NAMES = ("user", "users")
PATH_NAME = "path"
MAX_NOMINAL = 100  # distinct texts of one column; more are rather names or dates, and each would be a feature


class Table(NamedTuple):
    """columns: name -> the texts of its cells, without outer blanks. lines: of the file, per row, for messages."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def where(self, column: str, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}, column {column!r}"


def load_csv(path: Path, how: Reading = Reading()) -> Dataset:  # noqa: B008 - a frozen value
    """A table with a header. Columns of numbers are features, columns of text become one feature per distinct text.

    The class is in the column `how.label`, else in the only one named label, class or target, else in the last; whole
    numbers or texts, whose sorted distinct values are the classes (numbers by size). `how.users`, or a column named
    user, says whose an example is. Also nominal, ignore and standardise of `Reading`.
    Raises DataError naming the file, the line and the column for whatever is empty, not finite, or of mixed kinds.
    """
    table = read_table(path)
    if PATH_NAME in table.columns:
        from covey_models.image_folders import load_listed

        return load_listed(table, how)
    how.only(str(path), "label", "users", "nominal", "ignore", "standardise")
    for name in (*how.nominal, *how.ignore):
        require_column(table, name)
    label, users = label_column(table, how), user_column(table, how)
    features = [name for name in table.columns if name not in (label, users, *how.ignore)]
    if not features:
        raise DataError(f"{path} has no column besides {label!r}", "separate columns by commas, and keep some features")
    y, class_names = classes(table, label)
    blocks = [_feature(table, name, name in how.nominal) for name in features]
    x = np.concatenate([block for _, block in blocks], axis=1)
    names = tuple(name for group, _ in blocks for name in group)
    owners = None if users is None else np.array(table.columns[users])
    return Dataset(path.stem, x, y, class_names, names, occurring_range(x), owners)


def read_table(path: Path) -> Table:
    """All cells as text. Refused: no header, names twice, rows of another length."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except FileNotFoundError as exc:
        raise DataError(f"there is no file {path}", "check the path") from exc
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path} cannot be read as a table ({exc})", "write it as UTF-8 text with commas") from exc
    twice = [name for name in header if header.count(name) > 1 or not name]
    if twice or not header:
        told = f"names the column {twice[0]!r} twice" if twice and twice[0] else "has no name for a column"
        raise DataError(f"the first line of {path} {told}", "give every column a name of its own")
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: {len(row)} cells", f"give one for each of the {len(header)} columns")
    cells = list(zip(*(row for _, row in rows))) or [()] * len(header)
    return Table(path, {name: list(column) for name, column in zip(header, cells)}, [line for line, _ in rows])


def require_column(table: Table, name: str) -> str:
    if name not in table.columns:
        told = no_such("column", name, table.columns)
        raise DataError(f"{table.path}: {told.what}", told.remedy)
    return name


def label_column(table: Table, how: Reading) -> str:
    if how.label is not None:
        return require_column(table, how.label)
    named = [name for name in table.columns if name.lower() in LABEL_NAMES]
    return named[0] if len(named) == 1 else list(table.columns)[-1]


def user_column(table: Table, how: Reading) -> Optional[str]:
    if how.users is not None:
        return require_column(table, how.users)
    named = [name for name in table.columns if name.lower() in USER_NAMES]
    return named[0] if len(named) == 1 else None


def classes(table: Table, column: str) -> tuple[Array, tuple[str, ...]]:
    """((n,) int32 class numbers, their names)."""
    cells = filled(table, column)
    numbers = [_number(cell) for cell in cells]
    if any(number is None for number in numbers):
        names, y = np.unique(np.array(cells, dtype=np.str_), return_inverse=True)
    else:
        values = np.array(numbers, np.float64)
        broken = ~np.isfinite(values) | (values != np.floor(values))
        if broken.any():
            row = int(broken.argmax())
            raise DataError(
                f"{table.where(column, row)}: {cells[row]!r} is no class",
                "give whole numbers or texts, or name the column of the class",
            )
        distinct, y = np.unique(values, return_inverse=True)
        names = np.array([str(int(value)) for value in distinct])
    require_classes(table.path, y)
    return y.astype(np.int32), tuple(str(name) for name in names)


def filled(table: Table, column: str) -> list[str]:
    """The cells, none of them empty."""
    cells = table.columns[column]
    for row, cell in enumerate(cells):
        if not cell:
            raise DataError(f"{table.where(column, row)}: empty", "fill it in or remove the line")
    return cells


def _feature(table: Table, column: str, nominal: bool) -> tuple[list[str], Array]:
    """(names, (n, features) float32) of one column."""
    cells = filled(table, column)
    numbers = [None if nominal else _number(cell) for cell in cells]
    if all(number is None for number in numbers):
        return _one_hot(table, column, cells)
    for row, number in enumerate(numbers):
        if number is None:
            raise DataError(
                f"{table.where(column, row)}: {cells[row]!r} is no number, others are",
                "correct it, or name the column in nominal",
            )
        if not abs(number) <= float(np.finfo(np.float32).max):
            raise DataError(f"{table.where(column, row)}: {cells[row]!r}", "give a finite number or remove the line")
    return [column], np.array(numbers, np.float32)[:, None]


def _one_hot(table: Table, column: str, cells: list[str]) -> tuple[list[str], Array]:
    kinds, places = np.unique(np.array(cells), return_inverse=True)
    if len(kinds) > MAX_NOMINAL:
        raise DataError(
            f"{table.path}: column {column!r} holds {len(kinds)} different texts, more than {MAX_NOMINAL}",
            "name it in ignore",
        )
    return [f"{column}={kind}" for kind in kinds], np.eye(len(kinds), dtype=np.float32)[places]


def _number(cell: str) -> Optional[float]:
    """None where it is none. What Python alone reads as a number ("1_000") is text."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None
