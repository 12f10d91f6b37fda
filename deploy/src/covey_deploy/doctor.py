"""`covey doctor`: is a deployment right, from a device's end, from the coordinator's, or from its owner's desk?

Findings are those of `covey agent check`, in the same form. Each end looks at its files first, then at the way to the
broker (`doctor_reach`), then, as an MQTT client, at what the broker does (`doctor_probe`). What runs is not disturbed:
where the broker names clients by their certificates, nothing connects with that of a program that runs here; from the
owner's desk a certificate for a device that does not exist is made for ten minutes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Optional

import msgspec
from msgspec import Struct

from covey_deploy.access import COORDINATOR, DEVICE
from covey_deploy.broker_files import broker_files
from covey_deploy.doctor_probe import Patient, probe, takeover
from covey_deploy.doctor_reach import own_name, reach
from covey_deploy.fleet_folder import FleetFolder
from covey_deploy.folder_changes import is_secret
from covey_deploy.mosquitto import ACL_NAME, CONFIG_NAME
from covey_deploy.passing import Passphrase, passing_broker
from covey_edge.config import BrokerSettings, load_agent, read_broker, read_file, read_toml
from covey_edge.local_socket import lock_holder
from covey_edge.mqtt import Broker, parse_broker
from covey_edge.mqtt_reasons import EXPIRES_SOON_DAYS
from covey_edge.preflight import OK, WARNING, WRONG, Finding, dated, findings, wrong
from covey_protocol.errors import EXIT_CONFIG, EXIT_TRANSPORT, ConfigError, CoveyError
from covey_protocol.keys import keys_from
from covey_protocol.seals import SealingKey

PASSING = "covey-doctor"  # begins the name of a device that does not exist
NEWEST = "the doctor's is of the fleet's newest authority: copy broker/ca.pem and crl.pem to the broker and restart it"
RESTART = "copy the fleet's broker/crl.pem to the broker and restart it (systemctl restart, kill -HUP of broker run)"


def _told(check: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a look finds; an error that ends it is a finding, too."""
    try:
        yield from look()
    except CoveyError as exc:
        yield wrong(check, exc)


def _from_the_broker(patient: Patient, alone: bool) -> Iterator[Finding]:
    """alone: nobody else is connected with this certificate here."""
    named = own_name(patient.broker, patient.name)
    found = [*([named] if named is not None else []), *reach(patient.broker)]
    yield from found
    if any(one.level == WRONG for one in found):
        return
    if alone or patient.broker.cert_file is None:
        yield from probe(patient)
    else:
        what = f"a program that runs here uses {patient.name}'s certificate: rights and limits are not tried"
        yield Finding("mqtt", OK, f"{what}; they are while it is stopped")


# --- a device


def device_findings(config: Path) -> Iterator[Finding]:
    """All of `covey agent check`, then the broker in depth."""
    checked = list(findings(config))
    yield from checked
    if checked[0].level == WRONG:  # the settings cannot be read: no address
        return
    agent = load_agent(config)
    patient = Patient(agent.broker, agent.config.fleet, DEVICE, agent.config.device_id)
    yield from _told("mqtt", lambda: _from_the_broker(patient, lock_holder(agent.state_dir) is None))


# --- a coordinator


class _Coordinator(Struct):
    """Of a coordinator.toml what the doctor needs; `covey serve` looks at all of it."""

    fleet: str
    run: str
    key_file: str
    broker: BrokerSettings
    runs_dir: str = "runs"


def coordinator_findings(config: Path) -> Iterator[Finding]:
    try:
        settings = read_toml(config, _Coordinator)
        broker = read_broker(settings.broker, config.parent)
        key = SealingKey.from_pem(read_file(config.parent / settings.key_file), settings.key_file)
    except CoveyError as exc:
        yield wrong("settings", exc)
        return
    yield Finding("settings", OK, f"{config} names fleet, key and broker")
    secrets_of = [config.parent / settings.key_file, broker.key_file]
    yield _private([path for path in secrets_of if path is not None])
    patient = Patient(broker, settings.fleet, COORDINATOR, COORDINATOR, [key.public])
    held = _held(config.parent / settings.runs_dir / settings.run / "lock")
    yield from _told("mqtt", lambda: _from_the_broker(patient, not held))


