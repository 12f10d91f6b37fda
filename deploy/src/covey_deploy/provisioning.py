"""Making a fleet, its certificates and keys, and taking them back: what `covey provision` does.

Each function works under the folder's lock and changes all of its files or none (`folder_changes`). Nothing is printed
here, and no private key is in what is returned or raised.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Optional

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from covey_deploy import authority as ca
from covey_deploy.authority import Authority, Dates, Revoked
from covey_deploy.device_table import Wanted
from covey_deploy.fleet_folder import (
    BROKER,
    DEVICE,
    BrokerPlace,
    FleetFolder,
    FleetSettings,
    Issued,
    Lifetimes,
    issued_lines,
    utc_now,
)
from covey_deploy.folder_changes import change, locked
from covey_deploy.settings_texts import agent_text, coordinator_text, fleet_text, roster, with_devices
from covey_edge.certificate_request import Request
from covey_edge.config import read_file
from covey_protocol.errors import ConfigError
from covey_protocol.seals import SealingKey
from covey_protocol.topics import RESERVED_IDS, check_device_id, check_name

AUTHORITY = "authority"  # in issued.jsonl, with its number as id
Passphrase = Callable[[], Optional[bytes]]  # asked only where the key is encrypted
DEFAULT_LIFETIMES = Lifetimes()
DATA_SOURCE, DATA_PATH = "npz", "/var/lib/covey-data/data.npz"


def no_passphrase() -> Optional[bytes]:
    return None


@dataclass(frozen=True)
class NewDevice:
    """request: of a device that has made its keys itself."""

    device_id: str
    data_source: str = DATA_SOURCE
    data_path: str = DATA_PATH
    request: Optional[Request] = None

    @classmethod
    def of_row(cls, row: Wanted, data_source: str = DATA_SOURCE, data_path: str = DATA_PATH) -> NewDevice:
        """data_source, data_path: where the table has none."""
        return cls(row.device_id, row.data_source or data_source, row.data_path or data_path)


@dataclass
class _Work:
    """What one command is about to write, and the authority that signs it."""

    fleet: FleetFolder
    authority: Authority
    number: int
    now: datetime
    issued: list[Issued]
    ca_pem: bytes
    passphrase: Optional[bytes] = None
    files: dict[str, bytes] = field(default_factory=dict)

    def certificate(
        self, role: str, name: str, public_key: ec.EllipticCurvePublicKey, hosts: Sequence[str] = ()
    ) -> None:
        """Into the folder of its owner, with the authorities that the owner is to trust. ConfigError where the one that
        signs has ended."""
        if self.authority.certificate.not_valid_after_utc <= self.now:
            raise _ended(self.authority)
        lifetimes = self.fleet.settings.lifetimes
        dates = Dates.of(self.now, lifetimes.of(role), lifetimes.slack_hours)
        made = ca.issue(self.authority, self.fleet.name, role, name, public_key, dates, hosts)
        where = place(role, name)
        self.files |= {f"{where}/cert.pem": ca.certificate_pem(made), f"{where}/ca.pem": self.ca_pem}
        self.issued.append(
            Issued(f"{made.serial_number:x}", name, role, made.not_valid_after_utc, None, "", self.number)
        )

    def key(self, role: str, name: str) -> ec.EllipticCurvePublicKey:
        """A new TLS key, into the folder of its owner; its public half."""
        key = ca.new_key()
        self.files[f"{place(role, name)}/key.pem"] = ca.key_pem(key)
        return key.public_key()

    def write(self, removed: Sequence[str] = ()) -> None:
        change(self.fleet.path, {**self.files, "ca/issued.jsonl": issued_lines(self.issued)}, removed)


@contextlib.contextmanager
def _working(path: Path, passphrase: Passphrase, now: Optional[datetime]) -> Iterator[_Work]:
    FleetFolder.open(path)  # before the lock makes a folder
    with locked(path):
        fleet = FleetFolder.read(path)
        ca_pem, issued = read_file(fleet.ca / "ca.pem"), fleet.issued()
        certificate = ca.read_certificates(ca_pem, str(fleet.ca / "ca.pem"))[0]
        pem = read_file(fleet.ca / "ca.key")
        secret = passphrase() if ca.is_encrypted(pem) else None
        key = ca.read_key(pem, str(fleet.ca / "ca.key"), secret)
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{fleet.ca}: ca.key and ca.pem do not belong together", "restore both from one backup")
        number = _number(issued, certificate)
        yield _Work(fleet, Authority(certificate, key), number, now or utc_now(), issued, ca_pem, secret)


def _number(issued: Sequence[Issued], certificate: x509.Certificate) -> int:
    serial = f"{certificate.serial_number:x}"
    found = [one.authority for one in issued if one.role == AUTHORITY and one.serial == serial]
    if not found:
        raise ConfigError("ca/issued.jsonl does not know the authority of ca/ca.pem", "restore both from one backup")
    return found[0]


def _ended(authority: Authority) -> ConfigError:
    end = authority.certificate.not_valid_after_utc
    return ConfigError(
        f"the fleet's authority expired on {end:%Y-%m-%d}", "make the next one: covey provision authority next"
    )


def place(role: str, name: str) -> str:
    """Whose folder it is, in the fleet's."""
    return f"devices/{name}" if role == DEVICE else role


