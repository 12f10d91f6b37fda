"""`covey agent`: run the edge agent in the foreground until a signal ends it."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Optional

import click


@click.command(short_help="Train on this device's data and take part in rounds.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), default="agent.toml", show_default=True)
@click.option("--quiet", is_flag=True, help="Only warnings and errors.")
@click.option("--parent", type=int, hidden=True, help="End with this process.")
def agent(config_path: Path, quiet: bool, parent: Optional[int]) -> None:
    """Run the edge agent described by a TOML file until Ctrl-C or SIGTERM."""
    from covey_edge.agent import AgentProgram
    from covey_edge.config import load_agent
    from covey_edge.processes import die_with_parent, frugal_memory

    frugal_memory()
    if parent:
        die_with_parent(parent)
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    program = AgentProgram(load_agent(config_path))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: program.stop())
    try:
        program.start()
        program.run()
    finally:
        program.close()
