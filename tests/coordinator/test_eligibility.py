"""Who is invited: those who can, those who are meant, all of them or the same sample every time."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scripted import Scripted, manifest_of

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.eligibility import Eligible, eligible, sampled
from covey_coordinator.orders import Orders
from covey_coordinator.serve import CoordinatorConfig, RoundSettings, Task, Work, run_tasks
from covey_coordinator.store import RunStore
from covey_edge.config import BrokerSettings
from covey_protocol.bundle import write_bundle
from covey_protocol.errors import RunError
from covey_protocol.messages import Invitation
from covey_protocol.parameters import ParameterSpec
from covey_protocol.seals import SealingKey

IDS = [f"pi-{number}" for number in range(10)]


def silent(invitation: Invitation) -> bytes:
    return b""


# --- who can and who is meant

FLEET = Scripted(dict.fromkeys("abcd", silent), capabilities={"b": ("train", "float32"), "c": (), "d": ("train",)})
CHOICES: dict[str, tuple[dict[str, Any], list[str], dict[str, str]]] = {
    "what all can": ({"requires": ("train",)}, ["a", "b", "c", "d"], {}),
    "what some lack": (
        {"requires": ("train", "float32", "top-k")},
        ["a", "c"],  # c has not said what it can
        {"b": "cannot top-k", "d": "cannot float32, top-k"},
    ),
    "only some": ({"only": ("a", "d", "z")}, ["a", "d"], {"b": "is not meant", "c": "is not meant"}),
    "all but some": ({"exclude": ("a",)}, ["b", "c", "d"], {"a": "is not meant"}),
}


@pytest.mark.parametrize("what", CHOICES)
def test_invited_for(what: str) -> None:
    asked, devices, others = CHOICES[what]
    found = eligible(FLEET, **{"requires": (), "only": (), "exclude": (), **asked})
    assert (found.devices, found.others) == (devices, others)


def test_many_who_cannot_are_said_in_one_line() -> None:
    found = Eligible([], dict.fromkeys(IDS, "cannot evaluate"))
    assert found.told() == ", ".join([*(f"pi-{n} cannot evaluate" for n in range(5)), "and 5 more"])
    assert Eligible(["a"]).told() == ""


# --- samples


def test_a_sample_is_the_same_for_the_same_numbers_and_another_for_others() -> None:
    first = sampled(IDS, 4, 7, "run", 1, 0)
    assert first == sampled(reversed(IDS), 4, 7, "run", 1, 0) == sorted(first)
    assert len(set(first)) == 4
    others = [(8, "run", 1, 0), (7, "nur", 1, 0), (7, "run", 2, 0), (7, "run", 1, 1)]
    assert all(sampled(IDS, 4, *numbers) != first for numbers in others)
    assert first == ["pi-2", "pi-4", "pi-6", "pi-8"]  # of any covey, on any machine


def test_none_and_too_many_mean_all() -> None:
    assert sampled(IDS, 0, 0, "run", 1, 0) == sampled(IDS, 99, 0, "run", 1, 0) == IDS


def test_one_device_less_changes_one_of_a_sample_at_most() -> None:
    for number in range(50):
        before = set(sampled(IDS, 4, 0, "run", number, 0))
        after = set(sampled(IDS[1:], 4, 0, "run", number, 0))
        assert len(before & after) >= 3


def test_every_device_is_sampled_about_as_often() -> None:
    rounds = 2000
    counts = Counter(name for number in range(rounds) for name in sampled(IDS, 3, 1, "run", number, 0))
    expected = rounds * 3 / 10
    assert statistics.mean(counts.values()) == expected
    assert max(abs(count - expected) for count in counts.values()) < 5 * (expected * 0.7) ** 0.5  # five deviations
    together = [itertools.combinations(sampled(IDS, 3, 1, "run", number, 0), 2) for number in range(rounds)]
    assert len(set(itertools.chain(*together))) == 45  # every pair comes up: nobody is tied to anybody


# --- in a run

D = 3
MANIFEST = manifest_of(ParameterSpec("w", (D,)))
BUNDLE = write_bundle(MANIFEST, b"model", SealingKey.from_seed(bytes(32)))
ROUND = RoundSettings(devices=4, quorum=2, duration_s=5.0, answer_s=0.2, grace_s=0.1, wait_s=0.5)
replace = msgspec.structs.replace


def update(value: float) -> Any:
    return lambda invitation: np.full(D, value, "<f4").tobytes()


def run(folder: Path, fleet: Scripted, settings: RoundSettings, rounds: int = 3) -> list[str]:
    config = CoordinatorConfig(
        fleet="home",
        run="run",
        bundle="",
        key_file="",
        rounds=rounds,
        broker=BrokerSettings(url="mqtt://nowhere"),
        devices={},
        round=settings,
    )
    store, lines = RunStore(folder / "run"), []
    try:
        engine = make_engine("direct", make_rule("mean"), MANIFEST.parameters)
        work = Work(config, BUNDLE, np.zeros(D, np.float32))
        coordinator = Coordinator(fleet, store, leave_open=True)
        run_tasks([Task(coordinator, engine, work, lines.append, Orders(store.folder))])
    finally:
        store.close()
    return lines


def fleet(**options: Any) -> Scripted:
    return Scripted({name: update(place + 1) for place, name in enumerate(IDS)}, **options)


def test_a_round_invites_its_sample_and_no_other(tmp_path: Path) -> None:
    devices = fleet()
    run(tmp_path, devices, replace(ROUND, sample=3))
    invited = [one.devices for one in devices.invitations]
    assert invited == [tuple(sampled(IDS, 3, 0, "run", number, 0)) for number in (1, 2, 3)]
    assert len(set(invited)) > 1


def test_an_abandoned_round_is_repeated_with_another_sample(tmp_path: Path) -> None:
    devices = fleet()
    first = sampled(IDS, 3, 0, "run", 1, 0)
    for name in first[:2]:
        devices.make[name] = lambda invitation: b"no"  # of a wrong size
    run(tmp_path, devices, replace(ROUND, sample=3), rounds=1)
    assert [one.devices for one in devices.invitations][:2] == [
        tuple(first),
        tuple(sampled(IDS, 3, 0, "run", 1, 1)),
    ]


def test_who_cannot_is_not_invited_and_named_while_we_wait(tmp_path: Path) -> None:
    able = fleet(capabilities=dict.fromkeys(IDS[:3], ("float32",)))
    run(tmp_path, able, ROUND, rounds=1)
    assert able.invitations[0].devices == tuple(IDS[3:])
    few = fleet(capabilities=dict.fromkeys(IDS[:7], ("float32",)))
    with pytest.raises(RunError, match=r"only 3 of 4 devices came online within 0\.5 s") as caught:
        run(tmp_path / "few", few, ROUND, rounds=1)
    assert "not invited: pi-0 cannot train, pi-1 cannot train" in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert few.invitations == []


def test_only_and_exclude_choose_devices_by_name(tmp_path: Path) -> None:
    devices = fleet()
    run(tmp_path, devices, replace(ROUND, only=tuple(IDS[:6]), exclude=("pi-0",)), rounds=1)
    assert devices.invitations[0].devices == tuple(IDS[1:6])
