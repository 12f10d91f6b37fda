"""The agent renews itself: what it takes and refuses, and what becomes of releases that are not healthy."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from brokers import RunningBroker
from environments import FROM_LOCK, found_python, install, make_environment
from patience import PATIENCE_S
from release_helpers import MAKER, agent_files, as_file, released, small_wheel, wheel, write_device

from covey_edge import __version__, cache, launcher, releasing, updates
from covey_edge.boot import ATTEMPTS, RELEASES, Boot, Folder, Staged, attempted, best, failed, taken_up
from covey_edge.config import load_agent
from covey_edge.inbox import Inbox
from covey_edge.local_socket import ask
from covey_edge.mqtt import Refused, parse_broker
from covey_edge.outbox import Entry, Outbox
from covey_edge.updates import ARRIVED, REFETCH_S, Updates, updates_for
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.errors import ConfigError, CoveyError, ReleaseError, StorageError, TransportError
from covey_protocol.messages import Offer
from covey_protocol.releases import Release, place_of, seal_release
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

COVEY = [sys.executable, "-m", "covey_edge"]

# --- which one is run: data alone


def test_a_staged_release_is_tried_so_often_and_then_never_again() -> None:
    here = ["8.0", "9.0"]
    boot = taken_up(Boot("8.0"), Staged("9.0"), here, "0.1.0")
    for attempt in range(1, ATTEMPTS + 1):
        boot = attempted(boot, here, "0.1.0")
        assert (boot.trial, boot.attempts) == ("9.0", attempt)
    boot = attempted(boot, here, "0.1.0")
    assert (boot.trial, boot.bad, best(boot, here, "0.1.0")) == ("", ("9.0",), "8.0")
    assert "9.0" in boot.failed
    assert taken_up(boot, Staged("9.0"), here, "0.1.0") == boot
    assert taken_up(boot, Staged("9.0", again=True), here, "0.1.0").trial == "9.0"  # its owner's word
    assert taken_up(boot, Staged("9.1"), [*here, "9.1"], "0.1.0").trial == "9.1"


NOT_TRIED = {
    "what runs": (Boot("9.0"), Staged("9.0"), "0.1.0"),
    "what is older": (Boot("9.1"), Staged("9.0"), "0.1.0"),
    "what is not unpacked": (Boot(), Staged("9.2"), "0.1.0"),
    "what is older than the covey that is installed": (Boot(), Staged("9.0"), "10.0"),
    "nothing": (Boot(), Staged(), "0.1.0"),
}


@pytest.mark.parametrize("what", NOT_TRIED)
def test_what_is_not_tried(what: str) -> None:
    boot, staged, base = NOT_TRIED[what]
    assert taken_up(boot, staged, ["9.0", "9.1"], base) == boot


def test_the_newest_that_is_there_is_run() -> None:
    boot = Boot("9.1", "9.0")
    assert best(boot, ["9.0", "9.1"], "0.1.0") == "9.1"
    assert best(boot, ["9.0"], "0.1.0") == "9.0"  # its folder is lost
    assert best(boot, [], "0.1.0") == ""
    assert best(boot, ["9.0", "9.1"], "9.2") == ""  # somebody installed a newer one
    assert attempted(replace(boot, trial="9.2", attempts=1), [], "0.1.0").trial == ""


def test_a_damaged_memory_runs_what_is_installed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    wrong = (b'{"current": 1}', b'{"more": 2}', b'{"attempts": "1", "trial": "9.0"}', b'{"bad": [1]}', b'{"bad": 1}')
    for content in (b"", b"[]", b"\xff", *wrong):
        (tmp_path / "boot.json").write_bytes(content)
        (tmp_path / "staged.json").write_bytes(content)
        assert folder.boot() == Boot()
        assert folder.staged().version == ""


# --- what the agent takes: its own code and files, a recorder for the broker


class Recorder:
    """What the agent listens to."""

    def __init__(self) -> None:
        self.topics: set[str] = set()

    def subscribe(self, topics: list[str]) -> None:
        self.topics.update(topics)

    def unsubscribe(self, topics: list[str]) -> None:
        self.topics.difference_update(topics)

    def forget(self, topics: list[str]) -> None:
        """They are left with the others of their blob."""


class Device:
    """An agent's `Updates` and what it can be told."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.config = write_device(folder, "mqtt://127.0.0.1:1", SealingKey.from_seed(b"c".ljust(32, b".")), more)
        self.releases = folder.resolve() / "state" / "releases"
        self.now = 1000.0
        self.start()

    def start(self) -> None:
        self.broker = Recorder()
        self.updates = Updates(load_agent(self.config), self.broker, lambda: self.now)

    def hears(self, release: Release) -> None:
        self.updates.take_description(seal_release(release, MAKER))

    def fetches(self, data: bytes) -> None:
        ref = blob_ref(data)
        for index, piece in chunks(data, ref):
            self.updates.take_chunk(ref.sha256, index, piece)

    def fetching(self) -> set[str]:
        return self.broker.topics

    @property
    def staged(self) -> str:
        return Folder(self.releases).staged().version


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "device")


