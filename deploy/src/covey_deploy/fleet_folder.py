"""The fleet folder that `covey provision init` makes: where everything lies, and the few facts that others need.

docs/provisioning.md has the whole tree. This file reads; `provisioning` writes.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Optional, Union

import msgspec
from msgspec import Meta, Struct

from covey_deploy import folder_changes
from covey_edge.config import read_file, read_toml
from covey_protocol.errors import ConfigError
from covey_protocol.keys import keys_from
from covey_protocol.seals import PublicKey
from covey_protocol.topics import RESERVED_IDS, check_device_id, check_name

DEVICE = "device"  # a role of certificates, as are those below, of which each has one name
BROKER, COORDINATOR, OPERATOR = RESERVED_IDS
Days = Annotated[float, Meta(gt=0, le=36525)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class BrokerPlace(Struct, frozen=True, forbid_unknown_fields=True):
    """hosts: DNS names and addresses in its certificate; devices are told the first."""

    hosts: Annotated[tuple[str, ...], Meta(min_length=1)]
    port: Port = 8883


class Lifetimes(Struct, frozen=True, forbid_unknown_fields=True):
    """In days. crl: until a list of revoked certificates is to be renewed, 0 for as long as its authority lives.
    slack_hours: so long before they are made certificates begin, for machines whose clock is behind."""

    authority: Days = 3652
    broker: Days = 730
    coordinator: Days = 730
    operator: Days = 730
    device: Days = 730
    crl: Annotated[float, Meta(ge=0, le=36525)] = 0
    slack_hours: Annotated[float, Meta(ge=0, le=8784)] = 24

    def of(self, role: str) -> float:
        days: float = getattr(self, role)
        return days


class FleetSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """fleet.toml. The keys are public ones, 64 hex digits: devices pin them."""

    name: str
    coordinator_key: Union[str, tuple[str, ...]]
    release_key: str
    broker: BrokerPlace
    lifetimes: Lifetimes = Lifetimes()


class Issued(Struct, frozen=True):
    """A line of ca/issued.jsonl: one certificate. Times are UTC, as RFC 3339 writes them.

    serial: hex digits. authority: the number of the one that signed it. revoked: when, None where it is not.
    """

    serial: str
    id: str
    role: str
    not_after: datetime
    revoked: Optional[datetime] = None
    reason: str = ""
    authority: int = 1


@dataclass(frozen=True)
class FleetFolder:
    """path: the folder. Paths are not looked at until somebody reads them."""

    path: Path
    settings: FleetSettings

    @classmethod
    def open(cls, path: Path) -> FleetFolder:
        """Finishes what a power cut left half done. ConfigError where there is no fleet, StorageError."""
        if not (path / "fleet.toml").is_file() and not folder_changes.is_unfinished(path):
            raise ConfigError(f"{path} is no fleet's folder", "make one: covey provision init FLEET")
        if folder_changes.is_unfinished(path):
            with folder_changes.locked(path):
                pass
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> FleetFolder:
        """As `open`, by one who holds the folder's lock."""
        settings = read_toml(path / "fleet.toml", FleetSettings)
        check_name(settings.name, "fleet")
        keys_from(settings.coordinator_key, "the coordinator")
        PublicKey.from_hex(settings.release_key)
        return cls(path, settings)

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def broker_url(self) -> str:
        """As the devices are told it."""
        place = self.settings.broker
        return f"mqtts://{url_host(place.hosts[0])}:{place.port}"

    @property
    def release_key(self) -> PublicKey:
        """Of who makes releases and kits: the public half."""
        return PublicKey.from_hex(self.settings.release_key)

    @property
    def release_key_path(self) -> Path:
        """The private half; its owner may have taken the file away, to keep it off line."""
        return self.path / "release" / "release.pem"

    @property
    def ca(self) -> Path:
        """The folder of the authority: ca.pem, ca.key, crl.pem, issued.jsonl."""
        return self.path / "ca"

    @property
    def broker(self) -> Path:
        return self.path / BROKER

    @property
    def coordinator(self) -> Path:
        return self.path / COORDINATOR

    @property
    def operator(self) -> Path:
        return self.path / OPERATOR

    def device(self, device_id: str) -> Path:
        """The folder of one device: cert.pem, ca.pem, agent.toml, and key.pem and seal.pem where they were made here.
        ConfigError where there is none."""
        check_device_id(device_id)
        folder = self.path / "devices" / device_id
        if not (folder / "cert.pem").is_file():
            raise ConfigError(
                f"{self.path} has no device {device_id}",
                f"make it: covey provision device {device_id} --fleet-folder {self.path}",
            )
        return folder

    def device_ids(self) -> list[str]:
        """Of the devices that are not revoked, sorted."""
        return sorted(one.id for one in self.newest() if one.role == DEVICE and one.revoked is None)

    def revoked_ids(self) -> frozenset[str]:
        """Of the devices that are."""
        return frozenset(one.id for one in self.newest() if one.role == DEVICE and one.revoked is not None)

    def issued(self) -> list[Issued]:
        """Every certificate that the fleet's authorities have made, the oldest first."""
        return parse_issued(read_file(self.ca / "issued.jsonl"), self.ca / "issued.jsonl")

    def newest(self) -> list[Issued]:
        """Of each role and id the certificate that was made last: those that are in the folders."""
        return list({(one.role, one.id): one for one in self.issued()}.values())


def parse_issued(data: bytes, path: Path) -> list[Issued]:
    try:
        return [msgspec.json.decode(line, type=Issued) for line in data.splitlines() if line]
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{path} cannot be read ({exc})", "restore the file from a backup") from exc


def issued_lines(issued: Iterable[Issued]) -> bytes:
    return b"".join(msgspec.json.encode(one) + b"\n" for one in issued)


def url_host(host: str) -> str:
    """As a URL writes it: IPv6 addresses in brackets."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


def toml_value(value: object) -> str:
    """Strings, numbers and lists of them: TOML writes these as JSON does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
