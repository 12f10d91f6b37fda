"""`covey status`, `devices`, `runs`, and the orders: on stores that were made by the real RunStore."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from covey_coordinator.orders import LOOK_S, Orders, Revocations
from covey_coordinator.records import ACCEPTED, MISSING, REJECTED, DeviceVerdict, FleetMetric
from covey_coordinator.store import RunStore, only_one
from covey_coordinator.watching import cli, events
from covey_coordinator.watching.presence import PresenceKeeper
from covey_protocol import errors
from covey_protocol.blobs import blob_ref
from covey_protocol.messages import Invitation, Offer, TrainingPlan
from covey_protocol.round import Phase, Progress, RoundSettings

OLD = {name: Path(__file__).parent / "stores" / f"{name}.sqlite" for name in ("v1", "v3")}
NOW_MS = time.time_ns() // 1_000_000
BLOB = blob_ref(bytes(16))
CONFIG = 'fleet = "home"\nrun = "bell"\n[devices]\na = "00"\nb = "00"\nc = "00"\n'
VERDICTS = [
    DeviceVerdict("a", ACCEPTED, score=1.0),
    DeviceVerdict("b", REJECTED, "too far from the others", score=9.0),
]


def open_round(store: RunStore, number: int) -> str:
    round_id = f"bell.{number}.abc"
    plan = TrainingPlan(1, 0.5)
    invitation = Invitation(round_id, number, NOW_MS - 10_000, 600_000, BLOB, BLOB, plan, ("a", "b"))
    store.open_round("bell", invitation, RoundSettings(1, 20.0, 3.0, 16), NOW_MS - 10_000)
    return round_id


def deliver(store: RunStore, round_id: str, device_id: str, loss: float) -> None:
    update = np.full(4, loss, "<f4").tobytes()
    offer = Offer(round_id, blob_ref(update), 7, {"training_loss": loss})
    store.store_update(device_id, offer, update)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    """A round that is over, one under way, a device that was only heard."""
    global NOW_MS
    NOW_MS = time.time_ns() // 1_000_000  # not that of the import: minutes may have passed since
    (tmp_path / "coordinator.toml").write_text(CONFIG)
    made = RunStore(tmp_path / "runs" / "bell")
    made.started("bell", 20, NOW_MS - 60_000)
    first = open_round(made, 1)
    deliver(made, first, "a", 0.5)
    deliver(made, first, "b", 1.5)
    made.conclude(first, Phase.PUBLISHED, "", VERDICTS)
    second = open_round(made, 2)
    deliver(made, second, "a", 0.25)
    made.record(second, "b", Progress.DECLINED, "declined: \x1b[2Jbusy")
    made.keep_presence({"a": (True, NOW_MS - 3_000), "z": (False, 0)})
    yield made
    made.close()


Call = Callable[..., Any]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Call a command beside the store's coordinator.toml; JSON comes decoded."""

    def called(name: str, *arguments: str, place: tuple[str, ...] | None = None) -> Any:
        where = place if place is not None else ("--config", str(tmp_path / "coordinator.toml"))
        command = getattr(cli, f"{name}_command")
        result = CliRunner().invoke(command, [*where, *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.output) if "--json" in arguments else result.output

    return called


# --- status


def test_status_says_the_round_under_way_and_the_ones_before(store: RunStore, call: Call) -> None:
    with only_one(store.folder):
        facts = call("status", "--json")
    assert (facts["run"], facts["state"], facts["running"]) == ("bell", "running", True)
    assert (facts["rounds_asked"], facts["rounds_published"]) == (20, 1)
    assert facts["devices_online"] == ["a"]
    under_way = facts["round"]
    assert (under_way["number"], under_way["phase"], under_way["quorum"]) == (2, "collecting", 1)
    assert under_way["deadline_ms"] == NOW_MS + 590_000
    assert [(one["device"], one["progress"]) for one in under_way["devices"]] == [("a", "stored"), ("b", "declined")]
    (over,) = facts["last_rounds"]
    assert (over["number"], over["outcome"], over["accepted"], over["median_training_loss"]) == (1, "published", 1, 1.0)
    assert over["not_used"] == [{"device": "b", "status": "rejected", "reason": "too far from the others"}]


def test_status_in_words_says_the_same(store: RunStore, call: Call) -> None:
    with only_one(store.folder):
        text = call("status")
    assert "bell: running, 1 of 20 rounds published" in text
    assert "round 2 collecting, 9 min left, quorum 1" in text
    assert "round 1 published: 1 of 2 updates, median training loss 1.0000" in text
    assert "  b rejected: too far from the others" in text
    assert "\x1b" not in text  # a device chose that reason


def test_reading_a_store_changes_no_byte_of_it(store: RunStore, call: Call) -> None:
    def files() -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in store.folder.glob("coordinator.sqlite*")
            if path.suffix != ".sqlite-shm"
        }

    before = files()
    for name in ("status", "devices", "runs"):
        call(name)
    assert files() == before


