"""`covey broker`: what a fleet needs beside its agents."""

from __future__ import annotations

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
