"""A fleet's folder: what is in it, whom its certificates convince, and that it is never half changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pty
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from handmade_bundles import manifest
from small_disk import SmallDisk

from covey_deploy import authority, cli_provision, folder_changes, provisioning
from covey_deploy.cli_provision import provision
from covey_deploy.fleet_folder import FleetFolder, Lifetimes
from covey_deploy.provisioning import NewDevice, add_devices, next_authority, renew, retire_authority, revoke
from covey_deploy.settings_texts import bearable, roster, with_devices
from covey_edge.certificate_request import make_request, new_key_pem, read_request
from covey_edge.config import load_agent
from covey_protocol.bundle import write_bundle
from covey_protocol.errors import ConfigError, StorageError
from covey_protocol.seals import SealingKey

NOW = datetime(2026, 11, 26, 12, tzinfo=timezone.utc)
HOSTS = ("broker.lan", "192.168.1.5", "fd00::5")
CLIENTS = ("coordinator", "operator", "devices/kitchen-pi", "devices/porch-pi")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet of two devices. Not to be changed: `home` is a copy."""
    folder = tmp_path_factory.mktemp("made") / "home"
    provisioning.init(folder, "home", HOSTS, now=NOW)
    add_devices(folder, [NewDevice("kitchen-pi"), NewDevice("porch-pi")], now=NOW)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "home"))


def covey(*arguments: Any, give: str = "") -> Result:
    return CliRunner().invoke(provision, [str(one) for one in arguments], input=give)


def says(*arguments: Any) -> str:
    ended = covey(*arguments)
    assert ended.exit_code == 0, (ended.output, ended.exception)
    return ended.output


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def convinces(fleet: Path, name: str, at: datetime = NOW, ca: Path | None = None) -> bool:
    """By cryptography's verifier: as a client of the fleet's broker, or as its server."""
    trusted = x509.load_pem_x509_certificates((ca or fleet / "ca" / "ca.pem").read_bytes())
    policy = PolicyBuilder().store(Store(trusted)).time(at)
    own = certificate(fleet / name / "cert.pem")
    try:
        if name != "broker":
            policy.build_client_verifier().verify(own, [])
            return True
        for host in HOSTS:
            policy.build_server_verifier(authority.host_name(host)).verify(own, [])  # type: ignore[arg-type]
    except VerificationError:
        return False
    return True


def files(folder: Path) -> dict[str, bytes]:
    """Without the lock and what nobody decided to put in place."""
    named = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith((".lock", ".staged"))}


# --- what is made


def test_every_file_is_there_and_secrets_are_their_owners_alone(home: Path) -> None:
    of_all = {"cert.pem", "key.pem", "ca.pem"}
    assert {path.name for path in (home / "ca").iterdir()} == {"ca.pem", "ca.key", "crl.pem", "issued.jsonl"}
    assert {path.name for path in (home / "broker").iterdir()} == of_all | {"crl.pem"}
    assert {path.name for path in (home / "coordinator").iterdir()} == of_all | {"seal.pem", "coordinator.toml"}
    assert {path.name for path in (home / "operator").iterdir()} == of_all
    assert {path.name for path in (home / "devices/porch-pi").iterdir()} == of_all | {"seal.pem", "agent.toml"}
    for path in [home, *home.rglob("*")]:
        private = path.is_dir() or b"PRIVATE" in path.read_bytes()
        assert path.stat().st_mode & 0o777 in ((0o700, 0o600) if private else (0o644, 0o600)), path
    assert all(certificate(path).subject.rfc4514_string() for path in home.rglob("cert.pem"))


def test_an_agent_and_a_coordinator_start_from_what_is_made(home: Path) -> None:
    from covey_coordinator.serve import CoordinatorConfig
    from covey_coordinator.tasks import read_tasks
    from covey_edge.mqtt import tls_context

    (home / "devices/kitchen-pi" / "data.npz").write_bytes(b"")
    agent = load_agent(home / "devices/kitchen-pi/agent.toml")
    ((config, _),) = read_tasks(home / "coordinator/coordinator.toml", CoordinatorConfig)
    assert str(agent.broker) == "mqtts://broker.lan:8883"
    assert (agent.config.fleet, config.fleet) == ("home", "home")
    assert config.devices["kitchen-pi"] == agent.key.public.hex()
    coordinator = SealingKey.from_pem((home / "coordinator/seal.pem").read_bytes()).public
    assert agent.coordinators == (coordinator,)
    release = SealingKey.from_pem((home / "release/release.pem").read_bytes()).public
    assert agent.config.update.release_key == release.hex() == FleetFolder.open(home).release_key.hex()
    assert str(agent.state_dir) == "/var/lib/covey"
    provisioning.init(home.parent / "today", "home", HOSTS)  # by the clock of this machine
    add_devices(home.parent / "today", [NewDevice("a")])
    assert tls_context(load_agent(home.parent / "today/devices/a/agent.toml").broker) is not None


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 10, 40])
def test_the_rule_bears_as_many_as_it_is_told(count: int, tmp_path: Path) -> None:
    from covey_coordinator.aggregation.registry import rule_from_table

    quorum, num_byzantine = bearable(count)
    assert quorum + num_byzantine == count
    table = {"rule": "multi-krum", "num_byzantine": num_byzantine} if num_byzantine else {"rule": "mean"}
    rule_from_table(table).check(quorum)
    assert num_byzantine == {1: 0, 2: 0, 5: 0, 6: 1, 9: 1, 10: 2, 40: 8}[count]


