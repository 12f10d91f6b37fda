"""`covey doctor`: every fault it names, found on a real Mosquitto that has it; and nothing disturbed while it looks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from brokers import free_port
from click.testing import CliRunner
from fleet_broker import (
    END,
    ROOT,
    Client,
    FleetBroker,
    Identity,
    fleet_broker,
    issue,
    make_fleet,
    now,
    own_authority,
)

from covey_deploy import authority, doctor, provisioning
from covey_deploy.cli_broker import broker_command
from covey_deploy.cli_doctor import doctor as command
from covey_deploy.fleet_folder import FleetFolder
from covey_deploy.passing import no_passphrase
from covey_edge import preflight
from covey_edge.local_socket import StateLock
from covey_edge.preflight import OK, WARNING, WRONG, Finding
from covey_protocol.errors import EXIT_CONFIG, EXIT_TRANSPORT

pytestmark = [
    pytest.mark.broker,
    # paho leaves the socket of a failed handshake to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "RETAINED_S", 0.3)


def from_the_desk(fleet: FleetFolder, address: str) -> list[Finding]:
    return list(doctor.fleet_findings(fleet.path, address, no_passphrase))


def words(found: list[Finding], level: str) -> dict[str, str]:
    """check -> what and remedy, of those with this level."""
    return {one.check: f"{one.what}; {one.remedy}" for one in found if one.level == level}


def edited(*changes: tuple[str, str]) -> Callable[[str], str]:
    """Replaces patterns in mosquitto.conf, each of which must be there."""

    def edit(text: str) -> str:
        for pattern, new in changes:
            text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
            assert count, pattern
        return text

    return edit


@pytest.fixture
def fleet(tmp_path: Path) -> FleetFolder:
    return make_fleet(tmp_path / "home")


@pytest.fixture
def config(fleet: FleetFolder, tmp_path: Path) -> Callable[..., Path]:
    """A device's folder with data, as on the device; `lines` replace those of its agent.toml."""

    def make(port: int, **lines: str) -> Path:
        folder = fleet.device("kitchen-pi")
        np.savez(folder / "data.npz", x=np.zeros((30, 8, 8, 1), np.float32), y=np.zeros(30, np.int32))
        text = (folder / "agent.toml").read_text()
        given = {"url": f"mqtts://127.0.0.1:{port}", "state_dir": str(tmp_path / "state"), "path": "data.npz", **lines}
        for name, value in given.items():
            text = re.sub(rf"^{name} = .*$", f'{name} = "{value}"', text, flags=re.MULTILINE)
        (folder / "agent.toml").write_text(text)
        return folder / "agent.toml"

    return make


# --- a deployment that is right


def test_a_right_deployment_is_told_so_and_nothing_is_left_on_the_broker(
    home_broker: FleetBroker, tmp_path: Path
) -> None:
    fleet = home_broker.fleet
    running = [
        Client(home_broker, Identity.of(folder))
        for folder in (fleet.device("porch-pi"), fleet.coordinator, fleet.operator)
    ]
    arguments = ["--fleet-folder", str(fleet.path), "--address", f"127.0.0.1:{home_broker.port}", "--json"]
    ended = CliRunner().invoke(command, arguments)
    told = [json.loads(line) for line in ended.output.splitlines()]
    assert ended.exit_code == 0, ended.output
    assert {one["level"] for one in told} == {OK}
    wanted = "fleet keys certificates revoked configuration name port tls certificate mqtt payload rights names"
    assert set(wanted.split()) <= {one["check"] for one in told}
    assert any("65536 bytes were taken, kept and given back" in one["what"] for one in told)
    assert not any(client.ended for client in running)
    root = Client(home_broker, issue(fleet, ROOT, tmp_path / "root"))
    root.subscribe("covey/1/home/#")
    root.publish("covey/1/home/fleet/round", END)
    left = root.heard_until("covey/1/home/fleet/round")
    assert not any("covey-" in topic for topic in left), left
    for client in (*running, root):
        client.close()


@pytest.mark.slow
def test_device_and_coordinator_are_looked_at_from_their_own_ends(
    fleet: FleetFolder, config: Callable[..., Path]
) -> None:
    with fleet_broker(fleet) as broker:
        found = list(doctor.device_findings(config(broker.port)))
        assert words(found, WRONG) == {}
        assert {"settings", "data", "certificate", "payload", "rights"} <= words(found, OK).keys()
        settings = fleet.coordinator / "coordinator.toml"
        settings.write_text(re.sub(r'url = ".*"', f'url = "{broker.url}"', settings.read_text()))
        found = list(doctor.coordinator_findings(settings))
        assert words(found, WRONG) == words(found, WARNING) == {}
        assert {"keys", "payload", "rights", "coordinator"} <= words(found, OK).keys()