STATES: dict[str, tuple[str, Callable[[RunStore], None]]] = {
    "a coordinator that was killed": ("killed", lambda store: None),
    "all rounds published": ("finished", lambda store: store.ended("bell", 0, "", NOW_MS)),
    "a stop in order": ("stopped", lambda store: store.ended("bell", 130, "stopped by a signal", NOW_MS)),
    "an abort": ("aborted", lambda store: Orders(store.folder).abort("wrong data")),
    "a new start after an end": (
        "killed",
        lambda store: (store.ended("bell", 0, "", NOW_MS), store.started("bell", 30, NOW_MS))[1],
    ),
}


@pytest.mark.parametrize("what", STATES)
def test_the_state_of_a_run_that_nobody_runs(what: str, store: RunStore, call: Call) -> None:
    word, change = STATES[what]
    change(store)
    assert call("status", "--json")["state"] == word


def test_a_paused_run_says_so_and_why(store: RunStore, call: Call) -> None:
    with only_one(store.folder):
        call("pause", "--reason", "holidays")
        assert call("status", "--json")["state"] == "paused"
        assert "paused 0 s ago: holidays" in call("status")


# --- devices


def test_devices_have_their_history(store: RunStore, call: Call) -> None:
    with only_one(store.folder):
        found = {facts["device"]: facts for facts in call("devices", "--json")}
    assert list(found) == ["a", "b", "c", "z"]  # c is in the roster alone, z was only heard of
    assert found["a"] == {
        "device": "a",
        "online": True,
        "last_seen_ms": NOW_MS - 3_000,
        "invited": 2,
        "delivered": 2,
        "accepted": 1,
        "rejected": 0,
        "missing": 0,
        "last_rejection": "",
        "revoked": None,
    }
    assert (found["b"]["rejected"], found["b"]["last_rejection"]) == (1, "too far from the others")
    assert (found["c"]["invited"], found["c"]["last_seen_ms"]) == (0, None)
    assert found["z"]["last_seen_ms"] is None


def test_nobody_knows_who_is_online_once_the_coordinator_was_killed(store: RunStore, call: Call) -> None:
    """Its folder is not held, and nothing says that it ended."""
    found = {facts["device"]: facts["online"] for facts in call("devices", "--json")}
    assert found == {"a": None, "b": False, "c": False, "z": False}
    assert call("devices").splitlines()[1].split()[:2] == ["a", "unknown"]
    facts = call("status", "--json")
    assert (facts["state"], facts["devices_online"]) == ("killed", [])
    store.ended("bell", 0, "", NOW_MS)
    assert {facts["online"] for facts in call("devices", "--json")} == {False}


def test_the_newest_rejection_is_the_one_that_is_shown(store: RunStore, call: Call) -> None:
    verdicts = [DeviceVerdict("a", ACCEPTED), DeviceVerdict("b", REJECTED, "not finite")]
    store.conclude("bell.2.abc", Phase.PUBLISHED, "", verdicts)
    newest = open_round(store, 3)
    store.conclude(newest, Phase.PUBLISHED, "", [DeviceVerdict("b", MISSING, "connection lost")])
    (b,) = (facts for facts in call("devices", "--json") if facts["device"] == "b")
    assert (b["rejected"], b["missing"], b["last_rejection"]) == (2, 1, "not finite")


