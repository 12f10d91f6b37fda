"""What `covey broker config` writes, and `covey broker run`, which starts a Mosquitto with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Optional

import pytest
from brokers import free_port, mosquitto_binary
from click.testing import CliRunner
from fleet_broker import BrokerRun, Client, FleetBroker, Identity, make_fleet, wait_for

from covey_deploy import broker_run, provisioning
from covey_deploy.access import COORDINATOR, DEVICE, OPERATOR, Access
from covey_deploy.broker_files import DATA_FOLDER, INSTALL_FOLDER, broker_files
from covey_deploy.broker_folder import write_broker_folder
from covey_deploy.cli_broker import broker_command
from covey_deploy.fleet_folder import FleetFolder
from covey_deploy.mosquitto import MAX_PACKET_BYTES
from covey_deploy.other_brokers import AWS_POLICY_CHARACTERS, aws_policy, emqx_acl, hivemq_roles
from covey_edge.cli import main
from covey_edge.mqtt import PACKET_HEADER_BYTES
from covey_protocol.codec import MAX_ENVELOPE_BYTES
from covey_protocol.errors import EXIT_CONFIG, EXIT_MACHINE, EXIT_TRANSPORT

LONG = "f" * 63


# --- files


def test_config_writes_a_folder_that_can_be_copied_to_the_broker(home: FleetFolder, tmp_path: Path) -> None:
    out = tmp_path / "for-the-broker"
    ended = CliRunner().invoke(broker_command, ["config", "--fleet-folder", str(home.path), "--out", str(out)])
    assert ended.exit_code == 0, ended.output
    config = (out / "mosquitto.conf").read_text()
    for name in re.findall(rf"{INSTALL_FOLDER}/(\S+)", config):
        assert (out / name).is_file(), name
    assert (out / "key.pem").stat().st_mode & 0o777 == 0o600
    assert not any((out / name).stat().st_mode & 0o111 for name in ("mosquitto.conf", "acl", "compose.yaml"))
    private = (home.broker / "key.pem").read_text().splitlines()[1]
    written = [path for path in out.rglob("*") if path.is_file() and path.name != "key.pem"]
    assert not any(private in path.read_text() for path in written)
    assert private not in ended.output


AS_THE_CONTAINER = f"""
mount -t tmpfs tmpfs /etc/mosquitto && mkdir {INSTALL_FOLDER} && mount --bind -o ro "$1" {INSTALL_FOLDER} &&
mount --bind "$1/data" {DATA_FOLDER} &&
exec setpriv --reuid "$2" --regid "$3" --clear-groups --no-new-privs "$0" -c {INSTALL_FOLDER}/mosquitto.conf
"""


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("out", [None, "copy"])
def test_what_root_writes_is_read_by_the_containers_user_and_the_key_by_nobody_else(
    out: Optional[str], tmp_path: Path
) -> None:
    """Mosquitto as compose.yaml starts it: that user, the folder read-only, data/ to write."""
    program, port = mosquitto_binary(), free_port()
    fleet = make_fleet(tmp_path / "home", port=port, devices=("kitchen-pi",))
    folder = write_broker_folder(fleet, None if out is None else tmp_path / out, 100)
    user, group = re.findall(r'user: "(\d+):(\d+)"', (folder / "compose.yaml").read_text())[0]
    assert int(user) != 0
    for name, mode in (("key.pem", 0o600), ("acl", 0o600), ("data", 0o700)):
        found = (folder / name).stat()
        assert (found.st_uid, found.st_mode & 0o777) == (int(user), mode), name
    log = tmp_path / "mosquitto.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", AS_THE_CONTAINER, program, str(folder), user, group], stderr=file
        )
    try:
        wait_for(lambda: process.poll() is not None or b" running" in log.read_bytes())
        client = Client(FleetBroker(fleet, port, folder / "mosquitto.conf", process), Identity.of(fleet.coordinator))
        assert client.publish("covey/1/home/device/coordinator/probe", b"kept", retain=True) == "Success"
        client.close()
        provisioning.renew(fleet.path, ["broker"], new_key=True)
        if out is not None:
            write_broker_folder(fleet, folder, 100)
        process.send_signal(signal.SIGHUP)  # it reads the new key.pem, as that user
        wait_for(lambda: b"Reloading config" in log.read_bytes())
        client = Client(FleetBroker(fleet, port, folder / "mosquitto.conf", process), Identity.of(fleet.coordinator))
        client.close()
    finally:
        process.terminate()
        process.wait()
    assert b"Error" not in log.read_bytes(), log.read_text()
    assert (folder / "key.pem").read_bytes() == (fleet.broker / "key.pem").read_bytes()
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (folder / "data" / "mosquitto.db").stat().st_uid == int(user)


def test_the_largest_message_of_the_protocol_fits_the_brokers_limit() -> None:
    longest = len(f"covey/1/{LONG}/device/{LONG}/presence")
    assert MAX_ENVELOPE_BYTES + longest + PACKET_HEADER_BYTES <= MAX_PACKET_BYTES


def test_every_text_says_the_same_port_and_folder() -> None:
    files = broker_files("home", 8884, 77, (1000, 1000))
    assert "listener 8884\nmax_connections 77\n" in files["mosquitto.conf"]
    assert '"8884:8884"' in files["compose.yaml"]
    assert f"./:{INSTALL_FOLDER}:ro" in files["compose.yaml"]
    assert "nofile: 1077" in files["compose.yaml"]
    assert "LimitNOFILE=1077" in files["systemd/covey.conf"]
    assert "\nExecReload=\n" in files["systemd/covey.conf"]  # docs/broker.md: what a reload does to 2.0.11


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (systemd)")
def test_systemd_takes_the_drop_in(tmp_path: Path) -> None:
    program = mosquitto_binary()
    (tmp_path / "mosquitto.service.d").mkdir()
    unit = tmp_path / "mosquitto.service"
    unit.write_text(
        f"[Unit]\nDescription=as Debian's\n[Service]\nType=notify\nExecStart={program} -c /etc/other.conf\n"
    )
    text = broker_files("home", 8883, 100, (0, 0))["systemd/covey.conf"].replace("/usr/sbin/mosquitto", program)
    (tmp_path / "mosquitto.service.d" / "covey.conf").write_text(text)
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:/lib/systemd/system"}
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", str(unit)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "covey.conf" not in ended.stderr, ended.stderr
    assert ended.returncode == 0, ended.stderr


# --- other brokers: shape only


def fits(pattern: str, topic: str) -> bool:
    """AWS: * is any characters; the rest is itself."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), topic) is not None


