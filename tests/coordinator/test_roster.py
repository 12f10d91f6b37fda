"""The roster of a running coordinator: taken up when the file has settled, and never a wrong one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from covey_coordinator import roster as module
from covey_coordinator.roster import Roster, RosterFile
from covey_edge.config import read_roster
from covey_edge.retired import RetiredKeys
from covey_protocol import codec
from covey_protocol.errors import NotSealed
from covey_protocol.messages import Answer
from covey_protocol.seals import SealingKey

OLD, NEW, OTHER = (SealingKey.from_seed(bytes([number]) * 32) for number in range(3))
TOPIC = "covey/1/f/device/a/up"


def hear(roster: Roster, key: SealingKey, number: int = 1) -> bool:
    """Whether a message of device a under this key is new to the roster's ring."""
    data = codec.encode(Answer("r", True), topic=TOPIC, sender="a", sequence=number, key=key)
    ring = roster.ring("a")
    assert ring is not None
    return ring.is_new(ring.take(lambda one: codec.decode_from_device(data, topic=TOPIC, sender="a", key=one)))


def test_a_key_retired_by_one_coordinator_is_refused_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "f.retired.json"
    keys = {"a": (OLD.public, NEW.public)}
    assert hear(Roster(keys, RetiredKeys(path)), NEW)
    again = Roster(keys, RetiredKeys(path))
    with pytest.raises(NotSealed):
        hear(again, OLD, 2)
    assert hear(again, NEW, 2)


def test_a_roster_with_only_the_retired_key_does_not_bring_it_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "f.retired.json"
    assert hear(Roster({"a": (OLD.public, NEW.public)}, RetiredKeys(path)), NEW)
    roster = Roster({"a": OLD.public}, RetiredKeys(path))
    with pytest.raises(NotSealed):
        hear(roster, OLD, 2)
    assert "a is not heard: every key that the roster has for it is retired" in caplog.text


def test_another_roster_says_what_is_different_and_keeps_what_was_heard() -> None:
    roster = Roster({"a": OLD.public, "b": OTHER.public, "c": OTHER.public})
    assert hear(roster, OLD, 7)
    said = roster.replace({"a": (OLD.public, NEW.public), "b": OTHER.public, "d": NEW.public})
    assert said == [
        "a has other keys in the roster: 2",
        "d is new in the roster",
        "c is no longer in the roster",
    ]
    assert ("c" in roster, "d" in roster) == (False, True)
    assert not hear(roster, OLD, 7)
    assert hear(roster, NEW, 8)
    with pytest.raises(NotSealed):
        hear(roster, OLD, 9)


# --- the file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def write(path: Path, *lines: str, more: str = "") -> None:
    path.write_text("\n".join(['fleet = "f"', "[devices]", *lines, more]))


def one(name: str, *keys: SealingKey) -> str:
    quoted = ", ".join(f'"{key.public.hex()}"' for key in keys)
    return f"{name} = [{quoted}]" if len(keys) > 1 else f"{name} = {quoted}"


def looks(file: RosterFile, roster: Roster, clock: Any, times: int = 2) -> None:
    for _ in range(times):
        clock.now += module.LOOK_S
        file.renew(roster)


def test_a_changed_file_is_taken_up_once_it_has_settled(tmp_path: Path, clock: Any) -> None:
    path = tmp_path / "coordinator.toml"
    write(path, one("a", OLD))
    file, roster = RosterFile(path), Roster(read_roster(path))
    looks(file, roster, clock, 3)
    write(path, one("a", OLD, NEW), one("b", OTHER))
    looks(file, roster, clock, 1)
    assert "b" not in roster  # it may be half written
    looks(file, roster, clock, 1)
    assert "b" in roster
    assert hear(roster, NEW)


def test_it_looks_at_most_once_a_second(tmp_path: Path, clock: Any) -> None:
    path = tmp_path / "coordinator.toml"
    write(path, one("a", OLD))
    file, roster = RosterFile(path), Roster(read_roster(path))
    write(path, one("b", OLD))
    for _ in range(20):
        file.renew(roster)
    assert "a" in roster


WRONG = {
    "a key that is none": one("a", OLD).replace('"', '"zz', 1),
    "no TOML": "a = ",
    "a device id that is none": f'"a b" = "{OLD.public.hex()}"',
    "three keys": one("a", OLD, NEW, OTHER),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_logged_once_and_the_old_roster_stays(
    what: str, tmp_path: Path, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "coordinator.toml"
    write(path, one("a", OLD))
    file, roster = RosterFile(path), Roster(read_roster(path))
    write(path, WRONG[what])
    with caplog.at_level(logging.ERROR):
        looks(file, roster, clock, 6)
    assert caplog.text.count("the roster stays as it was") == 1
    assert hear(roster, OLD)
    write(path, one("a", NEW), more="# mended")
    looks(file, roster, clock)
    assert hear(roster, NEW)


def test_a_file_that_is_gone_changes_nothing(tmp_path: Path, clock: Any) -> None:
    path = tmp_path / "coordinator.toml"
    write(path, one("a", OLD))
    file, roster = RosterFile(path), Roster(read_roster(path))
    path.unlink()
    looks(file, roster, clock, 4)
    assert "a" in roster
