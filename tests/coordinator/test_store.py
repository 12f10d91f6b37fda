"""What a run's store keeps: durable rows, content-addressed files, checkpoints that fall back, old files brought up."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from covey_coordinator import store as stores
from covey_coordinator.records import ACCEPTED, MISSING, REJECTED, DeviceVerdict, FleetMetric
from covey_coordinator.store import KEEP_ROUNDS, RETENTION_MS, Checkpoint, RunStore, only_one
from covey_protocol.blobs import blob_ref
from covey_protocol.errors import StorageError
from covey_protocol.messages import Invitation, Offer, RoundClosed, TrainingPlan, Verdict
from covey_protocol.round import Phase, Progress, RoundSettings

D = 4
SETTINGS = RoundSettings(quorum=1, answer_s=20.0, grace_s=3.0, update_bytes=4 * D)


def invitation(number: int = 1, run: str = "run") -> Invitation:
    blob = blob_ref(bytes(4 * D))
    plan = TrainingPlan(1, 0.5, shuffle_seed=7)
    return Invitation(f"{run}.{number}.abc", number, 1000 * number, 60_000, blob, blob, plan, ("a", "b", "c"))


def update(value: float) -> bytes:
    return np.full(D, value, "<f4").tobytes()


def offer(number: int, data: bytes) -> Offer:
    return Offer(f"run.{number}.abc", blob_ref(data, 8), 7, {"training_loss": 0.5})


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run")


def opened(store: RunStore, number: int = 1) -> str:
    made = invitation(number)
    store.open_round("run", made, SETTINGS, made.issued_at_ms)
    return made.round_id


def published(store: RunStore, number: int, value: float | None = None) -> str:
    round_id = opened(store, number)
    store.store_update("a", offer(number, update(number)), update(number))
    checkpoint = Checkpoint(
        number, np.full(D, value if value is not None else number, np.float32), b"state %d" % number
    )
    store.conclude(round_id, Phase.PUBLISHED, "", [DeviceVerdict("a", ACCEPTED, "", 0.5)], checkpoint)
    return round_id


def test_a_round_under_way_is_found_again_as_it_was(store: RunStore) -> None:
    round_id = opened(store)
    store.record(round_id, "b", Progress.DECLINED, "declined: on battery")
    data = update(1.0)
    store.store_update("a", offer(1, data), data)
    store.keep_time(round_id, 12_000)
    store.keep_time(round_id, 9_000)  # time does not run back
    store.close()
    facts = RunStore(store.folder).unfinished("run")
    assert facts is not None
    assert (facts.invitation, facts.settings, facts.phase, facts.elapsed_s) == (
        invitation(),
        SETTINGS,
        Phase.INVITING,
        12.0,
    )
    assert (facts.devices["a"].progress, facts.devices["a"].offer) == (Progress.STORED, offer(1, data))
    assert (facts.devices["b"].progress, facts.devices["b"].reason) == (Progress.DECLINED, "declined: on battery")
    assert facts.devices["c"].progress is Progress.INVITED


def test_a_decided_round_is_found_as_decided_and_a_finished_one_not_at_all(store: RunStore) -> None:
    round_id = opened(store)
    store.decided(round_id)
    facts = store.unfinished("run")
    assert facts is not None
    assert facts.phase is Phase.AGGREGATING
    store.conclude(round_id, Phase.ABANDONED, "quorum", [])
    assert store.unfinished("run") is None
    assert store.newest_end("run") == RoundClosed(round_id, "abandoned", "quorum")
    assert store.unfinished("another run") is None


def test_an_update_lies_under_its_own_hash_and_only_its_owner_reads_it(store: RunStore) -> None:
    opened(store)
    data = update(1.0)
    store.store_update("a", offer(1, data), data)
    (path,) = (store.folder / "updates").iterdir()
    assert path.name == f"{blob_ref(data).sha256.hex()}.f32"
    assert path.stat().st_mode & 0o777 == 0o600
    np.testing.assert_array_equal(store.read_update("run.1.abc", "a"), np.ones(D, np.float32))


def test_a_stored_update_that_was_damaged_is_known_as_lost(store: RunStore) -> None:
    round_id = opened(store)
    store.store_update("a", offer(1, update(1.0)), update(1.0))
    (path,) = (store.folder / "updates").iterdir()
    path.write_bytes(b"damaged")
    facts = store.unfinished("run")
    assert facts is not None
    assert facts.devices["a"].progress is Progress.LOST
    with pytest.raises(StorageError, match=f"no readable update of a for round {round_id}"):
        store.read_update(round_id, "a")


def test_chunks_come_back_but_for_torn_ones_and_those_of_a_replaced_offer(store: RunStore) -> None:
    opened(store)
    data, other = update(1.0), update(2.0)
    store.save_chunk("a", offer(1, other), 0, other[:8])
    store.save_chunk("a", offer(1, data), 0, data[:8])
    store.save_chunk("a", offer(1, data), 1, data[8:])
    (torn,) = (store.folder / "partial").rglob("1.*")
    torn.write_bytes(b"half")
    facts = store.unfinished("run")
    assert facts is not None
    assert facts.devices["a"].chunks == {blob_ref(data).sha256: {0: data[:8]}}
    store.store_update("a", offer(1, data), data)
    assert not list((store.folder / "partial").rglob("0.*"))


def test_a_verdict_is_known_by_round_device_and_update_until_it_was_read(store: RunStore) -> None:
    round_id = opened(store)
    for name, value in (("a", 1.0), ("b", 2.0)):
        store.store_update(name, offer(1, update(value)), update(value))
    sha256 = blob_ref(update(1.0)).sha256
    assert store.verdict(round_id, "a", sha256) is None
    verdicts = [
        DeviceVerdict("a", ACCEPTED),
        DeviceVerdict("b", REJECTED, "too far", 3.5),
        DeviceVerdict("c", MISSING, "connection lost"),
    ]
    store.conclude(round_id, Phase.PUBLISHED, "", verdicts)
    assert store.verdict(round_id, "a", sha256) == Verdict(round_id, "accepted")
    assert store.verdict(round_id, "a", bytes(32)) is None
    assert store.verdict(round_id, "b", sha256) is None
    no = ("b", Verdict(round_id, "rejected", "too far"))
    assert store.untold(round_id) == [("a", Verdict(round_id, "accepted")), no]
    store.seen(round_id, "a")
    store.seen(round_id, "a")
    store.seen(round_id, "stranger")
    assert store.untold(round_id) == [no]
    assert store.untold_devices("run") == {"b"}
    assert store.untold_devices("another") == set()


def test_a_word_that_changes_nothing_costs_no_sync(store: RunStore) -> None:
    round_id = published(store, 1)
    before = store._database.total_changes
    for name in ("b", "stranger"):
        store.seen(round_id, name)
    store.seen("no such round", "a")
    assert store._database.total_changes == before


# --- checkpoints


def test_the_newest_checkpoint_comes_with_its_state(store: RunStore) -> None:
    for number in (1, 2):
        published(store, number)
    found = RunStore(store.folder).newest_checkpoint("run", D)
    assert found is not None
    assert (found.number, found.state) == (2, b"state 2")
    np.testing.assert_array_equal(found.parameters, np.full(D, 2, np.float32))


DAMAGED = {
    "the parameters are cut": (".f32", lambda data: data[:-1]),
    "one bit of the parameters is flipped": (".f32", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "the state is cut": (".state", lambda data: data[:-1]),
    "the state is another's": (".state", lambda data: b"state 1"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_checkpoint_is_passed_over_where(what: str, store: RunStore) -> None:
    for number in (1, 2):
        published(store, number)
    suffix, change = DAMAGED[what]
    path = store.checkpoints("run") / f"round-00002{suffix}"
    path.write_bytes(change(path.read_bytes()))
    found = store.newest_checkpoint("run", D)
    assert found is not None
    assert (found.number, found.state) == (1, b"state 1")


def test_files_of_a_round_that_was_not_concluded_are_no_checkpoint(store: RunStore) -> None:
    opened(store)
    store._write_checkpoint("run", Checkpoint(1, np.ones(D, np.float32), b"state"))
    assert store.newest_checkpoint("run", D) is None


def test_the_models_of_an_older_version_are_taken_up(store: RunStore) -> None:
    folder = store.checkpoints("run")
    folder.mkdir(parents=True)
    (folder / "round-00003.f32").write_bytes(update(3.0))
    (folder / "round-00004.f32").write_bytes(update(np.nan))
    (folder / "round-00007.f32").write_bytes(b"half a chec")
    found = store.newest_checkpoint("run", D)
    assert found is not None
    assert (found.number, found.state) == (3, b"")
    opened(store, 4)
    again = store.newest_checkpoint("run", D)
    assert again is not None
    assert again.number == 3


# --- what is kept for how long


def test_old_updates_and_states_go_and_models_and_verdicts_stay(store: RunStore) -> None:
    for number in range(1, KEEP_ROUNDS + 4):
        published(store, number)
    store.prune("run", now_ms=RETENTION_MS)
    assert len(list((store.folder / "updates").iterdir())) == KEEP_ROUNDS
    assert len(list(store.checkpoints("run").glob("*.state"))) == KEEP_ROUNDS
    assert len(list(store.checkpoints("run").glob("*.f32"))) == KEEP_ROUNDS + 3
    assert store.verdict("run.1.abc", "a", blob_ref(update(1.0)).sha256) is not None
    store.prune("run", now_ms=RETENTION_MS + 2001)  # rounds 1 and 2 are past it
    assert store.verdict("run.2.abc", "a", blob_ref(update(2.0)).sha256) is None
    assert store.verdict("run.3.abc", "a", blob_ref(update(3.0)).sha256) is not None


def test_a_round_under_way_is_never_forgotten(store: RunStore) -> None:
    opened(store, 1)
    store.store_update("a", offer(1, update(1.0)), update(1.0))
    store.prune("run", now_ms=10 * RETENTION_MS)
    facts = store.unfinished("run")
    assert facts is not None
    assert facts.devices["a"].progress is Progress.STORED


# --- files of other versions and damaged ones


OLD = {name: Path(__file__).parent / "stores" / f"{name}.sqlite" for name in ("v1", "v3")}


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_an_older_version_is_brought_up_to_date_with_all_it_holds(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(OLD[name], folder / "coordinator.sqlite")
    store = RunStore(folder)
    assert store._database.execute("PRAGMA user_version").fetchone() == (len(stores.SCHEMA),)
    facts = store.unfinished("old")
    assert facts is not None
    assert (facts.invitation.round_id, facts.elapsed_s) == ("old.2.abc", 12.0)
    assert facts.devices["a"].progress is Progress.LOST  # its file is not kept beside the old database
    assert facts.devices["b"].reason == "declined: on battery"
    assert store.untold("old.1.abc") == [("a", Verdict("old.1.abc", "accepted"))]
    store.seen("old.1.abc", "a")
    assert store.untold("old.1.abc") == []
    assert store._all("SELECT DISTINCT kind FROM rounds") == [("training",)]
    assert not store.evaluated("old", 1)


def test_a_migration_that_fails_half_way_leaves_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunStore(tmp_path).close()
    monkeypatch.setattr(stores, "SCHEMA", (*stores.SCHEMA, "CREATE TABLE more (x); CREATE TABLE rounds (x)"))
    with pytest.raises(StorageError, match="table rounds already exists"):
        RunStore(tmp_path)
    database = sqlite3.connect(tmp_path / "coordinator.sqlite")
    assert database.execute("PRAGMA user_version").fetchone() == (len(stores.SCHEMA) - 1,)
    assert database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'more'").fetchone() == (0,)
    database.close()


def test_a_file_of_a_newer_version_is_refused_in_words(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store._database.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(StorageError, match="version 99, this covey knows"):
        RunStore(tmp_path)


def test_a_file_that_is_no_database_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "coordinator.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(StorageError, match="cannot be used"):
        RunStore(tmp_path)


def test_the_database_syncs_every_commit(store: RunStore) -> None:
    assert store._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert (store.folder / "coordinator.sqlite").stat().st_mode & 0o777 == 0o600


# --- evaluation rounds


METRICS = (FleetMetric("loss", 0.5, 0.4, 0.1, 3, 2), FleetMetric("accuracy", 0.8, 0.9, 0.05, 3, 2))


def evaluation(store: RunStore, number: int, end: Phase = Phase.PUBLISHED) -> str:
    plan = TrainingPlan(1, 0.5, evaluate=("loss", "accuracy"))
    blob = blob_ref(bytes(4 * D))
    opened_ms = 1000 * number + 1
    made = Invitation(f"run.e{number}.abd", number, opened_ms, 60_000, blob, blob, plan, ("a", "b"))
    store.open_round("run", made, SETTINGS, opened_ms)
    data = np.array([0.5, number / 100], "<f4").tobytes()
    store.store_update("a", Offer(made.round_id, blob_ref(data), 7), data)
    store.conclude(
        made.round_id, end, "", [DeviceVerdict("a", ACCEPTED)], metrics=METRICS if end == end.PUBLISHED else ()
    )
    return made.round_id


def test_an_evaluation_is_kept_beside_the_models_and_is_none(store: RunStore) -> None:
    published(store, 1)
    assert not store.evaluated("run", 1)
    evaluation(store, 1)
    assert store.evaluated("run", 1)
    assert not store.evaluated("another", 1)
    newest = store.newest_checkpoint("run", D)
    assert newest is not None
    assert newest.number == 1
    rows = store._all("SELECT number, metric, mean, median, spread, devices, held_out FROM evaluations ORDER BY metric")
    assert rows == [(1, "accuracy", 0.8, 0.9, 0.05, 3, 2), (1, "loss", 0.5, 0.4, 0.1, 3, 2)]
    np.testing.assert_array_equal(store.read_update("run.e1.abd", "a"), np.array([0.5, 0.01], np.float32))


def test_an_evaluation_under_way_is_found_again_with_the_sizes_of_its_numbers(store: RunStore) -> None:
    plan = TrainingPlan(1, 0.5, evaluate=("loss",))
    blob = blob_ref(bytes(4 * D))
    store.open_round("run", Invitation("run.e3.abd", 3, 0, 60_000, blob, blob, plan, ("a",)), SETTINGS, 0)
    facts = store.unfinished("run")
    assert facts is not None
    assert facts.settings.sizes == range(4, 5)
    assert store.evaluated("run", 3)  # it has begun, and is not begun again


def test_an_abandoned_evaluation_has_no_numbers(store: RunStore) -> None:
    evaluation(store, 1, Phase.ABANDONED)
    assert store.evaluated("run", 1)
    assert store._all("SELECT * FROM evaluations") == []


def test_evaluations_take_no_room_from_the_updates_of_models(store: RunStore) -> None:
    """A damaged model is computed again from them: those of the newest KEEP_ROUNDS stay, however many evaluations."""
    for number in range(1, KEEP_ROUNDS + 4):
        published(store, number)
        evaluation(store, number)
    store.prune("run", now_ms=RETENTION_MS + 10**9)
    for number in range(1, KEEP_ROUNDS + 4):
        assert bool(store.kept_updates(f"run.{number}.abc")) == (number > 3), number
    kept = store._all("SELECT number FROM rounds WHERE kind = 'evaluation' ORDER BY number")
    assert [number for (number,) in kept] == list(range(4, KEEP_ROUNDS + 4))
    told = store._all("SELECT DISTINCT number FROM evaluations ORDER BY number")
    assert [number for (number,) in told] == list(range(1, KEEP_ROUNDS + 4))  # the numbers stay


# --- one coordinator at a time


def test_a_second_coordinator_of_a_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from covey_coordinator.store import only_one
with only_one(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"locked\n"
    with pytest.raises(StorageError, match="another covey serve uses"), only_one(tmp_path):
        pass
    first.kill()
    first.wait()
    first.stdout.close()
    with only_one(tmp_path):
        pass


# --- what is written together


def seen_by_another(store: RunStore) -> tuple[list[str], list[str]]:
    """(stored devices, files) as a program sees them that starts now."""
    with sqlite3.connect(f"file:{store.folder / 'coordinator.sqlite'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT id FROM devices WHERE progress = 'stored' ORDER BY id").fetchall()
    folder = store.folder / "updates"
    return [name for (name,) in rows], sorted(path.name for path in folder.glob("*")) if folder.exists() else []


def test_what_is_written_together_is_there_at_a_commit_and_not_before(store: RunStore) -> None:
    opened(store)
    updates = {name: update(value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    with store.together():
        store.store_update("a", offer(1, updates["a"]), updates["a"])
        store.store_update("b", offer(1, updates["b"]), updates["b"])
        assert seen_by_another(store) == ([], [])
        store.commit()
        assert seen_by_another(store)[0] == ["a", "b"]
        store.store_update("c", offer(1, updates["c"]), updates["c"])
        assert seen_by_another(store)[0] == ["a", "b"]
    names, files = seen_by_another(store)
    assert names == ["a", "b", "c"]
    assert len(files) == 3
    for name, data in updates.items():
        assert store.read_update("run.1.abc", name).tobytes() == data


def test_an_error_undoes_all_that_was_written_together_since_the_last_commit(store: RunStore) -> None:
    round_id = opened(store)

    def fail() -> None:
        with store.together():
            store.record(round_id, "a", Progress.ACCEPTED, "")
            store.commit()
            store.record(round_id, "b", Progress.ACCEPTED, "")
            store.store_update("c", offer(1, update(1.0)), update(1.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    facts = store.unfinished("run")
    assert facts is not None
    found = {name: known.progress for name, known in facts.devices.items()}
    assert found == {"a": Progress.ACCEPTED, "b": Progress.INVITED, "c": Progress.INVITED}
    assert seen_by_another(store) == ([], [])
    store.record(round_id, "b", Progress.DECLINED, "declined: busy")  # alone again, and durable at once
    facts = RunStore(store.folder).unfinished("run")
    assert facts is not None
    assert facts.devices["b"].progress is Progress.DECLINED


def test_a_disk_that_takes_no_update_takes_no_row_either(store: RunStore) -> None:
    opened(store)
    (store.folder / "updates").write_text("no folder")
    with pytest.raises(StorageError), store.together():
        store.store_update("a", offer(1, update(1.0)), update(1.0))
    assert seen_by_another(store)[0] == []


def test_chunks_of_an_update_that_is_soon_complete_are_never_saved(store: RunStore) -> None:
    opened(store)
    data = update(1.0)
    partial = store.folder / "partial"
    with store.together():
        store.save_chunk("a", offer(1, data), 0, data[:8])
        store.save_chunk("b", offer(1, data), 1, data[8:])
        store.store_update("a", offer(1, data), data)
    assert not partial.exists()
    store.save_chunks()
    assert [path.name for path in (partial / "run.1.abc").iterdir()] == ["b"]
    facts = RunStore(store.folder).unfinished("run")
    assert facts is not None
    assert facts.devices["b"].chunks == {offer(1, data).update.sha256: {1: data[8:]}}
