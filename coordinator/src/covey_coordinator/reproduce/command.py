"""`covey reproduce`. Cheap to import: nothing heavy is loaded for its help."""

from __future__ import annotations

from pathlib import Path

import click

from covey_coordinator.libraries import prepare

A_FILE = click.Path(path_type=Path)
LIST = "list"


@click.command(name="reproduce", short_help="Re-run a published experiment, published and measured side by side.")
@click.argument("name")
@click.option("--quick", is_flag=True, help="A small form of at most 3 minutes on two cores that shows the ordering.")
@click.option("--data", "data_folder", type=A_FILE, help="Folder of the data files.  [default: COVEY_DATA]")
@click.option("--seeds", type=click.IntRange(min=1), help="How many repetitions.  [default: 3, quick: 1]")
@click.option("--out", type=A_FILE, default=Path("runs/reproduce"), show_default=True, help="Folder of the results.")
@click.option("--jobs", type=int, default=0, help="Worker processes.  [default: as many as cores]")
def reproduce_command(
    name: str, quick: bool, data_folder: Path | None, seeds: int | None, out: Path, jobs: int
) -> None:
    """Re-run the published experiment NAME; `list` says which there are.

    Prints published and measured numbers side by side and which claims hold, and writes report.md, figure.png and
    results.json into OUT/NAME. Every finished run is saved at once: the same command goes on where it was interrupted.
    docs/reproductions.md has the protocols and what came out.
    """
    from covey_coordinator.machine import check_machine

    check_machine()
    prepare()
    if name == LIST:
        for line in listed():
            click.echo(line)
        return
    from covey_coordinator.grid.command import usable_jobs
    from covey_coordinator.grid.display import Display
    from covey_coordinator.reproduce.program import Request, reproduce
    from covey_coordinator.reproduce.registry import reproduction_of
    from covey_edge.processes import interrupted_by_signals
    from covey_models.datasets import data_folder as folder_of

    request = Request(reproduction_of(name), quick, folder_of(data_folder), seeds, out, usable_jobs(jobs))
    reproduce(request, Display(), interrupted_by_signals())


def listed() -> list[str]:
    """A line per reproduction: name, what it is, what it needs, how long its full form takes."""
    from covey_coordinator.reproduce.registry import NAMES, reproduction_of

    lines = []
    for name in NAMES:
        one = reproduction_of(name)
        needs = f"needs {', '.join(one.needs)}; " if one.needs else ""
        lines += [f"{name}: {one.title}", f"  {one.paper}", f"  {needs}{one.full_time}"]
    return lines
