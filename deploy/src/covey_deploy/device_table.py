"""A table of devices, which `covey provision device` and `covey flash` read (--csv): one file serves both."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from covey_protocol.errors import ConfigError
from covey_protocol.topics import check_device_id

COLUMNS = ("id", "hostname", "data", "data_source", "data_path")


@dataclass(frozen=True)
class Wanted:
    """One device. Empty: hostname for its id, data (a file for its card) for none, the others for what is usual."""

    device_id: str
    hostname: str = ""
    data: str = ""
    data_source: str = ""
    data_path: str = ""


def read_table(path: Path) -> list[Wanted]:
    """Of a header line and a row for each device. Only the column id is needed; data is a path beside the table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{path} cannot be read ({exc})", "save it as CSV in UTF-8, with a column id") from exc
    if "id" not in columns or set(columns) - set(COLUMNS):
        raise ConfigError(f"{path} has the columns {', '.join(columns) or 'none'}", f"use {', '.join(COLUMNS)}")
    return checked([_wanted(row, path, number) for number, row in enumerate(rows, 2)])


def _wanted(row: dict[str, str], path: Path, number: int) -> Wanted:
    if None in row or None in row.values():
        raise ConfigError(f"{path}: row {number} has not as many columns as the first", "correct that row")
    texts = {name: text.strip() for name, text in row.items()}
    if not texts["id"]:
        raise ConfigError(f"{path}: row {number} has no id", "name a device in it, or take it out")
    if texts.get("data"):
        texts["data"] = str(path.parent / texts["data"])
    return Wanted(texts.pop("id"), **texts)


def checked(wanted: Sequence[Wanted]) -> list[Wanted]:
    """The same; ConfigError where there is none, or an id is there twice or can be no device's."""
    if not wanted:
        raise ConfigError("no device is named", "name at least one")
    seen: set[str] = set()
    for one in wanted:
        check_device_id(one.device_id)
        if one.device_id in seen:
            raise ConfigError(f"{one.device_id} is there twice", "give each device an id of its own, such as pi-{n:03}")
        seen.add(one.device_id)
    return list(wanted)
