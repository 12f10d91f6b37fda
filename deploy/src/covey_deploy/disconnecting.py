"""Ending the session of one client: by taking it over with a certificate of the same name, made for a moment.

A broker judges certificates when they connect, and no reload ends a session. With `use_username_as_clientid` a second
client of the same name ends the first; whoever is revoked cannot come back, anybody else does within a second.
"""

from __future__ import annotations

from typing import Optional

from covey_deploy.fleet_folder import FleetFolder
from covey_deploy.passing import Passphrase, no_passphrase, passing_broker
from covey_deploy.provisioning import AUTHORITY
from covey_edge.inbox import Inbox
from covey_edge.mqtt import MqttTransport
from covey_protocol.errors import ConfigError


def disconnect(
    fleet: FleetFolder, name: str, address: Optional[str] = None, passphrase: Passphrase = no_passphrase
) -> None:
    """Raises TransportError, and ConfigError where the fleet has none of this name, or not its authority's key."""
    if name not in {one.id for one in fleet.issued() if one.role != AUTHORITY}:
        raise ConfigError(f"{fleet.path} has no {name}", "see who there is: covey provision list")
    with passing_broker(fleet, name, address, passphrase) as broker:
        transport = MqttTransport(broker, name, Inbox())
        transport.connect()
        transport.close()
