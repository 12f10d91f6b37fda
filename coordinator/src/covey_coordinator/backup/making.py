"""`covey backup`: takes it while the coordinator runs, and changes nothing.

What lies on the disk is written in an order: a file before the row that names it, an order before what follows from it.
So the databases are copied first, each as it was at one moment, and the files after them: what a copied row names is
there, and what is newer does no harm. Only what is tidied away in between can be missing; then everything is taken
again. The fleet's own files (message numbers, retired keys, revocations) come last: they only grow, and must not be
older than a database that has seen their effect.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from covey_coordinator.backup.archive import FORMAT, HEADER, KEYS, Header, Writer, written
from covey_coordinator.backup.content import Content, content_of, files_below
from covey_coordinator.backup.passphrase import SALT_BYTES, SCRYPT_N, encrypted
from covey_coordinator.store import KEEP_ROUNDS, OPEN_PHASES, SCHEMA
from covey_coordinator.watching.history import opened
from covey_edge.config import read_file
from covey_protocol import __version__
from covey_protocol.errors import ConfigError, StorageError
from covey_protocol.seals import SealingKey

ATTEMPTS = 5  # each fails only where a round ended within the seconds of the copy


class Made(NamedTuple):
    """absent: files that a database names and that were not there already before."""

    path: Path
    files: int
    size: int
    left_out: tuple[str, ...]
    absent: tuple[str, ...]


class _Changed(Exception):
    """A file that a copied database names was tidied away."""


def back_up(config_path: Path, out: Path, passphrase: str | None) -> Made:
    """passphrase: of the secret files, which are left out without one. Raises the errors of covey_protocol.errors."""
    content = content_of(config_path)
    key = SealingKey.from_pem(read_file(content.key_file), str(content.key_file))
    absent: tuple[str, ...] = ()
    for attempt in range(ATTEMPTS):
        try:
            return _attempt(content, config_path, out, passphrase, key, absent)
        except _Changed as exc:
            absent = exc.args[0]
            if attempt == ATTEMPTS - 1:
                raise StorageError(
                    f"the files of {content.runs_dir} change faster than they are copied",
                    "try again, or stop the coordinator",
                ) from exc
    raise AssertionError("unreachable")


def _attempt(
    content: Content, config_path: Path, out: Path, passphrase: str | None, key: SealingKey, known: tuple[str, ...]
) -> Made:
    secret = _secret_files(content)
    header = _header(content, config_path, key, secret)
    with written(out) as backup, tempfile.TemporaryDirectory(prefix=".covey-backup-", dir=out.parent) as scratch:
        salt = os.urandom(SALT_BYTES) if passphrase is not None else b""
        header = msgspec.structs.replace(header, salt=salt.hex(), scrypt_n=SCRYPT_N if salt else 0)
        encoded = msgspec.json.encode(header)
        backup.add_bytes(HEADER, encoded)
        keys: dict[str, bytes] = {}
        absent: list[str] = []
        snapshots = {run: _snapshot(content.runs_dir / run, Path(scratch)) for run in content.runs}
        for run, database in snapshots.items():
            backup.add_file(f"runs/{run}/coordinator.sqlite", database)
            absent += _add_files(backup, content.runs_dir, _needed(database, run))
            keys.update(_round_keys(content.runs_dir, run))
        if set(absent) - set(known):
            raise _Changed(tuple(absent))
        _add_named(backup, content, passphrase is not None)
        more = (name for name in _of_the_fleet(content) if not backup.has(f"runs/{name}"))
        _add_files(backup, content.runs_dir, more)
        if passphrase is not None:
            keys.update({name: read_file(path) for name, path in secret.items()})
            backup.add_bytes(KEYS, encrypted(keys, passphrase, salt, encoded))
        backup.finish(key)
    left_out = (*header.secret, *(["the keys of encrypted rounds"] if keys else [])) if passphrase is None else ()
    return Made(out, backup.count(), out.stat().st_size, left_out, tuple(absent))


def _header(content: Content, config_path: Path, key: SealingKey, secret: dict[str, Path]) -> Header:
    return Header(
        FORMAT,
        __version__,
        content.fleet,
        content.runs,
        time.time_ns() // 1_000_000,
        len(SCHEMA),
        str(content.runs_dir.resolve()),
        content.runs_in,
        config_path.name,
        key.public.hex(),
        content.moved,
        tuple(name.removeprefix("folder/") for name in secret),
    )


def _secret_files(content: Content) -> dict[str, Path]:
    return {named.name: named.path for named in content.named if named.secret}


def _add_named(backup: Writer, content: Content, with_keys: bool) -> None:
    for named in content.named:
        if not named.secret:
            for one in files_below(named):
                backup.add_file(one.name, one.path)
        elif named.path.suffix == ".toml" and not with_keys:
            raise ConfigError(
                f"{named.path} has a password in broker.url", "put it into a broker.password_file, or use --with-keys"
            )


def _snapshot(folder: Path, scratch: Path) -> Path:
    """A copy of the run's database as it was at one moment; its writer is not held up."""
    copy = scratch / f"{folder.name}.sqlite"
    source = folder / "coordinator.sqlite"
    with opened(folder):  # that there is one, and which version
        pass
    try:
        database = sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
        target = sqlite3.connect(copy)
        try:
            database.backup(target)
            (found,) = target.execute("PRAGMA quick_check").fetchone()
        finally:
            target.close()
            database.close()
    except sqlite3.Error as exc:
        raise StorageError(f"cannot copy {source} ({exc})", "free some space, or check its permissions") from exc
    if found != "ok":
        raise StorageError(f"{source} is damaged ({found})", "restore an older backup, or start a run of another name")
    return copy