def _private(paths: list[Path]) -> Finding:
    readable = [path for path in paths if path.exists() and path.stat().st_mode & 0o077]
    if readable:
        what = f"{readable[0]} may be read by others: mode {readable[0].stat().st_mode & 0o777:o}"
        return Finding("keys", WRONG, what, f"chmod 600 {readable[0]}", EXIT_CONFIG)
    return Finding("keys", OK, "only their owner may read keys")


def _held(path: Path) -> bool:
    """Whether a coordinator holds the lock of its run."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


# --- the owner's desk


def fleet_findings(folder: Path, address: Optional[str], passphrase: Passphrase) -> Iterator[Finding]:
    """address: HOST:PORT in place of the fleet's own."""
    try:
        fleet = FleetFolder.open(folder)
    except CoveyError as exc:
        yield wrong("fleet", exc)
        return
    yield Finding("fleet", OK, f"{fleet.name}, {len(fleet.device_ids())} devices, broker {fleet.broker_url}")
    yield _private([path for path in fleet.path.rglob("*") if path.is_file() and is_secret(path.name)])
    yield from _told("certificates", lambda: _dates(fleet))
    yield from _told("revoked", lambda: _list(fleet))
    yield from _told("configuration", lambda: _configuration(fleet))
    yield from _told("mqtt", lambda: _live(fleet, address, passphrase))


def _dates(fleet: FleetFolder) -> Iterator[Finding]:
    """Of everybody's certificate; those that are fine in one line."""
    now = datetime.now(timezone.utc)
    standing = [one for one in fleet.newest() if one.revoked is None]
    late = [one for one in standing if (one.not_after - now).days < EXPIRES_SOON_DAYS]
    for one in late:
        what = f"{one.id}'s certificate ends on {one.not_after:%Y-%m-%d}"
        remedy = f"covey provision renew {one.id}, and give it the new files"
        ended = one.not_after < now
        yield Finding("certificates", WRONG if ended else WARNING, what, remedy, EXIT_CONFIG if ended else 0)
    if not late:
        first = min(standing, key=lambda one: one.not_after)
        yield Finding("certificates", OK, f"{len(standing)} are valid, the first ends on {first.not_after:%Y-%m-%d}")
    yield dated("the broker's certificate", read_file(fleet.broker / "cert.pem"))


def _list(fleet: FleetFolder) -> Iterator[Finding]:
    """Of revoked certificates: a broker takes nobody by one that is out of date."""
    from cryptography import x509

    own = read_file(fleet.broker / "crl.pem")
    try:
        end = min(_crl_end(part) for part in _crls(own))
    except ValueError as exc:
        raise ConfigError(f"{fleet.broker / 'crl.pem'} is no list of revoked certificates", "renew the broker") from exc
    days = (end - datetime.now(timezone.utc)).days
    renew = f"covey provision renew broker; {RESTART}"
    if days < 0:
        what = f"the list of revoked certificates ended on {end:%Y-%m-%d}: brokers take nobody by it"
        yield Finding("revoked", WRONG, what, renew, EXIT_CONFIG)
    elif days < EXPIRES_SOON_DAYS:
        yield Finding("revoked", WARNING, f"the list of revoked certificates ends in {days} days", renew)
    else:
        number = sum(len(list(part)) for part in map(x509.load_pem_x509_crl, _crls(own)))
        yield Finding("revoked", OK, f"the list names {number} certificates and is good until {end:%Y-%m-%d}")


def _crls(pem: bytes) -> list[bytes]:
    """One list of each authority that is trusted."""
    mark = b"-----END X509 CRL-----"
    return [part + mark for part in pem.split(mark) if part.strip()]


