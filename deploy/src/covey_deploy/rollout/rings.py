"""Rings: which devices take a release when. What people write becomes data here; nothing is decided."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from msgspec import Struct

from covey_protocol.errors import ConfigError
from covey_protocol.releases import MAX_NAMED, place_of
from covey_protocol.topics import check_device_id, check_name

MAX_RINGS = 32
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(s|m|h|d)?")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Ring(Struct, frozen=True):
    """Who takes the release once this ring is open, those of the rings before among them.

    devices: by name. share: of the fleet, 0 to 1, in the order that the release's version draws (`place_of`).
    """

    name: str
    devices: tuple[str, ...] = ()
    share: float = 0.0

    def has(self, version: str, device_id: str) -> bool:
        return device_id in self.devices or place_of(version, device_id) < self.share


def rings_from(texts: Sequence[str], roster: Collection[str]) -> tuple[Ring, ...]:
    """`canary=kitchen-pi,hall-pi`, `10%`, `100%`, from the first to the last.

    Each holds those before it. ConfigError for a name that is not in the roster, a share that does not grow, no rings.
    """
    rings: list[Ring] = []
    for text in texts:
        before = rings[-1] if rings else Ring("")
        share = _SHARE.fullmatch(text.strip())
        ring = _by_share(text, float(share[1]) / 100, before) if share else _by_name(text, before, roster)
        if ring.name in [one.name for one in rings]:
            raise ConfigError(f"two rings are called {ring.name}", "give each a name of its own")
        rings.append(ring)
    if not 1 <= len(rings) <= MAX_RINGS:
        raise ConfigError(f"{len(rings)} rings", f"give 1 to {MAX_RINGS}, such as canary=kitchen-pi 10% 100%")
    return tuple(rings)


def _by_share(text: str, share: float, before: Ring) -> Ring:
    if not before.share < share <= 1:
        raise ConfigError(
            f"ring {text}: its share is not above the {100 * before.share:g}% before it", "let rings grow"
        )
    return Ring(text.strip(), before.devices, share)


def _by_name(text: str, before: Ring, roster: Collection[str]) -> Ring:
    name, equals, listed = text.partition("=")
    devices = [check_device_id(one.strip()) for one in listed.split(",") if one.strip()]
    if not equals or not devices:
        raise ConfigError(f"ring {text!r} names no devices", "write NAME=ID,ID, or a share such as 10%")
    unknown = sorted(set(devices) - set(roster))
    if unknown:
        what = f"ring {name}: {', '.join(unknown)} is not in the roster, or revoked"
        raise ConfigError(what, "name devices of this fleet")
    every = tuple(dict.fromkeys((*before.devices, *devices)))
    if len(every) > MAX_NAMED:
        raise ConfigError(f"ring {name} names {len(every)} devices", f"a release names at most {MAX_NAMED}; use shares")
    return Ring(check_name(name.strip(), "ring"), every, before.share)


def seconds(text: str) -> float:
    """`90`, `90s`, `30m`, `2h`, `1d`."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no duration", "write 90s, 30m, 2h or 1d")
    return float(found[1]) * _UNITS_S[found[2] or "s"]


def failures_from(text: str) -> tuple[int, float]:
    """`1` or `5%`: how many devices, and which share of them, may fail; one of the two is 0."""
    share = _SHARE.fullmatch(text.strip())
    if share is not None and float(share[1]) <= 100:
        return 0, float(share[1]) / 100
    if not text.strip().isdigit():
        raise ConfigError(f"{text!r} is no number of failures", "write a number of devices, or a share such as 5%")
    return int(text), 0.0
