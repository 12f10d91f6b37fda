"""The options of the data sources, `[data.options]` in agent.toml: docs/data-on-devices.md. Checked at the start.

No NumPy here: the agent loads it. What reads the data is in the modules *_source, in the training child.
"""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal, Optional, Union

from msgspec import Meta, Struct

from covey_protocol.errors import ConfigError

Columns = tuple[str, ...]
Codes = Union[dict[str, float], tuple[str, ...]]
Positive = Annotated[int, Meta(ge=1)]


class TableOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of every table. label: the column, or several, that the model is to learn. columns: its inputs, in this order;
    none for all others. codes: column -> text -> number, or the texts in the order of their numbers from 0. shape: of
    one example, none for one axis. fill: what stands for a missing input; none makes the row a bad one.
    precise: keep float64, for whole numbers above 2^24.
    """

    label: Union[str, Columns] = "label"
    columns: Columns = ()
    codes: dict[str, Codes] = {}
    shape: tuple[Positive, ...] = ()
    fill: Optional[float] = None
    precise: bool = False

    @property
    def labels(self) -> Columns:
        return (self.label,) if isinstance(self.label, str) else self.label


class NpzOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """x, y: the names of the arrays."""

    x: str = "x"
    y: str = "y"


class CsvOptions(TableOptions, frozen=True, kw_only=True):
    """header: whether the first line names the columns; without it they are called "0", "1", ... missing: cells that
    mean that there is no value. quote: "" for none."""

    header: bool = True
    delimiter: Annotated[str, Meta(min_length=1, max_length=1)] = ","
    decimal: Literal[".", ","] = "."
    quote: Annotated[str, Meta(max_length=1)] = '"'
    encoding: str = "utf-8"
    missing: tuple[str, ...] = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "?")


class SqliteOptions(TableOptions, frozen=True, kw_only=True):
    """table or query: what is read. time: the column that says when, needed by `days`. newest: only so many of the
    newest rows, 0 for all. days: only rows of so many last days, 0 for all."""

    table: str = ""
    query: str = ""
    time: str = "time"
    newest: Annotated[int, Meta(ge=0)] = 0
    days: Annotated[float, Meta(ge=0)] = 0.0


class ImagesOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """size: height and width to which all are resized; none where all have one size. classes: the folders in the order
    of the model's classes. labels: a CSV file in the folder, in place of a folder per class. values: floats from 0 to
    1, or whole numbers from 0 to 255."""

    size: Optional[tuple[Positive, Positive]] = None
    colour: Literal["rgb", "grey"] = "rgb"
    classes: Columns = ()
    labels: str = ""
    values: Literal["unit", "bytes"] = "unit"


class PythonOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """arguments: what the function is called with, by name."""

    arguments: dict[str, Any] = {}


OPTIONS: dict[str, type[Struct]] = {
    "npz": NpzOptions,
    "csv": CsvOptions,
    "images": ImagesOptions,
    "sqlite": SqliteOptions,
    "python": PythonOptions,
}


def check_together(options: Struct, where: str) -> None:
    """ConfigError for options that are good one by one and do not go together. where: for the error."""
    if isinstance(options, TableOptions):
        _check_columns(options, where)
    if isinstance(options, CsvOptions):
        _check_csv(options, where)
    if isinstance(options, SqliteOptions):
        _check_sqlite(options, where)


def _check_columns(options: TableOptions, where: str) -> None:
    both = sorted(set(options.labels) & set(options.columns))
    if both:
        raise ConfigError(f"{where}: column {both[0]!r} is a label and an input", "leave it out of `columns`")
    for what, names in (("label", options.labels), ("columns", options.columns)):
        if len(set(names)) < len(names) or (what == "label" and not names):
            raise ConfigError(f"{where}: `{what}` names a column twice, or none", "name each once")
    for column, codes in options.codes.items():
        if not isinstance(codes, dict) and len(set(codes)) < len(codes):
            raise ConfigError(f"{where}: codes of {column!r} name a text twice", "name each once")


def _check_csv(options: CsvOptions, where: str) -> None:
    if len({options.delimiter, options.decimal, options.quote}) < 3:
        raise ConfigError(
            f"{where}: two of delimiter, decimal and quote are {options.delimiter!r}",
            'write `delimiter = ";"` beside `decimal = ","`',
        )
    try:
        codecs.lookup(options.encoding)
    except LookupError as exc:
        raise ConfigError(f"{where}: there is no encoding {options.encoding!r}", 'write "utf-8" or "latin-1"') from exc


def _check_sqlite(options: SqliteOptions, where: str) -> None:
    if bool(options.table) == bool(options.query):
        raise ConfigError(f"{where}: give `table` or `query`, one of them", 'what `covey record` writes is "readings"')
    for name in ("newest", "days"):
        if options.query and getattr(options, name):
            raise ConfigError(f"{where}: `{name}` with a query", "say it in the query, with LIMIT or WHERE")
