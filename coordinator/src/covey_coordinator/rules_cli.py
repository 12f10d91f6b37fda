"""`covey rules`: what rules and pre-steps there are, and how to write one. Imports no TensorFlow.

Everything shown comes from the registry: the facts of the classes, their fields and their docstrings. The table of
docs/rules.md is `covey rules --markdown`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from typing import Any

import click

WIDTH = 160  # of the table where no terminal says another
EXAMPLE_BYZANTINE = 2
TRUSTED_EXAMPLE = ("", "[trusted]", 'path = "trusted.npz"')


@click.command(name="rules", short_help="List the aggregation rules and pre-steps, or explain one.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="As the tables of docs/rules.md.")
def rules_command(name: str | None, as_json: bool, as_markdown: bool) -> None:
    """List all aggregation rules and the pre-steps that can stand before them, or show NAME in full."""
    found = catalogue()
    if name is not None:
        found = [_named(found, name)]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif as_markdown:
        click.echo(markdown(found))
    elif name is not None:
        click.echo(in_full(found[0]))
    else:
        _print_table(found)


def catalogue() -> list[dict[str, Any]]:
    """One entry per rule and pre-step, rules first, in the order of the registry. Values are what JSON has."""
    from covey_coordinator.aggregation.registry import PRE_STEPS, RULES

    rules = [_entry("rule", name, kind) for name, kind in RULES.items()]
    return rules + [_entry("pre-step", name, kind) for name, kind in PRE_STEPS.items()]


def _entry(sort: str, name: str, kind: Any) -> dict[str, Any]:
    own = [field for field in dataclasses.fields(kind) if field.name != "num_byzantine"]
    settings = {field.name: _default(field) for field in own}
    return {
        "name": name,
        "kind": sort,
        **kind.facts._asdict(),
        "settings": settings,
        "description": inspect.getdoc(kind),
        "example": example(sort, name, settings),
    }


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def example(sort: str, name: str, settings: dict[str, Any]) -> str:
    """The table of coordinator.toml with every setting at its default; those that have no value are commented out."""
    if sort == "rule":
        head = ["[aggregation]", f"rule = {toml(name)}", f"num_byzantine = {_bearable(name)}"]
        told = [f"{_commented(value)}{key} = {toml(value)}" for key, value in settings.items()]
        return "\n".join([*head, *told, *(TRUSTED_EXAMPLE if _needs_trusted(name) else ())])
    written = {"step": name, **{key: value for key, value in settings.items() if value is not None}}
    table = ", ".join(f"{key} = {toml(value)}" for key, value in written.items())
    step = f"{{ {table} }}" if len(written) > 1 else toml(name)
    return f'[aggregation]\nrule = "median"\nnum_byzantine = {EXAMPLE_BYZANTINE}\nbefore = [{step}]'


def _needs_trusted(name: str) -> bool:
    from covey_coordinator.aggregation.registry import RULES

    return bool(RULES[name].needs_trusted)


def _commented(value: Any) -> str:
    return "# " if value is None or value == "required" else ""


def toml(value: Any) -> str:
    """A setting as TOML writes it; None, which TOML has not, as a word in a comment."""
    if value is None:
        return "(not set)"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _bearable(name: str) -> int:
    """EXAMPLE_BYZANTINE, or 0 for a rule that bears no hostile device among any number."""
    return EXAMPLE_BYZANTINE if _fewest(name, EXAMPLE_BYZANTINE) is not None else 0


def _fewest(name: str, num_byzantine: int) -> int | None:
    """The fewest devices that bear num_byzantine hostile ones under the rule's defaults; None if no number does."""
    from covey_coordinator.aggregation.registry import make_rule
    from covey_coordinator.aggregation.rules import least_devices
    from covey_protocol.errors import CoveyError

    try:
        return least_devices(make_rule(name, num_byzantine))
    except CoveyError:
        return None


def _named(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    from covey_coordinator.aggregation.registry import suggest
    from covey_protocol.errors import ConfigError

    for entry in found:
        if entry["name"] == name:
            return entry
    names = tuple(entry["name"] for entry in found)
    raise ConfigError(f"there is no aggregation rule or pre-step {name!r}", suggest(name, names))


def in_full(entry: dict[str, Any]) -> str:
    """One rule or pre-step with all there is to say, for reading."""
    rows = {
        "kind": entry["kind"],
        "needs": entry["needs"],
        "fewest devices": _fewest_devices(entry),
        "breakdown": entry["breakdown"],
        "cost": entry["cost"],
        "sums only": _sums(entry),
        "settings": _settings(entry) or "none",
        "source": entry["source"],
    }
    lines = [f"{label:15}{value}" for label, value in rows.items() if value]
    head = f"{entry['name']}: {entry['summary']}"
    return "\n".join([head, "", *lines, "", entry["description"], "", "coordinator.toml:", "", entry["example"]])


def _fewest_devices(entry: dict[str, Any]) -> str:
    if entry["kind"] != "rule":
        return ""
    borne = {f: _fewest(entry["name"], f) for f in range(4)}
    return ", ".join(f"{n} for f = {f}" for f, n in borne.items() if n is not None)


def _sums(entry: dict[str, Any]) -> str:
    return "yes" if entry["sums_only"] else "no"


def _settings(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {_short(value)}" for key, value in entry["settings"].items())


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else toml(value).strip("()")


COLUMNS = ("name", "what it does", "needs", "breakdown", "cost", "sums only", "settings and defaults")


def _cells(entry: dict[str, Any]) -> list[str]:
    middle = [entry[key] for key in ("summary", "needs", "breakdown", "cost")]
    return [entry["name"], *middle, _sums(entry), _settings(entry)]


def markdown(found: list[dict[str, Any]]) -> str:
    """Two tables, rules and pre-steps; the source is a last column."""
    parts = []
    for kind in ("rule", "pre-step"):
        entries = [entry for entry in found if entry["kind"] == kind]
        if entries:
            lines = [[*COLUMNS, "source"], ["---"] * (len(COLUMNS) + 1)]
            lines += [[f"`{entry['name']}`", *_cells(entry)[1:], entry["source"]] for entry in entries]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _print_table(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for kind in ("rule", "pre-step"):
        table = Table(title=f"{kind}s", title_justify="left", show_lines=False)
        for column in COLUMNS:
            table.add_column(column, no_wrap=column == "name")
        for entry in found:
            if entry["kind"] == kind:
                table.add_row(*_cells(entry))
        console.print(table, markup=False)
    click.echo("covey rules NAME shows one in full, with its source and an example.")
