"""`covey simulate`. Cheap to import: nothing heavy is loaded for its help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from covey_coordinator.libraries import prepare

A_PATH = click.Path(path_type=Path)


@click.command(name="simulate", short_help="Run an experiment: federated learning on this desk.")
@click.argument("file", metavar="EXPERIMENT.toml", type=A_PATH, required=False)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a dotted key; values as in TOML.")
@click.option("--seeds", metavar="N|A,B,...", help="How many repetitions, or which seeds.")
@click.option("--rounds", type=int, help="Instead of the file's.")
@click.option("--jobs", type=int, default=0, help="Worker processes.  [default: as many as cores]")
@click.option("--out", type=A_PATH, help="Folder of the results.  [default: runs/NAME-TIME]")
@click.option("--resume", type=A_PATH, metavar="FOLDER", help="Go on with an experiment that was interrupted.")
@click.option("--quick", is_flag=True, help="At most 5 rounds and one seed, to see that everything fits.")
@click.option("--data", type=A_PATH, help="Folder of downloaded data sets.  [default: $COVEY_DATA]")
@click.option("--as-fleet", is_flag=True, help="Through real agents and a broker instead of in TFF.")
def simulate_command(
    file: Path | None, settings: tuple[str, ...], jobs: int, out: Path | None, resume: Path | None, **options: Any
) -> None:
    """Train a fleet on this machine as EXPERIMENT.toml says: every point of its sweep with every seed.

    Everything is kept in a folder as it comes, so an interrupted run goes on where it was: --resume FOLDER.
    docs/simulation.md has examples and every key.
    """
    from covey_coordinator.machine import check_machine

    check_machine()
    prepare()
    from covey_coordinator.grid.command import usable_jobs
    from covey_coordinator.grid.display import Display
    from covey_coordinator.simulation.program import run_experiment
    from covey_edge.processes import interrupted_by_signals
    from covey_protocol.errors import RunError

    jobs = usable_jobs(jobs)
    experiment, folder = _opened(file, settings, out, resume, options)
    outcome = run_experiment(experiment, folder, jobs, Display(), interrupted_by_signals())
    if outcome.failed:
        first = next(iter(outcome.failed))
        raise RunError(
            f"{len(outcome.failed)} of {len(experiment.cells)} runs failed; {first}: {outcome.failed[first]}",
            f"see {folder.path}/cells/KEY/error.json; covey simulate --resume {folder.path} tries them again",
        )


def _opened(
    file: Path | None, settings: tuple[str, ...], out: Path | None, resume: Path | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    """(experiment, folder), the folder made or found."""
    from covey_coordinator.simulation.folder import ExperimentFolder, new_path
    from covey_coordinator.simulation.reading import read_experiment, resumed_experiment
    from covey_protocol.errors import ConfigError

    if (file is None) is (resume is None):
        raise ConfigError("covey simulate", "give it an experiment's file, or --resume and a folder")
    if resume is not None:
        if settings or out is not None or any(options.values()):
            raise ConfigError("--resume goes on with what the folder holds", "leave all other options but --jobs out")
        folder = ExperimentFolder.old(resume)
        return resumed_experiment(folder), folder
    assert file is not None  # one of the two is there
    experiment = read_experiment(
        file,
        overrides_of(settings, options["seeds"], options["rounds"]),
        data_dir=options["data"],
        as_fleet=options["as_fleet"],
        quick=options["quick"],
    )
    path = out if out is not None else new_path(Path("runs"), experiment.name)
    return experiment, ExperimentFolder.new(path, experiment.table, experiment.notes)


def overrides_of(settings: tuple[str, ...], seeds: str | None, rounds: int | None) -> dict[str, Any]:
    """Dotted keys and their values."""
    from covey_coordinator.grid.settings import toml_value
    from covey_protocol.errors import ConfigError

    found: dict[str, Any] = {}
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {text!r}", "write --set KEY=VALUE, such as --set aggregation.rule=median")
        found[key.strip()] = toml_value(value.strip())
    if seeds is not None:
        try:
            numbers = [int(part) for part in seeds.split(",")]
        except ValueError as exc:
            raise ConfigError(f"--seeds {seeds!r}", "give a number, or several with commas") from exc
        found["seeds"] = numbers if "," in seeds else numbers[0]
    if rounds is not None:
        found["rounds"] = rounds
    return found
