"""A disk that is really full, with real processes and a real Mosquitto: nothing acknowledged is lost.

Who is asked to free some space is told where. Afterwards the run goes on and ends as if nothing had been.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from clinic import IDS, Clinic, check, make_clinic
from patience import PATIENCE_S
from small_disk import SmallDisk

from covey_coordinator.demo.devices import Shard
from covey_protocol import errors
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

EXAMPLES = {"ward-1": 64, "ward-2": 1000, "ward-3": 1000}  # the first delivers long before the others
D = 64 * 1500 + 1500 + 1500 * 10 + 10  # an update has 450 KB, a checkpoint of Adam three times that


@pytest.fixture(scope="module")
def wide_bundle(coordinator_key: SealingKey) -> bytes:
    import tensorflow as tf

    import covey_models

    layers = [tf.keras.layers.InputLayer((64,)), tf.keras.layers.Dense(1500, "relu"), tf.keras.layers.Dense(10)]
    model = tf.keras.Sequential(layers)
    return covey_models.export(model, name="wide", batch_size=16, num_classes=10, seed=0, key=coordinator_key)


@pytest.fixture
def clinic(tmp_path: Path, wide_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Clinic]:
    rng = np.random.default_rng(0)
    shards = {
        name: Shard(rng.random((count, 64), np.float32), rng.integers(0, 10, count, np.int32))
        for name, count in EXAMPLES.items()
    }
    made = make_clinic(tmp_path, wide_bundle, coordinator_key, shards)
    yield made
    made.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], SmallDisk]]:
    """Puts a folder of the clinic on a disk of its own."""
    made: list[SmallDisk] = []

    def put(name: str) -> SmallDisk:
        made.append(SmallDisk(tmp_path / name, 64 * 2**20))
        return made[-1]

    yield put
    for disk in made:
        disk.close()


def until(clinic: Clinic, what: str, holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, f"{what}\n{clinic.story()}"
        time.sleep(0.02)


def phases(clinic: Clinic) -> dict[object, object]:
    """The newest round of each number -> its phase."""
    return dict(clinic.rows("SELECT number, phase FROM rounds ORDER BY rowid"))


def progress(clinic: Clinic, number: int) -> dict[object, object]:
    query = "SELECT d.id, d.progress FROM devices d JOIN rounds r ON r.id = d.round WHERE r.number = "
    return dict(clinic.rows(f"{query} {number}"))


def ended(clinic: Clinic, name: str) -> int:
    until(clinic, f"{name} does not end", lambda: clinic.running[name].poll() is not None)
    return clinic.running[name].returncode


def last_line(clinic: Clinic, name: str) -> str:
    assert "Traceback" not in clinic.log(name)
    return clinic.log(name).strip().splitlines()[-1]


def on_a_small_disk(clinic: Clinic, disk: SmallDisk, **changes: object) -> None:
    """The coordinator's runs, and everything started."""
    clinic.before["serve"], clinic.runs = disk.before, clinic.folder / "small"
    clinic.configure(3, runs_dir="small", quorum=3, duration_s=600, answer_s=200, grace_s=100, **changes)
    for name in ("broker", *IDS, "serve"):
        clinic.start(name)


def taken_off(clinic: Clinic, disk: SmallDisk) -> None:
    """What the coordinator left is copied to where this process can open it."""
    shutil.copytree(disk.seen, clinic.folder / "copy")
    del clinic.before["serve"]
    clinic.runs = clinic.folder / "copy"


def test_a_coordinator_whose_disk_fills_while_updates_come_in_loses_none_that_it_acknowledged(
    clinic: Clinic, small_disk: Callable[[str], SmallDisk], wide_bundle: bytes
) -> None:
    disk = small_disk("small")
    on_a_small_disk(clinic, disk, epochs=25)
    until(clinic, "no update of round 2 is stored", lambda: "stored" in progress(clinic, 2).values())
    disk.fill(leave=100_000)
    assert ended(clinic, "serve") == errors.EXIT_STORAGE
    assert "free some space" in last_line(clinic, "serve")
    assert str(clinic.folder / "small") in last_line(clinic, "serve")
    acknowledged = clinic.rows("SELECT id, round, sha256 FROM devices WHERE progress = 'stored'")
    assert progress(clinic, 2)["ward-1"] == "stored"
    assert phases(clinic)[2] == "inviting"
    disk.fill()
    clinic.start("serve")  # a service manager tries again, the disk is still full
    assert ended(clinic, "serve") == errors.EXIT_STORAGE
    assert "free some space" in last_line(clinic, "serve")
    disk.free()
    clinic.start("serve")
    assert ended(clinic, "serve") == errors.EXIT_OK, clinic.story()
    assert set(acknowledged) <= set(clinic.rows("SELECT id, round, sha256 FROM devices WHERE status = 'accepted'"))
    assert clinic.log("serve").count("round 2/3 published: 3 of 3 updates") == 1
    taken_off(clinic, disk)
    check(clinic, wide_bundle, 3)