def test_certificates_convince_for_their_purpose_and_their_time_alone(home: Path) -> None:
    for name in ("broker", *CLIENTS):
        assert convinces(home, name)
        assert convinces(home, name, NOW - timedelta(hours=23)), "a clock that is behind"
        assert not convinces(home, name, NOW - timedelta(hours=25))
        assert convinces(home, name, NOW + timedelta(days=729))
        assert not convinces(home, name, NOW + timedelta(days=731))
    store = Store([certificate(home / "ca/ca.pem")])
    device, server = certificate(home / "devices/porch-pi/cert.pem"), certificate(home / "broker/cert.pem")
    with pytest.raises(VerificationError):
        PolicyBuilder().store(store).time(NOW).build_client_verifier().verify(server, [])
    verifier = PolicyBuilder().store(store).time(NOW).build_server_verifier(x509.DNSName("porch-pi"))
    with pytest.raises(VerificationError):
        verifier.verify(device, [])
    provisioning.init(home.parent / "other", "home", HOSTS, now=NOW)  # of the same name
    assert not convinces(home, "devices/porch-pi", ca=home.parent / "other/ca/ca.pem")


def test_an_authority_signs_no_authority_and_nothing_outlives_it(home: Path, tmp_path: Path) -> None:
    own = certificate(home / "ca/ca.pem")
    limits = own.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.critical, limits.value.ca, limits.value.path_length) == (True, True, 0)
    serials = [certificate(path).serial_number for path in home.rglob("cert.pem")]
    assert len(set(serials)) == len(serials)
    assert all(2**96 < serial < 2**128 for serial in serials)  # 128 bits at random: below 2^96 once in 4 billion
    short = provisioning.init(tmp_path / "short", "short", HOSTS, lifetimes=Lifetimes(authority=10), now=NOW)
    assert certificate(short.broker / "cert.pem").not_valid_after_utc == NOW + timedelta(days=10)
    add_devices(short.path, [NewDevice("late")], now=NOW + timedelta(days=9))
    assert certificate(short.device("late") / "cert.pem").not_valid_after_utc == NOW + timedelta(days=10)
    with pytest.raises(ConfigError, match=r"authority expired on 2026-12-06.*authority next"):
        add_devices(short.path, [NewDevice("later")], now=NOW + timedelta(days=10, hours=1))


