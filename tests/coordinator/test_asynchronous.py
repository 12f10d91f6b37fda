"""Rounds with a goal and asynchronous rounds as an operator runs them: real agents, one of them slow, a real broker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from coordinator.test_kills import Clinic, check, clinic, rows, run_with_kills, story  # noqa: F401 - a fixture
from patience import PATIENCE_S

from covey_protocol.messages import Invitation, Offer
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

SLOW = "ward-3"
LATE = "SELECT id, staleness, status FROM devices WHERE origin IS NOT NULL AND sha256 NOTNULL"


def give_most_data_to(clinic: Clinic, name: str) -> None:  # noqa: F811
    """The others keep 60 examples."""
    for path in clinic.folder.glob("ward-*/*.npz"):
        arrays = dict(np.load(path))
        few = {key: value if path.parent.name == name else value[:60] for key, value in arrays.items()}
        np.savez(path, **few)


def configure(clinic: Clinic, rounds: int, epochs: int, *more: str) -> None:  # noqa: F811
    text = (clinic.folder / "template").read_text().replace("{rounds}", str(rounds)).replace("{epochs}", str(epochs))
    lines = "\n".join(("quorum = 2", *more))
    (clinic.folder / "coordinator.toml").write_text(text.replace("quorum = 2", lines))


def add_table(clinic: Clinic, table: str) -> None:  # noqa: F811
    path = clinic.folder / "coordinator.toml"
    path.write_text(path.read_text().replace("[devices]", f"{table}\n[devices]"))


def run_to_the_end(clinic: Clinic, kill_at: int = 0) -> None:  # noqa: F811
    for name in ("broker", "ward-1", "ward-2", "ward-3", "serve"):
        if name not in clinic.running:
            clinic.start(name)
    end = time.monotonic() + 3 * PATIENCE_S
    while not clinic.done():
        assert time.monotonic() < end, story(clinic)
        if kill_at and not clinic.kills["serve"] and len(rows(clinic, "SELECT id FROM rounds")) >= kill_at:
            clinic.kill("serve")
        clinic.keep_running()
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_a_round_ends_at_its_goal_and_who_was_slow_is_told(
    clinic: Clinic,  # noqa: F811
    digits_bundle: bytes,
) -> None:
    give_most_data_to(clinic, SLOW)
    configure(clinic, 2, 60, "goal = 2", "pause_s = 0.2")
    run_to_the_end(clinic)
    check(clinic, digits_bundle, 2)
    assert rows(clinic, LATE) == []
    missing = rows(clinic, "SELECT why FROM devices WHERE status = 'missing'")
    assert {why for (why,) in missing} == {"2 updates came before its own"}


@pytest.mark.timeout(900)
def test_a_slow_device_takes_part_in_asynchronous_rounds_also_over_a_restart(
    clinic: Clinic,  # noqa: F811
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    tmp_path: Path,
) -> None:
    """Updates travel compressed and encrypted: each is read by its own round's seed and key."""
    give_most_data_to(clinic, SLOW)
    configure(clinic, 15, 60, "goal = 2", "max_staleness = 15", "pause_s = 0.3")
    add_table(clinic, '[wire]\nencryption = true\ncompression = "rotated-8bit"')
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
    late = rows(clinic, LATE)
    assert [(staleness > 0, status) for name, staleness, status in late if name == SLOW] != [], story(clinic)
    assert {status for name, _, status in late if name == SLOW} == {"accepted"}
    of_each = rows(clinic, "SELECT count(*) FROM devices WHERE sha256 NOTNULL GROUP BY round")
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
        for (offer,) in rows(clinic, "SELECT offer FROM devices WHERE origin IS NOT NULL AND offer NOTNULL")
    }
    named = {
        earlier
        for (data,) in rows(clinic, "SELECT invitation FROM rounds")
        for earlier in msgspec.msgpack.decode(data, type=Invitation).earlier
    }
    assert whose <= named


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_asynchronous_rounds_survive_kills_of_everything(
    clinic: Clinic,  # noqa: F811
    digits_bundle: bytes,
) -> None:
    template = clinic.folder / "template"
    template.write_text(template.read_text().replace("quorum = 2", "quorum = 2\ngoal = 2\nmax_staleness = 5"))
    run_with_kills(clinic, rounds=8, epochs=100, seed=3, most_kills=12)
    check(clinic, digits_bundle, 8)