def test_the_table_of_devices_has_a_line_each(store: RunStore, call: Call) -> None:
    lines = call("devices").splitlines()
    words = "device now last heard invited delivered accepted rejected missing last rejection"
    assert lines[0].split() == words.split(" ")
    assert lines[3].split() == ["c", "offline", "never", "0", "0", "0", "0", "0"]


def test_an_old_last_will_does_not_count_as_heard(store: RunStore, call: Call) -> None:
    keeper = PresenceKeeper(store)
    keeper(events.MessageCame("a", "Presence", False))
    keeper(events.MessageCame("b", "Offer", None))
    keeper.keep()
    found = {facts["device"]: facts for facts in call("devices", "--json")}
    assert (found["a"]["online"], found["a"]["last_seen_ms"]) == (False, NOW_MS - 3_000)
    assert found["b"]["last_seen_ms"] >= NOW_MS


def test_presence_is_not_written_for_every_message(store: RunStore) -> None:
    keeper = PresenceKeeper(store)
    before = store._database.total_changes
    for _ in range(1000):
        keeper(events.MessageCame("a", "Chunk", None))
        keeper.keep()
    assert store._database.total_changes - before < 10


# --- runs


def test_all_runs_are_listed_with_their_outcome(store: RunStore, tmp_path: Path, call: Call) -> None:
    other = RunStore(tmp_path / "runs" / "ants")
    other.started("ants", 5, NOW_MS)
    other.ended("ants", 8, "too few devices", NOW_MS)
    other.close()
    ants, bell = call("runs", "--json")
    assert (ants["run"], ants["state"], ants["code"], ants["reason"]) == ("ants", "stopped", 8, "too few devices")
    assert (bell["run"], bell["rounds_published"], bell["rounds_abandoned"]) == ("bell", 1, 0)
    assert "code 8: too few devices" in call("runs")


@pytest.mark.parametrize(("name", "state"), [("v1", ("unknown", None, 1)), ("v3", ("killed", 5, 1))])
def test_a_run_of_an_older_version_can_be_read(
    name: str, state: tuple[str, int | None, int], tmp_path: Path, call: Call
) -> None:
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    shutil.copy(OLD[name], folder / "coordinator.sqlite")
    place = ("--runs-dir", str(tmp_path / "runs"))
    facts = call("status", "--json", place=place)
    assert (facts["state"], facts["rounds_asked"], facts["rounds_published"]) == state
    assert facts["evaluation"] is None
    assert facts["round"]["number"] == 2
    assert [one["device"] for one in call("devices", "--json", place=place)] == ["a", "b"]


# --- several tasks


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[dict[str, RunStore]]:
    """Two tasks that were started, one that is only in the file."""
    text = CONFIG + "".join(f'[[tasks]]\nname = "{name}"\n' for name in ("x", "y", "z"))
    (tmp_path / "coordinator.toml").write_text(text)
    stores = {name: RunStore(tmp_path / "runs" / f"bell-{name}") for name in ("x", "y")}
    for name, store in stores.items():
        store.started(f"bell-{name}", 9, NOW_MS)
    yield stores
    for store in stores.values():
        store.close()


def evaluated(store: RunStore, run: str) -> None:
    plan = TrainingPlan(1, 0.5, evaluate=("loss", "accuracy"))
    invitation = Invitation(f"{run}.e4.abc", 4, NOW_MS, 600_000, BLOB, BLOB, plan, ("a",))
    store.open_round(run, invitation, RoundSettings(1, 20.0, 3.0, 8), NOW_MS)
    metrics = [FleetMetric("accuracy", 0.91, 0.93, 0.02, 3, 1), FleetMetric("loss", 0.4, 0.3, 0.1, 3, 1)]
    store.conclude(invitation.round_id, Phase.PUBLISHED, "", [DeviceVerdict("a", ACCEPTED)], None, metrics)