@pytest.mark.parametrize("role", [DEVICE, COORDINATOR, OPERATOR])
def test_an_aws_policy_has_the_form_the_size_and_the_rights(role: str) -> None:
    text = aws_policy("home", role, "eu-central-1", "123456789012")
    assert (
        len(re.sub(r"\s", "", aws_policy(LONG[:40], role, "ap-northeast-1", "123456789012"))) <= AWS_POLICY_CHARACTERS
    )
    policy = json.loads(text)
    assert policy["Version"] == "2012-10-17"
    resources: dict[str, list[str]] = {}
    for statement in policy["Statement"]:
        assert statement.keys() == {"Effect", "Action", "Resource"}
        for action in statement["Action"]:
            assert action in {"iot:Connect", "iot:Publish", "iot:RetainPublish", "iot:Subscribe", "iot:Receive"}
            resources[action] = [
                one.removeprefix("arn:aws:iot:eu-central-1:123456789012:") for one in statement["Resource"]
            ]
    name = "${iot:Certificate.Subject.CommonName}" if role == DEVICE else role
    assert f"client/covey-home-{name}" in resources["iot:Connect"]
    assert not any("+" in one for one in resources["iot:Publish"] + resources["iot:Receive"])
    chunk, foreign = f"topic/covey/1/home/blob/{'ab' * 32}/0", "topic/covey/1/home/device/porch-pi/up"
    writes, reads = resources["iot:Publish"], resources["iot:Receive"]
    assert any(fits(one, chunk) for one in writes) == (role != DEVICE)
    assert any(fits(one, chunk) for one in reads)
    assert not any(fits(one, foreign) for one in writes)
    assert any(fits(one, foreign) for one in reads) == (role == COORDINATOR)
    assert any(fits(one, "topic/covey/1/home/fleet/round") for one in writes) == (role == COORDINATOR)


