"""`covey agent`: run the edge agent in the foreground until a signal ends it; and sub-commands for its owner.

A sub-command is a line in SUBCOMMANDS and is loaded when it is called: the agent itself pays nothing for it.
"""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

import click

from covey_edge.command_groups import NearestGroup

F = TypeVar("F", bound=Callable[..., Any])

# name -> the module that has it under that name, and one line for the help
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "check": ("covey_edge.cli_check", "Look for what would keep this device from taking part."),
    "forget": ("covey_edge.cli_forget", "Delete what the agent keeps on this device."),
    "join": ("covey_edge.cli_status", "Take part again after `leave`."),
    "leave": ("covey_edge.cli_status", "Decline every round from now on."),
    "sent": ("covey_edge.cli_sent", "Everything that ever left this device."),
    "unit": ("covey_edge.cli_unit", "A systemd unit for this agent."),
    "update": ("covey_edge.cli_update", "Give the agent a new release of itself."),
    "status": ("covey_edge.cli_status", "What the agent is doing."),
}


class Subcommands(NearestGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        if cmd_name not in SUBCOMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(SUBCOMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table: the help loads no module."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in sorted(SUBCOMMANDS.items())])


def config_option(command: F) -> F:
    """`--config` of a sub-command: `agent check --config X` as well as `agent --config X check`."""

    def chosen(ctx: click.Context, _: click.Parameter, value: Optional[Path]) -> Path:
        given: Optional[Path] = ctx.parent.params.get("config_path") if ctx.parent is not None else None
        return value or given or Path("agent.toml")

    option = click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        callback=chosen,
        help="Default: agent.toml.",
    )
    return option(command)


@click.group(
    cls=Subcommands, invoke_without_command=True, short_help="Train on this device's data and take part in rounds."
)
@click.option("--config", "config_path", type=click.Path(path_type=Path), default="agent.toml", show_default=True)
@click.option("--quiet", is_flag=True, help="Only warnings and errors.")
@click.option("--parent", type=int, hidden=True, help="End with this process.")
@click.pass_context
def agent(ctx: click.Context, config_path: Path, quiet: bool, parent: Optional[int]) -> None:
    """Run the edge agent described by a TOML file until Ctrl-C or SIGTERM; or one of the commands below."""
    if ctx.invoked_subcommand is None:
        run(config_path, quiet, parent)


def run(config_path: Path, quiet: bool, parent: Optional[int]) -> None:
    """The agent, in the foreground."""
    from covey_edge.agent import AgentProgram
    from covey_edge.config import load_agent
    from covey_edge.processes import die_with_parent, frugal_memory
    from covey_edge.service import begin_to_log

    frugal_memory()
    if parent:
        die_with_parent(parent)
    begin_to_log(quiet=quiet)
    program = AgentProgram(load_agent(config_path))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: program.stop())
    try:
        program.start()
        program.run()
    finally:
        program.close()
    if program.starts_anew:
        from covey_edge.launcher import start_anew

        start_anew(program.service.inherited)
