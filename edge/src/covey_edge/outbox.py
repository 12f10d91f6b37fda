"""The outbox: the updates this device still owes, each durable until the coordinator's verdict or refusal.

And the message numbers a program has reserved, so that one without a clock battery never repeats one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Optional

import msgspec

from covey_edge.files import DISK, Disk
from covey_protocol.messages import Offer


class Entry(msgspec.Struct, frozen=True):
    offer: Offer
    update: bytes


class Outbox:
    """One file per round in ``outbox/``. Older agents kept one entry in ``outbox.msgpack``; it is taken up as well."""

    def __init__(self, folder: Path, disk: Disk = DISK) -> None:
        self._folder = folder / "outbox"
        self._old = folder / "outbox.msgpack"
        self._damaged = folder / "outbox.damaged"
        self._disk = disk

    def keep(self, entry: Entry) -> None:
        """Durable when this returns. StorageError if it cannot be."""
        self._disk.write(self._path(entry.offer.round_id), msgspec.msgpack.encode(entry), mode=0o600)

    def offers(self) -> list[Offer]:
        """Of all that is owed, by round id. A file that cannot be read is set aside (the newest such), not deleted."""
        self._disk.sweep(self._folder)
        self._take_up_old()
        offers = []
        for name in self._disk.names(self._folder):
            entry = self._read(self._folder / name)
            if entry is not None and self._path(entry.offer.round_id).name == name:
                offers.append(entry.offer)
            else:
                self._disk.rename(self._folder / name, self._damaged)
        return offers

    def look(self) -> list[Offer]:
        """The same, for a program beside the agent: nothing is swept or set aside."""
        entries = [self._read(self._folder / name) for name in self._disk.names(self._folder)]
        return [entry.offer for entry in entries if entry is not None]

    def update(self, offer: Offer) -> Optional[bytes]:
        """The offered bytes; None where they are not here as they were offered."""
        entry = self._read(self._path(offer.round_id))
        return entry.update if entry is not None and entry.offer == offer else None

    def forget(self, round_id: str) -> None:
        """Not durable: after a power cut the entry may be back."""
        self._disk.remove(self._path(round_id))

    def _path(self, round_id: str) -> Path:
        return self._folder / f"{round_id}.msgpack"

    def _read(self, path: Path) -> Optional[Entry]:
        data = self._disk.read(path)
        try:
            entry = msgspec.msgpack.decode(data, type=Entry) if data is not None else None
        except msgspec.MsgspecError:
            return None
        whole = entry is not None and hashlib.sha256(entry.update).digest() == entry.offer.update.sha256
        return entry if whole else None

    def _take_up_old(self) -> None:
        if self._disk.read(self._old) is None:
            return
        entry = self._read(self._old)
        if entry is None:
            self._disk.rename(self._old, self._damaged)
            return
        self.keep(entry)
        self._disk.remove(self._old)


class NumberFile:
    """One number on disk: the highest message number a run may have used."""

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self._path, self._disk = path, disk

    def load(self) -> int:
        """0 where nothing readable is there."""
        try:
            return int(self._disk.read(self._path) or 0)
        except ValueError:
            return 0

    def store(self, number: int) -> None:
        self._disk.write(self._path, str(number).encode(), mode=0o600)