@pytest.mark.slow
def test_an_agent_that_runs_keeps_its_connection(fleet: FleetFolder, config: Callable[..., Path]) -> None:
    with fleet_broker(fleet) as broker:
        path = config(broker.port)
        lock = StateLock(path.parent.parent.parent.parent / "state")  # an agent would hold it
        agent = Client(broker, Identity.of(path.parent))
        found = list(doctor.device_findings(path))
        assert "uses kitchen-pi's certificate" in words(found, OK)["mqtt"]
        assert not agent.ended
        agent.close()
        lock.close()


# --- faults on the way there


@pytest.mark.slow
def test_a_name_without_address_a_closed_port_and_a_plain_listener_are_told_apart(fleet: FleetFolder) -> None:
    assert (
        "no-such-broker.invalid has no address"
        in words(from_the_desk(fleet, "no-such-broker.invalid:1"), WRONG)["name"]
    )
    closed = words(from_the_desk(fleet, f"127.0.0.1:{free_port()}"), WRONG)
    assert "nothing listens there: start the broker, or correct the port" in closed["port"]
    plain = edited(
        (r"^(cafile|certfile|keyfile|crlfile|tls_version|require_|use_).*\n", ""), ("anonymous false", "anonymous true")
    )
    with fleet_broker(fleet, plain) as broker:
        told = words(from_the_desk(fleet, f"127.0.0.1:{broker.port}"), WRONG)
    assert "is a listener without TLS; use the port of TLS" in told["tls"]


