"""Old code under a higher version, and whole rollouts with real agents under their launchers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from brokers import RunningBroker
from patience import PATIENCE_S
from puppets import key_of, write_roster
from release_helpers import MAKER, agent_files, as_file, released, small_wheel, wheel, write_device

from covey_deploy import provisioning
from covey_deploy.cli_fleet import DESK, NAMES, _desk
from covey_deploy.rollout.commands import _finished_before
from covey_deploy.rollout.journal import Journal, journals
from covey_deploy.rollout.reversion import version_above, with_version
from covey_deploy.rollout.rings import Ring
from covey_deploy.rollout.state import Finished, Gates, Opened, Passed, Plan, Published, Stopped, Stopping
from covey_edge.boot import Folder
from covey_edge.local_socket import ask
from covey_edge.wheels import look_at
from covey_protocol.errors import ConfigError, CoveyError, ReleaseError
from covey_protocol.seals import SealingKey


def test_the_same_code_becomes_a_wheel_of_a_higher_version_and_nothing_else_changes() -> None:
    name, data = wheel(agent_files("0.2.0"), "0.2.0")
    other = wheel({"other.py": b""}, "1.0", "other", ())
    made = with_version(dict([(name, data), other]), "0.3.0.1")
    assert list(made) == ["covey_edge-0.3.0.1-py3-none-any.whl", "other-1.0-py3-none-any.whl"]
    assert made[other[0]] == other[1]
    facts = look_at(*next(iter(made.items())))
    assert (facts.name, facts.version) == ("covey-edge", "0.3.0.1")
    assert facts.requires == look_at(name, data).requires
    before = {path.replace("0.2.0", "0.3.0.1"): content for path, content in look_at(name, data).files.items()}
    assert set(facts.files) == set(before)
    changed = {path for path in before if facts.files[path] != before[path]}
    info = "covey_edge-0.3.0.1.dist-info"
    assert changed == {"covey_protocol/__init__.py", f"{info}/METADATA", f"{info}/RECORD"}
    said: dict[str, object] = {}
    exec(facts.files["covey_protocol/__init__.py"], said)  # noqa: S102 - our own source
    assert said["__version__"] == "0.3.0.1"
    assert with_version({name: data}, "0.3.0.1")[next(iter(made))] == made[next(iter(made))]  # the same bytes


def test_a_version_above_another_is_below_the_next_real_one() -> None:
    assert [version_above(version, "0.1") for version in ("0.2", "0.2.0", "0.2.0.1")] == [
        "0.2.0.1",
        "0.2.0.1",
        "0.2.0.2",
    ]
    for version, code in (("0.1.0", "0.2.0"), ("0.2.0.999999", "0.1.0")):
        with pytest.raises(ConfigError, match="cannot come after"):
            version_above(version, code)


def test_a_wheel_that_does_not_say_its_version_in_its_code_is_refused() -> None:
    name, data = small_wheel()
    with pytest.raises(ReleaseError, match="does not say a version"):
        with_version({name: data}, "9.0.0.1")


def test_a_fleets_folder_says_all_that_the_commands_need(tmp_path: Path) -> None:
    folder = provisioning.init(tmp_path / "home", "home", ["broker.lan"])
    provisioning.add_devices(folder.path, [provisioning.NewDevice("kitchen-pi")])
    desk = _desk({**dict.fromkeys(NAMES), "fleet_folder": folder.path})
    assert (str(desk.broker), desk.fleet) == ("mqtts://broker.lan:8883", "home")
    assert desk.broker.cert_file == folder.operator / "cert.pem"
    assert (list(desk.roster), desk.key) == (["kitchen-pi"], folder.release_key)
    with pytest.raises(ConfigError, match="--broker is not given"):
        _desk(dict.fromkeys(NAMES))
    command = click.command()(lambda **given: None)
    for option in DESK:
        command = option(command)
    assert {one.name for one in command.params} == set(NAMES)


def kept(rollouts: Path, serial: int, version: str, finished: bool) -> None:
    """A rollout that has ended."""
    gates, made = Gates(), small_wheel(version)
    plan = Plan(fleet="home", version=version, serial=serial, rings=(Ring("100%", (), 1.0),), gates=gates, roster=())
    one = Journal.new(rollouts, plan, as_file(released(made), made), [], 1.0)
    one.add(Opened(2.0, 0))
    one.add(Published(3.0, 0))
    for event in (Passed(4.0, 0), Finished(5.0)) if finished else (Stopping(4.0, "bad"), Stopped(5.0)):
        one.add(event)


def test_what_is_gone_back_to_was_finished_and_not_taken_back_itself(tmp_path: Path) -> None:
    versions = (("0.2.0", True), ("0.3.0", False), ("0.4.0", True), ("0.4.0.1", True))
    for serial, (version, finished) in enumerate(versions, start=1):
        kept(tmp_path, serial, version, finished)
    folders = journals(tmp_path)
    assert list(_finished_before(folders[:3], "0.4.0", MAKER.public)) == ["covey_edge-0.2.0-py3-none-any.whl"]
    assert list(_finished_before(folders, "0.4.0.1", MAKER.public)) == ["covey_edge-0.2.0-py3-none-any.whl"]
    with pytest.raises(ConfigError, match=r"no rollout was finished before 0\.2\.0"):
        _finished_before(folders[:1], "0.2.0", MAKER.public)


# --- real agents


class Agents:
    """Devices under their launchers, each with a folder of its own."""

    def __init__(self, folder: Path, url: str, names: tuple[str, ...], coordinator_key: SealingKey) -> None:
        self.states = {name: folder / name / "state" for name in names}
        self.processes = []
        for name in names:
            config = write_device(folder / name, url, coordinator_key, device_id=name, key=key_of(name))
            limits = ("--ready-within", "60", "--healthy-for", "0.5", "--watchdog", "9", "--pause", "0.1")
            command = [sys.executable, "-m", "covey_edge.launcher", "--state", str(self.states[name]), *limits, "--"]
            self.processes.append(subprocess.Popen([*command, "--config", str(config)], cwd=config.parent))

    def version(self, name: str) -> str:
        try:
            return str(ask(self.states[name], "status")["version"])
        except (CoveyError, OSError, KeyError):
            return ""

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, {name: self.version(name) for name in self.states}
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.2)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(PATIENCE_S)


DEVICES = ("attic", "barn", "cellar")


@pytest.fixture
def agents(mosquitto: RunningBroker, coordinator_key: SealingKey, tmp_path: Path) -> Iterator[Agents]:
    made = Agents(tmp_path / "devices", mosquitto.url, DEVICES, coordinator_key)
    yield made
    made.close()


def marked(version: str, breaks: bool = False) -> tuple[str, bytes]:
    """Code that can be told from other versions' code."""
    first = "from __future__ import annotations\n"
    loop = "        if self._transport.alive:\n"
    changes = {"covey_edge/boot.py": (first, f"{first}CODE_OF = {version!r}\n")}
    if breaks:
        changes["covey_edge/agent.py"] = (loop, f"{loop}                raise SystemExit(5)\n")
    return wheel(agent_files(version, changes), version)


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
def test_real_agents_are_renewed_spared_a_broken_release_and_brought_back(
    agents: Agents, mosquitto: RunningBroker, tmp_path: Path
) -> None:
    roster = write_roster(tmp_path / "roster.toml", DEVICES)
    (tmp_path / "maker.pem").write_bytes(MAKER.pem())
    options = ["--broker", mosquitto.url, "--fleet", "home", "--roster", str(roster)]
    options += ["--release-key", MAKER.public.hex(), "--rollouts", str(tmp_path / "rollouts")]
    options += ["--key", str(tmp_path / "maker.pem"), "--soak", "2s"]

    def covey(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "covey_edge", "fleet", *arguments, *options]
        ended = subprocess.run(command, check=False, timeout=2 * PATIENCE_S, capture_output=True, text=True)
        print(ended.stdout, ended.stderr)
        return ended

    def release(version: str, breaks: bool = False) -> str:
        made, path = marked(version, breaks), tmp_path / f"{version}.covey-release"
        path.write_bytes(as_file(released(made), made))
        return str(path)

    agents.until(lambda: all(agents.version(name) for name in DEVICES))
    assert covey("rollout", release("0.2.0"), "canary=barn", "100%").returncode == 0
    assert [agents.version(name) for name in DEVICES] == ["0.2.0"] * 3

    broken = covey("rollout", release("0.3.0", breaks=True), "canary=barn", "100%")
    assert broken.returncode == 8
    assert "barn: release 0.3.0 ended with code 5" in broken.stderr
    agents.until(lambda: all(agents.version(name) == "0.2.0" for name in DEVICES))
    assert not (agents.states["attic"] / "releases" / "0.3.0").exists()  # it never took it

    assert covey("rollout", release("0.4.0"), "100%").returncode == 0
    assert covey("rollback").returncode == 0
    assert [agents.version(name) for name in DEVICES] == ["0.4.0.1"] * 3
    for name in DEVICES:
        releases = Folder(agents.states[name] / "releases")
        assert releases.boot().current == "0.4.0.1"
        code = (releases.path / "0.4.0.1" / "covey_edge" / "boot.py").read_text()
        assert "CODE_OF = '0.2.0'" in code
