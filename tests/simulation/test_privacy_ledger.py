"""The device's privacy ledger in the simulated worlds: through crashes and full disks, nothing that left is uncounted.

As tests/simulation/test_promise.py, with the production ledger before every device's outbox.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from covey_edge.config import PrivacySettings
from covey_edge.ledger import NAME, Book, Counts, Ledger
from covey_edge.outbox import Entry
from covey_edge.performer import Performer
from covey_protocol.errors import StorageError
from covey_protocol.messages import Offer
from simulation.mutations import Patch, wrapped
from simulation.world import SimulatedDevice, World, breaks

SEEDS, MANY = 80, 20_000
PRIVACY = PrivacySettings(clip_norm=1.0, noise_multiplier=4.0)


class LedgerWorld(World):
    """What a device offers is in its ledger, on the disk as it is then; and never more than it has trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.offered: dict[str, set[bytes]] = {}

    def privacy_ledger(self, owner: SimulatedDevice) -> Counts:
        return Ledger(Path(owner.name), PRIVACY, owner.disk, now_ms=lambda: 1)

    def device_says(self, name: str, message: Any) -> None:
        if isinstance(message, Offer) and name in self.devices:
            offered = self.offered.setdefault(name, set())
            offered.add(message.update.sha256)
            data = self.devices[name].disk.read(Path(name) / NAME)
            book = msgspec.json.decode(data, type=Book) if data is not None else Book(0)
            counted, trained = sum(book.noised.values()), self.devices[name].trained
            self.require(len(offered) <= counted, f"{name} offers what is not counted", len(offered), counted)
            self.require(counted <= trained, f"{name} counts an update twice", counted, trained)
            self.seen["counted one that was lost"] += counted > len(offered)
        super().device_says(name, message)


def run(seed: int) -> World:
    world = LedgerWorld(seed)
    try:
        return world.run()
    except BaseException as exc:
        raise AssertionError(f"{exc!r}\n{world.story()}\nseed {seed}") from exc


def test_every_update_is_counted_before_it_is_offered_and_none_twice() -> None:
    seen: Counter[str] = sum((run(seed).seen for seed in range(1, SEEDS)), run(0).seen)
    assert seen["counted one that was lost"] > 0  # a crash between the ledger and the outbox happens
    assert seen["device's power cut: wrote"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nor_in_many_more_worlds() -> None:
    for seed in range(SEEDS, MANY):
        run(seed)


# --- planted bugs


def counted_after_the_outbox(patch: Patch) -> None:
    def keep(self: Performer, effect: Any) -> bool:
        self._outbox.keep(Entry(effect.offer, effect.update))
        self._ledger.count(effect.offer.update.sha256, evaluates=effect.evaluates)
        return True

    patch.setattr(Performer, "_keep", keep)


def without_a_sync(patch: Patch) -> None:
    def count(original: Any, self: Ledger, sha256: bytes, *, evaluates: bool) -> None:
        patch_disk, write = self._disk, self._disk.write
        patch_disk.write = lambda path, data, mode=0o644: patch_disk.write_scratch(path, data)  # type: ignore[method-assign]
        try:
            original(self, sha256, evaluates=evaluates)
        finally:
            patch_disk.write = write  # type: ignore[method-assign]

    wrapped(patch, Ledger, "count", count)


def each_start_begins_a_new_one(patch: Patch) -> None:
    def book(original: Any, self: Ledger) -> Book:
        if not hasattr(self, "old"):
            self.old = True  # type: ignore[attr-defined]
            return Book(1)
        return original(self)  # type: ignore[no-any-return]

    wrapped(patch, Ledger, "book", book)


def what_is_offered_again_is_counted_again(patch: Patch) -> None:
    def start(original: Any, self: Performer) -> None:
        for offer in self._outbox.offers():
            self._ledger.count(offer.update.sha256[::-1], evaluates=False)
        original(self)

    wrapped(patch, Performer, "start", start)


def a_full_disk_is_passed_over(patch: Patch) -> None:
    def count(original: Any, self: Ledger, sha256: bytes, *, evaluates: bool) -> None:
        with contextlib.suppress(StorageError):
            original(self, sha256, evaluates=evaluates)

    wrapped(patch, Ledger, "count", count)


BUGS: dict[str, Callable[[Patch], None]] = {
    "an update is counted after it is in the outbox": counted_after_the_outbox,
    "the ledger is written without a sync": without_a_sync,
    "each start begins a new ledger": each_start_begins_a_new_one,
    "an update that is offered again is counted again": what_is_offered_again_is_counted_again,
    "a ledger that cannot be written is passed over": a_full_disk_is_passed_over,
}


@pytest.mark.parametrize("what", BUGS)
def test_the_simulation_finds_that(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[what](monkeypatch)
    assert any(breaks(LedgerWorld, seed) for seed in range(5 * SEEDS))
