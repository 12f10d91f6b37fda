"""`covey broker`: the configuration of a fleet's broker, and brokers to try it with."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Optional

import click

from covey_deploy.cli_provision import passphrase_option
from covey_edge.command_groups import NearestGroup

A_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(name="broker", cls=NearestGroup, short_help="Configure a fleet's MQTT broker; run one.")
def broker_command() -> None:
    """MQTT brokers for covey."""


@broker_command.command(name="config", short_help="Write a Mosquitto's configuration for a fleet.")
@click.option("--fleet-folder", type=A_FOLDER, required=True, help="As `covey provision init` made it.")
@click.option("--out", type=A_FOLDER, help="Where to; without it the folder's own broker/.")
@click.option("--max-connections", default=10_000, show_default=True, type=click.IntRange(min=1))
def write_config(fleet_folder: Path, out: Optional[Path], max_connections: int) -> None:
    """Write mosquitto.conf, acl, compose.yaml, a systemd drop-in, a README and the rights for other brokers, and with
    --out the broker's certificate and key beside them. Existing files are replaced: run it again after an update."""
    from covey_deploy.broker_folder import write_broker_folder
    from covey_deploy.fleet_folder import FleetFolder

    folder = write_broker_folder(FleetFolder.open(fleet_folder), out, max_connections)
    click.echo(f"{folder}: read README.md there")


@broker_command.command(name="run", short_help="Serve on one address until Ctrl-C.")
@click.option("--fleet-folder", type=A_FOLDER, help="A Mosquitto with this fleet's certificates and rights.")
@click.option("--host", help="Address to listen on; without a fleet 127.0.0.1, with one all of this machine's.")
@click.option("--port", type=click.IntRange(0, 65535), help="0 picks a free one; without it 1883, or the fleet's.")
@click.option("--parent", type=int, hidden=True, help="End with this process.")
def run_broker(fleet_folder: Optional[Path], host: Optional[str], port: Optional[int], parent: Optional[int]) -> None:
    """With --fleet-folder: the Mosquitto of this machine, configured as `covey broker config` does it, as the calling
    user, its data in the folder's broker/data. SIGHUP makes it read certificates and the list of revoked ones again.

    Without: the embedded broker (MQTT 3.1.1, no TLS, no rights, no persistence), for desks and tests, not for a fleet.
    """
    from covey_edge.processes import die_with_parent

    if parent:
        die_with_parent(parent)
    if fleet_folder is None:
        from covey_deploy.embedded_broker import run

        run(host or "127.0.0.1", 1883 if port is None else port, lambda url: click.echo(f"listening on {url}"))
        return
    from covey_deploy import broker_run
    from covey_deploy.fleet_folder import FleetFolder

    fleet = FleetFolder.open(fleet_folder)
    port = fleet.settings.broker.port if port is None else port
    ready = f"listening on {{}} for the fleet {fleet.name}"
    warn = functools.partial(click.echo, err=True)
    code = broker_run.run(fleet.name, fleet.broker, host, port, lambda url: click.echo(ready.format(url)), warn)
    sys.exit(code)


@broker_command.command(name="disconnect", short_help="End the session of a client whose certificate was revoked.")
@click.argument("name")
@click.option("--fleet-folder", type=A_FOLDER, required=True, help="With the authority's key.")
@click.option("--address", help="HOST:PORT of the broker, where that is not the fleet's own.")
@passphrase_option
def disconnect_client(name: str, fleet_folder: Path, address: Optional[str], passphrase_file: Optional[Path]) -> None:
    """Take over the session of NAME, a device or `coordinator` or `operator`, and end it. Revoke its certificate and
    have the broker read the new list first: who may come back does so within a second."""
    from covey_deploy.cli_provision import asking
    from covey_deploy.disconnecting import disconnect
    from covey_deploy.fleet_folder import FleetFolder

    fleet = FleetFolder.open(fleet_folder)
    disconnect(fleet, name, address, asking(passphrase_file))
    click.echo(f"{name} is disconnected, if it was connected")
