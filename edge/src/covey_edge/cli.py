"""The `covey` command: finds the sub-commands of all installed covey distributions and turns errors into exit codes.

Sub-commands register under the entry point group ``covey.commands``. Their modules must be cheap to import: help,
`agent` and `status` never wait for TensorFlow. Errors end in one line and a documented exit code, never a traceback
(COVEY_TRACEBACK=1 shows it).
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Optional

import click

from covey_edge import __version__
from covey_edge.command_groups import NearestGroup
from covey_edge.service import error_prefix
from covey_protocol.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_MACHINE, CoveyError

GROUP = "covey.commands"


def _commands() -> dict[str, EntryPoint]:
    points = entry_points()
    found = points.select(group=GROUP) if hasattr(points, "select") else points.get(GROUP, ())
    return {point.name: point for point in found}


class Commands(NearestGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        point = _commands().get(cmd_name)
        if point is None:
            return None
        try:
            command: click.Command = point.load()
        except (ImportError, AttributeError) as exc:
            return _broken(cmd_name, exc)
        return command


def _broken(name: str, error: Exception) -> click.Command:
    """A command whose parts are not installed still has a line in the help, and says what is missing when called."""

    def fail(**_: Any) -> None:
        click.echo(f"covey {name}: {error}; install the distribution it belongs to completely", err=True)
        sys.exit(EXIT_MACHINE)

    context = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, callback=fail, short_help="(not completely installed)", context_settings=context)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="covey")
def covey() -> None:
    """Private and robust federated learning for devices people already own."""


def main(argv: Optional[list[str]] = None) -> None:
    """Entry point of the `covey` command."""
    try:
        code = covey.main(args=argv, prog_name="covey", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):  # click turns the latter into the former
        click.echo("covey: interrupted", err=True)
        code = EXIT_INTERRUPTED
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except CoveyError as exc:
        if os.environ.get("COVEY_TRACEBACK"):
            raise
        click.echo(f"{error_prefix()}covey: error: {exc}", err=True)
        code = exc.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = EXIT_BUG
    sys.exit(code if isinstance(code, int) else 0)
