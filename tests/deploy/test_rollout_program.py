"""Rollouts over a real Mosquitto, with devices that are only what a rollout sees; and the journal under kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from brokers import RunningBroker, stop_broker
from click.testing import CliRunner
from fleet_broker import make_fleet
from patience import PATIENCE_S
from puppets import Puppets, write_roster
from release_helpers import MAKER, as_file, released, small_wheel

from covey_deploy import provisioning
from covey_deploy.cli_fleet import fleet_command
from covey_deploy.rollout import commands, journal, program
from covey_deploy.rollout.descriptions import sealed_rings
from covey_deploy.rollout.journal import Journal, alone, journals
from covey_deploy.rollout.program import Desk, Rollout, look
from covey_deploy.rollout.rings import Ring
from covey_deploy.rollout.state import Gates, Phase, Plan, Published, State, Stopping
from covey_deploy.rollout.status import rows, seen_now, status_text
from covey_edge import releasing
from covey_edge.config import read_roster
from covey_edge.mqtt import parse_broker
from covey_edge.releasing import publish_release
from covey_protocol.errors import ConfigError, RunError
from covey_protocol.releases import open_release, seal_release
from covey_protocol.seals import SealingKey

NAMES = ("attic", "barn", "cellar")
RINGS = ("canary=barn", "100%")
QUICK = Gates(soak_s=0.2)
SMALL = small_wheel()
RELEASE = as_file(released(SMALL), SMALL)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SETTLE_S", 0.3)
    monkeypatch.setattr(program, "TICK_S", 0.05)
    monkeypatch.setattr(program, "QUIET_S", 0.2)
    monkeypatch.setattr(releasing, "RETAINED_S", 0.2)


def desk_for(broker: RunningBroker, folder: Path) -> Desk:
    roster = read_roster(write_roster(folder / "roster.toml", NAMES))
    return Desk(parse_broker(broker.url), "home", roster, folder / "rollouts", MAKER.public)


@pytest.mark.broker
def test_a_release_goes_from_ring_to_ring_and_a_bad_one_stops(mosquitto: RunningBroker, tmp_path: Path) -> None:
    desk = desk_for(mosquitto, tmp_path)
    with Puppets(mosquitto, NAMES) as puppets:
        assert commands.roll_out(desk, RELEASE, RINGS, QUICK, MAKER).phase is Phase.FINISHED
        assert puppets.took[0] == ("barn", "9.0")
        assert sorted(puppets.took) == [(name, "9.0") for name in NAMES]

        worse = small_wheel("9.1")
        puppets.bad, puppets.took = ("barn",), []
        stopped = commands.roll_out(desk, as_file(released(worse), worse), RINGS, QUICK, MAKER)
        assert (stopped.phase, puppets.took) == (Phase.STOPPED, [("barn", "9.1")])
        assert "barn: it ended with code 1" in stopped.reason
        watch, there = look(desk)
        assert there is not None
        assert (there.version, there.share, there.devices or ()) == ("9.1", 0.0, ())
    with pytest.raises(RunError, match=r"9\.1 stopped"):
        commands.ended(desk, stopped)
    text = status_text(rows(watch, seen_now(desk.rollouts, watch, time.time())), there, watch.refused, time.time())
    assert "does not take 9.1; it ended with code 1" in text
    report = json.loads((journals(desk.rollouts)[-1] / "report.json").read_text())
    assert report["devices"] == {"barn": {"ring": "canary", "stand": "bad", "why": "it ended with code 1"}}


@pytest.mark.broker
def test_a_revoked_device_is_in_no_ring_and_is_shown_as_what_it_is(mosquitto: RunningBroker, tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "home", devices=("barn", "den"))
    provisioning.revoke(fleet.path, "den", "key-compromise")
    (tmp_path / "small.release").write_bytes(RELEASE)

    def said(*arguments: str) -> str:
        where = ["--fleet-folder", str(fleet.path), "--broker", mosquitto.url, "--release-key", MAKER.public.hex()]
        ended = CliRunner().invoke(fleet_command, [*arguments, *where])
        return ended.output if ended.exception is None else str(ended.exception)

    rollout = ("rollout", str(tmp_path / "small.release"), "--dry-run")
    assert "den is not in the roster, or revoked" in said(*rollout, "canary=den")
    assert "release 9.0 for home, 1 devices; nothing is published" in said(*rollout, "100%")
    status = said("status")
    assert [line.split()[0] for line in status.splitlines() if line.endswith("revoked")] == ["den"]
    assert "0 of 1 devices are online" in status


@pytest.mark.broker
def test_an_older_release_than_the_brokers_is_not_rolled_out(mosquitto: RunningBroker, tmp_path: Path) -> None:
    """Devices that have the newer one would count as healthy, and those that wait for it would get the older one."""
    desk, newer = desk_for(mosquitto, tmp_path), small_wheel("9.0.1")
    release = released(newer)
    publish_release(
        desk.broker, "home", seal_release(release, MAKER), release, [newer[1]], MAKER.public, lambda text: None
    )
    with pytest.raises(ConfigError, match=r"9\.0\.1 is on the broker, 9\.0 is older"):
        commands.roll_out(desk, RELEASE, RINGS, QUICK, MAKER)
    assert journals(desk.rollouts) == []


def test_who_looks_whether_a_rollout_is_open_cuts_no_line_of_it(tmp_path: Path) -> None:
    """Somebody else may be writing that line at this moment."""
    made = new_journal(tmp_path)
    path = made.folder / journal.JOURNAL
    with path.open("ab") as file:
        file.write(b'{"type":"opened"')
    before, desk = path.read_bytes(), Desk(parse_broker("mqtt://127.0.0.1:1"), "home", {}, tmp_path, MAKER.public)
    with pytest.raises(ConfigError, match="is not over"):
        commands.taken_back(desk, None, MAKER)
    assert path.read_bytes() == before


def new_journal(folder: Path) -> Journal:
    plan = Plan(fleet="home", version="9.0", serial=7, rings=(Ring("100%", (), 1.0),), gates=QUICK, roster=NAMES)
    return Journal.new(folder, plan, RELEASE, [b"a", b"b"], 1.0)


def test_a_torn_last_line_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    made = new_journal(tmp_path)
    made.add(Stopping(2.0, "enough"))
    path = made.folder / journal.JOURNAL
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        assert Journal.open(made.folder, mend=False).state.phase is Phase.BETWEEN
        assert path.read_bytes() == whole[:length]
        assert Journal.open(made.folder).state.phase is Phase.BETWEEN
        assert path.read_bytes() == whole[:first]
    path.write_bytes(whole[: first - 1])
    assert journals(tmp_path) == []  # it had not begun
    path.write_bytes(whole.replace(b"enough", b'eno"ugh'))
    with pytest.raises(ConfigError, match=r"journal\.jsonl, line 2"):
        Journal.open(made.folder)


def test_two_at_once_are_refused_and_an_open_rollout_is_not_forgotten(tmp_path: Path) -> None:
    desk = Desk(parse_broker("mqtt://127.0.0.1:1"), "home", {}, tmp_path, MAKER.public)
    with alone(tmp_path), pytest.raises(ConfigError, match="another rollout works"):
        commands.roll_out(desk, RELEASE, RINGS, QUICK, MAKER)
    made = new_journal(tmp_path)
    with pytest.raises(ConfigError, match=r"the rollout of 9\.0 is not over"):
        commands.roll_out(desk, RELEASE, RINGS, QUICK, MAKER)
    with pytest.raises(ConfigError, match="under way"):
        commands.resume(desk, {"max_failures": 3}, None)
    with alone(tmp_path):
        commands.stop(desk)  # who works on it finds the wish
    assert (tmp_path / journal.STOP).exists()
    assert Journal.open(made.folder).state.phase is Phase.BETWEEN


def test_a_strangers_key_begins_nothing(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(SealingKey.generate().pem())
    with pytest.raises(ConfigError, match="not the release key that this fleet pins"):
        commands.maker_key(tmp_path / "key.pem", MAKER.public)


# --- kills


DRIVER = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {here!r}]
from covey_deploy.rollout import journal, program
from covey_edge import releasing
program.SETTLE_S, program.TICK_S, program.QUIET_S, releasing.RETAINED_S = 0.3, 0.05, 0.2, 0.2
die_at, whole = int(sys.argv[1]), sys.argv[2] == "after"
real, written = journal.append_to, 0
def append_to(path, data, *, durable):
    global written
    written += 1
    if written == die_at and not whole:
        with open(path, "ab") as file:  # what a kill in the middle leaves
            file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    size = real(path, data, durable=durable)
    if written == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return size
journal.append_to = append_to
from covey_edge.cli import main
main(sys.argv[3:])
"""


