"""Many cards in a row: which devices, what was done already, and when the next card is in the reader.

The journal is a file of one JSON line for each finished card, synced; a series that was broken off goes on after the
last one. It holds no secret.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from covey_deploy.device_table import Wanted, checked
from covey_deploy.disks import Machine
from covey_edge.files import append_to
from covey_protocol.errors import ConfigError

LOOK_S = 1.0


def numbered(pattern: str, count: int, first: int) -> list[Wanted]:
    """count ids from a pattern such as pi-{n:03}."""
    try:
        ids = [pattern.format(n=number) for number in range(first, first + count)]
    except (KeyError, IndexError, ValueError, AttributeError) as exc:
        raise ConfigError(f"the pattern {pattern!r} cannot be filled", "write it such as pi-{n:03}") from exc
    return checked([Wanted(device_id) for device_id in ids])


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