def test_openssl_takes_them_strictly_with_the_list_of_the_revoked(home: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl (Debian: apt install openssl)")
    revoke(home, "porch-pi", "key-compromise", now=NOW)
    next_authority(home, now=NOW)
    renew(home, ["kitchen-pi"], now=NOW)
    at = ["-x509_strict", "-crl_check", "-CRLfile", str(home / "ca/crl.pem"), "-attime", str(int(NOW.timestamp()))]
    for name in ("broker", *CLIENTS):
        purpose = "sslserver" if name == "broker" else "sslclient"
        command = ["openssl", "verify", *at, "-purpose", purpose, "-CAfile", str(home / "ca/ca.pem")]
        ended = subprocess.run([*command, str(home / name / "cert.pem")], check=False, capture_output=True, text=True)
        assert (ended.returncode == 0) == (name != "devices/porch-pi"), ended.stderr
        assert ("certificate revoked" in ended.stderr) == (name == "devices/porch-pi")


# --- refusals: nothing is different afterwards


def refused(home: Path, match: str, work: Callable[[], object], kind: type[Exception] = ConfigError) -> None:
    before = files(home)
    with pytest.raises(kind, match=match):
        work()
    assert files(home) == before


def test_nothing_is_ever_replaced(home: Path, tmp_path: Path) -> None:
    refused(home, "is not empty.*--folder", lambda: provisioning.init(home, "home", HOSTS))
    refused(home, "porch-pi exists", lambda: add_devices(home, [NewDevice("new-pi"), NewDevice("porch-pi")]))
    refused(home, "twice exists", lambda: add_devices(home, [NewDevice("twice"), NewDevice("twice")]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(tmp_path / "mine", "is not empty", lambda: provisioning.init(tmp_path / "mine", "home", HOSTS))
    assert not (tmp_path / "nowhere").exists()
    refused(home, "is no fleet's folder", lambda: add_devices(tmp_path / "nowhere", [NewDevice("a")]))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["broker", "coordinator", "operator", "a/b", "..", "", "+", "x" * 64])
def test_names_of_other_roles_and_of_other_topics_are_no_devices(home: Path, name: str) -> None:
    words = "own name|cannot be used"
    refused(home, words, lambda: add_devices(home, [NewDevice(name)]))


@pytest.mark.parametrize("host", ["mqtts://broker.lan", "broker.lan:8883", "two words", "", "a..b", "*.lan"])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    refused(tmp_path, "neither a DNS name nor an IP address", lambda: provisioning.init(tmp_path, "home", [host]))


def test_a_revoked_device_stays_out(home: Path) -> None:
    assert revoke(home, "porch-pi", "key-compromise", now=NOW) == 1
    refused(home, "porch-pi is revoked", lambda: renew(home, ["kitchen-pi", "porch-pi"], now=NOW))
    refused(home, "porch-pi exists", lambda: add_devices(home, [NewDevice("porch-pi")]))
    refused(home, "has no shed-pi", lambda: revoke(home, "shed-pi", "unspecified"))
    refused(home, "has no shed-pi", lambda: renew(home, ["shed-pi"]))
    assert FleetFolder.open(home).device_ids() == ["kitchen-pi"]


# --- the list of the revoked


def crl(home: Path, issuer: int = 0) -> x509.CertificateRevocationList:
    blocks = (home / "broker/crl.pem").read_bytes().split(b"-----END X509 CRL-----\n")
    assert (home / "broker/crl.pem").read_bytes() == (home / "ca/crl.pem").read_bytes()
    return x509.load_pem_x509_crl(blocks[issuer] + b"-----END X509 CRL-----\n")


def test_who_there_is_one_of_goes_on_with_another_key(home: Path) -> None:
    before = certificate(home / "coordinator/cert.pem")
    revoke(home, "coordinator", "key-compromise", now=NOW)
    refused(home, "coordinator's certificate is revoked.*--new-key", lambda: renew(home, ["coordinator"], now=NOW))
    renew(home, ["coordinator"], new_key=True, now=NOW)
    after = certificate(home / "coordinator/cert.pem")
    assert {one.serial_number for one in crl(home)} == {before.serial_number}
    assert after.public_key() != before.public_key()
    assert convinces(home, "coordinator")
    revoke(home, "porch-pi", "unspecified", now=NOW)
    assert set(provisioning.due(FleetFolder.open(home), 731, NOW)) == {
        "broker",
        "coordinator",
        "operator",
        "kitchen-pi",
    }


def test_a_device_may_be_called_by_a_number_as_authorities_are(home: Path) -> None:
    add_devices(home, [NewDevice("1")], now=NOW)
    next_authority(home, now=NOW)
    everybody = ["1", "kitchen-pi", "porch-pi", "broker", "coordinator", "operator"]
    renew(home, everybody, now=NOW)
    retire_authority(home, now=NOW)
    renew(home, ["1"], now=NOW)
    assert "1" in FleetFolder.open(home).device_ids()
    assert convinces(home, "devices/1")


def test_a_fleet_whose_authority_has_ended_gets_the_next_one(home: Path) -> None:
    late = NOW + timedelta(days=3653)
    refused(home, "authority expired on 2036.*authority next", lambda: renew(home, ["broker"], now=late))
    refused(home, "authority expired on 2036", lambda: revoke(home, "porch-pi", "unspecified", now=late))
    next_authority(home, now=late)
    revoke(home, "porch-pi", "unspecified", now=late)
    renew(home, ["broker", "coordinator", "operator", "kitchen-pi"], now=late)
    assert all(convinces(home, name, late) for name in ("broker", "coordinator", "devices/kitchen-pi"))
    assert retire_authority(home, now=late) == 1


def test_a_revocation_reaches_the_coordinator(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `covey revoke`, where it is installed and the coordinator's file is here; else the operator is told."""
    said = says("revoke", "porch-pi", "--fleet-folder", home, "--reason", "key-compromise")
    order = home / "coordinator/runs/home.revoked/porch-pi.json"
    assert json.loads(order.read_text())["reason"] == "key-compromise"
    assert "porch-pi is revoked" in said
    assert "broker/crl.pem" in said
    monkeypatch.setattr(cli_provision, "entry_points", lambda group: [])  # as on a machine without the coordinator
    said = says("revoke", "kitchen-pi", "--fleet-folder", home)
    assert f"covey revoke kitchen-pi --config {home / 'coordinator/coordinator.toml'}" in said
    assert "covey revoke" not in says("revoke", "operator", "--fleet-folder", home)


def test_every_certificate_of_a_revoked_device_is_on_a_list_that_its_authority_has_signed(home: Path) -> None:
    first = certificate(home / "devices/porch-pi/cert.pem").serial_number
    renew(home, ["porch-pi"], now=NOW)
    second = certificate(home / "devices/porch-pi/cert.pem").serial_number
    assert len(crl(home)) == 0
    revoke(home, "porch-pi", "key-compromise", now=NOW)
    listed = crl(home)
    assert {one.serial_number for one in listed} == {first, second}
    assert {one.extensions.get_extension_for_class(x509.CRLReason).value.reason.value for one in listed} == {
        "keyCompromise"
    }
    own = certificate(home / "ca/ca.pem")
    assert listed.is_signature_valid(own.public_key())  # type: ignore[arg-type]
    assert listed.next_update_utc == own.not_valid_after_utc  # a list that ends would shut everybody out
    number = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    revoke(home, "porch-pi", "superseded", now=NOW)  # again: the first reason stays
    assert crl(home).extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == number + 1
    assert {one.reason for one in FleetFolder.open(home).issued() if one.id == "porch-pi"} == {"key-compromise"}


# --- renewing


def test_a_renewed_certificate_is_for_the_same_key_and_a_new_key_is_for_who_asks(home: Path) -> None:
    later = NOW + timedelta(days=700)
    before = {name: certificate(home / name / "cert.pem") for name in ("broker", *CLIENTS)}
    renew(home, ["broker", "kitchen-pi"], now=later)
    for name in ("broker", "devices/kitchen-pi"):
        after = certificate(home / name / "cert.pem")
        assert after.public_key() == before[name].public_key()
        assert after.serial_number != before[name].serial_number
        assert convinces(home, name, later + timedelta(days=729))
    assert certificate(home / "devices/porch-pi/cert.pem") == before["devices/porch-pi"]
    renew(home, ["porch-pi"], new_key=True, now=later)
    after = certificate(home / "devices/porch-pi/cert.pem")
    key = serialization.load_pem_private_key((home / "devices/porch-pi/key.pem").read_bytes(), None)
    assert key.public_key() == after.public_key() != before["devices/porch-pi"].public_key()


def test_what_ends_soon_is_due_and_said(home: Path) -> None:
    fleet = FleetFolder.open(home)
    assert provisioning.due(fleet, 30, NOW) == []
    late = NOW + timedelta(days=710)
    assert set(provisioning.due(fleet, 30, late)) == {"broker", "coordinator", "operator", "kitchen-pi", "porch-pi"}
    renew(home, ["broker", "coordinator", "operator", "porch-pi"], now=late)
    assert provisioning.due(FleetFolder.open(home), 30, late) == ["kitchen-pi"]
    revoke(home, "kitchen-pi", "unspecified", now=late)
    assert provisioning.due(FleetFolder.open(home), 30, late) == []


def test_the_list_says_who_until_when_and_warns(tmp_path: Path) -> None:
    folder = tmp_path / "soon"
    short = Lifetimes(device=20, operator=0.001)
    provisioning.init(folder, "soon", HOSTS, lifetimes=short, now=datetime.now(timezone.utc) - timedelta(hours=1))
    says("device", "a", "b", "--fleet-folder", folder)
    revoke(folder, "b", "unspecified")
    rows = {row["id"]: row for row in json.loads(says("list", "--fleet-folder", folder, "--json"))}
    assert {name: row["state"] for name, row in rows.items()} == {
        "1": "valid",
        "broker": "valid",
        "coordinator": "valid",
        "operator": "expired",
        "a": "ends soon",
        "b": "revoked",
    }
    assert rows["a"]["days_left"] == 19
    text = says("list", "--fleet-folder", folder)
    assert "renew operator, a " in text
    settings = folder / "fleet.toml"
    settings.write_text(settings.read_text().replace("operator = 0.001", "operator = 90").replace("crl = 0", "crl = 6"))
    assert "list of revoked" not in text
    says("renew", "operator", "--fleet-folder", folder)
    assert "nothing is due" in says("renew", "--due", "0", "--fleet-folder", folder)
    assert "the list of revoked certificates ends on" in says("list", "--fleet-folder", folder)


# --- the next authority


def test_a_fleet_moves_to_its_next_authority_while_both_are_trusted(home: Path) -> None:
    old_ca = (home / "ca/ca.pem").read_bytes()
    assert next_authority(home, now=NOW) == 2
    refused(home, "two authorities already", lambda: next_authority(home, now=NOW))
    for path in home.rglob("ca.pem"):
        assert len(x509.load_pem_x509_certificates(path.read_bytes())) == 2
        assert path.read_bytes().endswith(old_ca)
    assert all(convinces(home, name) for name in ("broker", *CLIENTS))  # old certificates, both authorities
    refused(home, "in use: broker, coordinator, kitchen-pi, operator", lambda: retire_authority(home, now=NOW))
    renew(home, ["broker", "coordinator", "operator", "kitchen-pi"], now=NOW)
    assert all(convinces(home, name) for name in ("broker", *CLIENTS))
    revoke(home, "porch-pi", "unspecified", now=NOW)  # whose certificate is of the older one
    assert [len(crl(home, issuer)) for issuer in (0, 1)] == [0, 1]
    assert retire_authority(home, now=NOW) == 1
    assert all(convinces(home, name) for name in ("broker", "coordinator", "operator", "devices/kitchen-pi"))
    assert not convinces(home, "devices/porch-pi")
    assert not (home / "ca/ca-1.key").exists()
    assert "1  " in says("list", "--fleet-folder", home).split("retired")[0]
    refused(home, "one authority only", lambda: retire_authority(home, now=NOW))
    assert next_authority(home, now=NOW) == 3


# --- keys that stay on the device


def test_a_device_that_made_its_keys_itself_is_signed_for(home: Path, tmp_path: Path) -> None:
    shed = tmp_path / "shed"
    said = says("csr", "shed-pi", "--fleet", "home", "--folder", shed)
    assert "the keys stay here" in said
    assert {path.name: path.stat().st_mode & 0o777 for path in shed.iterdir()} == {
        "key.pem": 0o600,
        "seal.pem": 0o600,
        "shed-pi.csr": 0o644,
    }
    assert b"PRIVATE" not in (shed / "shed-pi.csr").read_bytes()
    says("device", "--csr", shed / "shed-pi.csr", "--fleet-folder", home)
    signed = FleetFolder.open(home).device("shed-pi")
    assert {path.name for path in signed.iterdir()} == {"cert.pem", "ca.pem", "agent.toml"}
    for name in ("cert.pem", "ca.pem", "agent.toml"):
        shutil.copy(signed / name, shed / name)
    agent = load_agent(shed / "agent.toml")
    assert roster(home / "coordinator/coordinator.toml")["shed-pi"] == agent.key.public.hex()
    from covey_edge.mqtt import tls_context

    tls_context(agent.broker)  # key and certificate belong together
    ended = covey("renew", "shed-pi", "--new-key", "--fleet-folder", home)
    assert "make a request there" in str(ended.exception)
    keys = (shed / "key.pem").read_bytes()
    says("csr", "shed-pi", "--fleet", "home", "--folder", shed, "--key", "key-2.pem")
    says("renew", "--csr", shed / "shed-pi.csr", "--fleet-folder", home)
    new = serialization.load_pem_private_key((shed / "key-2.pem").read_bytes(), None)
    assert certificate(signed / "cert.pem").public_key() == new.public_key()
    assert (shed / "key.pem").read_bytes() == keys
    listed = home / "coordinator/coordinator.toml"
    assert roster(listed)["shed-pi"] == agent.key.public.hex()
    for _ in range(2):  # another seal is the next one, until it is heard
        says("csr", "shed-pi", "--fleet", "home", "--folder", shed, "--seal", "seal-2.pem")
        says("renew", "--csr", shed / "shed-pi.csr", "--fleet-folder", home)
        next_seal = SealingKey.from_pem((shed / "seal-2.pem").read_bytes()).public
        assert roster(listed)["shed-pi"] == [agent.key.public.hex(), next_seal.hex()]


def test_no_key_in_a_request_can_be_passed_off_as_ones_own(home: Path) -> None:
    key, seal = new_key_pem(), SealingKey.from_seed(bytes(32))
    good = make_request("shed-pi", "home", key, seal)
    assert read_request(good, "shed-pi.csr").seal_key == seal.public
    csr, _, block = good.partition(b"-----BEGIN COVEY SEAL-----")
    thief = make_request("shed-pi", "home", new_key_pem(), SealingKey.from_seed(bytes([1]) * 32))
    other_csr, _, other_block = thief.partition(b"-----BEGIN COVEY SEAL-----")
    mark = b"-----BEGIN COVEY SEAL-----"
    for bad in (csr + mark + other_block, other_csr + mark + block):  # another's seal, another's TLS key
        with pytest.raises(ConfigError, match="a key in it is not its sender's"):
            read_request(bad, "bad")
    body = x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER)
    changed = x509.load_der_x509_csr(body.replace(b"shed-pi", b"hall-pi"))
    pem = changed.public_bytes(serialization.Encoding.PEM)
    with pytest.raises(ConfigError, match="was changed"):
        read_request(pem + mark + block, "bad")
    for bad in (csr, b"", good[:-40], b"x" * 20_000, mark + block, csr + mark + block + mark + block):
        with pytest.raises(ConfigError, match="is no request of a device"):
            read_request(bad, "bad")
    elsewhere = read_request(make_request("shed-pi", "cabin", key, seal), "cabin.csr")
    refused(
        home,
        "for the fleet cabin, not home",
        lambda: add_devices(home, [NewDevice("shed-pi", request=elsewhere)]),
    )


def test_a_request_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    """A power cut between the two keys: the one that is there stays."""
    (tmp_path / "key.pem").write_bytes(new_key_pem())
    before = (tmp_path / "key.pem").read_bytes()
    says("csr", "pi", "--fleet", "home", "--folder", tmp_path)
    assert (tmp_path / "key.pem").read_bytes() == before
    request = read_request((tmp_path / "pi.csr").read_bytes(), "pi.csr")
    assert request.seal_key == SealingKey.from_pem((tmp_path / "seal.pem").read_bytes()).public


# --- tables, rosters, the authority's passphrase


def test_a_table_names_devices_and_their_data(home: Path, tmp_path: Path) -> None:
    table = tmp_path / "cards.csv"
    table.write_text("id,hostname,data_source,data_path\nhall-pi,hall,csv,/data/hall.csv\nattic-pi,attic,,\n")
    says("device", "--csv", table, "--fleet-folder", home, "--data-path", "/data/rest.npz")
    hall, attic = (load_agent(home / "devices" / name / "agent.toml").config.data for name in ("hall-pi", "attic-pi"))
    assert (hall.source, hall.path) == ("csv", "/data/hall.csv")
    assert (attic.source, attic.path) == ("npz", "/data/rest.npz")
    for text, words in (
        ("name\nhall\n", "has the columns name"),
        ("id,data\na,\n,\n", "row 3 has no id"),
        ("", "has the columns none"),
    ):
        table.write_text(text)
        assert words in str(covey("device", "--csv", table, "--fleet-folder", home).exception)
    table.write_text("id\nhall-pi-2\nhall-pi\n")
    refused(home, "hall-pi exists", lambda: _raised("device", "--csv", table, "--fleet-folder", home))


def _raised(*arguments: Any) -> None:
    exception = covey(*arguments).exception
    assert exception is not None
    raise exception


def test_a_roster_is_changed_and_nothing_else_of_the_operators_file() -> None:
    text = (
        '# mine\nfleet = "home"\n[devices] # who\na = "1"  # the first\n\n'
        '# two keys\nb = ["2", "3"]\n\n[round]\ndevices = 2 # so many\n'
    )
    new = with_devices(text, {"c": "4", "b": "5"}, Path("coordinator.toml"))
    assert new == text.replace('b = ["2", "3"]', 'b = "5"\nc = "4"')
    assert with_devices("[devices]\n", {"c": "4"}, Path("c")) == '[devices]\nc = "4"\n'
    for strange in ('devices = {a = "1"}\n', "[round]\ndevices = 1\n", '[devices]\na = [\n"1",\n]\n', "[devices"):
        with pytest.raises(ConfigError, match='write into it yourself: a = "2"'):
            with_devices(strange, {"a": "2"}, Path("coordinator.toml"))


def test_a_coordinators_file_that_is_elsewhere_is_written_by_its_operator(home: Path) -> None:
    (home / "coordinator/coordinator.toml").unlink()
    said = says("device", "hall-pi", "--fleet-folder", home)
    key = SealingKey.from_pem((home / "devices/hall-pi/seal.pem").read_bytes()).public.hex()
    assert f'into [devices] of coordinator.toml:\nhall-pi = "{key}"' in said


def test_an_authority_with_a_passphrase_signs_for_who_knows_it(tmp_path: Path) -> None:
    folder, word, wrong = tmp_path / "home", tmp_path / "word", tmp_path / "wrong"
    word.write_text("correct horse battery staple\n")
    wrong.write_text("guess\n")
    says("init", "home", "--folder", folder, "--broker-host", "localhost", "--passphrase-file", word)
    assert b"ENCRYPTED" in (folder / "ca/ca.key").read_bytes()
    before = files(folder)
    ended = covey("device", "a", "--fleet-folder", folder)
    assert "is encrypted; give --passphrase-file" in str(ended.exception)
    ended = covey("device", "a", "--fleet-folder", folder, "--passphrase-file", wrong)
    assert "passphrase is wrong" in str(ended.exception)
    assert files(folder) == before
    says("device", "a", "--fleet-folder", folder, "--passphrase-file", word)
    says("authority", "next", "--fleet-folder", folder, "--passphrase-file", word)
    assert b"ENCRYPTED" in (folder / "ca/ca.key").read_bytes()
    says("renew", "--all", "--fleet-folder", folder, "--passphrase-file", word)
    says("authority", "retire", "--fleet-folder", folder, "--passphrase-file", word)


def test_a_new_passphrase_is_asked_for_twice(tmp_path: Path) -> None:
    start = ("init", "home", "--folder", tmp_path / "home", "--broker-host", "localhost", "--encrypt")
    ended = covey(*start, give="one\ntwo\nsame\nsame\n")
    assert ended.exit_code == 0, ended.output
    assert "same" not in ended.output
    assert "do not match" in ended.output
    key = (tmp_path / "home/ca/ca.key").read_bytes()
    assert authority.read_key(key, "ca.key", b"same").curve.name == "secp256r1"


@pytest.mark.slow
def test_a_passphrase_is_read_from_the_terminal_and_not_shown(tmp_path: Path) -> None:
    word = "correct horse battery staple"
    provisioning.init(tmp_path / "home", "home", HOSTS, passphrase=word.encode())
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "covey_edge", "provision", "device", "a"]
        os.execv(sys.executable, [*command, "--fleet-folder", str(tmp_path / "home")])  # noqa: S606 - no shell is meant
    said = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while chunk := os.read(terminal, 1024):
            said += chunk
            if said.endswith(b"key: "):
                os.write(terminal, word.encode() + b"\n")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    assert word.encode() not in said
    assert FleetFolder.open(tmp_path / "home").device_ids() == ["a"]


def test_a_model_of_another_coordinator_is_taken_with_its_key(tmp_path: Path, coordinator_key: SealingKey) -> None:
    model = tmp_path / "digits.covey"
    data = b"what no test here loads"
    said = manifest(model_sha256=hashlib.sha256(data).hexdigest(), model_bytes=len(data))
    model.write_bytes(write_bundle(said, data, coordinator_key))
    start = ("init", "home", "--folder", tmp_path / "home", "--broker-host", "localhost", "--model", model)
    assert "say whose has with --sealed-by" in str(covey(*start).exception)
    assert "seal is not the expected" in str(covey(*start, "--sealed-by", "00" * 32).exception)
    assert not (tmp_path / "home").exists()
    key = coordinator_key.public.hex()
    says(*start, "--sealed-by", key)
    from covey_coordinator.serve import CoordinatorConfig
    from covey_coordinator.tasks import read_tasks

    ((config, _),) = read_tasks(tmp_path / "home/coordinator/coordinator.toml", CoordinatorConfig)
    assert config.bundle_key == key
    assert (tmp_path / "home/coordinator" / config.bundle).resolve() == model


# --- secrets


def secrets_in(*folders: Path) -> set[str]:
    """Pieces of every private key, in the forms in which one could be printed."""
    found = {"correct horse battery staple"}
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if b"PRIVATE KEY" not in data:
            continue
        lines = [line for line in data.decode().splitlines() if line and "-----" not in line]
        found |= {line[at : at + 24] for line in lines for at in range(0, len(line) - 23, 8)}
        if b"ENCRYPTED" not in data:
            key: Any = serialization.load_pem_private_key(data, None)
            if hasattr(key, "private_numbers"):
                found |= {f"{key.private_numbers().private_value:x}", str(key.private_numbers().private_value)}
            else:
                found.add(key.private_bytes_raw().hex())
    return found


def test_no_secret_is_printed_logged_or_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    folder, shed, word = tmp_path / "home", tmp_path / "shed", tmp_path / "word"
    word.write_text("correct horse battery staple")
    of = ("--fleet-folder", folder, "--passphrase-file", word)
    told = []

    def run(*arguments: Any) -> Result:
        ended = covey(*arguments)
        chain, error = [], ended.exception
        while error is not None:
            chain.append(repr(error))
            error = error.__cause__ or error.__context__
        told.append(ended.output + " ".join(chain))
        return ended

    run("init", "home", "--folder", folder, "--broker-host", "localhost", "--passphrase-file", word)
    assert run("device", "a", "b", *of).exit_code == 0
    run("csr", "c", "--fleet", "home", "--folder", shed)
    assert run("device", "--csr", shed / "c.csr", *of).exit_code == 0
    before = secrets_in(folder, shed)
    assert run("renew", "a", "broker", "--new-key", *of).exit_code == 0
    assert run("revoke", "b", *of).exit_code == 0
    assert run("authority", "next", *of).exit_code == 0
    run("list", "--fleet-folder", folder)
    run("list", "--fleet-folder", folder, "--json")
    run("device", "a", *of)  # exists
    secrets = before | secrets_in(folder, shed)
    for path in (folder / "ca/ca.key", shed / "key.pem", shed / "seal.pem"):  # torn files
        path.write_bytes(path.read_bytes().replace(b"M", b"!", 1))
    assert isinstance(run("device", "d", *of).exception, ConfigError)
    assert isinstance(run("csr", "c", "--fleet", "home", "--folder", shed).exception, ConfigError)
    everything = "".join(told) + caplog.text + "".join(map(repr, caplog.records))
    public = "".join(data.decode() for data in files(folder).values() if b"PRIVATE" not in data)
    secrets = {one for one in secrets if one not in public}  # a private key's file holds the public one, too
    assert len(secrets) > 60
    assert [one for one in secrets if one in everything] == []


# --- never half changed: power cuts, full disks, two at once

MOMENTS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod")


class Cut(BaseException):
    """The power goes; nothing of this program happens afterwards."""


def cut_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    left = [moment]

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return real(*args, **kwargs)

        return call

    for name in MOMENTS:
        patch.setattr(os, name, before(getattr(os, name)))


def consistent(folder: Path) -> FleetFolder:
    """Every file belongs to every other."""
    fleet = FleetFolder.open(folder)
    assert not (folder / ".decided").exists()
    trusted = x509.load_pem_x509_certificates((folder / "ca/ca.pem").read_bytes())
    key = serialization.load_pem_private_key((folder / "ca/ca.key").read_bytes(), None)
    assert key.public_key() == trusted[0].public_key()
    gone = {int(one.serial, 16) for one in fleet.issued() if one.revoked is not None and one.role != "authority"}
    assert {path.name for path in (folder / "ca").glob("*.key")} == {"ca.key", "ca-1.key"} - (
        {"ca-1.key"} if len(trusted) == 1 else set()
    )
    listed = [crl(folder, issuer) for issuer in range(len(trusted))]
    assert {one.serial_number for each in listed for one in each} == gone
    places = {"device": "devices/{0}"}
    expected = {one for one in fleet.newest() if one.role != "authority"}
    for one in expected:
        own = folder / places.get(one.role, one.role).format(one.id)
        made = certificate(own / "cert.pem")
        assert f"{made.serial_number:x}" == one.serial
        own_key = serialization.load_pem_private_key((own / "key.pem").read_bytes(), None)
        assert own_key.public_key() == made.public_key()
        assert (own / "ca.pem").read_bytes() == (folder / "ca/ca.pem").read_bytes()
    devices = {one.id for one in expected if one.role == "device"}
    there = folder / "devices"
    assert ({path.name for path in there.iterdir()} if there.exists() else set()) == devices
    keys = {name: SealingKey.from_pem((there / name / "seal.pem").read_bytes()).public.hex() for name in devices}
    assert roster(folder / "coordinator/coordinator.toml") == keys
    return fleet


def everything_happens(folder: Path) -> None:
    add_devices(folder, [NewDevice("hall-pi"), NewDevice("attic-pi")], now=NOW)
    renew(folder, ["kitchen-pi"], new_key=True, now=NOW)
    revoke(folder, "porch-pi", "unspecified", now=NOW)
    next_authority(folder, now=NOW)


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # only its moments matter here


@pytest.mark.usefixtures("swift")
@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_wherever_the_power_goes_a_command_is_done_or_not_begun(every: int, made: Path, tmp_path: Path) -> None:
    steps: list[Callable[[Path], object]] = [
        lambda folder: add_devices(folder, [NewDevice("hall-pi"), NewDevice("attic-pi")], now=NOW),
        lambda folder: renew(folder, ["kitchen-pi", "broker"], new_key=True, now=NOW),
        lambda folder: revoke(folder, "porch-pi", "unspecified", now=NOW),
        lambda folder: next_authority(folder, now=NOW),
        lambda folder: retire_authority(folder, now=NOW),
    ]
    moved = Path(shutil.copytree(made, tmp_path / "moved"))  # everybody is of the next authority
    next_authority(moved, now=NOW)
    renew(moved, ["broker", "coordinator", "operator", "kitchen-pi", "porch-pi"], now=NOW)
    for number, step in enumerate(steps):
        moment, finished, outcomes = number, False, set()
        while not finished:
            folder = Path(shutil.copytree(moved if number == 4 else made, tmp_path / f"{number}-{moment}"))
            before = files(folder)
            with pytest.MonkeyPatch.context() as patch:
                cut_at(patch, moment)
                try:
                    step(folder)
                    finished = True
                except Cut:
                    pass
            consistent(folder)
            done = files(folder) != before
            outcomes.add(done)
            if not done:
                step(folder)  # as if nothing had been
                consistent(folder)
            shutil.rmtree(folder)
            moment += every
        assert outcomes == {True, False}, number


@pytest.mark.usefixtures("swift")
@pytest.mark.parametrize("every", [53, pytest.param(1, marks=pytest.mark.slow)])
def test_wherever_the_power_goes_a_fleet_is_made_or_can_be(every: int, tmp_path: Path) -> None:
    moment, finished, outcomes = 0, False, set()
    while not finished:
        folder = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, moment)
            try:
                provisioning.init(folder, "home", HOSTS, now=NOW)
                finished = True
            except Cut:
                pass
        try:
            FleetFolder.open(folder)
            outcomes.add("made")
        except ConfigError:
            provisioning.init(folder, "home", HOSTS, now=NOW)
            outcomes.add("made at the second time")
        consistent(folder)
        moment += every
    assert outcomes == {"made", "made at the second time"}


