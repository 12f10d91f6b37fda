"""`kill -9` of coordinator, agents and broker at random moments, with real processes and a real Mosquitto.

What must hold at the end: all rounds are published; every update that was acknowledged has a verdict, and its device
has heard it or still has the update in its outbox, so that it will ask; the model is, bit for bit, what the accepted
updates of each round make of the model before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clinic import IDS, Clinic, check, digits_shards, make_clinic, run_with_kills

from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]


@pytest.fixture
def clinic(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Clinic]:
    made = make_clinic(tmp_path, digits_bundle, coordinator_key, digits_shards())
    yield made
    made.stop()


@pytest.mark.timeout(900)
def test_rounds_survive_kills_of_everything(clinic: Clinic, digits_bundle: bytes) -> None:
    clinic.configure(3)
    run_with_kills(clinic, 3, seed=1, most_kills=6)
    assert clinic.kills["serve"] >= 1
    check(clinic, digits_bundle, 3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_rounds_survive_kills_of_everything(clinic: Clinic, digits_bundle: bytes) -> None:
    clinic.configure(50)
    run_with_kills(clinic, 50, seed=2, most_kills=90)
    assert min(clinic.kills[name] for name in ("serve", "broker", *IDS)) >= 3
    check(clinic, digits_bundle, 50)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_encrypted_round_survives_a_kill_of_the_coordinator(clinic: Clinic, digits_bundle: bytes) -> None:
    clinic.configure(1, wire='encryption = true\ncompression = "rotated-8bit"')
    run_with_kills(clinic, 1, seed=3, most_kills=1)
    assert clinic.kills["serve"] == 1
    check(clinic, digits_bundle, 1)


# --- compressed updates

COMPRESSED = {"rotated-4bit": 'compression = "rotated-4bit"', "top-k": 'compression = "top-k"\nkept_fraction = 0.05'}
ALL_AWAITED = {"quorum": 3, "duration_s": 600, "answer_s": 300, "grace_s": 300}  # whoever is killed is waited for


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_of_rotated_updates_survive_kills_of_everything(clinic: Clinic, digits_bundle: bytes) -> None:
    """The stored bytes are those that were acknowledged, and decode to the same bits after every restart."""
    clinic.configure(3, wire=COMPRESSED["rotated-4bit"])
    run_with_kills(clinic, 3, seed=3, most_kills=6)
    assert clinic.kills["serve"] >= 1
    check(clinic, digits_bundle, 3)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_top_k_with_kills_ends_in_the_bits_of_a_run_without(
    tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    """Models, and what every device withholds. Each update depends on all before it: one that was trained from the
    wrong withheld numbers, sent twice or lost would show."""
    rounds, ends = 4, []
    for name, most_kills in (("quiet", 0), ("killed", 8)):
        clinic = make_clinic(tmp_path / name, digits_bundle, coordinator_key, digits_shards())
        clinic.configure(rounds, wire=COMPRESSED["top-k"], **ALL_AWAITED)
        try:
            run_with_kills(clinic, rounds, seed=4, most_kills=most_kills, victims=["serve", *IDS, *IDS])
            check(clinic, digits_bundle, rounds)
        finally:
            clinic.stop()
        ends.append(clinic)
    killed = ends[1]
    assert killed.kills["serve"] >= 1
    assert sum(killed.kills[name] for name in IDS) >= 1
    for number in range(1, rounds + 1):
        models = [np.fromfile(one.checkpoint(number), "<f4") for one in ends]
        np.testing.assert_array_equal(*models)
    for name in IDS:
        withheld = [one.withheld(name) for one in ends]
        assert withheld[0].any()
        np.testing.assert_array_equal(*withheld)
