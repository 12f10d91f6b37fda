"""`covey teach`. Cheap to import: nothing heavy is loaded for its help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from covey_coordinator.libraries import prepare

A_FILE = click.Path(path_type=Path)


@click.command(
    name="teach", short_help="Learn from doubtful data with a few trusted examples, and say which are wrong."
)
@click.argument("data")
@click.option("--trusted", required=True, help="Examples whose labels are right: a file of the same form.")
@click.option(
    "--teachers", default=5, show_default=True, type=click.IntRange(min=1), help="Split the data among so many."
)
@click.option("--users", help="Column (.csv) that says whose an example is: every user teaches. Of .npz: users.")
@click.option("--label", help="Column with the label.  [default: label, class or target, else the last]")
@click.option("--numbers", is_flag=True, help="Labels are numbers, not classes.")
@click.option("--bundle", type=A_FILE, help="Teach the last layer of this bundle (`covey export --teach`).")
@click.option("--tries", default=20, show_default=True, type=click.IntRange(min=1), help="Settings of teaching to try.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--output", type=A_FILE, default=Path("runs/teach"), show_default=True, help="Folder of what is found.")
def teach_command(**request: Any) -> None:
    """Learn from DATA that nobody vouches for with the help of a few TRUSTED examples (machine teaching, CoMT).

    DATA is a .csv table, an .npz file with x and y, or a folder of images. Prints how good teaching is on trusted
    examples it has not seen, beside the trusted examples alone, all data together, and a median over the teachers'
    models, each tuned; says plainly where trusted examples alone are as good. Writes OUTPUT/report.html: which examples
    of DATA to doubt, and what the model expects instead.
    """
    prepare()
    from covey_coordinator.grid.display import Display
    from covey_coordinator.teach.program import Request, teach
    from covey_edge.processes import interrupted_by_signals

    teach(Request(**request), Display(), interrupted_by_signals())
