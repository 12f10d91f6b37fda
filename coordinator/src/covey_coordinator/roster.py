"""The roster of a running coordinator: which keys each device may seal with, taken up anew when the file changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from covey_edge.config import read_roster
from covey_edge.retired import RetiredKeys
from covey_protocol.errors import ConfigError
from covey_protocol.keys import KeyRing, Keys, as_keys
from covey_protocol.seals import PublicKey

log = logging.getLogger("covey.coordinator")

LOOK_S = 1.0


class Roster:
    """Device -> its key ring. retired: what is durable of it; without it a restart forgets which keys are old."""

    def __init__(self, keys: Mapping[str, Keys], retired: RetiredKeys | None = None) -> None:
        self._retired = retired
        self._rings = {device_id: self._ring(device_id, one) for device_id, one in keys.items()}

    def __contains__(self, device_id: object) -> bool:
        return device_id in self._rings

    def ids(self) -> list[str]:
        return sorted(self._rings)

    def ring(self, device_id: str) -> KeyRing | None:
        return self._rings.get(device_id)

    def replace(self, keys: Mapping[str, Keys]) -> list[str]:
        """Take up another roster; a sentence for each difference. What devices have said before stays said."""
        old, said = self._rings, []
        self._rings = {}
        for device_id, one in keys.items():
            known = old.get(device_id)
            if known is None:
                said.append(f"{device_id} is new in the roster")
                self._rings[device_id] = self._ring(device_id, one)
            elif known.keys != as_keys(one):
                said.append(f"{device_id} has other keys in the roster: {len(as_keys(one))}")
                self._rings[device_id] = known.renewed(one, self._retired_of(device_id))
            else:
                self._rings[device_id] = known
        return said + [f"{device_id} is no longer in the roster" for device_id in sorted(old.keys() - keys.keys())]

    def _ring(self, device_id: str, keys: Keys) -> KeyRing:
        if self._retired is None:
            return KeyRing(keys)
        ring = KeyRing(keys, self._retired_of(device_id), self._retired.retire(device_id))
        if not ring.trusted:
            log.warning("%s is not heard: every key that the roster has for it is retired", device_id)
        return ring

    def _retired_of(self, device_id: str) -> frozenset[PublicKey]:
        return self._retired.of(device_id) if self._retired is not None else frozenset()


class RosterFile:
    """`[devices]` of a coordinator.toml, looked at while the coordinator runs; nothing else of the file is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._taken = self._look()
        self._looked_at = time.monotonic()

    def renew(self, roster: Roster) -> None:
        """Take up what is different, at most every LOOK_S, and only what stood so for two looks: a half-written file
        is not a roster. One that is wrong is logged, and the old roster stays."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        look, before = self._look(), self._seen
        self._seen = look
        if look != before or look == self._taken:
            return
        self._taken = look
        try:
            said = roster.replace(read_roster(self._path))
        except ConfigError as exc:
            log.error("the roster stays as it was: %s", exc)
            return
        for line in said:
            log.warning("%s", line)

    def _look(self) -> tuple[int, ...]:
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
