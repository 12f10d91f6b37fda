"""What a capture is made of: a round that is over, read from a run's store beside its coordinator or without one."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from covey_coordinator.store import SCHEMA, RunStore
from covey_coordinator.watching.history import opened
from covey_protocol.bundle import read_bundle
from covey_protocol.captures import Capture, CapturedUpdate, is_allowed
from covey_protocol.errors import ConfigError, StorageError
from covey_protocol.messages import TRAIN, Invitation, Offer, reason_text

NO_CONSENT = "its owner does not allow captures"
REMEDY = "set `[capture] allow = true` in the agent.toml of devices whose owners agree; it holds from the next round on"


def taken(folder: Path, fleet: str, bundle: bytes, number: int | None, now_ms: int) -> Capture:
    """Round `number` of the run in this folder, or its newest that is over; unsealed.

    StorageError where there is no such round or it cannot be read any more; ConfigError where no device's owner allows
    it, for a bundle that is not the round's, and for rounds of another work than training.
    """
    with _reading(folder) as store:
        round_id = _round(store, folder, number)
        invitation = store.invitation(round_id)
        _check(invitation, bundle)
        updates, left_out = [], {}
        for device_id, offer, update, status, why, origin in store.captured(round_id):
            problem = _problem(offer, update, origin, why)
            if problem:
                left_out[device_id] = reason_text(problem)
                continue
            assert offer is not None
            assert update is not None
            data = update.astype("<f4").tobytes()
            told = CapturedUpdate(
                device_id, offer.num_examples, dict(offer.metrics), offer.update.sha256, data, status, reason_text(why)
            )
            updates.append(told)
        if not updates:
            raise ConfigError(f"no update of round {round_id} may be captured ({_told(left_out)})", REMEDY)
        return Capture(
            fleet=fleet,
            run=folder.name,
            invitation=invitation,
            bundle=bundle,
            parameters=_parameters(store, folder.name, invitation, bundle),
            updates=tuple(updates),
            left_out=left_out,
            aggregate=store.model_of(round_id) or b"",
            captured_at_ms=now_ms,
            sealed_by=bytes(32),
        )


def ended(folder: Path) -> str:
    """Id of the newest training round that is over; "" where none is."""
    with _reading(folder) as store:
        rounds = store.ended_rounds()
        return rounds[0][0] if rounds else ""


def _problem(offer: Offer | None, update: object, origin: str, why: str) -> str:
    if offer is None:
        return why or "it sent no update"
    if not is_allowed(offer.metrics):
        return NO_CONSENT
    if origin:
        return f"its update is of the earlier round {origin}"
    return "" if update is not None else "its update cannot be read any more"


def _told(left_out: dict[str, str]) -> str:
    shown = [f"{device_id}: {why}" for device_id, why in list(left_out.items())[:3]]
    return "; ".join(shown) + (f"; {len(left_out) - 3} more" if len(left_out) > 3 else "")


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[RunStore]:
    with opened(folder):  # says what is wrong with a folder or a store of a newer covey
        pass
    path = folder / "coordinator.sqlite"
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
    with contextlib.closing(database):
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version != len(SCHEMA):
            raise StorageError(f"{path} is of an older covey", "start its `covey serve` once with this one")
        database.execute("BEGIN")  # all that is read is of one moment
        yield RunStore(folder, database=database, only_reads=True)


def _round(store: RunStore, folder: Path, number: int | None) -> str:
    rounds = store.ended_rounds()
    if not rounds:
        raise StorageError(f"no round of {folder.name} is over", "wait for one, or give --next")
    if number is None:
        return rounds[0][0]
    found = next((round_id for round_id, known in rounds if known == number), None)
    if found is None:
        raise StorageError(f"{folder.name} has no round {number} that is over", f"its newest is {rounds[0][1]}")
    return found


def _check(invitation: Invitation, bundle: bytes) -> None:
    if hashlib.sha256(bundle).digest() != invitation.bundle.sha256:
        raise ConfigError(f"the bundle is not that of round {invitation.round_id}", "give the one the run trains")
    if invitation.plan.work != TRAIN:
        raise ConfigError(
            f"round {invitation.round_id} is of work {invitation.plan.work!r}", "only rounds of training are captured"
        )


def _parameters(store: RunStore, run: str, invitation: Invitation, bundle: bytes) -> bytes:
    sha256 = invitation.parameters.sha256
    found = store.model(run, sha256.hex())
    if found is None:  # a run's first round starts from what the bundle holds
        from covey_edge.runtime import Model

        initial = Model(read_bundle(bundle)).parameters().astype("<f4").tobytes()
        found = initial if hashlib.sha256(initial).digest() == sha256 else None
    if found is None:
        raise StorageError(f"the model that round {invitation.round_id} started from is gone", "capture a newer round")
    if not np.isfinite(np.frombuffer(found, "<f4")).all():
        raise StorageError(f"the model that round {invitation.round_id} started from is not finite")
    return found
