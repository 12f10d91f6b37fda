"""`covey agent status`: what the agent of a configuration is doing, asked over its local socket."""

from __future__ import annotations

import json
from pathlib import Path

import click

from covey_edge.cli_agent import config_option


@click.command(short_help="What the agent is doing.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(config_path: Path, as_json: bool) -> None:
    """Say what the agent is doing."""
    from covey_edge.config import load_agent
    from covey_edge.local_socket import ask

    facts = ask(load_agent(config_path).state_dir, "status")
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(f"{k}: {v}" for k, v in facts.items()))
