"""The journal of a rollout: its events, one JSON line each, durable before anything is done about them.

A folder for each rollout, ROLLOUTS/VERSION-SERIAL: `journal.jsonl`, the release as it was given, and the sealed
descriptions of all rings. One process at a time works in ROLLOUTS.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from covey_deploy.rollout.state import Began, Event, Plan, State, apply, begin
from covey_edge.files import append_to, make_folder, write_atomic
from covey_edge.held import alone_in
from covey_protocol.errors import ConfigError, StorageError, UsageError

JOURNAL, RELEASE = "journal.jsonl", "release.covey-release"
STOP = "stop"

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


class Journal:
    """One rollout's folder. state: the fold of its events, which `add` keeps up to date."""

    def __init__(self, folder: Path, events: list[Event], state: State) -> None:
        self.folder, self.events, self.state = folder, events, state

    @classmethod
    def new(cls, rollouts: Path, plan: Plan, release: bytes, sealed: list[bytes], now: float) -> Journal:
        """Everything that a rollout needs is durable before its first event is: without that there is none."""
        folder = rollouts / f"{plan.version}-{plan.serial}"
        write_atomic(folder / RELEASE, release, mode=0o600)
        event = Began(now, plan)
        journal = cls(folder, [], begin(event))
        journal.keep_sealed(plan.serial, sealed)
        journal._append(event)
        return journal

    @classmethod
    def open(cls, folder: Path, *, mend: bool = True) -> Journal:
        """What a kill left of a last line is cut off; without `mend` it is only not read, for who looks on.

        Raises StorageError, ConfigError for a damaged journal."""
        path = folder / JOURNAL
        data = _read(path)
        whole = data[: data.rfind(b"\n") + 1]
        if mend and len(whole) < len(data):
            _cut(path, len(whole))
        events: list[Event] = []
        try:
            for line in whole.splitlines():
                events.append(_decoder.decode(line))
            state = begin(events[0])
            for event in events[1:]:
                state = apply(state, event)
        except (msgspec.MsgspecError, UsageError, IndexError) as exc:
            raise ConfigError(
                f"{path}, line {len(events) + 1}, cannot be read ({exc})", "move its folder away"
            ) from exc
        return cls(folder, events, state)

    def add(self, event: Event) -> None:
        """Durable when this returns. Raises StorageError, then nothing has happened."""
        state = apply(self.state, event)
        self._append(event)
        self.state = state

    def _append(self, event: Event) -> None:
        append_to(self.folder / JOURNAL, _encoder.encode(event) + b"\n", durable=True)
        self.events.append(event)

    # --- sealed descriptions

    def keep_sealed(self, serial: int, sealed: list[bytes]) -> None:
        """From this serial on: one for each ring, and last the one that stops."""
        for place, data in enumerate(sealed):
            write_atomic(self._sealed(serial + place), data, mode=0o600)

    def sealed(self, ring: int) -> bytes:
        """Of this ring; of the number after the last, the one that stops."""
        return _read(self._sealed(self.state.plan.serial + ring))

    def _sealed(self, serial: int) -> Path:
        return self.folder / "sealed" / str(serial)

    def release(self) -> bytes:
        return _read(self.folder / RELEASE)


def journals(rollouts: Path) -> list[Path]:
    """The folders of the rollouts that have begun, the oldest first."""
    try:
        names = [name for name in os.listdir(rollouts) if _is_begun(rollouts / name)]
    except FileNotFoundError:
        return []
    return [rollouts / name for name in sorted(names, key=lambda name: int(name.rpartition("-")[2]))]


def _is_begun(folder: Path) -> bool:
    """A first line that was cut off is no beginning."""
    return folder.name.rpartition("-")[2].isdigit() and b"\n" in _read(folder / JOURNAL, missing=b"")


@contextlib.contextmanager
def alone(rollouts: Path) -> Iterator[None]:
    """Busy where another process works on a rollout here."""
    make_folder(rollouts)
    with alone_in(rollouts, "rollout", "wait for it, or end it with `--stop`"):
        yield


def _read(path: Path, missing: bytes | None = None) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        if missing is not None:
            return missing
        raise StorageError(f"{path} is not there", "restore it from a backup") from exc
    except OSError as exc:
        raise StorageError(f"{path} cannot be read ({exc.strerror})", "check the disk and the permissions") from exc


def _cut(path: Path, size: int) -> None:
    try:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    except OSError as exc:
        raise StorageError(f"{path} cannot be mended ({exc.strerror})", "free some space") from exc
