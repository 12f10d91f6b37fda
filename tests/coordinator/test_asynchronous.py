"""Rounds with a goal and asynchronous rounds as an operator runs them: real agents, one of them slow, a real broker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from clinic import IDS, Clinic, check, digits_shards, make_clinic, run_with_kills
from patience import PATIENCE_S

from covey_coordinator.demo.devices import Shard
from covey_protocol.messages import Invitation, Offer
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

SLOW = "ward-3"
LATE = "SELECT id, staleness, status FROM devices WHERE origin IS NOT NULL AND sha256 NOTNULL"


@pytest.fixture
def clinic(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Clinic]:
    """One device has ten times the data of the others."""
    shards = digits_shards()
    few = {name: Shard(one.x[:60], one.y[:60]) for name, one in shards.items() if name != SLOW}
    made = make_clinic(tmp_path, digits_bundle, coordinator_key, {**shards, **few})
    yield made
    made.stop()


def run_to_the_end(clinic: Clinic, kill_at: int = 0) -> None:
    for name in ("broker", *IDS, "serve"):
        if name not in clinic.running:
            clinic.start(name)
    end = time.monotonic() + 3 * PATIENCE_S
    while not clinic.done():
        assert time.monotonic() < end, clinic.story()
        if kill_at and not clinic.kills["serve"] and len(clinic.rows("SELECT id FROM rounds")) >= kill_at:
            clinic.kill("serve")
        clinic.keep_running()
        time.sleep(0.05)


# every day: tests/protocol/test_late_updates has the goal and the reason, test_clean_room_rounds a goal over a broker
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_round_ends_at_its_goal_and_who_was_slow_is_told(
    clinic: Clinic,
    digits_bundle: bytes,
) -> None:
    clinic.configure(2, epochs=60, goal=2, pause_s=0.2)
    run_to_the_end(clinic)
    check(clinic, digits_bundle, 2)
    assert clinic.rows(LATE) == []
    missing = clinic.rows("SELECT why FROM devices WHERE status = 'missing'")
    assert {why for (why,) in missing} == {"2 updates came before its own"}


@pytest.mark.slow  # tests/simulation has asynchronous rounds with restarts every day
@pytest.mark.timeout(900)
def test_a_slow_device_takes_part_in_asynchronous_rounds_also_over_a_restart(
    clinic: Clinic,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    tmp_path: Path,
) -> None:
    """Updates travel compressed and encrypted: each is read by its own round's seed and key."""
    wire = 'encryption = true\ncompression = "rotated-8bit"'
    clinic.configure(15, epochs=60, goal=2, max_staleness=15, pause_s=0.3, wire=wire)
    record = tmp_path / "rounds.jsonl"
    covey = [sys.executable, "-m", "covey_edge", "protocol"]
    clinic.start("broker")
    url = f"mqtt://127.0.0.1:{clinic.port}"
    recorder = subprocess.Popen([*covey, "record", "--broker", url, "--fleet", "clinic", "--output", str(record)])
    try:
        end = time.monotonic() + PATIENCE_S
        while not record.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        run_to_the_end(clinic, kill_at=5)
    finally:
        recorder.send_signal(signal.SIGINT)
        recorder.wait(PATIENCE_S)
    check(clinic, digits_bundle, 15)
    late = clinic.rows(LATE)
    assert [(staleness > 0, status) for name, staleness, status in late if name == SLOW] != [], clinic.story()
    assert {status for name, _, status in late if name == SLOW} == {"accepted"}
    of_each = clinic.rows("SELECT count(*) FROM devices WHERE sha256 NOTNULL GROUP BY round")
    assert {count for (count,) in of_each} == {2}
    judged = subprocess.run(
        [*covey, "check", str(record), "--coordinator-key", coordinator_key.public.hex()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert " 0 violations" in judged.stdout, judged.stdout[-3000:]
    whose = {
        msgspec.msgpack.decode(offer, type=Offer).round_id
        for (offer,) in clinic.rows("SELECT offer FROM devices WHERE origin IS NOT NULL AND offer NOTNULL")
    }
    named = {
        earlier
        for (data,) in clinic.rows("SELECT invitation FROM rounds")
        for earlier in msgspec.msgpack.decode(data, type=Invitation).earlier
    }
    assert whose <= named


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_asynchronous_rounds_survive_kills_of_everything(
    clinic: Clinic,
    digits_bundle: bytes,
) -> None:
    clinic.configure(8, goal=2, max_staleness=5)
    run_with_kills(clinic, 8, seed=3, most_kills=12)
    check(clinic, digits_bundle, 8)
