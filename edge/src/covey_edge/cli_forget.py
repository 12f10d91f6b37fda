"""`covey agent forget`: the owner has deleted what the agent keeps."""

from __future__ import annotations

import time
from pathlib import Path

import click

from covey_edge.cli_agent import config_option

STOP_S = 60.0  # for an agent that was asked to stop: it says goodbye to the broker


@click.command(short_help="Delete what the agent keeps on this device.")
@config_option
@click.option("--data", is_flag=True, help="Also the data that agent.toml names.")
@click.option("--everything", is_flag=True, help="Also the privacy ledger and the log of what left.")
@click.option("--stop", is_flag=True, help="Ask an agent that runs to stop first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget(config_path: Path, data: bool, everything: bool, stop: bool, yes: bool) -> None:
    """Delete models, updates, records and whatever else the agent keeps on this device. The plan is printed and asked
    for first. Settings and keys stay; `covey agent leave` keeps the device from taking part again."""
    from covey_edge.config import load_agent
    from covey_edge.forgetting import KEPT, delete, gone, plan, unknown
    from covey_edge.local_socket import StateLock

    agent = load_agent(config_path)
    if stop:
        _stop(agent.state_dir)
    lock = StateLock(agent.state_dir)  # refuses while an agent runs
    try:
        doomed = plan(agent.folder, agent.config, agent.state_dir, data=data, everything=everything)
        for one in doomed:
            click.echo(f"delete  {one.path} ({one.size:,} bytes): {one.what}")
        if not everything:
            for name, what in KEPT.items():
                if any(agent.state_dir.glob(name)):
                    click.echo(f"keep    {name}: {what} (--everything deletes it)")
        for name in unknown(agent.state_dir):
            click.echo(f"keep    {name}: not of this covey")
        left = gone(agent.state_dir)
        if left.updates or left.evaluations:
            click.echo(
                f"gone    {left.updates} updates and {left.evaluations} evaluations left this device between "
                f"{left.first} and {left.last}; {left.accepted} of them were accepted there. Nobody can call them back"
            )
        if not doomed:
            click.echo("there is nothing to delete")
            return
        if not yes:
            click.confirm("Delete all this?", abort=True)
        delete(doomed)
        click.echo(f"deleted {sum(one.size for one in doomed):,} bytes")
    finally:
        lock.close()


def _stop(folder: Path) -> None:
    from covey_edge.local_socket import NotRunning, ask, lock_holder
    from covey_protocol.errors import TransportError

    try:
        ask(folder, "stop")
    except NotRunning:
        return
    end = time.monotonic() + STOP_S
    while lock_holder(folder) is not None:
        if time.monotonic() > end:
            raise TransportError(f"the agent did not stop within {STOP_S:g} s", "stop it by its service manager")
        time.sleep(0.1)
