"""`covey agent check`: everything that can be wrong before the first round is found and named, with its exit code."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import RunningBroker, certificates, tls_lines
from click.testing import CliRunner
from lone_coordinator import LoneCoordinator

from covey_edge import __version__, preflight, updates_check
from covey_edge.agent import AgentProgram
from covey_edge.boot import RELEASES, Boot, Folder, failed
from covey_edge.cli_agent import agent as command
from covey_edge.config import load_agent
from covey_edge.local_socket import LocalSocket
from covey_edge.preflight import OK, WARNING, WRONG, Facts, Finding
from covey_protocol.errors import EXIT_BUNDLE, EXIT_CONFIG, EXIT_DATA, EXIT_STORAGE, EXIT_TRANSPORT
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

KEY = SealingKey.from_seed(b"device".ljust(32, b"."))
RELEASE_KEY = SealingKey.from_seed(b"releases".ljust(32, b"."))


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "RETAINED_S", 0.3)


@pytest.fixture
def write(tmp_path: Path, coordinator_key: SealingKey) -> Callable[..., Path]:
    """Writes an agent.toml with its files; `broker`, `more` are lines of it."""

    def make(broker: str = 'url = "mqtt://127.0.0.1:1"', more: str = "", key: str = "") -> Path:
        (tmp_path / "device.pem").write_bytes(KEY.pem())
        (tmp_path / "device.pem").chmod(0o600)
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "data.npz", x=rng.random((30, 8, 8, 1), np.float32), y=rng.integers(0, 10, 30, np.int32))
        (tmp_path / "agent.toml").write_text(
            f'device_id = "pi"\nfleet = "home"\n[broker]\n{broker}\n[data]\npath = "data.npz"\n'
            f'[identity]\nkey_file = "device.pem"\ncoordinator_key = "{key or coordinator_key.public.hex()}"\n{more}\n'
        )
        return tmp_path / "agent.toml"

    return make


def found(check: Callable[[Facts], Iterator[Finding]], config: Path, **facts: Any) -> list[Finding]:
    return list(check(Facts(load_agent(config), **facts)))


def bad(findings: list[Finding]) -> tuple[str, int, str]:
    """The level, the code and the words of the only finding that is not ok."""
    (one,) = [finding for finding in findings if finding.level != OK]
    return one.level, one.code, f"{one.what}; {one.remedy}"


# --- all of it, as an owner runs it


@pytest.mark.broker
def test_a_device_whose_round_is_open_passes(
    write: Callable[..., Path],
    mosquitto: RunningBroker,
    digits_bundle: bytes,
    coordinator_key: SealingKey,
    tmp_path: Path,
) -> None:
    config = write(f'url = "{mosquitto.url}"')
    (tmp_path / "digits.covey").write_bytes(digits_bundle)
    with LoneCoordinator(mosquitto.url, "home", "pi", coordinator_key, KEY.public) as coordinator:
        invitation = coordinator.invite(digits_bundle, bytes(4000), TrainingPlan(1, 0.1))
        arguments = ["check", "--config", str(config), "--bundle", str(tmp_path / "digits.covey"), "--json"]
        ended = CliRunner().invoke(command, arguments)
        assert coordinator.heard == []  # nothing that a coordinator would look at
    told = [json.loads(line) for line in ended.output.splitlines()]
    assert ended.exit_code == 0, ended.output
    by_check = {one["check"]: one for one in told if one["level"] == OK}
    assert {"settings", "keys", "disk", "broker", "coordinator", "runtime", "data", "model"} <= by_check.keys()
    assert invitation.round_id in by_check["coordinator"]["what"]
    assert "30 examples" in by_check["data"]["what"]
    assert "tflite" in by_check["runtime"]["what"] or "litert" in by_check["runtime"]["what"]
    assert all(one["remedy"] for one in told if one["level"] != OK)


def test_the_exit_code_is_that_of_the_first_thing_that_is_wrong(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write()
    (tmp_path / "data.npz").write_bytes(b"torn")
    ended = CliRunner().invoke(command, ["check", "--config", str(config)])
    assert ended.exit_code == EXIT_TRANSPORT
    assert "WRONG   broker: mqtt://127.0.0.1:1 cannot be reached" in ended.output
    assert "WRONG   data: " in ended.output
    assert "save it with numpy.savez" in ended.output
    config.write_text(config.read_text().replace("fleet", "fleat"))
    ended = CliRunner().invoke(command, ["check", "--config", str(config)])
    assert ended.exit_code == EXIT_CONFIG
    assert "did you mean `fleet`?" in ended.output
    assert ended.output.count("\n") == 1


# --- keys, disk, clock


def test_a_key_that_others_may_read_is_wrong(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write()
    assert [one.level for one in found(preflight.keys, config)] == [OK]
    (tmp_path / "device.pem").chmod(0o640)
    level, code, words = bad(found(preflight.keys, config))
    assert (level, code) == (WRONG, EXIT_CONFIG)
    assert "identity.key_file (device.pem) may be read by others: mode 640; chmod 600" in words


def test_a_device_that_pins_itself_is_wrong(write: Callable[..., Path]) -> None:
    assert "this device's own public key" in bad(found(preflight.keys, write(key=KEY.public.hex())))[2]


def test_a_disk_with_little_room_is_said(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = write()
    for free, expected in ((10, (WRONG, EXIT_STORAGE)), (100, (WARNING, 0))):
        usage = shutil._ntuple_diskusage(10**10, 0, free * 10**6)  # type: ignore[attr-defined]  # what it returns
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, usage=usage: usage)
        assert bad(found(preflight.disk, config))[:2] == expected


def test_private_files_that_others_may_read_are_a_warning(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write()
    (tmp_path / "state" / "outbox").mkdir(parents=True)
    (tmp_path / "state" / "outbox" / "r.msgpack").write_bytes(b"x")
    (tmp_path / "state" / "outbox" / "r.msgpack").chmod(0o644)
    assert "r.msgpack" in bad(found(preflight.disk, config))[2]


def test_a_folder_that_cannot_be_written_is_wrong(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write()
    (tmp_path / "state").write_text("no folder")
    told = [one for one in preflight.findings(config) if one.check == "disk"]
    assert bad(told)[:2] == (WRONG, EXIT_STORAGE)


def test_a_clock_that_nobody_keeps_is_a_warning(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = write()
    for synchronised, level in ((True, OK), (None, OK), (False, WARNING)):
        monkeypatch.setattr(preflight, "_synchronised", lambda synchronised=synchronised: synchronised)
        assert [one.level for one in found(preflight.clock, config)] == [level]


def test_the_kernel_answers_whether_the_clock_is_kept() -> None:
    assert preflight._synchronised() in (True, False, None)


# --- certificates and the broker


@pytest.mark.broker
def test_certificates_that_end_soon_are_warned_of_and_the_brokers_too(
    write: Callable[..., Path], tls_broker: tuple[str, dict[str, Path]]
) -> None:
    url, files = tls_broker
    for path in files.values():
        path.chmod(0o600)
    tls = f'ca_file = "{files["ca.crt"]}"\ncert_file = "{files["client.crt"]}"\nkey_file = "{files["client.key"]}"'
    config = write(f'url = "{url}"\n{tls}')
    told = found(preflight.certificates, config)
    assert [(one.level, one.what.split(" expires")[0]) for one in told] == [
        (WARNING, "broker.cert_file"),
        (WARNING, "broker.ca_file"),
        (WARNING, f"the certificate of {url}"),
    ]
    assert all(one.level == OK for one in found(preflight.broker, config))


@pytest.mark.broker
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"  # paho leaves the socket of a failed handshake to the collector
)
def test_an_expired_broker_is_named_with_the_remedy(
    write: Callable[..., Path], readable: Path, broker_with: Callable[..., RunningBroker]
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    ago = (now - datetime.timedelta(days=9), now - datetime.timedelta(days=1))
    files = certificates(readable, client_dates=ago, server_dates=ago)
    url = f"mqtts://127.0.0.1:{broker_with(*tls_lines(files)).port}"
    config = write(f'url = "{url}"\nca_file = "{files["ca.crt"]}"')
    told = [one for one in preflight.findings(config) if one.check == "broker"]
    level, code, words = bad(told)
    assert (level, code) == (WRONG, EXIT_TRANSPORT)
    assert "certificate has expired" in words
    assert "set this machine's clock" in words
    mine = f'cert_file = "{files["client.crt"]}"\nkey_file = "{files["client.key"]}"'
    told = found(preflight.certificates, write(f'url = "{url}"\n{mine}'))
    assert bad(told)[:2] == (WRONG, EXIT_CONFIG)
    assert "broker.cert_file expired on" in bad(told)[2]
    gc.collect()


@pytest.mark.broker
def test_a_refused_user_and_forbidden_topics_are_named(
    write: Callable[..., Path], readable: Path, broker_with: Callable[..., RunningBroker]
) -> None:
    acl = readable / "acl"
    acl.write_text("topic readwrite covey/1/home/device/other/#\ntopic read covey/1/home/fleet/round\n")
    acl.chmod(0o644)
    url = broker_with("allow_anonymous true", f"acl_file {acl}").url
    level, code, words = bad(found(preflight.broker, write(f'url = "{url}"')))
    assert (level, code) == (WRONG, EXIT_TRANSPORT)
    assert "did not take a message of 0 bytes on covey/1/home/device/pi/up (Not authorized)" in words
    assert "access rules" in words
    passwords = readable / "passwords"
    passwords.touch(0o644)
    url = broker_with("allow_anonymous false", f"password_file {passwords}").url
    config = write(f'url = "{url}"\nusername = "pi"')
    told = [one for one in preflight.findings(config) if one.check == "broker"]
    assert "check the user" in bad(told)[2] or "check broker.username" in bad(told)[2]


# --- the fleet


@pytest.mark.broker
def test_a_round_of_another_coordinator_and_a_clock_behind_are_told(
    write: Callable[..., Path],
    mosquitto: RunningBroker,
    coordinator_key: SealingKey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write(f'url = "{mosquitto.url}"')
    with LoneCoordinator(mosquitto.url, "home", "pi", SealingKey.from_seed(bytes(32)), KEY.public) as other:
        other.invite(b"bundle", b"parameters", TrainingPlan(1, 0.1))
        level, code, words = bad(found(preflight.broker, config))
    assert (level, code) == (WRONG, EXIT_CONFIG)
    assert "not sealed by identity.coordinator_key" in words
    with LoneCoordinator(mosquitto.url, "home", "pi", coordinator_key, KEY.public) as coordinator:
        issued_s = coordinator.invite(b"bundle", b"parameters", TrainingPlan(1, 0.1)).issued_at_ms / 1000
        assert all(one.level == OK for one in found(preflight.broker, config))
        monkeypatch.setattr(time, "time", lambda: issued_s - 86400)
        level, _, words = bad(found(preflight.broker, config))
    assert level == WARNING
    assert "86,400 s" in words
    assert "behind the coordinator's" in words


# --- releases


def test_releases_that_cannot_come_or_failed_are_told(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [none] = found(updates_check.updates, write())
    assert none.level == OK
    assert "release_key is not set" in none.what
    config = write(more=f'[update]\nrelease_key = "{RELEASE_KEY.public.hex()}"')
    monkeypatch.delenv(RELEASES, raising=False)
    [resting] = found(updates_check.updates, config)
    assert resting.level == OK
    assert "once an agent runs under its launcher" in resting.what
    with answering(config, tmp_path):
        level, _, words = bad(found(updates_check.updates, config))
    assert level == WARNING
    assert "not started by its launcher" in words
    assert "covey_edge.launcher" in words
    monkeypatch.setenv(RELEASES, str(tmp_path / "state" / "releases"))
    with answering(config, tmp_path):
        assert [one.level for one in found(updates_check.updates, config)] == [OK]
    Folder(tmp_path / "state" / "releases").save(failed(Boot(trial="9.1", attempts=2), "9.1 was not healthy"))
    level, _, words = bad(found(updates_check.updates, config))
    assert level == WARNING
    assert f"release 9.1 was not healthy; it is not tried again, the installed {__version__} goes on" in words


@contextlib.contextmanager
def answering(config: Path, folder: Path) -> Iterator[None]:
    """The production agent's answers on its socket; it is not connected to anything."""
    program = AgentProgram(load_agent(config))
    local = LocalSocket(folder / "state", lambda question: question.reply(program._answer))
    local.open()
    try:
        yield
    finally:
        local.close()


# --- runtime, data, model


def test_data_that_are_not_the_models_are_told_before_a_round(
    write: Callable[..., Path], tmp_path: Path, digits_bundle: bytes
) -> None:
    config, bundle = write(more="[privacy]\nmin_examples = 50"), tmp_path / "digits.covey"
    bundle.write_bytes(digits_bundle)
    told = found(preflight.data, config, bundle=bundle)
    assert bad(told)[0] == WARNING
    assert "30 examples, fewer than privacy.min_examples (50)" in bad(told)[2]
    assert told[-1].check == "model"
    np.savez(tmp_path / "data.npz", x=np.zeros((60, 8, 9, 1), np.float32), y=np.zeros(60, np.int32))
    level, code, words = bad(found(preflight.data, config, bundle=bundle))
    assert (level, code) == (WRONG, EXIT_DATA)
    assert "shape (8, 9, 1), the model takes (8, 8, 1)" in words
    bundle.write_bytes(digits_bundle[:-100] + bytes(100))
    assert bad(found(preflight.data, config, bundle=bundle))[1] == EXIT_BUNDLE
