"""What a run leaves on disk: rounds and verdicts in SQLite, updates and checkpoints as files.

    coordinator.sqlite                    facts: see SCHEMA
    updates/SHA256.f32                    a stored update in the form in which it came, named by its content, mode 600
    keys/ROUND.x25519                     private half of an encrypted round's key; goes with its updates; mode 600
    partial/ROUND/DEVICE/SHA256/          chunks of updates that are still coming; not synced, nothing depends on them
    checkpoints/RUN/round-NNNNN.f32       the model after a published round; .state beside it: rule and server optimizer

A file is durable before the row that names it, and a row before anyone is told of it. Every method is one transaction,
but for those called `together`: what they write becomes durable in one. SQLite runs in WAL with synchronous=FULL: what
was committed survives a power cut. This file takes no decisions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from covey_coordinator.aggregation.staleness import weighted
from covey_coordinator.records import DeviceVerdict, FleetMetric
from covey_edge.files import DISK, Disk, make_folder
from covey_protocol.compression import decode_update
from covey_protocol.encryption import KeyPair, decrypted
from covey_protocol.errors import StorageError, UsageError
from covey_protocol.messages import MAX_STALENESS, Invitation, Offer, RoundClosed, Verdict, reason_text
from covey_protocol.round import DeviceFacts, Earlier, Phase, Progress, RoundFacts, RoundSettings

# PRAGMA user_version counts how many of these were applied. An entry is never changed, only added.
SCHEMA = (
    """
    CREATE TABLE rounds (
        id TEXT PRIMARY KEY, run TEXT NOT NULL, number INTEGER NOT NULL,
        invitation BLOB NOT NULL,               -- as in a message: msgpack
        quorum INTEGER NOT NULL, answer_s REAL NOT NULL, grace_s REAL NOT NULL,
        phase TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
        opened_ms INTEGER NOT NULL,             -- Unix time
        elapsed_ms INTEGER NOT NULL DEFAULT 0   -- at least so much of the round's time is over
    );
    CREATE INDEX rounds_of_run ON rounds (run, opened_ms);
    CREATE TABLE devices (
        round TEXT NOT NULL, id TEXT NOT NULL,
        progress TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
        offer BLOB, sha256 TEXT,                -- of the stored update
        status TEXT, why TEXT, score REAL,      -- the verdict
        PRIMARY KEY (round, id)
    ) WITHOUT ROWID;
    CREATE INDEX devices_by_update ON devices (sha256);
    CREATE TABLE checkpoints (
        run TEXT NOT NULL, number INTEGER NOT NULL, round TEXT NOT NULL,
        parameters TEXT NOT NULL, state TEXT NOT NULL,  -- sha256 of the files
        PRIMARY KEY (run, number)
    ) WITHOUT ROWID;
    """,
    # told: the device has said that it knows the verdict
    "ALTER TABLE devices ADD COLUMN told INTEGER NOT NULL DEFAULT 0",
    # for those who read along (watching.history); nothing a coordinator does depends on them
    """
    CREATE TABLE runs (
        run TEXT PRIMARY KEY, rounds INTEGER NOT NULL,
        started_ms INTEGER NOT NULL,            -- the newest start
        ended_ms INTEGER, code INTEGER, why TEXT  -- its end; NULL while it runs, and for ever if it was killed
    ) WITHOUT ROWID;
    CREATE TABLE presence (id TEXT PRIMARY KEY, online INTEGER NOT NULL, seen_ms INTEGER NOT NULL) WITHOUT ROWID;
    """,
    # origin: the earlier round for which the stored update was trained; NULL where it is this one
    """
    ALTER TABLE rounds ADD COLUMN goal INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE devices ADD COLUMN origin TEXT;
    ALTER TABLE devices ADD COLUMN staleness INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX devices_by_origin ON devices (origin) WHERE origin IS NOT NULL;
    """,
    # evaluation rounds; their number is that of the round whose model they evaluate
    """
    ALTER TABLE rounds ADD COLUMN kind TEXT NOT NULL DEFAULT 'training';
    CREATE TABLE evaluations (
        run TEXT NOT NULL, number INTEGER NOT NULL, metric TEXT NOT NULL, round TEXT NOT NULL,
        mean REAL NOT NULL, median REAL NOT NULL, spread REAL NOT NULL,
        devices INTEGER NOT NULL, held_out INTEGER NOT NULL,  -- how many it is over; on data kept for it, they say
        PRIMARY KEY (run, number, metric)
    ) WITHOUT ROWID;
    """,
    # how much can be read off updates (inversion.round_checks); device '' is the whole round. Nothing depends on it
    """
    CREATE TABLE leakage (
        round TEXT NOT NULL, device TEXT NOT NULL, measure TEXT NOT NULL, value REAL NOT NULL,
        PRIMARY KEY (round, device, measure)
    ) WITHOUT ROWID;
    """,
)
RETENTION_MS = 30 * 24 * 3600 * 1000
KEEP_ROUNDS = 10
TRAINING, EVALUATION = "training", "evaluation"  # kinds of rounds
LOCK_PATIENCE_S = 1.0
NO_KEY_REMEDY = "started again, the coordinator abandons that round"
OPEN_PHASES = (Phase.INVITING.value, Phase.AGGREGATING.value)  # what a row says of a round that is not over

Floats = npt.NDArray[np.float32]


class Checkpoint(NamedTuple):
    """number: of the round that made it. state: the engine's, b"" where there is none (a run from before 0.1.0)."""

    number: int
    parameters: Floats
    state: bytes


