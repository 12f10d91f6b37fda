"""`covey capture` and `covey replay`. Cheap to import: nothing heavy is loaded for their help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from covey_coordinator.libraries import prepare
from covey_coordinator.watching.cli import which_run

A_PATH = click.Path(path_type=Path)


@click.command(name="capture", short_help="Record a round that is over, of devices whose owners allow it.")
@which_run
@click.option("--round", "number", type=click.IntRange(min=1), help="Its number [default: the newest that is over].")
@click.option("--next", "wait", is_flag=True, help="Wait for the next round that ends.")
@click.option("--output", type=A_PATH, help="File to write [default: ROUND.covey-capture].")
def capture_command(**request: Any) -> None:
    """Write one round of a run to a sealed file, for `covey replay`: bundle, model, plan, and the updates as they came.

    Only of devices whose owner has `[capture] allow = true` in agent.toml; the others are named with the reason. Reads
    the run's store beside its coordinator or without one. The newest ten rounds can be captured.
    """
    prepare()
    from covey_coordinator.capture.program import Request, capture
    from covey_edge.processes import interrupted_by_signals

    capture(Request(**request), click.echo, interrupted_by_signals())


@click.command(name="replay", short_help="Check a captured round, and attack it.")
@click.argument("file", type=A_PATH, required=False)
@click.option("--record", "records", type=A_PATH, multiple=True, help="A device's own record of the round; repeatable.")
@click.option("--check", "only_check", is_flag=True, help="Only say whether everything fits together.")
@click.option("--attack", "attacks", multiple=True, help="Name of an attack; repeatable [default: the cheap ones].")
@click.option("--list", "list_attacks", is_flag=True, help="Say which attacks there are, and what each sees.")
@click.option("--device", "devices", multiple=True, help="Attack this device's update; repeatable [default: all].")
@click.option("--coordinator-key", help="64 hex digits: the file must be sealed by it.")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(min=0), help="For each attack.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--output", type=A_PATH, default=Path("runs/replay"), show_default=True, help="Folder of what is found.")
def replay_command(**request: Any) -> None:
    """Check that a captured round fits together (parameters, buffers, batches, mode), then attack its updates.

    With a device's record its training is done again, and what the attacks find is held against its examples. An update
    that does not fit is named with what explains it, and not attacked. Exits with 4 where something does not fit.
    """
    prepare()
    from covey_coordinator.capture.replaying import Request, replay
    from covey_coordinator.grid.display import Display
    from covey_edge.processes import interrupted_by_signals

    replay(Request(**request), Display(), interrupted_by_signals())