# --- a new fleet


def init(
    folder: Path,
    name: str,
    hosts: Sequence[str],
    port: int = 8883,
    lifetimes: Lifetimes = DEFAULT_LIFETIMES,
    *,
    bundle: str = "model.covey",
    bundle_key: str = "",
    num_devices: int = 2,
    passphrase: Optional[bytes] = None,
    now: Optional[datetime] = None,
) -> FleetFolder:
    """Make a fleet's folder. ConfigError where there is something in it. passphrase: encrypts the authority's key."""
    check_name(name, "fleet")
    for host in hosts:
        ca.host_name(host)
    now = now or utc_now()
    with locked(folder):
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ConfigError(f"{folder} is not empty", "name another with --folder; a fleet's keys are never replaced")
        os.chmod(folder, 0o700)
        seal, release = SealingKey.generate(), SealingKey.generate()
        settings = FleetSettings(
            name, seal.public.hex(), release.public.hex(), BrokerPlace(tuple(hosts), port), lifetimes
        )
        made = ca.make_authority(name, 1, Dates.of(now, lifetimes.authority, lifetimes.slack_hours))
        fleet = FleetFolder(folder, settings)
        ca_pem = ca.certificate_pem(made.certificate)
        first = Issued(f"{made.certificate.serial_number:x}", "1", AUTHORITY, made.certificate.not_valid_after_utc)
        work = _Work(fleet, made, 1, now, [first], ca_pem, passphrase)
        for role in RESERVED_IDS:
            work.certificate(role, role, work.key(role, role), hosts if role == BROKER else ())
        _list_revoked(work, [made])
        work.files |= {
            "fleet.toml": fleet_text(settings).encode(),
            "ca/ca.pem": ca_pem,
            "ca/ca.key": ca.key_pem(made.key, passphrase),
            "coordinator/seal.pem": seal.pem(),
            "coordinator/coordinator.toml": coordinator_text(settings, bundle, bundle_key, num_devices).encode(),
            "release/release.pem": release.pem(),
        }
        work.write()
    return fleet


# --- devices


def add_devices(
    path: Path, devices: Sequence[NewDevice], passphrase: Passphrase = no_passphrase, now: Optional[datetime] = None
) -> dict[str, str]:
    """Make or sign for devices, all of them or none; device -> its public seal key. ConfigError where one exists."""
    with _working(path, passphrase, now) as work:
        known = {one.id for one in work.issued if one.role == DEVICE}
        keys: dict[str, str] = {}
        for device in devices:
            name = check_device_id(device.device_id)
            if name in known or name in keys or (path / "devices" / name).exists():
                raise ConfigError(
                    f"{name} exists in {path}", f"choose another id, or renew it: covey provision renew {name}"
                )
            if device.request is not None:
                _check_fleet(device.request, work.fleet)
                public, keys[name] = device.request.public_key, device.request.seal_key.hex()
            else:
                seal = SealingKey.generate()
                work.files[f"devices/{name}/seal.pem"] = seal.pem()
                public, keys[name] = work.key(DEVICE, name), seal.public.hex()
            work.certificate(DEVICE, name, public)
            text = agent_text(work.fleet, name, device.data_source, device.data_path)
            work.files[f"devices/{name}/agent.toml"] = text.encode()
        _enter(work, keys)
        work.write()
    return keys


def _check_fleet(request: Request, fleet: FleetFolder) -> None:
    if request.fleet != fleet.name:
        raise ConfigError(
            f"the request of {request.device_id} is for the fleet {request.fleet}, not {fleet.name}",
            "make it with the right name, or open the other fleet's folder",
        )


