"""The folder of a grid: one small file per finished cell, so that a run that ends early loses no finished one.

settings.json    what the grid is; another grid is refused here
cells/KEY.json   one result each, written whole or not at all
results.csv, results.json, heatmap.png   made anew from the cells at the end
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from covey_coordinator.grid.settings import Cell
from covey_edge.files import write_atomic
from covey_edge.held import alone_in
from covey_protocol.errors import ConfigError, StorageError

FORMAT = 1  # grows when cells of an older version would not mean the same
COLUMNS = (
    "rule",
    "attack",
    "fraction",
    "num_hostile",
    "seed",
    "told",
    "accuracy",
    "best_accuracy",
    "backdoor_success",
    "rounds_refused",
    "refused",
    "last_refusal",
    "seconds",
)


class Folder:
    """Cells on disk. The settings are the canonical ones (`settings.canonical`)."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._settings = {"format": FORMAT, **settings}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder for this process. ConfigError if it holds another grid or another process works in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot use {self.path} ({exc.strerror})", "choose another --output") from exc
        with alone_in(self.path, "covey grid"):
            self._claim()
            yield

    def _claim(self) -> None:
        place = self.path / "settings.json"
        if place.exists():
            differing = _differences(_read(place), self._settings)
            if differing:
                raise ConfigError(
                    f"{self.path} holds a grid with other settings ({differing})",
                    "choose another --output, or delete that folder to start anew",
                )
        elif any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise ConfigError(f"{self.path} holds other things", "choose a new folder with --output")
        else:
            write_atomic(place, _json(self._settings))

    def finished(self, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
        """The results that are there already."""
        found = {}
        for cell in cells:
            place = self._place(cell)
            if place.exists():
                result = _read(place)
                if any(result.get(name) != value for name, value in cell._asdict().items()):
                    raise ConfigError(f"{place} is not the result of its cell", "delete that file and run again")
                found[cell] = result
        return found

    def save(self, cell: Cell, result: dict[str, Any]) -> None:
        write_atomic(self._place(cell), _json(result))

    def write_tables(self, results: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(results)
        write_atomic(self.path / "results.csv", text.getvalue().encode())
        whole = {"settings": self._settings, "summary": summary, "cells": list(results)}
        write_atomic(self.path / "results.json", _json(whole))

    def _place(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.key}.json"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read ({exc})", "delete that file and run again") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no table", "delete that file and run again")
    return content


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = sorted(set(there) | set(here))
    parts = [
        f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} now"
        for name in names
        if there.get(name) != here.get(name)
    ]
    return "; ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = ", ".join(str(entry.get("label")) for entry in value)
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"