def _crl_end(pem: bytes) -> datetime:
    from cryptography import x509

    end = x509.load_pem_x509_crl(pem).next_update_utc
    return end if end is not None else datetime.max.replace(tzinfo=timezone.utc)


def _configuration(fleet: FleetFolder) -> Iterator[Finding]:
    """What `covey broker config` wrote here, against what it would write now."""
    if not (fleet.broker / CONFIG_NAME).is_file():
        what = "no Mosquitto configuration in the folder"
        yield Finding("configuration", OK, f"{what}: covey broker config --fleet-folder {fleet.path} writes one")
        return
    wanted = broker_files(fleet.name, fleet.settings.broker.port, 1, (0, 0))
    own = {name: (fleet.broker / name).read_text() for name in (CONFIG_NAME, ACL_NAME)}
    other = [name for name, text in own.items() if _settled(text) != _settled(wanted[name])]
    if other:
        what = f"{', '.join(other)} in {fleet.broker} are not what this covey writes"
        yield Finding("configuration", WARNING, what, "covey broker config writes them anew; keep changes elsewhere")
    else:
        yield Finding(
            "configuration", OK, "settings and access rules are this covey's: TLS, rights, persistence, limits"
        )


def _settled(text: str) -> list[str]:
    """The lines that say something, without the one that the operator chooses."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "max_connections"))]


def _live(fleet: FleetFolder, address: Optional[str], passphrase: Passphrase) -> Iterator[Finding]:
    url = f"mqtts://{address}" if address else fleet.broker_url
    if not (fleet.ca / "ca.key").is_file():
        yield from reach(_as(fleet.operator, url), "operator's")
        what = "the authority's key is not in the folder: rights and limits are not tried from here"
        yield Finding("mqtt", WARNING, what, "use --coordinator or --config where the programs are stopped")
        return
    name = f"{PASSING}-{secrets.token_hex(4)}"
    with passing_broker(fleet, name, address, passphrase) as broker:
        keys = keys_from(fleet.settings.coordinator_key, "the coordinator")
        patient = Patient(broker, fleet.name, DEVICE, name, keys)
        found = [_from_the_desk(one) for one in reach(broker, "doctor's")]
        yield from found
        if any(one.level == WRONG for one in found):
            return
        yield from probe(patient)
        yield from takeover(patient)
    yield from _taken(fleet, url)


def _from_the_desk(found: Finding) -> Finding:
    """Where the broker does not know an authority, it is the broker whose files are old."""
    return msgspec.structs.replace(found, remedy=NEWEST) if "UNKNOWN_CA" in found.what else found


def _as(folder: Path, url: str) -> Broker:
    return parse_broker(url, ca_file=folder / "ca.pem", cert_file=folder / "cert.pem", key_file=folder / "key.pem")


def _taken(fleet: FleetFolder, url: str) -> Iterator[Finding]:
    """TLS with the certificates of coordinator, operator and a revoked device, without MQTT: no session is touched."""
    for folder, whose in ((fleet.coordinator, "coordinator's"), (fleet.operator, "operator's")):
        if (folder / "key.pem").is_file():
            yield from (one for one in reach(_as(folder, url), whose) if one.check == "certificate")
    revoked = [one for one in fleet.newest() if one.revoked is not None]
    folders = [(one.id, fleet.path / "devices" / one.id) for one in revoked]
    known = [(name, folder) for name, folder in folders if (folder / "key.pem").is_file()]
    for name, folder in known[-1:]:  # the one that was revoked last
        told = [one for one in reach(_as(folder, url), f"revoked {name}'s") if one.check == "certificate"]
        if told and told[0].level == OK:
            what = f"the broker takes {name}, which is revoked: it has not read the newest list"
            yield Finding("revoked", WRONG, what, RESTART, EXIT_TRANSPORT)
        elif told:
            yield Finding("revoked", OK, f"the broker refuses {name}, which is revoked")