def _needed(database: Path, run: str) -> Iterator[str]:
    """Files that the rows of a run name and a coordinator still keeps, relative to runs_dir."""
    connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    try:
        newest = connection.execute("SELECT number, state FROM checkpoints ORDER BY number DESC").fetchall()
        updates = connection.execute(
            "SELECT DISTINCT sha256 FROM devices JOIN rounds ON rounds.id = devices.round WHERE sha256 NOTNULL"
            " AND (phase IN (?, ?) OR rounds.id IN (SELECT id FROM rounds ORDER BY rowid DESC LIMIT ?))",
            (*OPEN_PHASES, KEEP_ROUNDS),
        ).fetchall()
    finally:
        connection.close()
    for place, (number, state) in enumerate(newest):
        name = f"{run}/checkpoints/{run}/round-{number:05d}"
        yield f"{name}.f32"
        if state and place < KEEP_ROUNDS:
            yield f"{name}.state"
    for (sha256,) in updates:
        yield f"{run}/updates/{sha256}.f32"


def _add_files(backup: Writer, runs_dir: Path, names: Iterator[str]) -> list[str]:
    """Those that are not there."""
    absent = []
    for name in names:
        try:
            backup.add_file(f"runs/{name}", runs_dir / name)
        except FileNotFoundError:
            absent.append(name)
    return absent


def _round_keys(runs_dir: Path, run: str) -> dict[str, bytes]:
    found = {}
    for path in sorted((runs_dir / run / "keys").glob("[!.]*.x25519")):
        try:
            found[f"runs/{run}/keys/{path.name}"] = path.read_bytes()
        except FileNotFoundError:
            continue  # of a round that has just been tidied away
    return found


def _of_the_fleet(content: Content) -> Iterator[str]:
    """Models of rounds whose rows are forgotten, orders, and what all runs of the fleet share; the numbers last."""
    runs_dir, fleet = content.runs_dir, content.fleet
    for run in content.runs:
        for path in sorted((runs_dir / run / "checkpoints" / run).glob("[!.]*.f32")):
            yield str(path.relative_to(runs_dir))
        for order in ("paused.json", "aborted.json"):
            yield f"{run}/{order}"
    for path in sorted((runs_dir / f"{fleet}.revoked").glob("[!.]*.json")):
        yield str(path.relative_to(runs_dir))
    yield from (f"{fleet}.retired.json", f"{fleet}.retained", f"{fleet}.sequence")
