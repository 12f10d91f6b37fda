"""`covey broker` and `covey provision`: what a fleet needs beside its agents."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click


@click.group(name="broker", short_help="Run an embedded MQTT broker.")
def broker_command() -> None:
    """MQTT brokers for covey."""


@broker_command.command(name="run", short_help="Serve on one address until Ctrl-C.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=1883, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option("--parent", type=int, hidden=True, help="End with this process.")
def run_broker(host: str, port: int, parent: Optional[int]) -> None:
    """Run the embedded broker (MQTT 3.1.1, no TLS, no persistence): for desks and tests, not for a fleet."""
    from covey_deploy.embedded_broker import run
    from covey_edge.processes import die_with_parent

    if parent:
        die_with_parent(parent)
    run(host, port, lambda url: click.echo(f"listening on {url}"))


@click.group(name="provision", short_help="Make the keys of coordinators and devices.")
def provision_command() -> None:
    """Identities of a fleet."""


@provision_command.command(name="key", short_help="Make one private key.")
@click.argument("path", type=click.Path(path_type=Path))
def make_key(path: Path) -> None:
    """Write a new Ed25519 private key to PATH (mode 600) and print its public key."""
    from covey_edge.key_files import make_key as make

    click.echo(make(path).hex())
