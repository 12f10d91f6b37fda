"""From a TOML file or a table to an experiment that is ready to run, and from a folder to one to go on with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from covey_coordinator.simulation.folder import ExperimentFolder, RunNotes, file_sha256
from covey_coordinator.simulation.settings import code_files
from covey_coordinator.simulation.sweep import Cell, cells_of, set_key
from covey_edge.config import toml_content
from covey_protocol.errors import ConfigError

QUICK_ROUNDS = 5
DATA_VARIABLE = "COVEY_DATA"

Source = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """table: with every override. notes: what else a resumed run must know."""

    table: dict[str, Any]
    cells: list[Cell]
    notes: RunNotes

    @property
    def name(self) -> str:
        return self.cells[0].settings.name


def read_experiment(
    source: Source,
    overrides: Mapping[str, Any] | None = None,
    *,
    data_dir: str | Path | None = None,
    as_fleet: bool = False,
    quick: bool = False,
) -> Experiment:
    """overrides: dotted keys, set in the table. quick: at most 5 rounds, one seed. data_dir: None for COVEY_DATA.

    Raises ConfigError for whatever can be seen to be wrong without the data, naming the file and the key.
    """
    table, where, beside = _read(source)
    for key, value in (overrides or {}).items():
        set_key(table, key, value)
    if quick:
        _make_quick(table)
    told = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    folder = None if told is None else str(Path(told).resolve())
    cells = cells_of(table, where, beside, folder)
    if as_fleet and any(cell.settings.workers for cell in cells):
        raise ConfigError("--as-fleet with workers", "leave workers out: the devices of a fleet train by themselves")
    files = sorted({path for cell in cells for path in code_files(cell.settings)})
    notes = RunNotes(
        beside=str(beside), data_dir=folder, as_fleet=as_fleet, files={path: file_sha256(path) for path in files}
    )
    return Experiment(table, cells, notes)


def resumed_experiment(folder: ExperimentFolder) -> Experiment:
    """What the folder was started with."""
    notes, table = folder.notes, folder.table
    cells = cells_of(table, str(folder.path / "experiment.toml"), Path(notes.beside), notes.data_dir)
    return Experiment(table, cells, notes)


def _read(source: Source) -> tuple[dict[str, Any], str, Path]:
    """(table, its name in errors, where relative paths start from)."""
    if not isinstance(source, Mapping):
        return toml_content(Path(source)), str(source), Path(source).resolve().parent
    try:
        # not through JSON, which has no infinity: an infinite lambda would be null
        table = msgspec.to_builtins(source, str_keys=True)
        return _lists(table), "the experiment", Path.cwd()
    except TypeError as exc:
        raise ConfigError(f"the experiment holds what no TOML file can ({exc})", "use plain values") from exc


def _lists(value: Any) -> Any:
    """With lists for tuples, as a TOML file would give them."""
    if isinstance(value, dict):
        return {name: _lists(part) for name, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


def _make_quick(table: dict[str, Any]) -> None:
    seeds = table.get("seeds", 1)
    table["seeds"] = seeds[:1] if isinstance(seeds, list) else 1
    if isinstance(table.get("rounds"), int):
        table["rounds"] = min(table["rounds"], QUICK_ROUNDS)
