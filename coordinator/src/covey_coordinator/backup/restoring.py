"""`covey restore`: checks all of a backup first, then writes it where nothing is, and says what is left to do.

While it writes, the folder holds UNFINISHED, and `covey serve` refuses to start there; a restore that was cut off is
begun again by the same command. Message numbers never go back: they start beyond what the old coordinator can have
used since (`next_number`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from covey_coordinator.backup.archive import BLOCK_BYTES, Checked, Header, read
from covey_coordinator.backup.passphrase import decrypted
from covey_coordinator.store import SCHEMA, is_held
from covey_edge.files import make_folder, sync_folder, write_all, write_atomic
from covey_protocol.codec import Sequence
from covey_protocol.errors import ConfigError, StorageError
from covey_protocol.seals import PublicKey

UNFINISHED = ".restoring"
MARGIN = 64 * Sequence.BLOCK  # about a minute of the clock: starts in quick succession reserve ahead of it

Passphrase = Callable[[], str]


class Restored(NamedTuple):
    """unchanged: paths in coordinator.toml that are to be corrected by hand: as it is -> as it should be."""

    header: Header
    files: int
    with_keys: bool
    unchanged: dict[str, str]


def refuse_unfinished(*folders: Path) -> None:
    """ConfigError where a restore into one of these was cut off: what is there is not whole."""
    for folder in folders:
        if (folder / UNFINISHED).exists():
            raise ConfigError(f"a restore into {folder} was not finished", "run covey restore once more")


def checked(path: Path, sealed_by: PublicKey | None = None) -> Checked:
    """Whole, unchanged, and of a version that this covey can use; nothing is written."""
    backup = read(path, lambda name, content, header: None, sealed_by)
    if backup.header.schema > len(SCHEMA):
        raise ConfigError(
            f"{path} holds a store of version {backup.header.schema}, this covey knows {len(SCHEMA)}", "update covey"
        )
    return backup


def restore(
    path: Path,
    to: Path,
    passphrase: Passphrase | None,
    *,
    only_runs: bool = False,
    sealed_by: PublicKey | None = None,
    now_us: int | None = None,
) -> Restored:
    """passphrase: asked for where the backup holds keys; None leaves them out. only_runs: `to` becomes the runs_dir.

    Raises the errors of covey_protocol.errors; `to` is then as it was, or is marked as unfinished.
    """
    backup = checked(path, sealed_by)
    header = backup.header
    _refuse_running(header)
    keys = decrypted(backup, passphrase(), path) if backup.keys and passphrase is not None else {}
    refuse_used(to)
    place = _Place(to, header, only_runs)
    now_us = time.time_ns() // 1000 if now_us is None else now_us
    with _written_to(to):
        _begin(to)
    again = read(path, lambda name, content, _: place.take(name, content), sealed_by)
    if again.header_bytes != backup.header_bytes:
        raise StorageError(f"{path} has changed while it was read", "restore it once more")
    with _written_to(to):
        for name, data in keys.items():
            place.put(name, [data])
        unchanged = place.correct_settings()
        place.raise_numbers(now_us)
        place.sync()
        os.unlink(to / UNFINISHED)
        sync_folder(to)
    return Restored(header, place.files, bool(keys), unchanged)


@contextlib.contextmanager
def _written_to(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(
            f"cannot restore into {to} ({exc.strerror or exc})", "free some space or check the folder's permissions"
        ) from exc


def next_number(reserved: int, created_us: int, now_us: int) -> int:
    """The message number to begin after. reserved: of the backup. created_us, now_us: Unix time then and now.

    The old coordinator's numbers followed its clock, or ran ahead of it by as much as `reserved` shows. So what it can
    have reserved since is at most the time gone by more, and MARGIN. Where this machine's clock is behind that of the
    backup, no time seems gone by: then, and only then, set it right before restoring (docs/backup.md).
    """
    return max(now_us, reserved + max(0, now_us - created_us)) + MARGIN


class _Place:
    """Where the files of a backup go."""

    def __init__(self, to: Path, header: Header, only_runs: bool) -> None:
        self._to, self._header, self._only_runs = to, header, only_runs
        self._runs = to if only_runs else to / header.runs_in
        self._folders: set[Path] = set()
        self.files = 0

    def _path(self, name: str) -> Path | None:
        """None for what is not wanted."""
        top, _, rest = name.partition("/")
        if top == "runs":
            return self._runs / rest
        if self._only_runs:
            return None
        return self._to / (rest if top == "folder" else name)

    def take(self, name: str, content: BinaryIO) -> None:
        with _written_to(self._to):
            self.put(name, iter(lambda: content.read(BLOCK_BYTES), b""))

    def put(self, name: str, blocks: Iterable[bytes]) -> None:
        """Mode 600; its content is durable when this returns, its name after `sync`."""
        path = self._path(name)
        if path is None:
            return
        self._make(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for block in blocks:
                write_all(descriptor, block)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.files += 1

    def _make(self, folder: Path) -> None:
        make_folder(folder)
        self._folders.add(folder)

    def sync(self) -> None:
        for folder in self._folders:
            sync_folder(folder)

    def raise_numbers(self, now_us: int) -> None:
        path = self._runs / f"{self._header.fleet}.sequence"
        try:
            reserved = int(path.read_bytes())
        except (FileNotFoundError, ValueError):
            reserved = 0
        self._make(path.parent)
        write_atomic(path, str(next_number(reserved, self._header.created_ms * 1000, now_us)).encode(), mode=0o600)

    def correct_settings(self) -> dict[str, str]:
        """Of coordinator.toml, the paths of files that lie elsewhere now; those that an operator has to correct."""
        path = self._to / self._header.config
        if self._only_runs or not self._header.moved or not path.exists():
            return {}
        changed = relocated(path.read_text(), self._header.moved)
        if changed is None:
            return dict(self._header.moved)
        write_atomic(path, changed.encode(), mode=0o600)
        return {}


def relocated(text: str, moved: dict[str, str]) -> str | None:
    """TOML with these strings changed and nothing else; None where that cannot be done without a TOML writer."""
    changed = text
    for old, new in moved.items():
        for quote in ('"', "'"):
            changed = changed.replace(f"= {quote}{old}{quote}", f'= "{new}"')
            changed = changed.replace(f"={quote}{old}{quote}", f'="{new}"')
    return changed if msgspec.toml.decode(changed) == _with(msgspec.toml.decode(text), moved) else None


def _with(value: Any, moved: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _with(one, moved) for name, one in value.items()}
    if isinstance(value, list):
        return [_with(one, moved) for one in value]
    return moved.get(value, value) if isinstance(value, str) else value


def refuse_used(to: Path) -> None:
    """ConfigError where something lies in the folder, unless a restore that was cut off has left it."""
    if to.exists() and not to.is_dir():
        raise ConfigError(f"{to} is a file", "name a new folder with --to")
    if to.is_dir() and not (to / UNFINISHED).exists() and any(not _is_nothing(path.name) for path in to.iterdir()):
        raise ConfigError(f"{to} is not empty", "name a new folder with --to: nothing is ever overwritten")


def _is_nothing(name: str) -> bool:
    """lost+found of an empty file system; what is left of writing the mark."""
    return name == "lost+found" or name.startswith(f".{UNFINISHED}.")


def _refuse_running(header: Header) -> None:
    for run in header.runs:
        folder = Path(header.runs_dir) / run
        if is_held(folder):
            raise ConfigError(
                f"the coordinator of this backup runs, in {folder}: two of them would undo each other's rounds",
                "stop it first, for good",
            )


def _begin(to: Path) -> None:
    """The folder, empty but for the mark, which is durable."""
    make_folder(to)
    write_atomic(to / UNFINISHED, b"covey restore has not finished here\n")
    for path in to.iterdir():
        if path.name in (UNFINISHED, "lost+found"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