def _enter(work: _Work, keys: Mapping[str, object]) -> None:
    """Into the roster. Where the coordinator's file is elsewhere, the caller says what is to be written there."""
    name = "coordinator/coordinator.toml"
    path = work.fleet.path / name
    if path.exists():
        roster(path)  # says what is wrong with a file that is no TOML
        work.files[name] = with_devices(read_file(path).decode(), keys, path).encode()


# --- renewing


def renew(
    path: Path,
    names: Sequence[str],
    *,
    new_key: bool = False,
    request: Optional[Request] = None,
    passphrase: Passphrase = no_passphrase,
    now: Optional[datetime] = None,
) -> list[Issued]:
    """New certificates, all of them or none, and a new list of revoked ones.

    names: devices, "broker", "coordinator", "operator". new_key: makes a new TLS key where it lies in the folder.
    request: of the only device in `names`, with the key that its certificate is to be for.
    """
    with _working(path, passphrase, now) as work:
        newest = {one.id: one for one in work.fleet.newest() if one.role != AUTHORITY}
        for name in names:
            old = newest.get(name)
            if old is None:
                raise ConfigError(f"{path} has no {name}", "see who there is: covey provision list")
            _check_renewable(old, new_key)
            work.certificate(
                old.role,
                name,
                _renewed_key(work, old, new_key, request),
                work.fleet.settings.broker.hosts if old.role == BROKER else (),
            )
        _list_revoked(work, _authorities(work))
        work.write()
        return work.issued[-len(names) :]


def _check_renewable(old: Issued, new_key: bool) -> None:
    """A revoked device stays out. There is one broker, coordinator and operator: they go on, with other keys."""
    if old.revoked is not None and old.role == DEVICE:
        raise ConfigError(f"{old.id} is revoked", "make a device of another id")
    if old.revoked is not None and not new_key:
        raise ConfigError(f"the {old.id}'s certificate is revoked, and perhaps its key known", "add --new-key")


def _renewed_key(work: _Work, old: Issued, new_key: bool, request: Optional[Request]) -> ec.EllipticCurvePublicKey:
    folder = work.fleet.path / place(old.role, old.id)
    if request is not None:
        _check_fleet(request, work.fleet)
        _enter_next(work, request)
        return request.public_key
    if not new_key:
        certificate = ca.read_certificates(read_file(folder / "cert.pem"), str(folder / "cert.pem"))[0]
        public = certificate.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey), "covey signs no other"
        return public
    if not (folder / "key.pem").exists():
        raise ConfigError(
            f"the key of {old.id} is not in {folder}",
            f"make a request there (covey key request) and give it: covey provision renew {old.id} --csr FILE",
        )
    return work.key(old.role, old.id)


def _enter_next(work: _Work, request: Request) -> None:
    """Another seal key is the device's next one: the roster has both until the device is heard under it."""
    path, new = work.fleet.coordinator / "coordinator.toml", request.seal_key.hex()
    present = roster(path).get(request.device_id) if path.exists() else None
    known = [present] if isinstance(present, str) else list(present or [])
    if new not in known:
        _enter(work, {request.device_id: [known[-1], new] if known else new})


def due(fleet: FleetFolder, within_days: float, now: Optional[datetime] = None) -> list[str]:
    """Whose certificates end within so many days, and are not revoked; without the authorities."""
    end = (now or utc_now()) + timedelta(days=within_days)
    owned = [one for one in fleet.newest() if one.role != AUTHORITY and one.revoked is None]
    return [one.id for one in owned if one.not_after <= end]


# --- revoking


def revoke(
    path: Path, name: str, reason: str, passphrase: Passphrase = no_passphrase, now: Optional[datetime] = None
) -> int:
    """All certificates of a device or a role; how many. The list is in ca/ and broker/ when this returns."""
    with _working(path, passphrase, now) as work:
        mine = [one for one in work.issued if one.id == name and one.role != AUTHORITY]
        if not mine:
            raise ConfigError(f"{path} has no {name}", "see who there is: covey provision list")
        standing = [one for one in mine if one.revoked is None]
        at = work.now.replace(microsecond=0)
        work.issued = [
            msgspec.structs.replace(one, revoked=at, reason=reason) if one in standing else one for one in work.issued
        ]
        _list_revoked(work, _authorities(work))
        work.write()
        return len(standing)


