"""Every role, every topic, writing and reading, on a real Mosquitto: docs/broker.md says who may what, and so it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from fleet_broker import (
    END,
    ROOT,
    Client,
    FleetBroker,
    Identity,
    answer,
    issue,
    make_fleet,
    wait_for,
)

from covey_deploy.fleet_folder import FleetFolder

pytestmark = pytest.mark.broker
DOCS = Path(__file__).parents[2] / "docs" / "broker.md"
OWN, OTHER = "kitchen-pi", "porch-pi"
BLOB = f"{'ab' * 32}/0"
ROLES = ("device", "coordinator", "operator")
NOBODYS = (  # nobody of the fleet may write or read these
    "covey/1/home/fleet/other",
    "covey/1/home/fleet",
    "covey/1/home/device/kitchen-pi",
    "covey/1/home/device/kitchen-pi/other",
    "covey/1/home/device/kitchen-pi/up/more",
    "covey/1/home/device/up",
    "covey/1/home/blob/ab",
    "covey/1/home/blob/ab/0/1",
    "covey/1/home/device/coordinator/up",
    "covey/1/home/device/coordinator/down",
    "covey/1/home/device/broker/probe",
    "covey/1/office/fleet/round",
    "covey/1/office/device/kitchen-pi/up",
    "covey/2/home/fleet/round",
    "covey",
    "elsewhere/kitchen-pi",
)


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/broker.md: column -> topic after the prefix -> "write", "read", "write, read" or "-"."""
    lines = DOCS.read_text().split("<!-- access -->")[1].strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        column: {re.sub("`", "", row[0]): row[number] for row in rows} for number, column in enumerate(head) if number
    }


def may(role: str, verb: str) -> set[str]:
    """Full topics that a role may write or read, of those that the tests try."""
    table, allowed = documented(), set()
    for column in ("a device's own", "another device's") if role == "device" else (role,):
        for topic, rights in table[column].items():
            if verb in rights.split(", "):
                names = {"a device's own": [OWN], "another device's": [OTHER]}.get(column, [OWN, OTHER])
                allowed |= {f"covey/1/home/{topic.replace('ID', name).replace('SHA256/INDEX', BLOB)}" for name in names}
    return allowed


def every_topic() -> set[str]:
    topics = {topic for column in documented().values() for topic in column}
    named = {topic.replace("SHA256/INDEX", BLOB) for topic in topics}
    return {f"covey/1/home/{topic.replace('ID', name)}" for topic in named for name in (OWN, OTHER)} | set(NOBODYS)