def killed_at(place: int, when: str, arguments: list[str]) -> int:
    here = Path(__file__).parent
    code = DRIVER.format(tests=str(here.parent), here=str(here))
    command = [sys.executable, "-c", code, str(place), when, "fleet", "rollout", *arguments]
    return subprocess.run(command, check=False, timeout=PATIENCE_S, stdout=subprocess.DEVNULL).returncode


@pytest.fixture
def options(mosquitto: RunningBroker, tmp_path: Path) -> list[str]:
    roster = write_roster(tmp_path / "roster.toml", NAMES)
    (tmp_path / "maker.pem").write_bytes(MAKER.pem())
    (tmp_path / "r.covey-release").write_bytes(RELEASE)
    return [
        *("--broker", mosquitto.url, "--fleet", "home", "--roster", str(roster), "--release-key", MAKER.public.hex()),
        *("--rollouts", str(tmp_path / "rollouts"), "--key", str(tmp_path / "maker.pem")),
    ]


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.parametrize("when", ["after", "in"])
def test_a_kill_at_every_line_of_the_journal_changes_nothing_but_the_time(
    when: str, options: list[str], mosquitto: RunningBroker, tmp_path: Path
) -> None:
    start = [str(tmp_path / "r.covey-release"), *RINGS, "--soak", "0.2", *options]
    with Puppets(mosquitto, NAMES) as puppets:
        place, kills = 1, 0
        arguments = start
        while (code := killed_at(place, when, arguments)) == -signal.SIGKILL:
            kills += 1
            begun = bool(journals(tmp_path / "rollouts"))
            arguments = ["--resume", *options] if begun else start
            place = 1 if when == "after" else 1 + kills % 2  # a run that dies at its first line gets one further
            assert kills < 60
        assert code == 0
        made = Journal.open(journals(tmp_path / "rollouts")[-1])
        assert made.state.phase is Phase.FINISHED
        assert [event.ring for event in made.events if isinstance(event, Published)] == [0, 1]
        assert kills >= 10
        assert puppets.took[0] == ("barn", "9.0")
        assert sorted(puppets.took) == [(name, "9.0") for name in NAMES]
        _, there = look(desk_for(mosquitto, tmp_path))
        assert there is not None
        assert open_release(made.sealed(1), MAKER.public) == there


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
def test_a_running_rollout_is_stopped_from_elsewhere_and_resumed_with_its_key(
    options: list[str], mosquitto: RunningBroker, tmp_path: Path
) -> None:
    covey = [sys.executable, "-m", "covey_edge", "fleet", "rollout"]
    with Puppets(mosquitto, NAMES):
        started = subprocess.Popen([*covey, str(tmp_path / "r.covey-release"), *RINGS, "--soak", "1h", *options])
        end = time.monotonic() + PATIENCE_S
        while not (folders := journals(tmp_path / "rollouts")) or Journal.open(folders[-1], mend=False).state.ring < 0:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert subprocess.run([*covey, "--resume", *options], check=False, timeout=PATIENCE_S).returncode == 2
        assert subprocess.run([*covey, "--stop", *options], check=False, timeout=PATIENCE_S).returncode == 0
        assert started.wait(PATIENCE_S) == 8
        assert Journal.open(folders[-1]).state.reason == "its operator stopped it"
        ended = subprocess.run([*covey, "--resume", "--soak", "0.5s", *options], check=False, timeout=PATIENCE_S)
        assert ended.returncode == 0
        assert os.path.getsize(folders[-1] / "report.svg") > 1000


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
def test_a_broker_that_has_lost_its_memory_makes_nobody_healthy(
    broker_with: Callable[..., RunningBroker], tmp_path: Path
) -> None:
    broker = broker_with()
    desk = desk_for(broker, tmp_path)
    made = Journal.new(desk.rollouts, *begun(), 1.0)
    running = threading.Thread(target=Rollout(desk, made, Silent()).run)
    with Puppets(broker, NAMES) as puppets:
        running.start()
        until(lambda: all(made.state.devices[name].healthy_since for name in NAMES if name in made.state.devices))
        until(lambda: len(made.state.devices) == len(NAMES))
        stop_broker(broker)
        broker_with(port=broker.port)
        until(lambda: not any(device.saw.online for device in made.state.devices.values()))
        puppets.say("barn")
        until(lambda: made.state.devices["barn"].saw.online)
        assert made.state.phase is Phase.WATCHING
        (desk.rollouts / journal.STOP).touch()
        running.join(PATIENCE_S)
        assert made.state.phase is Phase.STOPPED


class Silent:
    def state(self, state: State, now: float) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def begun() -> tuple[Plan, bytes, list[bytes]]:
    rings = (Ring("100%", (), 1.0),)
    plan = Plan(fleet="home", version="9.0", serial=7, rings=rings, gates=Gates(soak_s=3600), roster=NAMES)
    return plan, RELEASE, sealed_rings(released(SMALL), plan, MAKER)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
