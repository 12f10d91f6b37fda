"""`covey agent check`: the preflight. One line a finding; the exit code is that of the first that is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import click

from covey_edge.cli_agent import config_option

if TYPE_CHECKING:
    from covey_edge.preflight import Finding

MARKS = {"ok": "ok     ", "warning": "warning", "wrong": "WRONG  "}


@click.command(short_help="Look for what would keep this device from taking part.")
@config_option
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="A model to hold the data against, in place of the cache's."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def check(config_path: Path, bundle: Optional[Path], as_json: bool) -> None:
    """Look at settings, keys, disk, clock, certificates, broker, coordinator, runtime, data, conditions and releases.
    Works while the agent runs and while it does not. Ends with code 0 where nothing is wrong (a warning is not), else
    with that of the first thing that is."""
    from covey_edge.preflight import findings

    sys.exit(report(findings(config_path, bundle), as_json))


def report(found: Iterable[Finding], as_json: bool) -> int:
    """One line a finding, as soon as it is known; the exit code of the first that is wrong."""
    import msgspec

    code = 0
    for one in found:
        remedy = f"; {one.remedy}" if one.remedy else ""
        told = (
            json.dumps(msgspec.to_builtins(one)) if as_json else f"{MARKS[one.level]} {one.check}: {one.what}{remedy}"
        )
        click.echo(told)
        code = code or (one.code if one.level == "wrong" else 0)
    return code