SMALL = small_wheel()


def test_what_is_heard_is_fetched_checked_unpacked_and_waits_for_the_round_to_end(device: Device) -> None:
    device.hears(released(SMALL))
    assert device.fetching() == {Topics("home").blob(blob_ref(SMALL[1]).sha256, 0)}
    assert not device.updates.waits
    device.fetches(SMALL[1])
    assert not device.fetching()
    assert (device.releases / "9.0/covey_edge/deep/er.py").read_bytes() == b"x = 1\n"
    assert device.staged == "9.0"
    assert device.updates.waits
    assert not device.updates.tick(idle=False)  # a round is under way
    assert device.updates.tick(idle=True)
    assert not (device.releases / "incoming").exists()


def test_the_same_release_twice_is_nothing_new(device: Device) -> None:
    for _ in range(2):
        device.hears(released(SMALL))
        device.fetches(SMALL[1])
    assert device.fetching() == set()
    device.hears(released(small_wheel(__version__), serial=2))
    assert device.fetching() == set()


def test_older_news_are_refused_also_after_a_restart(device: Device) -> None:
    device.hears(released(SMALL, serial=5, share=0.0))
    assert device.fetching() == set()
    device.start()
    with pytest.raises(ReleaseError, match="older news"):
        device.hears(released(SMALL, serial=4))
    device.hears(released(SMALL, serial=5))
    assert device.fetching()


def test_a_memory_of_what_was_heard_that_is_damaged_is_an_error(device: Device) -> None:
    device.hears(released(SMALL, serial=5))
    (device.releases / "heard.json").write_text("{")
    with pytest.raises(StorageError, match=r"heard\.json cannot be read"):
        device.start()


def test_a_downgrade_and_a_stranger_are_refused(device: Device) -> None:
    with pytest.raises(ReleaseError, match="older than this agent"):
        device.hears(released(small_wheel("0.0.1")))
    with pytest.raises(ReleaseError, match="not sealed by the pinned release_key"):
        device.updates.take_description(seal_release(released(SMALL), SealingKey.generate()))
    assert device.fetching() == set()


def test_a_device_waits_until_the_share_comes_to_it(device: Device) -> None:
    place = place_of("9.0", "kitchen-pi")
    device.hears(released(SMALL, serial=1, share=place))
    assert device.fetching() == set()
    device.hears(released(SMALL, serial=2, share=place + 1e-9))
    assert device.fetching()


def test_a_device_that_is_named_does_not_wait(device: Device) -> None:
    device.hears(msgspec.structs.replace(released(SMALL, serial=1, share=0.0), devices=("hall-pi",)))
    assert device.fetching() == set()
    device.hears(msgspec.structs.replace(released(SMALL, serial=2, share=0.0), devices=("hall-pi", "kitchen-pi")))
    assert device.fetching()


def test_a_share_of_nothing_stops_a_roll_out_that_is_being_fetched(device: Device) -> None:
    device.hears(released(SMALL, serial=1))
    device.hears(released(SMALL, serial=2, share=0.0))
    device.fetches(SMALL[1])
    assert device.staged == ""


