"""What the store of a run says, read beside a running coordinator or without one. Changes nothing.

Values are what JSON has; times are Unix milliseconds. SQLite's WAL lets any number read while one writes. What is
forgotten with time (docs/coordinator.md: verdicts after 30 days) is not counted any more.
"""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from covey_coordinator.orders import Order, Orders
from covey_coordinator.records import ACCEPTED, REJECTED
from covey_coordinator.store import EVALUATION, OPEN_PHASES, SCHEMA, TRAINING, is_held
from covey_protocol.bundle import METRICS
from covey_protocol.errors import EXIT_OK, StorageError
from covey_protocol.messages import Invitation, Offer
from covey_protocol.round import Phase, Progress

Facts = dict[str, Any]
LEAKAGE_VERSION = 6  # of the store: from here on it has the table leakage
NOTES_VERSION = 3  # of the store: from here on it has the tables runs and presence
LAST_ROUNDS = 5


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[History]:
    """The run's store, read-only. StorageError where there is none, or one of a newer covey."""
    path = folder / "coordinator.sqlite"
    if not path.is_file():
        raise StorageError(
            f"there is no run in {folder}", "check --config, --runs-dir and --run; covey runs lists them"
        )
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > len(SCHEMA):
                raise StorageError(f"{path} has version {version}, this covey knows {len(SCHEMA)}", "update covey")
            database.execute("BEGIN")  # all that is read is of one moment
            yield History(folder, database, version)
        finally:
            database.close()
    except sqlite3.Error as exc:
        raise StorageError(f"{path} cannot be read ({exc})", "check its permissions, and its folder's") from exc


def run_folders(runs_dir: Path) -> list[Path]:
    """Folders of runs, by name. StorageError where there is none."""
    found = sorted(path.parent for path in runs_dir.glob("*/coordinator.sqlite"))
    if not found:
        raise StorageError(f"there is no run in {runs_dir}", "check --config or --runs-dir")
    return found


