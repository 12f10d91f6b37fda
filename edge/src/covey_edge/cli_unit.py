"""`covey agent unit`: the systemd unit of this agent."""

from __future__ import annotations

from pathlib import Path

import click

from covey_edge.cli_agent import config_option


@click.command(short_help="A systemd unit for this agent.")
@config_option
@click.option("--user", default="covey", show_default=True, help="The system user that the agent runs as.")
@click.option("--install", "installs", is_flag=True, help="Write it to /etc/systemd/system instead of printing it.")
def unit(config_path: Path, user: str, installs: bool) -> None:
    """Print the systemd unit that runs this agent: sandboxed, watched, started again."""
    from covey_edge.config import load_agent
    from covey_edge.unit import install, unit_text

    text = unit_text(load_agent(config_path), config_path, user)
    if not installs:
        click.echo(text, nl=False)
        return
    path = install(text, user)
    click.echo(f"{path} is written; start it now and with every boot: systemctl enable --now {path.name}")