@pytest.mark.parametrize(
    ("what", "dates", "hosts", "expected"),
    [
        ("another name's", (-1, 1), ("broker.lan", "10.1.2.3"), "is for broker.lan, 10.1.2.3, not for 127.0.0.1"),
        pytest.param(
            "expired", (-9, -1), ("127.0.0.1",), "certificate has expired; renew the broker's", marks=pytest.mark.slow
        ),
        pytest.param("a client's", (-1, 1), (), "unsuitable certificate purpose", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_certificate_of_the_broker_is_named(
    fleet: FleetFolder, tmp_path: Path, what: str, dates: tuple[float, float], hosts: tuple[str, ...], expected: str
) -> None:
    role = "broker" if hosts else "device"
    issue(fleet, "broker", tmp_path / "wrong", role=role, dates=dates, hosts=hosts)
    wrong = edited(
        (r"^certfile .*", f"certfile {tmp_path}/wrong/cert.pem"), (r"^keyfile .*", f"keyfile {tmp_path}/wrong/key.pem")
    )
    with fleet_broker(fleet, wrong) as broker:
        found = from_the_desk(fleet, f"127.0.0.1:{broker.port}")
    told = [one for one in found if one.level == WRONG]
    assert [(one.check, one.code) for one in told] == [("tls", EXIT_TRANSPORT)]
    assert expected in f"{told[0].what}; {told[0].remedy}"


@pytest.mark.slow
def test_a_broker_of_another_authority_is_named(fleet: FleetFolder, tmp_path: Path) -> None:
    other = make_fleet(tmp_path / "other", devices=())
    with fleet_broker(other) as broker:
        told = words(from_the_desk(fleet, f"127.0.0.1:{broker.port}"), WRONG)
    assert "is not the authority that signed the broker's certificate" in told["tls"]


@pytest.mark.slow
def test_a_broker_that_refuses_our_certificate_says_why(
    fleet: FleetFolder, tmp_path: Path, config: Callable[..., Path]
) -> None:
    other = make_fleet(tmp_path / "other", devices=("kitchen-pi",))
    strange = other.device("kitchen-pi")
    with fleet_broker(fleet) as broker:
        path = config(broker.port)
        files = {"cert_file": str(strange / "cert.pem"), "key_file": str(strange / "key.pem")}
        for name, value in files.items():
            path.write_text(re.sub(rf'{name} = "(cert|key).pem"', f'{name} = "{value}"', path.read_text()))
        found = words(list(doctor.device_findings(path)), WRONG)
        assert "refuses the client certificate" in found["certificate"]
        assert "get a certificate from the broker's own" in found["certificate"]
        porch = fleet.device("porch-pi")
        for value in files.values():
            path.write_text(path.read_text().replace(value, str(porch / Path(value).name)))
        found = words(list(doctor.device_findings(path)), WRONG)
        assert "our certificate is porch-pi's, and we are kitchen-pi" in found["certificate"]
        path.write_text(re.sub(r'^(cert_file|key_file) = "/.*\n', "", path.read_text(), flags=re.MULTILINE))
        found = words(list(doctor.device_findings(path)), WRONG)
        assert "takes nobody without a certificate" in found["certificate"]


# --- faults of the broker's settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "level", "check", "expected"),
    [
        (("^acl_file .*", ""), WRONG, "rights", "covey broker config"),
        (("^max_packet_size .*", "max_packet_size 16384"), WRONG, "payload", "takes messages of at most 16384 bytes"),
        (("^max_packet_size .*", "message_size_limit 60000"), WRONG, "payload", "above the broker's limit"),
        (("^listener", "retain_available false\nlistener"), WRONG, "mqtt", "keeps no retained messages"),
        (("^use_username_as_clientid .*", ""), WARNING, "names", "can end another's connection"),
        (("^use_identity_as_username .*", ""), WRONG, "mqtt", "Not authorized"),
        (
            ("^allow_anonymous false((.|\n)*)^use_identity_as_username true\nuse_user.*", r"allow_anonymous true\1"),
            WRONG,
            "rights",
            "must take us for covey-doctor-",
        ),
    ],
)
def test_a_wrong_setting_of_the_broker_is_named(
    fleet: FleetFolder, change: tuple[str, str], level: str, check: str, expected: str
) -> None:
    with fleet_broker(fleet, edited(change)) as broker:
        found = from_the_desk(fleet, f"127.0.0.1:{broker.port}")
    told = [f"{one.what}; {one.remedy}" for one in found if (one.level, one.check) == (level, check)]
    assert any(expected in one for one in told), found


@pytest.mark.slow
def test_over_mqtt_3_the_doctor_says_what_it_cannot_know(fleet: FleetFolder, config: Callable[..., Path]) -> None:
    with fleet_broker(fleet) as broker:
        path = config(broker.port)
        path.write_text(path.read_text().replace("[broker]\n", '[broker]\nprotocol = "3.1.1"\n'))
        found = list(doctor.device_findings(path))
        assert words(found, WRONG) == {}
        assert "cannot be told over MQTT 3.1.1" in words(found, WARNING)["rights"]
        assert "kept and given back" in words(found, OK)["payload"]


# --- faults of the folder


@pytest.mark.slow
def test_a_broker_with_an_old_list_and_a_list_that_ended_are_named(fleet: FleetFolder) -> None:
    with fleet_broker(fleet) as broker:
        address = f"127.0.0.1:{broker.port}"
        provisioning.revoke(fleet.path, "porch-pi", "key-compromise")
        told = words(from_the_desk(fleet, address), WRONG)
        assert "takes porch-pi, which is revoked" in told["revoked"]
        broker.reload()
        assert words(from_the_desk(fleet, address), WRONG) == {}
        made = own_authority(fleet)
        for days, level in ((-0.5, WRONG), (9, WARNING)):
            dates = authority.Dates(now() - timedelta(days=1), now() + timedelta(days=days))
            (fleet.broker / "crl.pem").write_bytes(authority.make_crl(made, [], 9, dates))
            told = words(from_the_desk(fleet, address), level)
            assert "covey provision renew broker" in told["revoked"], told
        provisioning.next_authority(fleet.path)
        told = words(from_the_desk(fleet, address), WRONG)
        assert "copy broker/ca.pem and crl.pem to the broker and restart it" in told["certificate"]
        broker.reload()
        assert words(from_the_desk(fleet, address), WRONG) == {}


@pytest.mark.slow
def test_certificates_that_end_open_keys_and_changed_settings_are_named(tmp_path: Path) -> None:
    made = make_fleet(tmp_path / "home", devices=("kitchen-pi",))
    provisioning.renew(made.path, ["operator"], now=now() - timedelta(days=729))
    made.release_key_path.chmod(0o644)
    ended = CliRunner().invoke(broker_command, ["config", "--fleet-folder", str(made.path)])
    assert ended.exit_code == 0, ended.output
    with (made.broker / "acl").open("a") as acl:
        acl.write("topic readwrite #\n")
    found = from_the_desk(made, f"127.0.0.1:{free_port()}")
    assert "operator's certificate ends on" in words(found, WARNING)["certificates"]
    assert "acl in" in words(found, WARNING)["configuration"]
    assert "release.pem may be read by others: mode 644" in words(found, WRONG)["keys"]
    no_folder = CliRunner().invoke(command, ["--fleet-folder", str(tmp_path / "nowhere")])
    assert no_folder.exit_code == EXIT_CONFIG


def test_one_end_is_looked_at_at_a_time() -> None:
    ended = CliRunner().invoke(command, ["--config", "a.toml", "--coordinator", "b.toml"])
    assert ended.exit_code == EXIT_CONFIG
    assert "give one of" in ended.output