def test_emqx_refuses_at_the_end_and_hivemq_has_a_role_for_everybody() -> None:
    rules = emqx_acl("home").strip().splitlines()
    assert rules[-1] == "{deny, all}."
    assert all(re.fullmatch(r"\{(allow|deny), .*\}\.", rule) for rule in rules[1:])
    own = next(rule for rule in rules if "all, publish" in rule)
    assert own == (
        '{allow, all, publish, ["covey/1/home/device/${username}/presence", "covey/1/home/device/${username}/up", '
        '"covey/1/home/device/${username}/probe"]}.'
    )
    tree = ElementTree.fromstring(hivemq_roles("home"))  # noqa: S314 - our own text
    roles = {role.findtext("id"): role.findall("permissions/permission") for role in tree.findall("roles/role")}
    assert roles.keys() == {DEVICE, COORDINATOR, OPERATOR}
    told = {(one.findtext("activity"), one.findtext("topic")) for one in roles[DEVICE]}
    assert ("PUBLISH", "covey/1/home/device/${{username}}/up") in told
    assert len(told) == len(Access("home").everyone())


# --- covey broker run


@pytest.fixture
def fleet(tmp_path: Path) -> FleetFolder:
    return make_fleet(tmp_path / "home", devices=("kitchen-pi",))


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_broker_that_is_run_ends_with_ctrl_c_and_keeps_what_it_retained(fleet: FleetFolder) -> None:
    topic = "covey/1/home/device/coordinator/probe"
    run = BrokerRun(fleet)
    client = Client(run.broker, Identity.of(fleet.coordinator))
    client.publish(topic, b"kept", retain=True)
    before, whole = run.children(), (fleet.broker / "crl.pem").read_bytes()
    (fleet.broker / "crl.pem").write_bytes(whole[:-40])
    run.process.send_signal(signal.SIGHUP)
    assert run.process.stderr is not None
    next(line for line in run.process.stderr if "goes on" in line and "crl.pem cannot be used" in line)
    assert run.children() == before  # a torn list ends nothing
    (fleet.broker / "crl.pem").write_bytes(whole)
    run.process.send_signal(signal.SIGHUP)
    wait_for(lambda: client.ended)
    wait_for(lambda: run.children() not in ([], before) and run.broker.is_open)  # the port is another one's
    client = Client(run.broker, Identity.of(fleet.coordinator))
    client.subscribe(topic)
    wait_for(lambda: client.heard == [(topic, b"kept")])
    run.process.send_signal(signal.SIGINT)
    log = run.ended()
    assert run.process.returncode == 0, log
    assert "Reloading config" not in log
    wait_for(lambda: client.ended)
    assert (fleet.broker / "data").stat().st_mode & 0o777 == 0o700
    run = BrokerRun(fleet)
    client = Client(run.broker, Identity.of(fleet.coordinator))
    client.subscribe(topic)
    wait_for(lambda: client.heard == [(topic, b"kept")])
    run.process.send_signal(signal.SIGTERM)
    run.ended()


@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.slow
def test_a_broker_that_is_run_does_not_outlive_who_ran_it(fleet: FleetFolder) -> None:
    run = BrokerRun(fleet)
    client = Client(run.broker, Identity.of(fleet.device("kitchen-pi")))
    run.process.kill()
    run.ended()
    wait_for(lambda: client.ended)


@pytest.mark.broker
def test_what_keeps_a_broker_from_running_is_named(
    fleet: FleetFolder, monkeypatch: pytest.MonkeyPatch, home_broker: FleetBroker
) -> None:
    mosquitto_binary()

    def code(port: int) -> object:
        with pytest.raises(SystemExit) as ended:
            main(["broker", "run", "--fleet-folder", str(fleet.path), "--host", "127.0.0.1", "--port", str(port)])
        return ended.value.code

    assert code(home_broker.port) == EXIT_TRANSPORT
    (fleet.broker / "key.pem").write_text("torn")
    assert code(0) == EXIT_CONFIG
    (fleet.broker / "crl.pem").unlink()
    assert code(0) == EXIT_CONFIG
    monkeypatch.setattr(broker_run.shutil, "which", lambda *a, **k: None)
    assert code(0) == EXIT_MACHINE
