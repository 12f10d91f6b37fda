"""Many cards in a row: which devices, what was done already, and when the next card is in the reader.

The journal is a file of one JSON line for each finished card, synced; a series that was broken off goes on after the
last one. It holds no secret.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from covey_deploy.disks import Machine
from covey_edge.files import append_to
from covey_protocol.errors import ConfigError
from covey_protocol.topics import check_device_id

COLUMNS = ("id", "hostname", "data")
LOOK_S = 1.0


@dataclass(frozen=True)
class Wanted:
    """One device. hostname: empty for its id; data: a file for it, empty for none."""

    device_id: str
    hostname: str = ""
    data: str = ""


def numbered(pattern: str, count: int, first: int) -> list[Wanted]:
    """count ids from a pattern such as pi-{n:03}."""
    try:
        ids = [pattern.format(n=number) for number in range(first, first + count)]
    except (KeyError, IndexError, ValueError, AttributeError) as exc:
        raise ConfigError(f"the pattern {pattern!r} cannot be filled", "write it such as pi-{n:03}") from exc
    return _checked([Wanted(device_id) for device_id in ids])


def from_csv(path: Path) -> list[Wanted]:
    """A table with a header line: id, and if you like hostname and data."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{path} cannot be read ({exc})", "give a table with a column id") from exc
    if "id" not in columns or set(columns) - set(COLUMNS):
        raise ConfigError(f"{path} has the columns {', '.join(columns) or 'none'}", f"use {', '.join(COLUMNS)}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ConfigError(f"{path}: row {number} has not as many columns as the first", "correct that row")
    data = [row.get("data", "").strip() for row in rows]
    found = [Wanted(row["id"].strip(), row.get("hostname", "").strip()) for row in rows]
    places = [str(path.parent / name) if name else "" for name in data]  # beside the table
    return _checked([Wanted(one.device_id, one.hostname, place) for one, place in zip(found, places)])


def _checked(wanted: list[Wanted]) -> list[Wanted]:
    if not wanted:
        raise ConfigError("there is no device to make a card for", "name at least one")
    seen: set[str] = set()
    for one in wanted:
        check_device_id(one.device_id)
        if one.device_id in seen:
            raise ConfigError(f"{one.device_id} is there twice", "each card needs an id of its own: pi-{n:03}")
        seen.add(one.device_id)
    return wanted


def finished(journal: Path) -> set[str]:
    """Devices whose cards are made. A last line that a power cut left half is not counted."""
    found = set()
    try:
        lines = journal.read_text().splitlines()
    except FileNotFoundError:
        return set()
    for line in lines:
        try:
            found.add(json.loads(line)["id"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def note(journal: Path, device_id: str, image_sha256: str, where: str, written_sha256: str) -> None:
    """Durable when this returns. It begins a line of its own, also after half a one."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"id": device_id, "image": image_sha256, "on": where, "written": written_sha256, "at": at}
    whole = not journal.exists() or journal.read_bytes()[-1:] in (b"\n", b"")
    append_to(journal, (b"" if whole else b"\n") + json.dumps(entry).encode() + b"\n", durable=True)


def left_to_do(wanted: Iterable[Wanted], done: set[str]) -> list[Wanted]:
    return [one for one in wanted if one.device_id not in done]


def wait_for_next_card(name: str, machine: Machine, look: Callable[[float], None] = time.sleep) -> None:
    """Until the card in a reader was taken out and another one (or the same) was put in."""
    while machine.has_card(name):
        look(LOOK_S)
    while not machine.has_card(name):
        look(LOOK_S)
    look(LOOK_S)  # the kernel reads its partitions
