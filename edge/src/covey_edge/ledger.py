"""The privacy ledger: every update that may leave this device is counted, durably, before it is in the outbox.

One JSON file for the life of the device, over all rounds, tasks, fleets' runs and bundles. It counts too much rather
than too little: an update that is counted and then lost in a crash stays counted, and the round's next training is
another one. An update in the outbox that is sent again is the same update, and is not counted again.

Exact numbers (updates without noise, metrics of evaluations) have no epsilon; they are counted apart, and told. Of what
else leaves the device nothing is counted: numbers of examples, times, refusals (docs/privacy-gate.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional, Protocol

import msgspec
from msgspec import Meta, Struct

from covey_edge.config import PrivacySettings
from covey_edge.files import DISK, Disk
from covey_protocol.errors import CoveyError, StorageError
from covey_protocol.gaussian import epsilon_of, mu_of

NAME = "ledger.json"  # in state_dir
REMEMBERED = 64  # updates whose hashes are kept, so that one is not counted twice; the outbox holds at most 8
SPENT = "this device's privacy budget is spent (privacy.epsilon_limit in its agent.toml)"
_Count = Annotated[int, Meta(ge=0)]


class Overspent(CoveyError):
    """One more update would go beyond the owner's epsilon_limit."""


class Book(Struct, frozen=True, forbid_unknown_fields=True):
    """since_ms: Unix time of the first entry. noised: noise multiplier, as text -> updates with it. last: sha256 of the
    newest entries."""

    since_ms: int
    noised: dict[str, _Count] = {}
    exact_updates: _Count = 0
    exact_evaluations: _Count = 0
    last: tuple[str, ...] = ()

    def epsilon(self, delta: float, *, more: float = 0.0) -> float:
        """Of the noised updates; with one more of this noise multiplier, where that is above 0."""
        releases = {float(text): count for text, count in self.noised.items()}
        if more:
            releases[more] = releases.get(more, 0) + 1
        return epsilon_of(mu_of(releases), delta)


class Counts(Protocol):
    """What the performer asks before an update is kept."""

    def count(self, sha256: bytes, *, evaluates: bool) -> None: ...


class Uncounted:
    """Of a device without a ledger (in tests)."""

    def count(self, sha256: bytes, *, evaluates: bool) -> None:
        pass


UNCOUNTED = Uncounted()


class Ledger:
    """now_ms: Unix time."""

    def __init__(
        self,
        folder: Path,
        privacy: PrivacySettings,
        disk: Disk = DISK,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._path, self._privacy, self._disk, self._now_ms = folder / NAME, privacy, disk, now_ms

    def book(self) -> Book:
        """StorageError where there is a file that cannot be read: it must not be taken for an empty one."""
        data = self._disk.read(self._path)
        if data is None and self._path.name not in self._disk.names(self._path.parent):
            return Book(self._now_ms())
        try:
            return msgspec.json.decode(data or b"", type=Book)
        except msgspec.MsgspecError as exc:
            raise StorageError(
                f"{self._path} cannot be read ({exc})",
                "restore it from a copy; deleting it forgets what this device has spent",
            ) from exc

    def refusal(self, *, evaluates: bool) -> str:
        """Why a round is declined; "" where its update would be within the limit. Raises StorageError."""
        if not self._privacy.epsilon_limit or evaluates:
            return ""
        return SPENT if self._over(self.book()) else ""

    def count(self, sha256: bytes, *, evaluates: bool) -> None:
        """Durable when this returns. Raises StorageError, and Overspent where the update must not leave."""
        book, entry = self.book(), sha256.hex()
        if entry in book.last:
            return
        noise = 0.0 if evaluates else self._privacy.noise_multiplier
        if noise and self._over(book):
            raise Overspent(SPENT)
        last = (*book.last, entry)[-REMEMBERED:]
        if noise:
            text = repr(noise)
            new = msgspec.structs.replace(book, noised={**book.noised, text: book.noised.get(text, 0) + 1}, last=last)
        elif evaluates:
            new = msgspec.structs.replace(book, exact_evaluations=book.exact_evaluations + 1, last=last)
        else:
            new = msgspec.structs.replace(book, exact_updates=book.exact_updates + 1, last=last)
        self._disk.write(self._path, msgspec.json.encode(new) + b"\n", mode=0o600)

    def _over(self, book: Book) -> bool:
        privacy = self._privacy
        limit = privacy.epsilon_limit
        return bool(limit) and book.epsilon(privacy.delta, more=privacy.noise_multiplier) > limit

    def rounds_left(self, book: Book) -> Optional[int]:
        """How many more noised updates the limit allows; None without a limit."""
        privacy = self._privacy
        if not privacy.epsilon_limit:
            return None
        releases = {float(text): count for text, count in book.noised.items()}
        have = releases.get(privacy.noise_multiplier, 0)

        def over(more: int) -> bool:
            mu = mu_of({**releases, privacy.noise_multiplier: have + more})
            return epsilon_of(mu, privacy.delta) > privacy.epsilon_limit

        low, high = 0, 1
        while not over(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if over(middle) else (middle, high)
        return low