@pytest.fixture(scope="module")
def root(home_broker: FleetBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(home_broker, issue(home_broker.fleet, ROOT, tmp_path_factory.mktemp("root") / "it"))
    yield client
    client.close()


def identity(fleet: FleetFolder, role: str) -> Identity:
    return Identity.of(fleet.device(OWN) if role == "device" else fleet.path / role)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_writes_what_the_page_says_and_nothing_else(home_broker: FleetBroker, root: Client, role: str) -> None:
    assert may(role, "write") < every_topic()
    client = Client(home_broker, identity(home_broker.fleet, role))
    root.heard.clear()
    root.subscribe("#")
    payload = role.encode()
    reasons = client.publish_all(dict.fromkeys(sorted(every_topic()), payload))
    assert {topic for topic, reason in reasons.items() if reason == "Success"} == may(role, "write")
    assert {reason for reason in reasons.values() if reason != "Success"} == {"Not authorized"}
    root.publish("covey/1/home/fleet/round", END)
    told = root.heard_until("covey/1/home/fleet/round")
    assert {topic for topic, payloads in told.items() if payload in payloads} == may(role, "write")
    client.close()


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reads_what_the_page_says_however_it_asks(home_broker: FleetBroker, root: Client, role: str) -> None:
    root.publish_all(dict.fromkeys(every_topic(), b"retained"), retain=True)
    client = Client(home_broker, identity(home_broker.fleet, role))
    filters = ("#", "+/#", "covey/1/home/device/+/+", "covey/+/+/blob/#", "$SYS/#", "$share/crew/#")
    client.subscribe(*filters, *every_topic())
    root.publish_all(dict.fromkeys(every_topic(), b"live"))
    root.publish("covey/1/home/fleet/round", END)
    told = client.heard_until("covey/1/home/fleet/round")
    assert told.keys() == may(role, "read")
    assert all(payloads == {b"retained", b"live"} for payloads in told.values())
    client.close()
    root.publish_all(dict.fromkeys(every_topic(), b""), retain=True)


def test_a_device_cannot_take_away_what_another_one_or_the_coordinator_retains(
    home_broker: FleetBroker, root: Client
) -> None:
    topics = ["covey/1/home/device/porch-pi/presence", "covey/1/home/fleet/round", f"covey/1/home/blob/{BLOB}"]
    root.publish_all(dict.fromkeys(topics, b"kept"), retain=True)
    client = Client(home_broker, identity(home_broker.fleet, "device"))
    assert set(client.publish_all(dict.fromkeys(topics, b""), retain=True).values()) == {"Not authorized"}
    watcher = Client(home_broker, identity(home_broker.fleet, "operator"))
    watcher.subscribe(*topics)
    root.publish("covey/1/home/fleet/round", END)
    assert watcher.heard_until("covey/1/home/fleet/round") == {topic: {b"kept"} for topic in topics}
    root.publish_all(dict.fromkeys(topics, b""), retain=True)
    client.close()
    watcher.close()


def test_a_last_will_reaches_only_the_devices_own_topics(home_broker: FleetBroker, root: Client) -> None:
    root.heard.clear()
    root.subscribe("covey/1/home/device/+/presence")
    for name in (OTHER, OWN):
        client = Client(home_broker, identity(home_broker.fleet, "device"), will=f"covey/1/home/device/{name}/presence")
        client.vanish()
        wait_for(lambda client=client: client.ended)
    wait_for(lambda: root.heard)
    assert set(root.heard) == {(f"covey/1/home/device/{OWN}/presence", b"gone")}


@pytest.mark.parametrize("protocol", [paho.MQTTv5, pytest.param(paho.MQTTv311, marks=pytest.mark.slow)])
def test_nobody_takes_anothers_connection_with_its_client_id(home_broker: FleetBroker, protocol: int) -> None:
    fleet = home_broker.fleet
    device = Client(home_broker, identity(fleet, "device"), "covey-home-kitchen-pi")
    coordinator = Client(home_broker, identity(fleet, "coordinator"), "covey-home-coordinator")
    for stolen in ("covey-home-kitchen-pi", "kitchen-pi", "coordinator", "covey-home-coordinator"):
        thief = Client(home_broker, Identity.of(fleet.device(OTHER)), stolen, protocol=protocol)
        assert device.publish(f"covey/1/home/device/{OWN}/up") == "Success"
        assert coordinator.publish(f"covey/1/home/device/{OWN}/down") == "Success"
        assert not device.ended
        assert not coordinator.ended
        thief.close()
    again = Client(home_broker, identity(fleet, "device"), "another-program")
    wait_for(lambda: device.ended)  # the same certificate, the same device: the newer program holds
    again.close()
    coordinator.close()


def test_who_may_connect(home_broker: FleetBroker, tmp_path: Path) -> None:
    fleet = home_broker.fleet
    other = make_fleet(tmp_path / "home", devices=("kitchen-pi",))  # the same names, another authority
    cases = {
        "a device": (Identity.of(fleet.device(OWN)), "taken"),
        "the operator": (Identity.of(fleet.operator), "taken"),
        "nobody's": (Identity(fleet.ca / "ca.pem"), "handshake_failure"),
        "one that has expired": (issue(fleet, OWN, tmp_path / "old", dates=(-9, -0.01)), "certificate_expired"),
        "one of the future": (issue(fleet, OWN, tmp_path / "new", dates=(0.5, 9)), "bad_certificate"),
        "the broker's own": (Identity.of(fleet.broker), "unsupported_certificate"),
        "another fleet's": (Identity.of(other.device(OWN)), "unknown_ca"),
    }
    for what, (one, expected) in cases.items():
        one = Identity(fleet.ca / "ca.pem", one.cert, one.key)
        assert expected in answer(home_broker, one), what


@pytest.mark.parametrize(
    "name", ["+", "porch-pi/up", *(pytest.param(one, marks=pytest.mark.slow) for one in ("#", "kitchen-pi/+", "a+b"))]
)
def test_a_name_that_is_a_pattern_opens_nothing(
    home_broker: FleetBroker, root: Client, tmp_path: Path, name: str
) -> None:
    """`covey provision` makes no such certificate; another program with the authority's key could."""
    client = Client(home_broker, issue(home_broker.fleet, name, tmp_path / "it"))
    assert set(client.publish_all(dict.fromkeys(every_topic(), b"x")).values()) == {"Not authorized"}
    client.subscribe("#")
    private = {topic for topic in every_topic() if "/device/" in topic}
    root.publish_all(dict.fromkeys(private, b"secret"))
    root.publish("covey/1/home/fleet/round", END)
    if "+" in name or "#" in name:  # Mosquitto refuses everything to such users, also what all may read
        client.publish("covey")  # answered after whatever else is for this client
        assert client.heard == []
    else:
        assert client.heard_until("covey/1/home/fleet/round") == {}
    client.close()