def test_a_newer_release_takes_the_place_of_one_that_is_being_fetched(device: Device) -> None:
    other = small_wheel("9.1")
    device.hears(released(SMALL, serial=1))
    device.hears(released(other, serial=2))
    device.fetches(SMALL[1])
    device.fetches(other[1])
    assert device.staged == "9.1"


def test_what_lacks_is_asked_for_again(device: Device) -> None:
    device.hears(released(SMALL))
    device.broker.topics.clear()  # the broker forgot it
    device.updates.tick(idle=True)
    assert device.fetching() == set()
    device.now += REFETCH_S + 1
    device.updates.tick(idle=True)
    assert device.fetching()


def test_a_wheel_that_is_refused_is_told_and_not_fetched_again(device: Device) -> None:
    evil = wheel({"covey_edge/__init__.py": b""}, "9.0", requires=("no-such-thing",))
    device.hears(released(evil))
    device.fetches(evil[1])
    assert "needs no-such-thing" in device.updates.told
    assert device.updates.bad == ("9.0",)
    device.hears(released(evil))
    assert device.fetching() == set()
    assert device.staged == ""


def test_one_that_failed_before_is_not_fetched_and_the_operator_hears_why(device: Device) -> None:
    Folder(device.releases).save(failed(Boot(trial="9.0"), "9.0 ended with code 1"))
    device.start()
    assert device.updates.told == "release 9.0 ended with code 1"
    assert device.updates.bad == ("9.0",)
    device.hears(released(SMALL))
    assert device.fetching() == set()


def test_one_that_the_launcher_could_not_take_up_is_not_fetched_again_and_again(device: Device) -> None:
    """A full disk, say: else device and launcher would start each other for ever."""
    device.hears(released(SMALL))
    device.fetches(SMALL[1])
    device.start()  # and staged.json is still there
    device.hears(released(SMALL))
    assert device.fetching() == set()
    assert not device.updates.tick(idle=True)


def test_its_owner_may_have_it_tried_again(device: Device) -> None:
    Folder(device.releases).save(failed(Boot(trial="9.0"), "9.0 ended with code 1"))
    device.start()
    (device.releases / ARRIVED).write_bytes(as_file(released(SMALL), SMALL))
    device.now += 11
    assert device.updates.tick(idle=True)
    assert Folder(device.releases).staged() == Staged("9.0", again=True)
    assert not (device.releases / ARRIVED).exists()


def test_a_given_file_that_is_no_release_is_told(device: Device) -> None:
    (device.releases).mkdir(parents=True, exist_ok=True)
    (device.releases / ARRIVED).write_bytes(as_file(released(SMALL), SMALL, key=SealingKey.generate()))
    device.now += 11
    assert not device.updates.tick(idle=True)
    assert "not sealed by the pinned release_key" in device.updates.told
    assert not (device.releases / ARRIVED).exists()