class RunStore:
    """One run's folder. Used by one thread. Every write is durable when it returns; StorageError if it cannot be.

    Within `together` it is durable when `commit` returns: a sync takes milliseconds, and a fleet says a lot at once.
    """

    def __init__(self, folder: Path, *, disk: Disk = DISK, database: Any = None, only_reads: bool = False) -> None:
        """only_reads: `database` is open for reading, maybe beside the run's coordinator; change nothing."""
        self.folder = folder
        self._disk = disk
        self._database = open_database(folder / "coordinator.sqlite") if database is None else database
        if not only_reads:
            with _translated(folder):
                migrate(self._database)
            self._disk.sweep(self.folder / "updates")
            self._disk.sweep(self.folder / "keys")
        self._together = False
        self._updates: dict[Path, bytes] = {}  # to be written before the commit
        # device -> (round, sha256 of the update, index, data) of updates that are coming in
        self._chunks: dict[str, list[tuple[str, str, int, bytes]]] = {}

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Many writes in one transaction, committed at the end of the with block (or nothing of it), and by `commit`.

        What is read meanwhile may not be durable yet. Chunks wait for `save_chunks`.
        """
        self._together = True
        try:
            yield
            self.commit()
        except BaseException:
            self._forget_uncommitted()
            raise
        finally:
            self._together = False

    def commit(self) -> None:
        """What was written until now is durable when this returns. Raises StorageError."""
        if self._updates:
            self._disk.write_all(self._updates, mode=0o600)  # an update can be inverted
            self._updates.clear()
        if self._database.in_transaction:
            with _translated(self.folder):
                self._database.execute("COMMIT")

    def _forget_uncommitted(self) -> None:
        self._updates.clear()
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def close(self) -> None:
        self._database.close()

    # --- for those who read along

    def started(self, run_id: str, rounds: int, now_ms: int) -> None:
        """Of the devices nothing is known until they are heard again."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, NULL, NULL, NULL)", (run_id, rounds, now_ms))
            database.execute("UPDATE presence SET online = 0")

    def ended(self, run_id: str, code: int, why: str, now_ms: int) -> None:
        with self._transaction() as database:
            row = (now_ms, code, why, run_id)
            database.execute("UPDATE runs SET ended_ms = ?, code = ?, why = ? WHERE run = ?", row)
            database.execute("UPDATE presence SET online = 0")

    def keep_presence(self, seen: Mapping[str, tuple[bool, int]]) -> None:
        """device -> (online, when it was last heard, Unix time in ms; 0 where it is only said to be away)."""
        with self._transaction() as database:
            rows = [(device_id, online, seen_ms) for device_id, (online, seen_ms) in seen.items()]
            database.executemany(
                "INSERT INTO presence VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE"
                " SET online = excluded.online, seen_ms = max(seen_ms, excluded.seen_ms)",
                rows,
            )

    # --- a round that is under way

    def open_round(
        self,
        run_id: str,
        invitation: Invitation,
        settings: RoundSettings,
        opened_ms: int,
        key: KeyPair | None = None,
    ) -> None:
        """After this its invitation may go out. key: whose public half the invitation carries."""
        if key is not None:
            self._disk.write(self._key_path(invitation.round_id), key.private, mode=0o600)
        row = (
            invitation.round_id,
            run_id,
            invitation.number,
            msgspec.msgpack.encode(invitation),
            settings.quorum,
            settings.answer_s,
            settings.grace_s,
            Phase.INVITING.value,
            opened_ms,
            settings.goal,
            EVALUATION if invitation.plan.evaluate else TRAINING,
        )
        with self._transaction() as database:
            database.execute(
                "INSERT INTO rounds"
                " (id, run, number, invitation, quorum, answer_s, grace_s, phase, opened_ms, goal, kind)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            database.executemany(
                "INSERT INTO devices (round, id, progress) VALUES (?, ?, ?)",
                [(invitation.round_id, device_id, Progress.INVITED.value) for device_id in invitation.devices],
            )

    def record(self, round_id: str, device_id: str, progress: Progress, reason: str) -> None:
        """How far a device is."""
        with self._transaction() as database:
            database.execute(
                "UPDATE devices SET progress = ?, reason = ? WHERE round = ? AND id = ?",
                (progress.value, reason, round_id, device_id),
            )

    def store_update(
        self, device_id: str, offer: Offer, data: bytes, *, taken_by: str = "", staleness: int = 0
    ) -> None:
        """After this the device may be told that its update is kept. taken_by: the round, if not the offer's own."""
        round_id = taken_by or offer.round_id
        sha256 = offer.update.sha256.hex()
        self._updates[self._update_path(sha256)] = data
        self._chunks.pop(device_id, None)
        with self._transaction() as database:
            database.execute(
                "UPDATE devices SET progress = ?, reason = '', offer = ?, sha256 = ?, origin = nullif(?, round),"
                " staleness = ? WHERE round = ? AND id = ?",
                (
                    Progress.STORED.value,
                    msgspec.msgpack.encode(offer),
                    sha256,
                    offer.round_id,
                    staleness,
                    round_id,
                    device_id,
                ),
            )
        self._disk.remove_tree(self._partial(round_id) / device_id)

    def decided(self, round_id: str) -> None:
        """The stored updates are those that will be aggregated; no other comes in."""
        with self._transaction() as database:
            database.execute("UPDATE rounds SET phase = ? WHERE id = ?", (Phase.AGGREGATING.value, round_id))

    def keep_time(self, round_id: str, elapsed_ms: int) -> None:
        """At least so much of the round's time is over, whatever the clock says after a restart."""
        with self._transaction() as database:
            database.execute("UPDATE rounds SET elapsed_ms = max(elapsed_ms, ?) WHERE id = ?", (elapsed_ms, round_id))

    def conclude(
        self,
        round_id: str,
        phase: Phase,
        reason: str,
        verdicts: Sequence[DeviceVerdict],
        checkpoint: Checkpoint | None = None,
        metrics: Sequence[FleetMetric] = (),
        leakage: Sequence[tuple[str, str, float]] = (),
    ) -> None:
        """The end of a round: outcome, verdicts, new model and the engine's state, metrics; all or nothing of it.

        leakage: (device, measure, value), of round_checks.
        """
        run_id, number = self._one("SELECT run, number FROM rounds WHERE id = ?", round_id)
        hashes = self._write_checkpoint(run_id, checkpoint) if checkpoint is not None else ("", "")
        with self._transaction() as database:
            database.execute("UPDATE rounds SET phase = ?, reason = ? WHERE id = ?", (phase.value, reason, round_id))
            database.executemany(
                "UPDATE devices SET status = ?, why = ?, score = ? WHERE round = ? AND id = ?",
                [(v.status, v.reason, v.score, round_id, v.device_id) for v in verdicts],
            )
            if checkpoint is not None:
                database.execute(
                    "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?)",
                    (run_id, checkpoint.number, round_id, *hashes),
                )
            database.executemany(
                "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (run_id, number, one.name, round_id, one.mean, one.median, one.spread, one.devices, one.held_out)
                    for one in metrics
                ],
            )
            database.executemany(
                "INSERT OR REPLACE INTO leakage VALUES (?, ?, ?, ?)", [(round_id, *row) for row in leakage]
            )
        self._chunks.clear()
        self._disk.remove_tree(self._partial(round_id))

    def unfinished(self, run_id: str) -> RoundFacts | None:
        """The round that was under way when the coordinator ended.

        A device whose stored update cannot be read any more has the progress LOST.
        """
        row = self._one(
            "SELECT id, invitation, quorum, answer_s, grace_s, phase, elapsed_ms, goal FROM rounds"
            " WHERE run = ? AND phase IN (?, ?) ORDER BY rowid DESC",
            run_id,
            *OPEN_PHASES,
        )
        if row is None:
            return None
        round_id, encoded, quorum, answer_s, grace_s, phase, elapsed_ms, goal = row
        invitation = msgspec.msgpack.decode(encoded, type=Invitation)
        settings = RoundSettings.of(invitation, quorum, answer_s, grace_s, goal, self.earlier(invitation))
        return RoundFacts(invitation, settings, Phase(phase), self._devices(round_id), elapsed_ms / 1000)

    def evaluated(self, run_id: str, number: int) -> bool:
        """Whether the model of this round has had its evaluation round, however that ended."""
        query = "SELECT 1 FROM rounds WHERE run = ? AND number = ? AND kind = ?"
        return self._one(query, run_id, number, EVALUATION) is not None

    def evaluation_median(self, run_id: str, number: int, metric: str) -> float | None:
        """What devices said of this round's model; None where no evaluation of it was published."""
        row = self._one(
            "SELECT median FROM evaluations WHERE run = ? AND number = ? AND metric = ?", run_id, number, metric
        )
        return float(row[0]) if row is not None else None

    def newest_opened_ms(self, run_id: str) -> int:
        """When the run's newest round was opened, Unix time; 0 where none was."""
        return int(self._one("SELECT max(opened_ms) FROM rounds WHERE run = ?", run_id)[0] or 0)

    # --- chunks of updates that are coming in

    def save_chunk(self, device_id: str, offer: Offer, index: int, data: bytes, *, taken_by: str = "") -> None:
        """So that a restart need not ask for it again. Not synced: the name holds a checksum of the content.

        Within `together` it waits for `save_chunks`; most updates are complete by then, and their chunks need no file.
        """
        round_id = taken_by or offer.round_id
        self._chunks.setdefault(device_id, []).append((round_id, offer.update.sha256.hex(), index, data))
        if not self._together:
            self.save_chunks()

    def save_chunks(self) -> None:
        """Of the updates that are still incomplete."""
        for device_id, waiting in self._chunks.items():
            for round_id, sha256, index, data in waiting:
                self._save_chunk(self._partial(round_id) / device_id, sha256, index, data)
        self._chunks.clear()

    def _save_chunk(self, folder: Path, sha256: str, index: int, data: bytes) -> None:
        if any(name != sha256 for name in self._disk.names(folder)):
            self._disk.remove_tree(folder)  # of an offer that was replaced
        self._disk.write_scratch(folder / sha256 / f"{index}.{zlib.crc32(data):08x}", data)

    def _saved_chunks(self, round_id: str, device_id: str) -> dict[bytes, dict[int, bytes]]:
        folder = self._partial(round_id) / device_id
        found: dict[bytes, dict[int, bytes]] = {}
        for sha256 in self._disk.names(folder):
            for name in self._disk.names(folder / sha256):
                index, _, checksum = name.partition(".")
                data = self._disk.read(folder / sha256 / name)
                if data is not None and f"{zlib.crc32(data):08x}" == checksum:
                    found.setdefault(bytes.fromhex(sha256), {})[int(index)] = data
        return found

    # --- rounds whose updates later rounds take

    def invitation(self, round_id: str) -> Invitation:
        """Of a round that is in the store."""
        row = self._one("SELECT invitation FROM rounds WHERE id = ?", round_id)
        return msgspec.msgpack.decode(row[0], type=Invitation)

    def next_window(self, run_id: str) -> tuple[str, ...]:
        """The rounds whose updates the run's next round may take, as far as is known before it."""
        row = self._one(
            "SELECT invitation, phase FROM rounds WHERE run = ? AND kind = ? AND phase NOT IN (?, ?)"
            " ORDER BY rowid DESC",
            run_id,
            TRAINING,
            *OPEN_PHASES,
        )
        if row is None:
            return ()
        newest = msgspec.msgpack.decode(row[0], type=Invitation)
        number = newest.number + (row[1] == Phase.PUBLISHED.value)
        following = msgspec.structs.replace(newest, number=number, round_id="")
        return self.window(following, run_id, newest.max_staleness)

    def window(self, invitation: Invitation, run_id: str, max_staleness: int) -> tuple[str, ...]:
        """The ended rounds that are behind this one by at most max_staleness models, the newest first.

        Not those of another bundle, or whose updates have another form or cannot be read.
        """
        rows = self._all(
            "SELECT id, invitation FROM rounds WHERE run = ? AND kind = ? AND number >= ? AND number <= ?"
            " AND phase NOT IN (?, ?) AND id != ? ORDER BY rowid DESC LIMIT ?",
            run_id,
            TRAINING,
            invitation.number - max_staleness,
            invitation.number,
            *OPEN_PHASES,
            invitation.round_id,
            MAX_STALENESS if max_staleness else 0,
        )
        before = [(round_id, msgspec.msgpack.decode(encoded, type=Invitation)) for round_id, encoded in rows]
        return tuple(
            round_id
            for round_id, one in before
            if one.max_staleness and _same_form(one, invitation) and self.has_key(one)
        )

    def earlier(self, invitation: Invitation) -> dict[str, Earlier]:
        """What must be known of the rounds whose updates this one takes, too: those of its run that it names."""
        found: dict[str, Earlier] = {}
        for round_id in invitation.earlier if invitation.max_staleness else ():
            row = self._one("SELECT number, invitation FROM rounds WHERE id = ?", round_id)
            if row is not None and self.has_key(msgspec.msgpack.decode(row[1], type=Invitation)):
                found[round_id] = Earlier(invitation.number - row[0], self.taken(round_id, invitation.round_id))
        return found

    def taken(self, round_id: str, but_by: str = "") -> frozenset[str]:
        """The devices whose update for this round was stored by any round, but for one."""
        rows = self._all(
            "SELECT id FROM devices WHERE sha256 IS NOT NULL AND round != ?"
            " AND (origin = ? OR (round = ? AND origin IS NULL))",
            but_by,
            round_id,
            round_id,
        )
        return frozenset(device_id for (device_id,) in rows)

    # --- encrypted rounds

    def has_key(self, invitation: Invitation) -> bool:
        """Whether updates for this invitation can be read; always where they are not encrypted."""
        return not invitation.encryption_key or self._key(invitation) is not None

    def opened(self, invitation: Invitation, device_id: str, offer: Offer, data: bytes) -> tuple[Offer, Floats]:
        """The offer and the update that a device sent for this round, from its bytes: (d,), or in an evaluation round a
        number for each metric. Of an encrypted one the offer says what was hidden: number of examples and metrics.

        PeerError where they are malformed, StorageError where the round's key is gone.
        """
        if invitation.encryption_key:
            key = self._key(invitation)
            if key is None:
                raise StorageError(f"no readable key of round {invitation.round_id} in {self.folder}", NO_KEY_REMEDY)
            header, data = decrypted(key, invitation.round_id, device_id, data)
            offer = msgspec.structs.replace(offer, num_examples=header.num_examples, metrics=header.metrics)
        update = decode_update(data, invitation.plan, invitation.round_id, device_id, invitation.update_dimension)
        return offer, update

    def _key(self, invitation: Invitation) -> bytes | None:
        """None where it is not here as it was written."""
        data = self._disk.read(self._key_path(invitation.round_id))
        try:
            return data if data is not None and KeyPair.of(data).public == invitation.encryption_key else None
        except ValueError:
            return None

    def _key_path(self, round_id: str) -> Path:
        return self.folder / "keys" / f"{round_id}.x25519"

    # --- updates and verdicts of rounds that may be over

    def read_update(self, round_id: str, device_id: str) -> Floats:
        """As it enters the rule. StorageError where there is none, or not the one that was stored."""
        row = self._one("SELECT sha256, offer, staleness FROM devices WHERE round = ? AND id = ?", round_id, device_id)
        data = self._read_update(row[0]) if row is not None and row[0] else None
        if data is None:
            raise StorageError(f"no readable update of {device_id} for round {round_id} in {self.folder}")
        offer = msgspec.msgpack.decode(row[1], type=Offer)
        return weighted(self.opened(self.invitation(offer.round_id), device_id, offer, data)[1], row[2])

    def newest_end(self, run_id: str) -> RoundClosed | None:
        """How the newest round of the run that is over ended."""
        row = self._one(
            "SELECT id, phase, reason FROM rounds WHERE run = ? AND phase NOT IN (?, ?) ORDER BY rowid DESC",
            run_id,
            *OPEN_PHASES,
        )
        return RoundClosed(row[0], row[1], reason_text(row[2])) if row is not None else None

    def verdict(self, round_id: str, device_id: str, sha256: bytes) -> Verdict | None:
        """What became of a stored update; None where it was not stored, or nothing is decided."""
        row = self._one(
            "SELECT status, why FROM devices"
            " WHERE coalesce(origin, round) = ? AND id = ? AND sha256 = ? AND status IS NOT NULL",
            round_id,
            device_id,
            sha256.hex(),
        )
        return Verdict(round_id, row[0], reason_text(row[1])) if row is not None else None

    def untold(self, round_id: str) -> list[tuple[str, Verdict]]:
        """(device, verdict) of the stored updates whose device has not said that it knows."""
        rows = self._all(
            "SELECT id, status, why, coalesce(origin, round) FROM devices"
            " WHERE round = ? AND sha256 IS NOT NULL AND status IS NOT NULL AND NOT told ORDER BY id",
            round_id,
        )
        return [(device_id, Verdict(origin, status, reason_text(why))) for device_id, status, why, origin in rows]

    def untold_devices(self, run_id: str) -> set[str]:
        """Devices that have not said that they know the verdict on a stored update, of any round of the run."""
        rows = self._all(
            "SELECT DISTINCT devices.id FROM devices JOIN rounds ON rounds.id = devices.round"
            " WHERE run = ? AND sha256 IS NOT NULL AND status IS NOT NULL AND NOT told",
            run_id,
        )
        return {row[0] for row in rows}

    def seen(self, round_id: str, device_id: str) -> None:
        """The device has read the verdict on its update for this round. Nothing happens where it has none."""
        row = self._one(
            "SELECT round FROM devices WHERE id = ? AND sha256 IS NOT NULL AND status IS NOT NULL AND NOT told"
            " AND (origin = ? OR (round = ? AND origin IS NULL))",
            device_id,
            round_id,
            round_id,
        )
        if row is None:
            return  # a commit costs a sync; a device could ask for many
        with self._transaction() as database:
            database.execute("UPDATE devices SET told = 1 WHERE round = ? AND id = ?", (row[0], device_id))

    def prune(self, run_id: str, now_ms: int) -> None:
        """Keep what a restart and late devices need, not everything for ever.

        Rounds are forgotten RETENTION_MS after they were opened; updates, the keys that open them and states of a
        checkpoint after KEEP_ROUNDS rounds; the models (.f32) and the evaluations stay. The newest
        KEEP_ROUNDS rounds of a kind lose nothing.
        """
        older = (
            "(SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY kind ORDER BY rowid DESC) AS age"
            " FROM rounds WHERE run = ?) WHERE age > ?)"
        )
        rows = self._all(
            "SELECT number FROM checkpoints WHERE run = ? ORDER BY number DESC LIMIT -1 OFFSET ?", run_id, KEEP_ROUNDS
        )
        with self._transaction() as database:
            gone = database.execute(
                f"DELETE FROM rounds WHERE id IN {older} AND phase NOT IN (?, ?) AND opened_ms < ?",  # noqa: S608 - fixed
                (run_id, KEEP_ROUNDS, *OPEN_PHASES, now_ms - RETENTION_MS),
            )
            if gone.rowcount:
                database.execute("DELETE FROM devices WHERE round NOT IN (SELECT id FROM rounds)")
                database.execute("DELETE FROM leakage WHERE round NOT IN (SELECT id FROM rounds)")
            for (number,) in rows:
                database.execute("DELETE FROM checkpoints WHERE run = ? AND number = ?", (run_id, number))
        for (number,) in rows:
            self._disk.remove(self._checkpoint_path(run_id, number, ".state"))
        wanted = self._all(  # not of all devices of all rounds: they grow for a month
            f"SELECT sha256 FROM devices WHERE round IN (SELECT id FROM rounds WHERE id NOT IN {older})"  # noqa: S608 - fixed
            " AND sha256 IS NOT NULL",
            run_id,
            KEEP_ROUNDS,
        )
        names = {f"{sha256}.f32" for (sha256,) in wanted}
        for name in self._disk.names(self.folder / "updates"):
            if name not in names:
                self._disk.remove(self.folder / "updates" / name)
        newest = self._all(
            f"SELECT id FROM rounds WHERE id NOT IN {older} UNION SELECT origin FROM devices"  # noqa: S608 - fixed
            f" WHERE origin IS NOT NULL AND round NOT IN {older}",
            *(run_id, KEEP_ROUNDS) * 2,
        )
        needed = {round_id for (round_id,) in newest} | set(self.next_window(run_id))
        keys = {self._key_path(round_id).name for round_id in needed}
        for name in self._disk.names(self.folder / "keys"):
            if name not in keys:
                self._disk.remove(self.folder / "keys" / name)

    # --- checkpoints

    def checkpoints(self, run_id: str) -> Path:
        return self.folder / "checkpoints" / run_id

    def newest_checkpoint(self, run_id: str, dimension: int) -> Checkpoint | None:
        """The newest one that is as it was written; damaged ones are passed over.

        A run that has no row yet takes up the newest usable .f32 file of its folder, which older versions left alone.
        """
        self._disk.sweep(self.checkpoints(run_id))
        if self._one("SELECT 1 FROM rounds WHERE run = ?", run_id) is None:
            return self._adopted(run_id, dimension)
        rows = self._all("SELECT number, parameters, state FROM checkpoints WHERE run = ? ORDER BY number DESC", run_id)
        for number, parameters, state in rows:
            found = self._read_checkpoint(run_id, number, parameters, state)
            if found is not None and len(found.parameters) == dimension:
                return found
        return None

    def later_models(self, run_id: str, number: int) -> list[tuple[str, int, str, str]]:
        """(round, its number, sha256 of its model, of its state) of the published rounds after this one, in order."""
        return self._all(
            "SELECT round, number, parameters, state FROM checkpoints WHERE run = ? AND number > ? ORDER BY number",
            run_id,
            number,
        )

    def kept_updates(self, round_id: str) -> dict[str, tuple[Offer, Floats]]:
        """Device -> its stored update as it enters the rule, of those that can still be read and were not revoked."""
        rows = self._all(
            "SELECT id, offer, sha256, staleness FROM devices WHERE round = ? AND progress = ?",
            round_id,
            Progress.STORED.value,
        )
        found: dict[str, tuple[Offer, Floats]] = {}
        for device_id, encoded, sha256, staleness in rows:
            data = self._read_update(sha256)
            offer = msgspec.msgpack.decode(encoded, type=Offer)
            asked = self.invitation(offer.round_id)
            if data is not None and self.has_key(asked):
                offer, update = self.opened(asked, device_id, offer, data)
                found[device_id] = (offer, weighted(update, staleness))
        return found

    def captured(self, round_id: str) -> Iterator[tuple[str, Offer | None, Floats | None, str, str, str]]:
        """Of each device of a round: (device, its offer, its update before it is weighted, its status, why, the earlier
        round the update was trained for). The update is None where it cannot be read any more, the offer where none was
        stored."""
        rows = self._all(
            "SELECT id, offer, sha256, status, why, origin FROM devices WHERE round = ? ORDER BY id", round_id
        )
        for device_id, encoded, sha256, status, why, origin in rows:
            offer = msgspec.msgpack.decode(encoded, type=Offer) if encoded is not None and sha256 else None
            update = None
            if offer is not None:
                asked, data = self.invitation(offer.round_id), self._read_update(sha256)
                if data is not None and self.has_key(asked):
                    offer, update = self.opened(asked, device_id, offer, data)
            yield device_id, offer, update, status or "", why or "", origin or ""

    def ended_rounds(self) -> list[tuple[str, int]]:
        """(id, number) of the training rounds that are over, the newest first."""
        return self._all(
            "SELECT id, number FROM rounds WHERE kind = ? AND phase NOT IN (?, ?) ORDER BY rowid DESC",
            TRAINING,
            *OPEN_PHASES,
        )

    def model(self, run_id: str, sha256: str) -> bytes | None:
        """The published model with this hash, 4 d bytes, as its file has it."""
        rows = self._all("SELECT number FROM checkpoints WHERE run = ? AND parameters = ?", run_id, sha256)
        found = (self._verified(self._checkpoint_path(run_id, number, ".f32"), sha256) for (number,) in rows)
        return next((data for data in found if data is not None), None)

    def model_of(self, round_id: str) -> bytes | None:
        """What came of the round, 4 d bytes; None where nothing did, or its file is gone."""
        row = self._one("SELECT run, parameters FROM checkpoints WHERE round = ?", round_id)
        return self.model(*row) if row is not None else None

    def num_refused(self, round_id: str) -> int:
        """How many devices sent what could not even be stored."""
        rows = self._all("SELECT id FROM devices WHERE round = ? AND progress = ?", round_id, Progress.REFUSED.value)
        return len(rows)

    def mend_checkpoint(self, run_id: str, checkpoint: Checkpoint) -> None:
        """Write the files of a checkpoint again that its row still names."""
        self._write_checkpoint(run_id, checkpoint)

    def _adopted(self, run_id: str, dimension: int) -> Checkpoint | None:
        folder = self.checkpoints(run_id)
        for name in sorted(self._disk.names(folder), reverse=True):
            data = self._disk.read(folder / name) if name.endswith(".f32") else None
            if data is None or len(data) != 4 * dimension or not np.isfinite(np.frombuffer(data, "<f4")).all():
                continue
            number = int(name.removeprefix("round-").removesuffix(".f32"))
            with self._transaction() as database:
                row = (run_id, number, "", hashlib.sha256(data).hexdigest(), "")
                database.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?)", row)
            return Checkpoint(number, np.frombuffer(data, "<f4").astype(np.float32), b"")
        return None

    def _checkpoint_path(self, run_id: str, number: int, suffix: str) -> Path:
        return self.checkpoints(run_id) / f"round-{number:05d}{suffix}"

    def _write_checkpoint(self, run_id: str, checkpoint: Checkpoint) -> tuple[str, str]:
        parameters = checkpoint.parameters.astype("<f4").tobytes()
        self._disk.write(self._checkpoint_path(run_id, checkpoint.number, ".f32"), parameters)
        self._disk.write(self._checkpoint_path(run_id, checkpoint.number, ".state"), checkpoint.state)
        return hashlib.sha256(parameters).hexdigest(), hashlib.sha256(checkpoint.state).hexdigest()

    def _read_checkpoint(self, run_id: str, number: int, parameters: str, state: str) -> Checkpoint | None:
        data = self._verified(self._checkpoint_path(run_id, number, ".f32"), parameters)
        kept = self._verified(self._checkpoint_path(run_id, number, ".state"), state) if state else b""
        if data is None or kept is None:
            return None
        return Checkpoint(number, np.frombuffer(data, "<f4").astype(np.float32), kept)

    # --- below

    def _update_path(self, sha256: str) -> Path:
        return self.folder / "updates" / f"{sha256}.f32"

    def _read_update(self, sha256: str) -> bytes | None:
        return self._verified(self._update_path(sha256), sha256)

    def _partial(self, round_id: str) -> Path:
        return self.folder / "partial" / round_id

    def _verified(self, path: Path, sha256: str) -> bytes | None:
        data = self._disk.read(path)
        return data if data is not None and hashlib.sha256(data).hexdigest() == sha256 else None

    def _devices(self, round_id: str) -> dict[str, DeviceFacts]:
        facts: dict[str, DeviceFacts] = {}
        rows = self._all(
            "SELECT id, progress, reason, offer, sha256 FROM devices WHERE round = ? ORDER BY id", round_id
        )
        for device_id, word, reason, encoded, sha256 in rows:
            progress = Progress(word)
            offer = msgspec.msgpack.decode(encoded, type=Offer) if encoded is not None else None
            if progress is Progress.STORED and self._read_update(sha256) is None:
                progress = Progress.LOST
            facts[device_id] = DeviceFacts(progress, reason, offer, self._saved_chunks(round_id, device_id))
        return facts

    def _one(self, query: str, *values: Any) -> Any:
        with _translated(self.folder):
            return self._database.execute(query, values).fetchone()

    def _all(self, query: str, *values: Any) -> list[Any]:
        with _translated(self.folder):
            return list(self._database.execute(query, values).fetchall())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """Committed and synced at the end of the with block (within `together`: by `commit`), or nothing of it."""
        with _translated(self.folder):
            if not self._database.in_transaction:
                self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                if not self._together:
                    self.commit()
            except BaseException:
                self._forget_uncommitted()
                raise


