"""docs/first-fleet.md as far as it can be tried in an instant; tests/device/test_first_fleet.py runs all of it."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from walkthrough import read_page

from covey_edge.cli import covey

PAGE = Path(__file__).resolve().parents[2] / "docs" / "first-fleet.md"
MOST_COMMANDS = 10


def test_the_first_fleet_needs_ten_commands_and_each_is_one_that_covey_has() -> None:
    """Options and arguments are those of the commands, all that are required are given; nothing is run."""
    page = read_page(PAGE)
    assert 0 < len(page.steps) <= MOST_COMMANDS
    assert set(page.files) == {"first.py"}
    programs = []
    for step in page.steps:
        assert not set(step.command) & set(";&|\n") - set("|"), f"{step.command} is more than one command"
        program, *arguments = shlex.split(step.command)
        programs.append(program)
        if program == "covey":
            parsed(arguments)
    assert programs.count("covey") == MOST_COMMANDS - 2
    assert {"sudo", "python"} < set(programs)
    compile(page.files["first.py"], "first.py", "exec")


def parsed(arguments: list[str]) -> None:
    """click.UsageError where this is no call of covey."""
    command: click.Command = covey
    context = click.Context(covey, info_name="covey")
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        found = command.get_command(context, arguments[0])
        assert found is not None, arguments[0]
        command, arguments = found, arguments[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    command.make_context(command.name, list(arguments))
