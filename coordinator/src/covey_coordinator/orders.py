"""What an operator orders of a run or a fleet, from another process: pause, resume, abort; revoke, readmit.

An order is a file in the run's folder, `paused.json` or `aborted.json`, or one for each revoked device in the fleet's
`FLEET.revoked`: it is wished as long as the file exists, so it holds over a restart and giving it twice changes
nothing. Files and not rows of coordinator.sqlite, because the coordinator is then the database's only writer: no
operator's process that is stopped in the middle of a transaction can lock it out, and no order needs a migration. A
file for each order, because a pause given at the same moment must never overwrite an abort. All are durable when the
command returns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from covey_edge.files import DISK, sync_folder
from covey_protocol.errors import ConfigError, StorageError
from covey_protocol.topics import check_device_id

LOOK_S = 0.2  # how often a running coordinator looks for revoked devices
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
        _lift(self._folder / "paused.json")
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
        _give(self._folder / f"{word}.json", reason)

    def _read(self, word: str) -> Order | None:
        return _standing(self._folder / f"{word}.json")


class Revocations:
    """The devices of a fleet of which nothing is taken: one file for each in `RUNS_DIR/FLEET.revoked`.

    Of the fleet and not of a run, because the next run must not take a stolen device either.
    """

    def __init__(self, runs: Path, fleet: str) -> None:
        self._folder = runs / f"{fleet}.revoked"
        self._looked_at = float("-inf")
        self._reasons: dict[str, str] = {}

    def standing(self) -> dict[str, Order]:
        found = {}
        for path in sorted(self._folder.glob("[!.]*.json")):
            order = _standing(path)
            if order is not None:
                found[path.stem] = order
        return found

    def reasons(self) -> Mapping[str, str]:
        """For operator and devices: device -> why. At most LOOK_S old; call it as often as you like."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._reasons = {device_id: order.told("revoked") for device_id, order in self.standing().items()}
        return self._reasons

    def revoke(self, device_id: str, reason: str = "") -> None:
        """The first reason stays."""
        path = self._path(device_id)
        if _standing(path) is None:
            _give(path, reason)

    def readmit(self, device_id: str) -> bool:
        """Whether it was revoked."""
        path = self._path(device_id)
        was = _standing(path) is not None
        if was:
            _lift(path)
        return was

    def _path(self, device_id: str) -> Path:
        return self._folder / f"{check_device_id(device_id)}.json"


# --- the files


def _give(path: Path, reason: str) -> None:
    if len(reason) > MAX_REASON:
        raise ConfigError(f"a reason of {len(reason)} characters", f"say it in {MAX_REASON}")
    order = Order(time.time_ns() // 1_000_000, " ".join(reason.split()))
    DISK.write(path, msgspec.json.encode(order))


def _lift(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(f"cannot remove {path} ({exc.strerror})", "check its permissions") from exc


def _standing(path: Path) -> Order | None:
    """A file that cannot be read is an order all the same: it was meant."""
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Order)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return Order(0, f"{path.name} cannot be read")
