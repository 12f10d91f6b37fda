"""Who is invited to a round: of the devices that are online those that can do it and are meant, all or a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MOST_NAMED = 5  # devices in one line


class Online(Protocol):
    """Of coordinator.Devices, what is read here."""

    def online(self) -> list[str]: ...
    def capabilities(self, device_id: str) -> Sequence[str]: ...


@dataclass(frozen=True)
class Eligible:
    """devices: that can be invited, sorted. others: who is online and cannot, and why."""

    devices: list[str]
    others: dict[str, str] = field(default_factory=dict)

    def told(self) -> str:
        """The others in one line, the first few by name; "" where there are none."""
        named = [f"{device_id} {why}" for device_id, why in list(self.others.items())[:MOST_NAMED]]
        hidden = len(self.others) - len(named)
        return ", ".join([*named, *([f"and {hidden} more"] if hidden else [])])


def eligible(fleet: Online, requires: Sequence[str], only: Collection[str], exclude: Collection[str]) -> Eligible:
    """Of those online. only: the devices meant, empty for all. exclude: those not meant.

    A device whose presence names no capability at all has not said what it can: it is invited, and can decline.
    """
    devices, others = [], {}
    known: dict[Sequence[str], list[str]] = {}  # thousands of devices say the same few things
    online = fleet.online()
    wanted = set(meant(online, only, exclude))
    for device_id in online:
        can = tuple(fleet.capabilities(device_id))
        if can not in known:
            known[can] = [name for name in requires if name not in can] if can else []
        lacks = known[can]
        if device_id not in wanted:
            others[device_id] = "is not meant"
        elif lacks:
            others[device_id] = f"cannot {', '.join(lacks)}"
        else:
            devices.append(device_id)
    return Eligible(devices, others)


def meant(device_ids: Iterable[str], only: Collection[str], exclude: Collection[str]) -> list[str]:
    """Those of these devices that the operator means."""
    return [name for name in device_ids if name not in exclude and (not only or name in only)]


def sampled(device_ids: Iterable[str], count: int, seed: int, run: str, number: int, attempt: int) -> list[str]:
    """count of these devices, all where count is 0 or there are not more, sorted.

    Those whose SHA-256 of seed, run, number, attempt and id is smallest: so every set of count devices is as likely as
    any other, the same numbers give the same devices, and one device more or less online changes one of them at most.
    attempt: how often the round of this number was abandoned since the start, so that it is not repeated with devices
    that failed.
    """

    def drawn(device_id: str) -> bytes:
        return hashlib.sha256(f"covey sample {seed} {run} {number} {attempt} {device_id}".encode()).digest()

    ordered = sorted(device_ids, key=drawn)
    return sorted(ordered[:count] if count else ordered)
