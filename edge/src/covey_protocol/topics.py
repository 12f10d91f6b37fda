"""MQTT topics: building and parsing them. docs/protocol.md, section 2.

All topics start with ``covey/1/FLEET/``. Names are checked so that no wildcard or separator can slip in.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

from covey_protocol import PROTOCOL_VERSION
from covey_protocol.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_BLOB_TAIL = re.compile(r"([0-9a-f]{64})/(0|[1-9][0-9]{0,5})")


class BlobTopic(NamedTuple):
    sha256: bytes
    chunk: int


class DeviceTopic(NamedTuple):
    device_id: str
    channel: str  # "presence", "up" or "down"


RESERVED_ID = "coordinator"  # the sender and MQTT client name of the coordinator
RESERVED_IDS = ("broker", RESERVED_ID, "operator")  # names in certificates to which brokers give other rights


def check_device_id(name: str) -> str:
    """The device id itself; ConfigError where it cannot be one."""
    if name in RESERVED_IDS:
        raise ConfigError(f"device_id {name!r} is the {name}'s own name", "choose another")
    return check_name(name, "device_id")


def check_name(name: str, what: str = "name") -> str:
    """The name itself; ConfigError unless it is 1-63 letters, digits, - or _, starting with a letter or digit."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name[:80]!r} cannot be used",
            "use 1 to 63 letters, digits, - and _, starting with a letter or digit",
        )
    return name


class Topics:
    """The topics of one fleet."""

    def __init__(self, fleet: str) -> None:
        self.fleet = check_name(fleet, "fleet name")
        self.root = f"covey/{PROTOCOL_VERSION}/{fleet}"
        self.round = f"{self.root}/fleet/round"
        self.release = f"{self.root}/fleet/release"
        self.all_presence = f"{self.root}/device/+/presence"
        self.all_up = f"{self.root}/device/+/up"

    def presence(self, device_id: str) -> str:
        return f"{self.root}/device/{device_id}/presence"

    def up(self, device_id: str) -> str:
        return f"{self.root}/device/{device_id}/up"

    def down(self, device_id: str) -> str:
        return f"{self.root}/device/{device_id}/down"

    def blob(self, sha256: bytes, index: int) -> str:
        return f"{self.root}/blob/{sha256.hex()}/{index}"

    def all_blob_chunks(self, sha256: bytes) -> str:
        return f"{self.root}/blob/{sha256.hex()}/+"

    def parse_blob(self, topic: str) -> Optional[BlobTopic]:
        prefix = f"{self.root}/blob/"
        match = _BLOB_TAIL.fullmatch(topic[len(prefix) :]) if topic.startswith(prefix) else None
        return BlobTopic(bytes.fromhex(match[1]), int(match[2])) if match else None

    def parse_device(self, topic: str) -> Optional[DeviceTopic]:
        prefix = f"{self.root}/device/"
        if not topic.startswith(prefix):
            return None
        device_id, _, channel = topic[len(prefix) :].partition("/")
        if channel not in ("presence", "up", "down") or not _NAME.fullmatch(device_id):
            return None
        return DeviceTopic(device_id, channel)