def test_status_is_of_all_tasks_or_of_one(tasks: dict[str, RunStore], call: Call) -> None:
    evaluated(tasks["y"], "bell-y")
    assert [one["run"] for one in call("status", "--json")] == ["bell-x", "bell-y"]
    facts = call("status", "--json", "--task", "y")
    assert (facts["run"], facts["rounds_published"], facts["rounds_asked"]) == ("bell-y", 0, 9)
    assert facts["evaluation"]["number"] == 4
    assert facts["evaluation"]["metrics"][1] == {
        "metric": "accuracy",
        "mean": 0.91,
        "median": 0.93,
        "spread": 0.02,
        "devices": 3,
        "held_out": 1,
    }
    (over,) = facts["last_rounds"]
    assert (over["kind"], over["number"], over["evaluation"]) == ("evaluation", 4, facts["evaluation"]["metrics"])
    text = call("status", "--task", "y")
    line = "loss 0.3 (mean 0.4, spread 0.1), accuracy 0.93 (mean 0.91, spread 0.02), 1 of 3 on held-out data"
    assert f"evaluation of round 4: {line}" in text
    assert f"evaluation of round 4 published: 1 of 1 updates, {line}" in text
    assert "loss 0.3 accuracy 0.93 (round 4)" in call("runs")
    assert call("status", "--json", "--run", "bell-x")["run"] == "bell-x"
    assert list(call("devices", "--json")) == ["bell-x", "bell-y"]
    assert [one["device"] for one in call("devices", "--json", "--task", "x")] == ["a", "b", "c"]


def test_orders_are_for_all_tasks_or_for_one(tasks: dict[str, RunStore], call: Call) -> None:
    call("pause", "--task", "y", "--reason", "wet")
    paused = {name: Orders(store.folder).paused() is not None for name, store in tasks.items()}
    assert paused == {"x": False, "y": True}
    assert call("resume").splitlines() == [
        "bell-x was not paused",
        "bell-y goes on; no coordinator runs now, so this holds from its next start",
    ]
    call("abort", "--task", "x")
    assert "bell-y is paused" in call("pause")
    assert Orders(tasks["x"].folder).paused() is None  # over for good


def test_an_abort_names_its_task(tasks: dict[str, RunStore], call: Call) -> None:
    with pytest.raises(errors.ConfigError, match="has 3 tasks; say which with --task"):
        call("abort")
    with pytest.raises(errors.ConfigError, match=r"has no task 'w'; it has x, y, z"):
        call("status", "--task", "w")
    with pytest.raises(errors.StorageError, match="there is no run in"):
        call("abort", "--task", "z")
    with pytest.raises(errors.ConfigError, match="--task with --runs-dir"):
        call("status", "--task", "x", place=("--runs-dir", "runs"))


# --- errors


def test_no_store_is_said_with_a_remedy(tmp_path: Path, call: Call) -> None:
    (tmp_path / "coordinator.toml").write_text(CONFIG)
    for name in ("status", "devices", "runs", "pause", "resume", "abort"):
        with pytest.raises(errors.StorageError, match=r"there is no run in .*; check --config"):
            call(name)


def test_a_store_of_a_newer_version_is_refused_in_words(store: RunStore, call: Call) -> None:
    store._database.execute("PRAGMA user_version = 99")
    for name in ("status", "devices", "runs"):
        with pytest.raises(errors.StorageError, match="has version 99, this covey knows"):
            call(name)