def test_a_change_is_decided_when_all_of_it_is_durable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced before what: a power cut takes what was not."""
    synced: set[str] = set()
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "rmdir")}
    decided = []

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real["fsync"](descriptor)

    def rename(old: Path, new: Path) -> None:
        for path in [old, *old.rglob("*")]:
            name = f".{path.name}.{os.getpid()}.tmp" if path.is_file() else path.name  # as it was called when written
            assert str(path.with_name(name)) in synced, path
        synced.clear()
        decided.append(sorted(str(path.relative_to(old)) for path in old.rglob("*") if path.is_file()))
        real["rename"](old, new)

    def rmtree(folder: Path) -> None:
        assert folder.name == ".decided"
        assert str(home) in synced
        for name in decided[-1]:
            assert str((home / name).parent) in synced, name
        shutil_rmtree(folder)

    shutil_rmtree = shutil.rmtree
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(folder_changes.shutil, "rmtree", rmtree)  # type: ignore[attr-defined]
    everything_happens(home)
    assert len(decided) == 4
    assert "devices/hall-pi/key.pem" in decided[0]


def test_a_full_disk_is_named_and_changes_nothing(tmp_path: Path, made: Path) -> None:
    disk = SmallDisk(tmp_path / "card", 1 << 20)
    try:
        home = Path(shutil.copytree(made, disk.seen / "home"))
        disk.fill(leave=12 * 1024)  # for some of the files
        refused(
            home,
            "No space left on device.*free some space",
            lambda: add_devices(home, [NewDevice(f"pi-{number}") for number in range(8)], now=NOW),
            StorageError,
        )
        assert not (home / ".staged").exists()
        disk.free()
        add_devices(home, [NewDevice("hall-pi")], now=NOW)
        consistent(home)
    finally:
        disk.close()


def test_two_at_once_do_not_lose_each_others_devices(home: Path) -> None:
    names = [f"pi-{number}" for number in range(8)]
    start = threading.Barrier(len(names))

    def add(name: str) -> None:
        start.wait()
        add_devices(home, [NewDevice(name)], now=NOW)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(add, names))
    assert set(consistent(home).device_ids()) == {"kitchen-pi", "porch-pi", *names}


def test_who_waits_too_long_for_another_is_told(home: Path) -> None:
    with folder_changes.locked(home), pytest.raises(StorageError, match="another program has been working in"):
        _enter_locked(home)


def _enter_locked(home: Path) -> None:
    with folder_changes.locked(home, wait_s=0.1):
        pass