@pytest.mark.slow
def test_a_coordinator_whose_disk_is_full_at_the_end_of_a_round_ends_it_to_the_same_bits_later(
    clinic: Clinic, small_disk: Callable[[str], SmallDisk], wide_bundle: bytes
) -> None:
    disk = small_disk("small")
    on_a_small_disk(clinic, disk, epochs=25, wire='compression = "top-k"\nkept_fraction = 0.001')
    until(clinic, "nobody works for round 2", lambda: "accepted" in progress(clinic, 2).values())
    disk.fill(leave=4 * D - 10_000)  # room for many small updates, not for the model
    assert ended(clinic, "serve") == errors.EXIT_STORAGE
    assert f"cannot write {clinic.folder}/small/digits/checkpoints/digits/round-00002.f32" in last_line(clinic, "serve")
    assert "No space left on device" in last_line(clinic, "serve")
    assert "free some space" in last_line(clinic, "serve")
    assert phases(clinic)[2] == "aggregating"
    assert set(progress(clinic, 2).values()) == {"stored"}
    assert (
        clinic.rows("SELECT * FROM devices d JOIN rounds r ON r.id = d.round WHERE number = 2 AND status NOTNULL") == []
    )
    disk.free()
    clinic.start("serve")
    assert ended(clinic, "serve") == errors.EXIT_OK, clinic.story()
    assert clinic.log("serve").count("round 2/3 published: 3 of 3 updates") == 1
    taken_off(clinic, disk)
    check(clinic, wide_bundle, 3)


def test_an_agent_whose_disk_is_full_says_so_and_takes_part_again_when_it_is_not(
    clinic: Clinic, small_disk: Callable[[str], SmallDisk], wide_bundle: bytes
) -> None:
    """It neither offers what it could not keep nor ends. First its update does not fit, then not even the model."""
    disk = small_disk("ward-2/state")
    clinic.before["ward-2"] = disk.before
    with (clinic.folder / "ward-2" / "agent.toml").open("a") as file:
        file.write("[conditions]\nmin_free_disk_mb = 0\n")  # or it would decline in time
    clinic.configure(5, duration_s=600, answer_s=200, grace_s=100, epochs=25)
    for name in ("broker", *IDS, "serve"):
        clinic.start(name)
    until(clinic, "nobody works for round 2", lambda: progress(clinic, 2).get("ward-2") == "accepted")
    blobs = disk.seen / "blobs"
    until(clinic, "the model of round 2 does not come", lambda: len(list(blobs.glob("?" * 64))) >= 3)
    disk.fill()
    until(clinic, "round 2 does not end", lambda: phases(clinic).get(2) == "published")
    until(clinic, "round 3 does not end", lambda: phases(clinic).get(3) == "published")
    disk.free()
    assert ended(clinic, "serve") == errors.EXIT_OK, clinic.story()
    reasons = dict(
        clinic.rows(
            "SELECT r.number, d.why FROM devices d JOIN rounds r ON r.id = d.round"
            " WHERE d.id = 'ward-2' AND d.status = 'missing'"
        )
    )
    state = clinic.folder / "ward-2" / "state"
    assert f"cannot write {state}/ledger.json" in clinic.log("ward-2")  # counted before it is kept
    assert f"cannot write {state}/blobs/" in clinic.log("ward-2")
    assert "free some space" in clinic.log("ward-2")
    for number in (2, 3):
        assert "No space left on device" in str(reasons[number])
        assert str(clinic.folder) not in str(reasons[number])
        assert clinic.log("serve").count(f"round {number}/5 published: 2 of 3 updates") == 1
    assert clinic.log("serve").count("published: 3 of 3 updates") >= 2
    assert clinic.running["ward-2"].poll() is None  # without a new start
    assert "Traceback" not in clinic.log("ward-2")
    check(clinic, wide_bundle, 5)


def test_an_agent_that_is_started_on_a_full_disk_ends_with_a_word_about_it(
    clinic: Clinic, small_disk: Callable[[str], SmallDisk]
) -> None:
    disk = small_disk("ward-1/state")
    clinic.before["ward-1"] = disk.before
    disk.fill()
    clinic.start("broker")
    clinic.start("ward-1")
    assert ended(clinic, "ward-1") == errors.EXIT_STORAGE
    assert f"cannot write {clinic.folder / 'ward-1' / 'state'}" in last_line(clinic, "ward-1")
    assert "free some space" in last_line(clinic, "ward-1")
