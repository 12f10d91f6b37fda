"""The data source `sqlite`: a table or a query, read only, while a recorder may be writing (`covey record`)."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from covey_edge.source_options import SqliteOptions
from covey_edge.table_rows import Rows, Table
from covey_protocol.errors import DATA, DataError

BUSY_S = 30.0
DAY_S = 86400.0
MILLISECONDS_FROM = 1e11  # as seconds the year 5138


class _Plan(NamedTuple):
    sql: str
    values: tuple[object, ...] = ()
    skip: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_sqlite(path: Path, options: SqliteOptions) -> Table:
    """One SELECT, so one moment of the database. Rows without a label are no examples yet, and no bad rows either.

    DataError for a file that is no database, and for SQL that it refuses.
    """
    if not path.exists():
        raise DataError.at(path, " does not exist", "check data.path in agent.toml, or record something first")
    try:
        with contextlib.closing(_opened(path)) as database:
            return _read(path, database, options)
    except sqlite3.Error as exc:
        told = f"{DATA} is no database that can be read as its options say"
        raise DataError(f"{path} cannot be read ({exc})", "check the file and [data.options]", told=told) from exc


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BUSY_S)
    database.execute("PRAGMA query_only = ON")
    return database


def _read(path: Path, database: sqlite3.Connection, options: SqliteOptions) -> Table:
    plan = _table_plan(path, database, options) if options.table else _Plan(options.query)
    cursor = database.execute(plan.sql, plan.values)
    names = [one[0] for one in cursor.description or ()]
    if not names:
        raise DataError.at(path, ": the query gives no columns", "write a SELECT")
    by_id = bool(options.table)  # then the first column is the row id
    rows = Rows(path, names[by_id:], options, skip=plan.skip)
    labels, unlabelled = [names[by_id:].index(one) for one in options.labels], 0
    for number, row in enumerate(cursor):
        place, cells = (row[0], row[1:]) if by_id else (number, row)
        if any(cells[label] is None for label in labels):
            unlabelled += 1
        else:
            rows.add(place if isinstance(place, int) else number, cells)
    notes = [f"{unlabelled} rows have no label yet"] if unlabelled else []
    return rows.table([*plan.notes, *notes])


def _table_plan(path: Path, database: sqlite3.Connection, options: SqliteOptions) -> _Plan:
    """Of a table: the newest rows that have a label, oldest first. Views have no row id: they are sorted by time."""
    table = _quoted(options.table)
    facts = database.execute(f"PRAGMA table_info({table})").fetchall()
    if not facts:
        remedy = f"it has: {', '.join(_tables(database)) or 'none'}"
        raise DataError(f"{path} has no table {options.table!r}", remedy, told=f"{DATA} lacks the table that is named")
    names = [name for _, name, *_ in facts]
    keys = tuple(name for _, name, kind, _, _, key in facts if key == 1 and kind.upper() == "INTEGER")
    where, values = _since(path, database, options, names)
    labelled = [f"{_quoted(name)} IS NOT NULL" for name in options.labels if name in names]
    order = _order(path, database, options, names)
    sql = f"SELECT {order}, * FROM {table} WHERE {' AND '.join([*where, *labelled]) or '1'} ORDER BY {order} "  # noqa: S608  # names are quoted
    if options.newest:
        sql = f"SELECT * FROM ({sql} DESC LIMIT {options.newest}) ORDER BY 1"  # noqa: S608  # a whole number
    without = f"SELECT count(*) FROM {table} WHERE {' AND '.join([*where, f'NOT ({_all(labelled)})'])}"  # noqa: S608
    (unlabelled,) = database.execute(without, values).fetchone()
    notes = (f"{unlabelled} rows have no label yet",) if unlabelled else ()
    return _Plan(sql, values, (*keys, options.time), notes)


def _all(conditions: list[str]) -> str:
    return " AND ".join(conditions) or "1"


def _order(path: Path, database: sqlite3.Connection, options: SqliteOptions, names: list[str]) -> str:
    try:
        database.execute(f"SELECT rowid FROM {_quoted(options.table)} LIMIT 1").fetchone()  # noqa: S608
    except sqlite3.OperationalError as exc:
        if options.time not in names:
            what = "has neither row ids nor a time"
            raise DataError(f"{path}: {options.table!r} {what}", "name `time`", told=f"{DATA} {what}") from exc
        return _quoted(options.time)
    return "rowid"


def _since(
    path: Path, database: sqlite3.Connection, options: SqliteOptions, names: list[str]
) -> tuple[list[str], tuple[object, ...]]:
    """For `days`: by this device's clock. Times are Unix seconds or milliseconds, or texts that SQLite knows (UTC)."""
    if not options.days:
        return [], ()
    if options.time not in names:
        what = f"{path}: {options.table!r} has no column {options.time!r} for `days`"
        raise DataError(what, "name `time`", told=f"{DATA} lacks the column for `days`")
    column, since = _quoted(options.time), time.time() - options.days * DAY_S
    (newest,) = database.execute(f"SELECT max({column}) FROM {_quoted(options.table)}").fetchone()  # noqa: S608
    if isinstance(newest, str):
        return [f"julianday({column}) >= julianday(?, 'unixepoch')"], (since,)
    scale = 1000 if newest is not None and newest > MILLISECONDS_FROM else 1
    return [f"{column} >= ?"], (since * scale,)


def _tables(database: sqlite3.Connection) -> list[str]:
    return [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def sqlite_state(path: Path, options: SqliteOptions) -> tuple[object, ...]:
    """Changes whenever the content may have: also what a recorder has written and the file itself does not hold yet."""
    files = [path, path.with_name(f"{path.name}-wal")]
    stats = [one.stat() for one in files if one.exists()]
    hour = int(time.time() / 3600) if options.days else 0
    return (hour, *((one.st_mtime_ns, one.st_size) for one in stats))
