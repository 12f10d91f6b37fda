"""The configuration of a Mosquitto 2 for one fleet, as texts: its settings and its access rules.

Pure functions: no files, no processes. What was measured on Mosquitto 2.0.11 is in docs/broker.md and ADR 41.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from covey_deploy.access import CHANNELS, SELF, Access
from covey_edge.mqtt import KEEPALIVE_S, PACKET_HEADER_BYTES, TOPIC_BYTES
from covey_edge.mqtt_window import WINDOW
from covey_protocol.codec import MAX_ENVELOPE_BYTES

CERTIFICATE_FILES = ("cert.pem", "key.pem", "ca.pem", "crl.pem")
CONFIG_NAME, ACL_NAME = "mosquitto.conf", "acl"
MAX_PACKET_BYTES = MAX_ENVELOPE_BYTES + TOPIC_BYTES + PACKET_HEADER_BYTES  # the protocol's largest envelope fits
MAX_CONNECTIONS = 10_000
QUEUED_MESSAGES = 1_000_000
QUEUED_MB = 256  # of one client that is slow: a coordinator of 2,000 devices that all deliver


@dataclass(frozen=True)
class Settings:
    """folder: where Mosquitto finds its files. data: where it keeps what is retained. host: None for all addresses.
    user: whom a Mosquitto that root starts becomes, None for the package's own user."""

    fleet: str
    folder: str
    data: str
    port: int = 8883
    host: Optional[str] = None
    max_connections: int = MAX_CONNECTIONS
    user: Optional[str] = None


def config(settings: Settings) -> str:
    """mosquitto.conf."""
    listen = f"listener {settings.port}" + (f" {settings.host}" if settings.host else "")
    user = f"user {settings.user}\n" if settings.user else ""
    return f"""\
# Mosquitto 2 for the fleet {settings.fleet}. Made by `covey broker config`, which overwrites this file: docs/broker.md.
{user}
# Nobody without a certificate, and everybody only where the access rules say so.
allow_anonymous false
acl_file {settings.folder}/{ACL_NAME}

# What is retained (the round, the model's chunks, presences) survives a restart.
persistence true
persistence_location {settings.data}/
autosave_interval 60
persistent_client_expiration 1d

# Limits. max_packet_size is told to MQTT 5 clients; message_size_limit is not, and Mosquitto 2.0 answers a message
# above it with a code that MQTT does not allow there.
max_packet_size {MAX_PACKET_BYTES}
max_keepalive {2 * KEEPALIVE_S}
max_inflight_messages {WINDOW}
# Messages of many devices wait for one coordinator: bound their bytes rather than their number. Not by 0, no limit:
# with that Mosquitto 2.0.11 ends the connection of whoever publishes what it may not.
max_queued_messages {QUEUED_MESSAGES}
max_queued_bytes {QUEUED_MB * 2**20}
queue_qos0_messages false
set_tcp_nodelay true

# No $SYS topics: nobody may read them.
sys_interval 0
log_type error
log_type warning
log_type notice
log_type information
log_timestamp_format %Y-%m-%dT%H:%M:%S

{listen}
max_connections {settings.max_connections}
tls_version tlsv1.2
cafile {settings.folder}/ca.pem
certfile {settings.folder}/cert.pem
keyfile {settings.folder}/key.pem
# A list that is past its "next update" keeps everybody out: covey doctor warns before.
crlfile {settings.folder}/crl.pem
require_certificate true
# The certificate's common name is the user and the client id: who has another's id cannot take its connection.
use_identity_as_username true
use_username_as_clientid true
"""


def acl(fleet: str) -> str:
    """The access rules. What is not named is refused; Mosquitto checks a subscription when a message is delivered."""
    access = Access(fleet)
    lines = [f"# Who may do what in the fleet {fleet}. Made by `covey broker config`: docs/broker.md.", ""]
    for role, rights in access.more().items():
        lines += [f"user {role}", *(f"topic {verb} {topic}" for verb, topic in rights)]
        # the patterns below would give it a device's topics under its own name, which is no device's
        lines += [*(f"topic deny {access.own(channel, role)}" for channel in CHANNELS), ""]
    lines.append("# everybody, under the name in its certificate")
    lines += [f"pattern {verb} {topic.replace(SELF, '%u')}" for verb, topic in access.everyone()]
    return "\n".join(lines) + "\n"