def _same_form(one: Invitation, another: Invitation) -> bool:
    """Whether updates for the two rounds can stand side by side, and travel in the same form."""
    forms = [
        (of.bundle, of.dimension, of.plan.compression, of.plan.kept_fraction, bool(of.encryption_key))
        for of in (one, another)
    ]
    return forms[0] == forms[1]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the run's folder: two coordinators of one run would each count the other's rounds as their own.

    Raises StorageError where another process holds it for LOCK_PATIENCE_S (`is_held` does, for an instant). A process
    that dies lets go.
    """
    try:
        make_folder(folder)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise StorageError(f"cannot lock {folder} ({exc.strerror or exc})", "check its permissions") from exc
    end = time.monotonic() + LOCK_PATIENCE_S
    while not _locked(descriptor, fcntl.LOCK_EX):
        if time.monotonic() > end:
            os.close(descriptor)
            raise StorageError(f"another covey serve uses {folder}", "stop it first")
        time.sleep(LOCK_PATIENCE_S / 20)
    try:
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a coordinator runs on this folder now."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise StorageError(f"cannot read {folder / 'lock'} ({exc.strerror})", "check its permissions") from exc
    try:
        return not _locked(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_database(path: Path) -> sqlite3.Connection:
    """A connection that commits durably and only when told to. Makes the file and its folder."""
    try:
        make_folder(path.parent)
    except OSError as exc:
        raise StorageError(f"cannot make {path.parent} ({exc.strerror or exc})", "check its permissions") from exc
    with _translated(path):
        database = sqlite3.connect(path, isolation_level=None)
        try:
            for pragma in ("journal_mode = WAL", "synchronous = FULL"):
                database.execute(f"PRAGMA {pragma}")
        except sqlite3.Error:
            database.close()
            raise
        path.chmod(0o600)
        return database


def migrate(database: Any) -> None:
    """Bring the tables to this version, one transaction per step. StorageError for a file of a newer covey."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > len(SCHEMA):
        raise StorageError(f"coordinator.sqlite has version {version}, this covey knows {len(SCHEMA)}", "update covey")
    for number, script in enumerate(SCHEMA[version:], version + 1):
        with transaction(database):
            for statement in _statements(script):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number}")


def _statements(script: str) -> list[str]:
    """The statements of a script, for `execute` (`executescript` would commit between them)."""
    lines = [line.split("--")[0] for line in script.splitlines()]
    return [statement for statement in "\n".join(lines).split(";") if statement.strip()]


@contextlib.contextmanager
def transaction(database: Any) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _translated(place: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError as exc:
        raise UsageError(f"the store was used wrongly ({exc})") from exc
    except sqlite3.Error as exc:
        raise StorageError(
            f"the database of {place} cannot be used ({exc})",
            "free some space, check its permissions, and that no other covey serve uses it",
        ) from exc