def test_a_given_file_that_cannot_be_read_is_told_without_its_place(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    (device.releases / ARRIVED).mkdir(parents=True)
    device.now += 11
    assert not device.updates.tick(idle=True)
    assert "(Is a directory); its log says which" in device.updates.told
    assert ARRIVED not in device.updates.told
    assert str(device.releases / ARRIVED) in caplog.text


def test_a_given_file_that_is_too_large_is_named_to_its_owner_alone(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(updates, "MAX_FILE_BYTES", 10)
    device.releases.mkdir(parents=True, exist_ok=True)
    (device.releases / ARRIVED).write_bytes(bytes(11))
    device.now += 11
    assert not device.updates.tick(idle=True)
    assert "(larger than any release); its log says which" in device.updates.told
    assert ARRIVED not in device.updates.told
    assert f"{device.releases / ARRIVED} is larger than any release" in caplog.text


def test_on_a_full_disk_what_has_come_of_a_release_goes_again(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    others = device.releases / "incoming" / ("0" * 64)
    device.hears(released(SMALL))
    others.parent.mkdir(parents=True, exist_ok=True)
    others.write_bytes(bytes(1000))

    def full(path: Path, data: bytes) -> None:
        raise StorageError(f"cannot write {path} (No space left on device)")

    monkeypatch.setattr(cache, "write_atomic", full)
    device.fetches(SMALL[1])
    assert not others.parent.exists()
    assert str(device.releases) not in device.updates.told
    assert (device.fetching(), device.staged) == (set(), "")


def test_a_given_file_that_cannot_be_removed_is_looked_at_once(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Root's, in a folder of root's; found under a real systemd, where it ended the agent."""
    device.releases.mkdir(parents=True, exist_ok=True)
    (device.releases / ARRIVED).write_bytes(b"nothing")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(3):
        device.now += 11
        assert not device.updates.tick(idle=True)
    assert caplog.text.count("cannot remove") == 1


def test_what_is_not_run_any_more_goes(device: Device) -> None:
    for version in ("7.0", "8.0", "8.1", "9.0", ".9.2.new.tmp"):
        (device.releases / version).mkdir(parents=True)
    (device.releases / ".boot.json.4711.tmp").write_bytes(b"half")
    (device.releases / "incoming").mkdir(exist_ok=True)
    (device.releases / "incoming" / f".{'0' * 64}.4711.tmp").write_bytes(b"half")
    folder = Folder(device.releases)
    folder.save(Boot("8.1", "8.0"))
    folder.stage(Staged("9.0"))
    device.start()
    assert folder.here() == ["8.0", "8.1", "9.0"]
    assert not list(device.releases.rglob(".*"))


def test_pieces_of_a_release_that_is_not_wanted_any_more_go(device: Device) -> None:
    for serial, version in enumerate(("9.0", "9.1", "9.2"), 1):
        evil = wheel({"covey_edge/__init__.py": b""}, version, requires=("no-such-thing",))
        device.hears(released(evil, serial=serial))
        device.fetches(evil[1])
        assert device.updates.bad[-1] == version
        assert len(list((device.releases / "incoming").iterdir())) == 1


def test_an_owner_who_wants_files_only_listens_to_nobody(tmp_path: Path) -> None:
    assert Device(tmp_path / "one").updates.listens == ["covey/1/home/fleet/release"]
    assert Device(tmp_path / "two", "from_fleet = false").updates.listens == []


def test_without_a_key_or_a_launcher_there_are_no_updates(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = load_agent(device.config)
    monkeypatch.delenv(RELEASES, raising=False)
    assert updates_for(agent, Recorder()) is None
    monkeypatch.setenv(RELEASES, str(device.releases.parent / "elsewhere"))
    with pytest.raises(ConfigError, match="make them the same"):
        updates_for(agent, Recorder())
    monkeypatch.setenv(RELEASES, str(device.releases))
    assert updates_for(agent, Recorder()) is not None


def test_the_coordinators_key_is_no_release_key(device: Device) -> None:
    text = device.config.read_text()
    coordinator = SealingKey.from_seed(b"c".ljust(32, b".")).public.hex()
    device.config.write_text(text.replace(MAKER.public.hex(), coordinator))
    with pytest.raises(ConfigError, match="release_key is the coordinator's"):
        load_agent(device.config)


def test_who_may_not_see_what_a_broker_has_does_not_publish_over_it() -> None:
    inbox, topics = Inbox(), Topics("home")
    inbox.put(Refused(topics.release, TransportError("the broker refused the subscription")))
    with pytest.raises(TransportError, match="refused the subscription"):
        releasing._retained(inbox, topics, MAKER.public)


# --- the launcher, with releases that are no agents but quick

PUPPET = """
import os, socket, sys, time
def say(word):
    if "COVEY_TRIAL" in os.environ:
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(word.encode(), os.environ["NOTIFY_SOCKET"])
"""
LIVES = """
def confirmed():
    return '"current": "9.0"' in open(os.environ["COVEY_RELEASES"] + "/boot.json").read()
while not confirmed():
    say("WATCHDOG=1")
    time.sleep(0.1)
"""
# what it does; seconds to be ready and without a sign of life; what becomes of it
WATCHED = {
    "that is ready and then hangs": ("say('READY=1')\ntime.sleep(600)", 60, 1, "gave no sign of life for 1 s"),
    "that lives but is not ready": (LIVES, 1, 60, "did not connect within 1 s"),
    "that ends": ("say('READY=1')\nsys.exit(7)", 60, 60, "ended with code 7"),
    "that is ready and lives": (f"say('READY=1')\n{LIVES}", 60, 60, ""),
}


def puppet(state: Path, code: str) -> Folder:
    """A release that does this, before its last attempt."""
    folder = Folder(state / "releases")
    package = folder.path / "9.0" / "covey_edge"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PUPPET + code)
    folder.save(Boot(trial="9.0", attempts=ATTEMPTS - 1))
    return folder


def launched(state: Path, ready_s: float, watchdog_s: float) -> subprocess.CompletedProcess[str]:
    limits = f"--ready-within {ready_s} --healthy-for 0.4 --watchdog {watchdog_s} --pause 0.1".split()
    command = [sys.executable, "-m", "covey_edge.launcher", "--state", str(state), *limits, "--"]
    command += ["--config", "/none"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@pytest.mark.parametrize("what", WATCHED)
def test_a_launcher_watches_a_release(what: str, tmp_path: Path) -> None:
    """On its last attempt. Afterwards an agent is started that ends at once: its file is not there."""
    code, ready_s, watchdog_s, why = WATCHED[what]
    folder = puppet(tmp_path, code)
    ended = launched(tmp_path, ready_s, watchdog_s)
    boot = folder.boot()
    if why:
        assert (boot.failed, boot.bad, boot.trial) == (f"9.0 {why}", ("9.0",), "")
        assert (ended.returncode, "/none cannot be read" in ended.stderr) == (2, True)
    else:
        assert (boot, ended.returncode) == (Boot("9.0"), 0)


def test_on_a_full_disk_a_healthy_release_runs_on_until_that_can_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Boot(trial="9.0", attempts=ATTEMPTS)
    folder = Folder(tmp_path / "releases")
    folder.save(trial)
    starter = launcher.Launcher(Namespace(state=str(tmp_path), watchdog=60.0), [])

    def full(self: Folder, boot: Boot) -> None:
        raise StorageError("cannot write boot.json (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save", full)
        assert not starter._confirm(trial)
        assert not starter._confirm(trial)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert starter._confirm(trial)
    assert folder.boot() == Boot("9.0")


@pytest.mark.slow
def test_a_release_that_was_healthy_on_its_last_attempt_and_hangs_later_stays(tmp_path: Path) -> None:
    """Whoever watches the launcher starts it again."""
    folder = puppet(tmp_path, f"say('READY=1')\n{LIVES}time.sleep(600)")
    ended = launched(tmp_path, 60, 1)
    assert "gave no sign of life" in ended.stderr
    assert (folder.boot(), ended.returncode) == (Boot("9.0"), 128 + signal.SIGTERM)


# --- with real processes


class Running:
    """A device under its launcher, as a service would be: started again when it ends badly."""

    def __init__(self, folder: Path, url: str, coordinator_key: SealingKey, python: str = sys.executable) -> None:
        self.python = python
        self.config = write_device(folder, url, coordinator_key)
        self.state = folder / "state"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        limits = ("--ready-within", "40", "--healthy-for", "0.5", "--watchdog", "9", "--pause", "0.1")
        command = [self.python, "-m", "covey_edge.launcher", "--state", str(self.state), *limits, "--"]
        self.process = subprocess.Popen([*command, "--config", str(self.config)], cwd=self.config.parent)

    def keep_running(self) -> None:
        if self.process is None or self.process.poll() is not None:
            self.start()

    def facts(self) -> dict[str, object]:
        """What the agent says of its releases, and which process it is."""
        try:
            said = ask(self.state, "status")
            return {**said["sections"]["update"], "pid": said["pid"]}
        except (CoveyError, OSError, KeyError):
            return {}

    def boot(self) -> Boot:
        return Folder(self.state / "releases").boot()

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            self.keep_running()
            assert time.monotonic() < end, self.facts()
            time.sleep(0.1)

    def runs(self, version: str) -> bool:
        """In the launcher's place: not on trial, nor about to be started anew."""
        facts = self.facts()
        assert self.process is not None
        return facts.get("version") == version and facts["pid"] == self.process.pid

    def stop(self) -> int:
        if self.process is None:
            return 0
        self.process.terminate()
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def running(mosquitto: RunningBroker, coordinator_key: SealingKey, tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path / "device", mosquitto.url, coordinator_key)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def give(running: Running, file: bytes) -> subprocess.CompletedProcess[str]:
    path = running.config.with_name("given.covey-release")
    path.write_bytes(file)
    command = [running.python, "-m", "covey_edge", "agent", "update", "--config", str(running.config), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@pytest.mark.broker
@pytest.mark.fleet
def test_a_release_comes_over_the_broker_is_tried_and_stays_and_the_outbox_with_it(
    running: Running, mosquitto: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releasing, "RETAINED_S", 0.2)
    owed = Entry(Offer("run.1.abc", blob_ref(b"update"), 8), b"update")
    Outbox(running.state).keep(owed)
    made = wheel(agent_files("0.2.0"), "0.2.0")
    release = released(made)
    releasing.publish_release(
        parse_broker(mosquitto.url), "home", seal_release(release, MAKER), release, [made[1]], MAKER.public, print
    )
    running.start()
    started = running.process
    running.until(lambda: running.runs("0.2.0"))
    assert running.facts()["release"] == "0.2.0"
    assert running.boot() == Boot("0.2.0")
    assert running.process is started  # and never ended
    assert Outbox(running.state).offers() == [owed.offer]
    assert running.stop() == 0


FIRST, LOOP = "from __future__ import annotations\n", "        if self._transport.alive:\n"
# the file that is changed, where, what comes there, and what becomes of it
BROKEN = {
    "that ends at once": ("cli_agent", FIRST, "raise SystemExit(0)\n", "ended with code 0"),
    "that does not understand the configuration": ("cli_agent", FIRST, "raise SystemExit(2)\n", "ended with code 2"),
    "that dies": ("agent", FIRST, "import os\nos.abort()\n", "was ended by signal 6"),
    "that cannot be imported": ("agent", FIRST, "import no_such_thing\n", "ended with code 1"),
    "that hangs when it is connected": (
        "agent",
        LOOP,
        "                time.sleep(3600)\n",
        "gave no sign of life for 9 s",
    ),
    "that dies soon after": ("agent", LOOP, "                raise SystemExit(5)\n", "ended with code 5"),
}


def broken_wheel(what: str, version: str) -> tuple[str, bytes]:
    name, place, more, _ = BROKEN[what]
    return wheel(agent_files(version, {f"covey_edge/{name}.py": (place, place + more)}), version)


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.parametrize("what", BROKEN)
def test_a_release(what: str, running: Running) -> None:
    """...is given up after its attempts; the one before goes on, and says so."""
    broken = broken_wheel(what, "0.2.0")
    running.start()
    running.until(lambda: running.runs(__version__))
    given = give(running, as_file(released(broken), broken))
    assert given.returncode == 0, given.stderr
    running.until(lambda: "0.2.0" in running.boot().bad)
    running.until(lambda: running.runs(__version__))
    assert running.facts()["failed"] == f"release 0.2.0 {BROKEN[what][3]}"
    mended = wheel(agent_files("0.2.1"), "0.2.1")
    assert give(running, as_file(released(mended, serial=2), mended)).returncode == 0
    running.until(lambda: running.runs("0.2.1"))
    assert running.facts()["failed"] == ""
    assert running.stop() == 0


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
def test_a_release_that_never_connects_is_given_up(running: Running) -> None:
    change = {"covey_edge/agent.py": ("        self._transport.connect\\(\\)\n", "        time.sleep(3600)\n")}
    broken = wheel(agent_files("0.2.0", change), "0.2.0")
    running.start()
    running.until(lambda: running.runs(__version__))
    assert give(running, as_file(released(broken), broken)).returncode == 0
    running.until(lambda: running.boot().failed == "0.2.0 did not connect within 40 s")
    running.until(lambda: running.runs(__version__))


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
def test_kills_of_everything_while_it_renews_itself_leave_an_agent(running: Running) -> None:
    """Every 0.3 s longer into it: while it installs, starts anew, is tried, is confirmed."""
    made = wheel(agent_files("0.2.0"), "0.2.0")
    for after in range(12):
        running.start()
        running.until(lambda: bool(running.facts()))
        (running.state / "releases").mkdir(exist_ok=True)
        (running.state / "releases" / ARRIVED).write_bytes(as_file(released(made), made))
        running.until(lambda: not (running.state / "releases" / ARRIVED).exists())
        time.sleep(0.3 * after)
        assert running.process is not None
        running.process.kill()
        running.process.wait()
        assert running.boot().bad == ()
        if running.boot().attempts == ATTEMPTS:
            Folder(running.state / "releases").save(replace(running.boot(), attempts=1))  # these kills were ours
        running.start()
        running.until(lambda: running.runs("0.2.0"))
        assert running.stop() == 0
        for path in ("boot.json", "heard.json"):
            (running.state / "releases" / path).unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
def test_what_an_owner_gives_is_looked_at_before_it_is_left_to_the_agent(running: Running) -> None:
    made = small_wheel("0.0.1")
    refused = give(running, as_file(released(made), made))
    assert (refused.returncode, refused.stderr.count("\n")) == (6, 1)
    assert "older than this agent" in refused.stderr
    strange = give(running, as_file(released(SMALL), SMALL, key=SealingKey.generate()))
    assert "not sealed by the pinned release_key" in strange.stderr
    half = give(running, as_file(released(SMALL), SMALL)[:-1])
    assert "ends too early" in half.stderr
    assert not (running.state / "releases" / ARRIVED).exists()


@pytest.mark.slow
def test_the_real_wheel_becomes_a_release_and_a_larger_share_of_it(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=root / "edge", check=True
    )
    (tmp_path / "maker.pem").write_bytes(MAKER.pem())
    made, wider = tmp_path / "a.covey-release", tmp_path / "b.covey-release"
    file = next(tmp_path.glob("*.whl"))
    key = ("--key", str(tmp_path / "maker.pem"))
    subprocess.run([*COVEY, "release", "make", "--wheel", str(file), *key, "--share", "0.1", "--out", made], check=True)
    subprocess.run([*COVEY, "release", "widen", str(made), *key, "--share", "1", "--out", str(wider)], check=True)
    shown = subprocess.check_output([*COVEY, "release", "show", str(wider)])
    facts = json.loads(shown)
    assert (facts["version"], facts["share"], facts["requires_python"]) == (__version__, 1.0, ">=3.9")
    assert facts["wheels"][0]["name"] == file.name


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_an_installed_agent_alone_renews_itself(
    version: str, mosquitto: RunningBroker, coordinator_key: SealingKey, tmp_path: Path
) -> None:
    """From its wheel, in an environment that holds the edge's dependencies and nothing else."""
    found = found_python(version)
    if found is None:
        pytest.skip(f"there is no Python {version} on this machine")
    python = make_environment(found, tmp_path / "environment")
    name, data = wheel(agent_files(__version__), __version__)
    (tmp_path / name).write_bytes(data)
    problem = install(python, *FROM_LOCK) or install(python, "--no-deps", "--no-index", str(tmp_path / name))
    if problem:
        pytest.skip(f"pip cannot install the agent: {problem}")
    running = Running(tmp_path / "device", mosquitto.url, coordinator_key, python)
    running.start()
    try:
        running.until(lambda: running.runs(__version__))
        made = wheel(agent_files("0.2.0"), "0.2.0")
        given = give(running, as_file(released(made), made))
        assert given.returncode == 0, given.stderr
        running.until(lambda: running.runs("0.2.0"))
    finally:
        running.stop()
