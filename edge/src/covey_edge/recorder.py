"""Sensor readings into a table of a SQLite database, which the data source `sqlite` reads at the same time.

Each call of `add` is one transaction: readings and the deletion of old ones are durable together, or neither happened.
A kill at any moment loses at most the readings that were not yet added. Freed pages of the file are used again, and
given back where they are more than a quarter, so it stays about as large as what it keeps; beside it lies a log
(`-wal`) of up to 4 MB, and more only while a reader takes long.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Union

from covey_protocol.errors import ConfigError, DataError, StorageError

Value = Union[float, str, None]
TABLE, ID, TIME, LABEL = "readings", "id", "time", "label"
BUSY_S = 30.0
WAL_BYTES = 2**20  # to which the log is cut when it has been written back
OLD_AT_ONCE = 100  # rows beyond `days` that go in one transaction, and ten for each that comes: a clock that jumps far
# ahead makes all rows look old, and must not cost them all before somebody sets it right
SPARE_PAGES = 64  # freed pages that stay in the file, for the next rows


class Retention(NamedTuple):
    """What is kept: so many of the newest rows, rows of so many days, so many bytes; 0 for no limit of this kind."""

    rows: int = 0
    days: float = 0.0
    bytes: int = 0


class Recorder:
    """Appends to one table. Made at first use, with a column of numbers or of text for each value of the first reading;
    a reading with other columns is refused by name."""

    def __init__(
        self,
        path: Path,
        table: str = TABLE,
        retention: Retention = Retention(),  # noqa: B008  # frozen
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._table, self._retention, self._clock = path, _quoted(table), retention, clock
        with self._translated():
            self._database = _opened(path)
        self._kinds = self._read_kinds()

    def close(self) -> None:
        self._database.close()

    def add(self, readings: Sequence[Mapping[str, Value]]) -> None:
        """Durable when this returns. `time`, Unix seconds, is the clock's where a reading has none.

        DataError for columns that the table has not, or that a reading lacks (`label` may come later); StorageError
        where there is no space: then nothing of it is stored, and it can be added again.
        """
        if not readings:
            return
        with self._translated(), self._transaction():
            if not self._kinds:
                self._make(readings[0])
            rows = [self._row(one) for one in readings]
            names = (TIME, *self._kinds)
            places = ", ".join(map(_quoted, names))
            marks = ", ".join("?" * len(names))
            self._database.executemany(f"INSERT INTO {self._table} ({places}) VALUES ({marks})", rows)  # noqa: S608
            self._forget(len(rows))
        with contextlib.suppress(sqlite3.Error):  # the readings are durable; space is given back another time
            self._shrink()

    def label(self, value: Value, since: float, until: float, *, again: bool = False) -> int:
        """Label the rows of a span of time that have no label yet, or with again all of it. The number of rows."""
        with self._translated(), self._transaction():
            if not self._kinds:
                raise DataError(f"{self._path} holds no readings yet", "record some first")
            if LABEL not in self._kinds:
                kind = "TEXT" if isinstance(value, str) else "REAL"
                self._database.execute(f"ALTER TABLE {self._table} ADD COLUMN {LABEL} {kind}")
                self._kinds[LABEL] = kind
            value = self._fitting(LABEL, value)
            only = "" if again else f" AND {LABEL} IS NULL"
            where = f"{TIME} >= ? AND {TIME} < ?{only}"
            done = self._database.execute(f"UPDATE {self._table} SET {LABEL} = ? WHERE {where}", (value, since, until))  # noqa: S608
            return done.rowcount

    # --- the schema

    def _read_kinds(self) -> dict[str, str]:
        """Column -> REAL or TEXT, without id and time; empty where there is no table yet."""
        with self._translated():
            facts = self._database.execute(f"PRAGMA table_info({self._table})").fetchall()
        kinds = {name: kind for _, name, kind, *_ in facts}
        if facts and (ID not in kinds or TIME not in kinds):
            raise DataError(
                f"table {self._table} of {self._path} was not made by `covey record`", "name another --table or file"
            )
        return {name: kind for name, kind in kinds.items() if name not in (ID, TIME)}

    def _make(self, reading: Mapping[str, Value]) -> None:
        names = [name for name in reading if name != TIME]
        if not names or ID in names or any(not name for name in names):
            raise DataError(f"no table can be made of {', '.join(reading)}", f"give each value a name other than {ID}")
        kinds = {name: "TEXT" if isinstance(reading[name], str) else "REAL" for name in names}
        columns = "".join(f", {_quoted(name)} {kind}" for name, kind in kinds.items())
        self._database.execute(
            f"CREATE TABLE IF NOT EXISTS {self._table} ({ID} INTEGER PRIMARY KEY, {TIME} REAL NOT NULL{columns})"
        )
        self._kinds = self._read_kinds()  # another recorder may have been first

    def _row(self, reading: Mapping[str, Value]) -> list[Value]:
        unknown = [name for name in reading if name not in self._kinds and name != TIME]
        missing = [name for name in self._kinds if name not in reading and name != LABEL]
        if unknown or missing:
            wrong = (
                f"has no column {unknown[0]!r}" if unknown else f"has a column {missing[0]!r} that the reading lacks"
            )
            raise DataError(
                f"table {self._table} of {self._path} {wrong}", f"it has {', '.join(self._kinds)}; name another --table"
            )
        try:
            moment = self._clock() if reading.get(TIME) is None else moment_of(reading[TIME])
        except ConfigError as exc:
            raise BadReading(exc.what, exc.remedy) from exc
        return [moment, *(self._fitting(name, reading.get(name)) for name in self._kinds)]

    def _fitting(self, name: str, value: Value) -> Value:
        if value is None or (isinstance(value, str) == (self._kinds[name] == "TEXT")):
            return value
        if isinstance(value, float):
            return f"{value:g}"
        number = number_or_text(value)
        if isinstance(number, str):
            raise BadReading(f"{name} holds numbers, and {value[:40]!r} came")
        return number

    # --- what goes

    def _forget(self, added: int) -> None:
        """Of the oldest rows those beyond what is kept."""
        first, last = self._ends()
        if self._retention.rows:
            self._delete(f"{ID} <= ?", last - self._retention.rows)
        if self._retention.days:
            since = self._clock() - self._retention.days * 86400
            self._delete(f"{ID} < ? AND {TIME} < ?", first + OLD_AT_ONCE + 10 * added, since)
        while self._retention.bytes and (used := self._used_bytes()) > self._retention.bytes:
            first, last = self._ends()
            if first >= last:
                return
            share = (used - self._retention.bytes) / used
            self._delete(f"{ID} <= ?", min(last - 1, first + math.ceil(share * (last - first))))

    def _ends(self) -> tuple[int, int]:
        first, last = self._database.execute(f"SELECT min({ID}), max({ID}) FROM {self._table}").fetchone()  # noqa: S608
        return first, last

    def _delete(self, where: str, *values: float) -> None:
        self._database.execute(f"DELETE FROM {self._table} WHERE {where}", values)  # noqa: S608

    def _pragma(self, name: str) -> int:
        (value,) = self._database.execute(f"PRAGMA {name}").fetchone()
        return int(value)

    def _used_bytes(self) -> int:
        return (self._pragma("page_count") - self._pragma("freelist_count")) * self._pragma("page_size")

    def _shrink(self) -> None:
        spare = self._pragma("freelist_count")
        if spare > max(SPARE_PAGES, self._pragma("page_count") // 4):
            self._database.execute(f"PRAGMA incremental_vacuum({spare - SPARE_PAGES})").fetchall()

    # --- SQLite

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        kinds = dict(self._kinds)
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            self._kinds = kinds
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
                self._database.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as exc:
            raise StorageError(f"cannot write {self._path} ({exc})", "free some space, check its permissions") from exc
        except sqlite3.DatabaseError as exc:
            raise StorageError(f"{self._path} is no usable database ({exc})", "move it away") from exc


class BadReading(DataError):
    """One reading is not usable; the next one may be."""


def _opened(path: Path) -> sqlite3.Connection:
    """Made where there is none, for its owner alone."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    database = sqlite3.connect(str(path), timeout=BUSY_S, isolation_level=None)
    for setting in ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = FULL"):
        database.execute(f"PRAGMA {setting}")
    database.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    return database


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def number_or_text(text: str) -> Value:
    """None for an empty text and for what is no finite number, such as nan: a sensor that has nothing to say."""
    text = text.strip()
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else None


def moment_of(value: object) -> float:
    """Unix seconds of a number or of an ISO 8601 text, which is UTC where it does not say otherwise."""
    given = number_or_text(value) if isinstance(value, str) else value
    if isinstance(given, (int, float)):
        return float(given)
    try:
        moment = datetime.fromisoformat(str(given).replace("Z", "+00:00"))
    except ValueError as exc:
        raise ConfigError(f"{given!r} is no time", "write 2026-11-26T15:30 (UTC) or Unix seconds") from exc
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def optional_moment(text: Optional[str], otherwise: float) -> float:
    return otherwise if text is None else moment_of(text)
