"""Changes of several files of one folder: all of them are made, or none, whatever is killed, whenever the power goes.

The new files are written and synced beside the folder's own (`.staged`); renaming that folder to `.decided` decides;
then they are moved to their places. Who next works in the folder finishes what was decided and drops what was not. One
program at a time: the lock ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from covey_edge.files import sync_folder, write_all_atomic
from covey_protocol.errors import StorageError

STAGED, DECIDED, LOCK = ".staged", ".decided", ".lock"
REMOVED = ".removed"  # in a staged folder: which files are to go, a line each
WAIT_S, POLL_S = 30.0, 0.05
SECRETS = ("key.pem", "seal.pem", "release.pem")  # and what ends in .key


def is_secret(name: str) -> bool:
    """Whether a file of this name holds a private key: mode 600."""
    return name.endswith(SECRETS) or name.endswith(".key")


@contextlib.contextmanager
def locked(folder: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Nobody else changes the folder meanwhile; what an earlier program left half done is done or gone.

    Makes the folder (mode 700). StorageError where another program holds it for longer than wait_s.
    """
    try:
        _make_private(folder)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StorageError(f"cannot open {folder} ({exc.strerror or exc})", "check the folder's permissions") from exc
    try:
        _wait_for(descriptor, folder, wait_s)
        _finish(folder)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, folder: Path, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as exc:
            if time.monotonic() > end:
                raise StorageError(
                    f"another program has been working in {folder} for {wait_s:g} s", "wait for it, or end it"
                ) from exc
        time.sleep(POLL_S)


def change(folder: Path, files: Mapping[str, bytes], removed: Sequence[str] = ()) -> None:
    """Write files and remove others, named relatively, within `locked`. StorageError (a full disk): then nothing is
    different."""
    staged, decided = folder / STAGED, folder / DECIDED
    if removed:
        files = {**files, REMOVED: "\n".join(removed).encode()}
    try:
        _make_private(staged)
        for secret in (True, False):
            group = {staged / name: data for name, data in files.items() if is_secret(name) == secret}
            write_all_atomic(group, 0o600 if secret else 0o644)
        os.rename(staged, decided)
        sync_folder(folder)
    except OSError as exc:
        shutil.rmtree(staged, ignore_errors=True)
        raise StorageError(f"cannot write to {folder} ({exc.strerror or exc})", "free some space") from exc
    except StorageError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _finish(folder)


def is_unfinished(folder: Path) -> bool:
    """Whether something was decided there and is not done."""
    return (folder / DECIDED).is_dir()


def _finish(folder: Path) -> None:
    staged, decided = folder / STAGED, folder / DECIDED
    try:
        if staged.is_dir():
            shutil.rmtree(staged)
        if not decided.is_dir():
            return
        touched = set()
        for source in sorted(path for path in decided.rglob("*") if path.is_file() and path != decided / REMOVED):
            target = folder / source.relative_to(decided)
            _make_private(target.parent)
            if os.geteuid() == 0 and target.exists():  # root's new file stays its reader's: `covey broker config`
                os.chown(source, target.stat().st_uid, target.stat().st_gid)
            os.replace(source, target)
            touched.add(target.parent)
        if (decided / REMOVED).exists():
            for name in (decided / REMOVED).read_text().splitlines():
                (folder / name).unlink(missing_ok=True)
                touched.add((folder / name).parent)
        for one in touched:
            sync_folder(one)
        shutil.rmtree(decided)
    except OSError as exc:
        raise StorageError(
            f"cannot finish the change of {folder} ({exc.strerror or exc})",
            "free some space or check the folder's permissions, and repeat any command: it goes on from there",
        ) from exc


def _make_private(folder: Path) -> None:
    """The folder and the missing ones above it, the folder itself with mode 700 where it is new."""
    if folder.is_dir():
        return
    _make_private(folder.parent)
    os.mkdir(folder, 0o700)
    sync_folder(folder.parent)
