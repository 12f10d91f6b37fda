"""The folder of an experiment: what was asked, and of every cell its rounds, its newest state and its result.

experiment.toml         the experiment as it runs, overrides included
run.json                what else a resumed run must know
cells/KEY/              of one cell; KEY as in `sweep.Cell`
    rounds.jsonl        a line per round, durable before the next one starts
    state.bin           the newest saved state of the learning process, with the number of its round
    result.json         when it is finished: `results.RunResult`
    error.json          why it failed; tried again by --resume
tensorboard/KEY/        event files
report.html

After a crash at any moment a cell goes on after its newest state; lines of later rounds are dropped and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from covey_coordinator.simulation.results import RoundRecord, RunResult
from covey_edge.config import toml_content
from covey_edge.files import write_atomic
from covey_edge.held import alone_in
from covey_protocol.errors import ConfigError, StorageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1  # grows when a folder of an older version would not mean the same

Table = Mapping[str, Any]


class RunNotes(Struct, frozen=True):
    """beside: the folder that relative paths start from. data_dir: where data sets lie. as_fleet: cells run on real
    agents. files: the user's code, path -> SHA-256.
    """

    format: int = FORMAT
    beside: str = ""
    data_dir: str | None = None
    as_fleet: bool = False
    files: dict[str, str] = {}


class SavedState(Struct, frozen=True):
    """After round `number`. notes: of the run until then."""

    number: int
    state: bytes
    notes: tuple[str, ...] = ()


class ExperimentFolder:
    """One experiment on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def new(cls, path: Path, table: Table, notes: RunNotes) -> ExperimentFolder:
        """Make it. Raises ConfigError where something is there already."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path} is there already", "choose another --out, or go on with --resume")
        write_atomic(path / "run.json", msgspec.json.format(msgspec.json.encode(notes), indent=1))
        write_atomic(path / "experiment.toml", toml_of(table).encode())
        return cls(path)

    @classmethod
    def new_or_same(cls, path: Path, table: Table, notes: RunNotes) -> ExperimentFolder:
        """Make it, or go on where it holds this experiment already. Raises ConfigError where it holds another."""
        if not (path / "run.json").exists():
            return cls.new(path, table, notes)
        folder = cls.old(path)
        if folder.table != tomllib.loads(toml_of(table)) or folder.notes != notes:
            raise ConfigError(f"{path} holds another experiment", "choose another folder")
        return folder

    @classmethod
    def old(cls, path: Path) -> ExperimentFolder:
        """One to go on with. Raises ConfigError where it is none, or the user's code has changed since."""
        folder = cls(path)
        for source, sha256 in folder.notes.files.items():
            if file_sha256(source) != sha256:
                raise ConfigError(
                    f"{source} is not what it was when {path} was started",
                    "put the old file back, or start a new experiment",
                )
        return folder

    @property
    def notes(self) -> RunNotes:
        try:
            notes = msgspec.json.decode((self.path / "run.json").read_bytes(), type=RunNotes)
        except (OSError, msgspec.DecodeError) as exc:
            raise ConfigError(f"{self.path} holds no experiment ({exc})", "give the folder of a run") from exc
        if notes.format != FORMAT:
            raise ConfigError(f"{self.path} is of another version of covey", "finish it with that version")
        return notes

    @property
    def table(self) -> dict[str, Any]:
        """The experiment."""
        return toml_content(self.path / "experiment.toml")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For this process alone: two would each spoil the other's cells."""
        with alone_in(self.path, "covey simulate"):
            yield

    @property
    def has_rounds(self) -> bool:
        """Whether any cell has begun."""
        return any(self.path.glob("cells/*/rounds.jsonl"))

    def delete(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def cell(self, key: str) -> CellFolder:
        return CellFolder(self.path / "cells" / key)

    def board(self, key: str) -> Path:
        """Of a cell's TensorBoard files."""
        return self.path / "tensorboard" / key

    def results(self, keys: Sequence[str]) -> list[RunResult]:
        """Of those cells that have one, in this order."""
        return [result for key in keys if (result := self.cell(key).result()) is not None]


class CellFolder:
    """One cell on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def result(self) -> RunResult | None:
        """None where the cell is not finished."""
        place = self.path / "result.json"
        if not place.exists():
            return None
        try:
            return msgspec.json.decode(place.read_bytes(), type=RunResult)
        except (OSError, msgspec.DecodeError) as exc:
            raise ConfigError(f"{place} cannot be read ({exc})", "delete that file and resume") from exc

    def taken_up(self) -> tuple[SavedState | None, list[RoundRecord]]:
        """The newest state and the records up to it, to go on from; nothing where there is no state.

        Records of later rounds, and a line that a crash cut off, are gone when this returns.
        """
        state, records = self._state(), []
        if state is not None:
            records = [record for record in self._records() if record.number <= state.number]
            if [record.number for record in records] != list(range(state.number + 1)):
                state, records = None, []  # lines were lost: begin again
        write_atomic(self.path / "rounds.jsonl", b"".join(map(_line, records)))
        return state, records

    def append(self, record: RoundRecord) -> None:
        """Durable when this returns. The file is there since `taken_up`."""
        try:
            with (self.path / "rounds.jsonl").open("ab") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise StorageError(
                f"cannot write {self.path / 'rounds.jsonl'} ({exc.strerror})", "free some space"
            ) from exc

    def save(self, state: SavedState) -> None:
        write_atomic(self.path / "state.bin", msgspec.msgpack.encode(state))

    def finish(self, result: RunResult) -> None:
        """The state is not needed any more."""
        write_atomic(self.path / "result.json", msgspec.json.encode(result))
        for name in ("state.bin", "error.json"):
            (self.path / name).unlink(missing_ok=True)

    def fail(self, what: str, text: str = "") -> None:
        """text: a traceback, where covey has no words for the error."""
        write_atomic(self.path / "error.json", json.dumps({"error": what, "traceback": text}, indent=1).encode())

    def _state(self) -> SavedState | None:
        try:
            return msgspec.msgpack.decode((self.path / "state.bin").read_bytes(), type=SavedState)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as exc:
            raise ConfigError(f"{self.path / 'state.bin'} cannot be read ({exc})", "delete it and resume") from exc

    def _records(self) -> Iterator[RoundRecord]:
        """Up to a line that is not whole."""
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            for line in (self.path / "rounds.jsonl").read_bytes().splitlines():
                yield msgspec.json.decode(line, type=RoundRecord)


def _line(record: RoundRecord) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def new_path(runs: Path, name: str) -> Path:
    """runs/NAME-TIME, which is not there yet."""
    started = time.strftime("%Y%m%d-%H%M%S")
    path, count = runs / f"{name}-{started}", 1
    while path.exists():
        count += 1
        path = runs / f"{name}-{started}-{count}"
    return path


def file_sha256(path: str) -> str:
    """Empty where there is no such file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


# ---- TOML, which Python reads but does not write


def toml_of(table: Table) -> str:
    """As a TOML file that reads back as this: tables of tables become [sections], what is deeper is written inline."""
    plain = {key: value for key, value in table.items() if not _is_section(value)}
    sections = {key: value for key, value in table.items() if _is_section(value)}
    lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in sections.items():
        head = f"[[{_toml_key(key)}]]" if isinstance(value, (list, tuple)) else f"[{_toml_key(key)}]"
        for one in value if isinstance(value, (list, tuple)) else [value]:
            lines += ["", head, *(f"{_toml_key(inner)} = {_toml_value(held)}" for inner, held in one.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_section(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, Mapping) for one in value)
    return isinstance(value, Mapping)


def _toml_key(key: str) -> str:
    return (
        key
        if key and all(letter.isascii() and (letter.isalnum() or letter in "_-") for letter in key)
        else _quoted(key)
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml_value(held)}" for key, held in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    raise ConfigError(f"an experiment holds {value!r}", "use numbers, texts, true and false, lists and tables")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