def test_a_file_that_is_no_database_is_a_storage_error(tmp_path: Path, call: Call) -> None:
    (tmp_path / "coordinator.toml").write_text(CONFIG)
    (tmp_path / "runs" / "bell").mkdir(parents=True)
    (tmp_path / "runs" / "bell" / "coordinator.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(errors.StorageError, match="cannot be read"):
        call("status")


def test_several_runs_ask_for_a_name(store: RunStore, tmp_path: Path, call: Call) -> None:
    RunStore(tmp_path / "runs" / "ants").close()
    place = ("--runs-dir", str(tmp_path / "runs"))
    with pytest.raises(errors.ConfigError, match="add --run: ants, bell"):
        call("status", place=place)
    assert call("status", "--run", "ants", "--json", place=place)["state"] == "unknown"


# --- orders


def test_a_pause_holds_until_it_is_lifted(store: RunStore, call: Call) -> None:
    assert "no coordinator runs now" in call("pause", "--reason", "holidays")
    order = Orders(store.folder).paused()  # as another start of a coordinator reads it
    assert order is not None
    assert order.told("paused") == "paused: holidays"
    assert call("resume").startswith("bell goes on")
    assert Orders(store.folder).paused() is None
    assert call("resume") == "bell was not paused\n"


def test_an_abort_is_for_good_and_keeps_its_first_reason(store: RunStore, call: Call) -> None:
    call("abort", "--reason", "wrong data")
    call("abort", "--reason", "another one")
    aborted = Orders(store.folder).aborted()
    assert aborted is not None
    assert aborted.reason == "wrong data"
    for name in ("pause", "resume"):
        with pytest.raises(errors.ConfigError, match="an abort is for good"):
            call(name)


def test_an_abort_beside_a_pause_stands(store: RunStore, call: Call) -> None:
    call("pause")
    call("abort", "--reason", "wrong data")
    orders = Orders(store.folder)
    assert orders.paused() is not None
    assert orders.aborted() is not None


def test_a_damaged_order_still_stands(store: RunStore) -> None:
    (store.folder / "aborted.json").write_bytes(b"")
    aborted = Orders(store.folder).aborted()
    assert aborted is not None
    assert aborted.reason == "aborted.json cannot be read"


def test_an_endless_reason_is_refused(store: RunStore) -> None:
    with pytest.raises(errors.ConfigError, match="a reason of 201 characters"):
        Orders(store.folder).pause("x" * 201)


# --- revoking


def test_a_revocation_is_of_the_fleet_and_listed_with_its_reason(store: RunStore, tmp_path: Path, call: Call) -> None:
    said = call("revoke", "b", "--reason", "stolen\n on Monday")
    assert said == "b is revoked; no coordinator runs now, so this holds from its next start\n"
    call("revoke", "b", "--reason", "another reason")  # the first stays
    revocations = Revocations(tmp_path / "runs", "home")
    assert revocations.reasons() == {"b": "revoked: stolen on Monday"}
    found = {facts["device"]: facts["revoked"] for facts in call("devices", "--json")}
    assert {name for name, order in found.items() if order is not None} == {"b"}
    assert found["b"]["reason"] == "stolen on Monday"
    (line,) = (line for line in call("devices").splitlines() if line.startswith("b "))
    assert " revoked " in line
    assert line.endswith("ago: stolen on Monday")
    assert call("readmit", "b").startswith("b is readmitted")
    assert call("readmit", "b") == "b was not revoked\n"
    assert revocations.standing() == {}


def test_a_mistyped_device_is_not_revoked(store: RunStore, tmp_path: Path, call: Call) -> None:
    with pytest.raises(errors.ConfigError, match="did you mean 'b'"):
        call("revoke", "bb")
    assert not (tmp_path / "runs" / "home.revoked").exists()


def test_a_damaged_revocation_still_stands(tmp_path: Path) -> None:
    revocations = Revocations(tmp_path, "home")
    revocations.revoke("b")
    (tmp_path / "home.revoked" / "b.json").write_bytes(b"{")
    assert revocations.reasons() == {"b": "revoked: b.json cannot be read"}


def test_a_running_coordinator_sees_a_revocation_after_an_instant(tmp_path: Path) -> None:
    running, operator = Revocations(tmp_path, "home"), Revocations(tmp_path, "home")
    assert running.reasons() == {}
    operator.revoke("b", "stolen")
    time.sleep(1.5 * LOOK_S)
    assert running.reasons() == {"b": "revoked: stolen"}
    operator.readmit("b")
    time.sleep(1.5 * LOOK_S)
    assert running.reasons() == {}


def test_the_commands_import_no_tensorflow() -> None:
    script = "import covey_coordinator.watching.commands, sys; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
