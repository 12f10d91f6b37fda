"""What an operator orders of a run, from another process: pause, resume, abort.

An order is a file in the run's folder, `paused.json` or `aborted.json`: it is wished as long as the file exists, so it
holds over a restart and giving it twice changes nothing. Files and not rows of coordinator.sqlite, because the
coordinator is then the database's only writer: no operator's process that is stopped in the middle of a transaction can
lock it out, and no order needs a migration. Two files and not one, because a pause given at the same moment must
never overwrite an abort. Both are durable when the command returns.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
from msgspec import Struct

from covey_edge.files import DISK, sync_folder
from covey_protocol.errors import ConfigError, StorageError

MAX_REASON = 200  # characters; with what is put before it, within what a message may say


class Order(Struct, frozen=True):
    """asked_ms: Unix time. reason: the operator's, may be empty."""

    asked_ms: int
    reason: str = ""

    def told(self, what: str) -> str:
        return f"{what}: {self.reason}" if self.reason else what


class Orders:
    """The orders of one run's folder. Reading costs a look for a file; call it as often as you like."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def paused(self) -> Order | None:
        return self._read("paused")

    def aborted(self) -> Order | None:
        return self._read("aborted")

    def stand(self) -> bool:
        """Whether no new round may be opened."""
        return self.aborted() is not None or self.paused() is not None

    def abort_reason(self) -> str | None:
        """For operator and devices; None where nobody aborted."""
        aborted = self.aborted()
        return aborted.told("aborted by the operator") if aborted is not None else None

    def pause(self, reason: str = "") -> None:
        self._refuse_aborted()
        self._write("paused", reason)

    def resume(self) -> bool:
        """Whether there was a pause to lift."""
        self._refuse_aborted()
        was = self.paused() is not None
        try:
            (self._folder / "paused.json").unlink(missing_ok=True)
            sync_folder(self._folder)
        except OSError as exc:
            raise StorageError(
                f"cannot lift the pause in {self._folder} ({exc.strerror})", "check its permissions"
            ) from exc
        return was

    def abort(self, reason: str = "") -> None:
        """For good. The first reason stays."""
        if self.aborted() is None:
            self._write("aborted", reason)

    def _refuse_aborted(self) -> None:
        if self.aborted() is not None:
            raise ConfigError(
                f"the run in {self._folder} was aborted", "an abort is for good: start a run of another name"
            )

    def _write(self, word: str, reason: str) -> None:
        if len(reason) > MAX_REASON:
            raise ConfigError(f"a reason of {len(reason)} characters", f"say it in {MAX_REASON}")
        order = Order(time.time_ns() // 1_000_000, " ".join(reason.split()))
        DISK.write(self._folder / f"{word}.json", msgspec.json.encode(order))

    def _read(self, word: str) -> Order | None:
        """A file that cannot be read is an order all the same: it was meant."""
        path = self._folder / f"{word}.json"
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=Order)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError):
            return Order(0, f"{path.name} cannot be read")