def _list_revoked(work: _Work, authorities: Sequence[Authority]) -> None:
    """One list of each authority that somebody still trusts, all in one file. ConfigError where all have ended."""
    path = work.fleet.ca / "crl.pem"
    number = 1
    if path.exists():
        old = ca.read_crl(read_file(path), str(path))
        number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1
    living = [one for one in authorities if one.certificate.not_valid_after_utc > work.now]
    if not living:
        raise _ended(authorities[0])
    data = b"".join(_list_of(work, one, number) for one in living)
    work.files |= {"ca/crl.pem": data, "broker/crl.pem": data}


def _list_of(work: _Work, authority: Authority, number: int) -> bytes:
    of, lifetimes = _number(work.issued, authority.certificate), work.fleet.settings.lifetimes
    revoked = [
        Revoked(int(one.serial, 16), one.revoked, one.reason)
        for one in work.issued
        if one.revoked is not None and one.authority == of and one.role != AUTHORITY
    ]
    own_end = authority.certificate.not_valid_after_utc
    begin, end = Dates.of(work.now, lifetimes.crl, lifetimes.slack_hours)
    return ca.make_crl(authority, revoked, number, Dates(begin, min(own_end, end) if lifetimes.crl else own_end))


def _authorities(work: _Work) -> list[Authority]:
    """The present one, and an older one that is still trusted."""
    folder = work.fleet.ca
    found = [work.authority]
    for certificate in ca.read_certificates(work.ca_pem, str(folder / "ca.pem"))[1:]:
        path = folder / f"ca-{_number(work.issued, certificate)}.key"
        found.append(Authority(certificate, ca.read_key(read_file(path), str(path), work.passphrase)))
    return found


# --- the next authority


def next_authority(path: Path, passphrase: Passphrase = no_passphrase, now: Optional[datetime] = None) -> int:
    """Another authority beside the present one, which everybody goes on trusting; its number. Certificates are signed
    by the new one from now on."""
    with _working(path, passphrase, now) as work:
        if len(ca.read_certificates(work.ca_pem, "ca.pem")) > 1:
            raise ConfigError(
                f"{path} has two authorities already", "end the older one first: covey provision authority retire"
            )
        lifetimes = work.fleet.settings.lifetimes
        number = work.number + 1
        made = ca.make_authority(
            work.fleet.name, number, Dates.of(work.now, lifetimes.authority, lifetimes.slack_hours)
        )
        serial, end = f"{made.certificate.serial_number:x}", made.certificate.not_valid_after_utc
        work.issued.append(Issued(serial, str(number), AUTHORITY, end, None, "", number))
        work.files |= {
            f"ca/ca-{work.number}.key": read_file(work.fleet.ca / "ca.key"),
            "ca/ca.key": ca.key_pem(made.key, work.passphrase),
        }
        _list_revoked(work, [made, work.authority])
        _trust(work, ca.certificate_pem(made.certificate) + work.ca_pem)
        work.write()
        return number


def retire_authority(path: Path, passphrase: Passphrase = no_passphrase, now: Optional[datetime] = None) -> int:
    """Nobody is to trust the older authority any more; its number. ConfigError while somebody's newest certificate is
    of it."""
    with _working(path, passphrase, now) as work:
        certificates = ca.read_certificates(work.ca_pem, "ca.pem")
        if len(certificates) < 2:
            raise ConfigError(f"{path} has one authority only", "make the next one: covey provision authority next")
        number = work.number - 1
        waiting = [
            one.id
            for one in work.fleet.newest()
            if one.authority == number and one.role != AUTHORITY and one.revoked is None and one.not_after > work.now
        ]
        if waiting:
            raise ConfigError(
                f"certificates of authority {number} are in use: {', '.join(sorted(waiting))}",
                "renew them first: covey provision renew --all",
            )
        at = work.now.replace(microsecond=0)
        work.issued = [
            msgspec.structs.replace(one, revoked=at, reason="superseded")
            if one.role == AUTHORITY and one.id == str(number)
            else one
            for one in work.issued
        ]
        _list_revoked(work, [work.authority])
        _trust(work, ca.certificate_pem(work.authority.certificate))
        work.write(removed=[f"ca/ca-{number}.key"])
        return number


def _trust(work: _Work, ca_pem: bytes) -> None:
    """Into every folder that has a ca.pem."""
    fleet = work.fleet.path
    folders = [fleet / "ca", *(fleet / role for role in RESERVED_IDS), *sorted((fleet / "devices").glob("*"))]
    for folder in folders:
        if (folder / "ca.pem").exists():
            work.files[f"{folder.relative_to(fleet)}/ca.pem"] = ca_pem