class History:
    """One moment of one run's store. Made by `opened`."""

    def __init__(self, folder: Path, database: sqlite3.Connection, version: int) -> None:
        self._folder, self._database, self._version = folder, database, version
        # older stores know no evaluation rounds
        self._kinds = self._one("SELECT 1 FROM sqlite_master WHERE name = 'evaluations'") is not None

    def run(self) -> Facts:
        """The run with its outcome. state: see `_word`."""
        published, abandoned = (
            self._one(f"SELECT count(*) FROM rounds WHERE phase = ? AND {self._kind} = ?", phase.value, TRAINING)[0]  # noqa: S608 - fixed
            for phase in (Phase.PUBLISHED, Phase.ABANDONED)
        )
        newest = self._one("SELECT max(number) FROM checkpoints")[0]
        row = self._noted("SELECT rounds, started_ms, ended_ms, code, why FROM runs")
        asked, started_ms, ended_ms, code, why = row[0] if row else (None, None, None, None, None)
        orders, running = Orders(self._folder), is_held(self._folder)
        paused, aborted = orders.paused(), orders.aborted()
        return {
            "run": self._folder.name,
            "state": _word(running and code is None, paused, aborted, bool(row), code),
            "running": running and code is None,
            "rounds_asked": asked,
            "rounds_published": newest or published,
            "rounds_abandoned": abandoned,
            "started_ms": started_ms,
            "ended_ms": ended_ms,
            "code": code,
            "reason": why or "",
            "paused": _order(paused),
            "aborted": _order(aborted),
            "evaluation": self._newest_evaluation(),
            "leakage": self._newest_leakage(),
        }

    @property
    def _kind(self) -> str:
        """The column that says a round's kind, in SQL."""
        return "kind" if self._kinds else f"'{TRAINING}'"

    def _newest_evaluation(self) -> Facts | None:
        if not self._kinds:
            return None
        row = self._one("SELECT round, number FROM evaluations ORDER BY number DESC")
        return None if row is None else {"round": row[0], "number": row[1], "metrics": self._metrics(row[0])}

    def _metrics(self, round_id: str) -> list[Facts]:
        """What an evaluation round gave."""
        names = ("metric", "mean", "median", "spread", "devices", "held_out")
        rows = self._all(f"SELECT {', '.join(names)} FROM evaluations WHERE round = ?", round_id)  # noqa: S608 - fixed
        return [dict(zip(names, row)) for row in sorted(rows, key=lambda row: METRICS.index(row[0]))]

    def _leakage(self, round_id: str) -> Facts:
        """What was measured of a round's updates: of the whole round, and the largest of any device by measure."""
        if self._version < LEAKAGE_VERSION:
            return {}
        rows = self._all(
            "SELECT CASE device WHEN '' THEN measure ELSE 'max_' || measure END, max(value) FROM leakage"
            " WHERE round = ? GROUP BY 1 ORDER BY 1",
            round_id,
        )
        return dict(rows)

    def _newest_leakage(self) -> Facts | None:
        found = self.leakage(last=1)
        return found[-1] if found else None

    def leakage(self, last: int = -1) -> list[Facts]:
        """Of the newest rounds in which it was measured, the oldest first; all where last is -1."""
        if self._version < LEAKAGE_VERSION:
            return []
        rows = self._all(
            "SELECT id, number FROM rounds WHERE id IN (SELECT round FROM leakage) ORDER BY rowid DESC LIMIT ?", last
        )
        return [{"round": name, "number": number, **self._leakage(name)} for name, number in reversed(rows)]

    def status(self) -> Facts:
        """The run, the round under way and the newest ones that are over."""
        run = self.run()
        online = [name for (name,) in self._noted("SELECT id FROM presence WHERE online ORDER BY id")]
        over = self._all(
            f"SELECT id, number, phase, reason, {self._kind} FROM rounds"  # noqa: S608 - fixed
            " WHERE phase NOT IN (?, ?) ORDER BY rowid DESC LIMIT ?",
            *OPEN_PHASES,
            LAST_ROUNDS,
        )
        return {
            **run,
            "devices_online": online if run["running"] else [],
            "round": self._open_round(),
            "last_rounds": [self._ended_round(*row) for row in reversed(over)],
        }

    def devices(self, roster: list[str]) -> list[Facts]:
        """Every device that was invited, heard or is in the roster, by name, with what became of it.

        online: None where it was when the coordinator was killed; nobody has looked since.
        """
        running = is_held(self._folder)
        counts = self._all(
            "SELECT id, count(*), count(sha256), sum(status IS 'accepted'), sum(status IS 'rejected'),"
            " sum(status IS 'missing') FROM devices GROUP BY id"
        )
        last = dict(
            self._all(
                "SELECT devices.id, why FROM devices JOIN rounds ON rounds.id = devices.round"
                " WHERE status = ? ORDER BY rounds.rowid",
                REJECTED,
            )
        )
        presence = {row[0]: row[1:] for row in self._noted("SELECT id, online, seen_ms FROM presence")}
        known = {row[0]: row[1:] for row in counts}
        found = []
        for name in sorted({*known, *presence, *roster}):
            online, seen_ms = presence.get(name, (0, 0))
            numbers = dict(zip(("invited", "delivered", "accepted", "rejected", "missing"), known.get(name, (0,) * 5)))
            now = bool(online) if running or not online else None
            facts = {"device": name, "online": now, "last_seen_ms": seen_ms or None, **numbers}
            found.append({**facts, "last_rejection": last.get(name, "")})
        return found

    def _open_round(self) -> Facts | None:
        row = self._one(
            "SELECT id, invitation, quorum, phase FROM rounds WHERE phase IN (?, ?) ORDER BY rowid DESC", *OPEN_PHASES
        )
        if row is None:
            return None
        round_id, encoded, quorum, phase = row
        invitation = msgspec.msgpack.decode(encoded, type=Invitation)
        devices = self._all("SELECT id, progress, reason FROM devices WHERE round = ? ORDER BY id", round_id)
        if phase == Phase.INVITING.value and all(progress != Progress.INVITED.value for _, progress, _ in devices):
            phase = Phase.COLLECTING.value  # the store does not tell the two apart
        return {
            "id": round_id,
            "number": invitation.number,
            "kind": EVALUATION if invitation.plan.evaluate else TRAINING,
            "phase": phase,
            "quorum": quorum,
            "opened_ms": invitation.issued_at_ms,
            "deadline_ms": invitation.issued_at_ms + invitation.duration_ms,
            "devices": [{"device": name, "progress": word, "reason": why} for name, word, why in devices],
        }

    def _ended_round(self, round_id: str, number: int, outcome: str, reason: str, kind: str) -> Facts:
        rows = self._all(  # without those that may still deliver to a later round
            "SELECT id, status, why, offer FROM devices WHERE round = ? AND status IS NOT NULL ORDER BY id", round_id
        )
        offers = [msgspec.msgpack.decode(offer, type=Offer).metrics for *_, offer in rows if offer is not None]
        losses = [metrics["training_loss"] for metrics in offers if "training_loss" in metrics]
        return {
            "id": round_id,
            "number": number,
            "kind": kind,
            "outcome": outcome,
            "reason": reason,
            "invited": len(rows),
            "accepted": sum(status == ACCEPTED for _, status, _, _ in rows),
            "median_training_loss": statistics.median(losses) if losses else None,
            "evaluation": self._metrics(round_id) if kind == EVALUATION else [],
            "leakage": self._leakage(round_id),
            "not_used": [
                {"device": name, "status": status, "reason": why} for name, status, why, _ in rows if status != ACCEPTED
            ],
        }

    def _one(self, query: str, *values: Any) -> Any:
        return self._database.execute(query, values).fetchone()

    def _all(self, query: str, *values: Any) -> list[Any]:
        return self._database.execute(query, values).fetchall()

    def _noted(self, query: str) -> list[Any]:
        """From the tables that older stores have not; nothing then."""
        return self._all(query) if self._version >= NOTES_VERSION else []


def _word(running: bool, paused: Order | None, aborted: Order | None, noted: bool, code: int | None) -> str:
    """One of running, paused, aborted, finished, stopped (in order, or by an error: see reason), killed, unknown."""
    if aborted is not None:
        return "aborted"
    if running:
        return "paused" if paused is not None else "running"
    if not noted:
        return "unknown"
    if code is None:
        return "killed"
    return "finished" if code == EXIT_OK else "stopped"


def _order(order: Order | None) -> Facts | None:
    return None if order is None else {"asked_ms": order.asked_ms, "reason": order.reason}
