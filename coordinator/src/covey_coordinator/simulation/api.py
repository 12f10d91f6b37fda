"""`covey_coordinator.simulate`: an experiment from Python, in a script or a notebook."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covey_coordinator.libraries import prepare
from covey_coordinator.simulation.results import RunResult


def simulate(
    experiment: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    data_dir: str | Path | None = None,
    quick: bool = False,
    as_fleet: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> list[RunResult]:
    """Run an experiment and return a result per point of its sweep and seed, in the order of `covey simulate`.

    experiment: a TOML file, or the same as a dict. out: the folder that everything is kept in, runs/NAME-TIME if left
    out; where it holds this experiment already, what is finished there is not run again. jobs: 1 trains in this
    process; more start processes, for which a script must be importable (`if __name__ == "__main__":`). overrides:
    top-level keys, such as rounds=3. Raises the errors of covey_protocol.errors; RunError where a run failed.
    """
    prepare()
    from covey_coordinator.grid.command import usable_jobs
    from covey_coordinator.grid.display import Display
    from covey_coordinator.simulation.folder import ExperimentFolder, new_path
    from covey_coordinator.simulation.program import HERE, run_experiment
    from covey_coordinator.simulation.reading import read_experiment
    from covey_protocol.errors import RunError

    read = read_experiment(experiment, overrides, data_dir=data_dir, as_fleet=as_fleet, quick=quick)
    path = new_path(Path("runs"), read.name) if out is None else Path(out)
    folder = ExperimentFolder.new_or_same(path, read.table, read.notes)
    display = Display(io.StringIO() if quiet else None)
    outcome = run_experiment(read, folder, HERE if jobs == 1 else usable_jobs(jobs), display)
    if outcome.failed:
        first = next(iter(outcome.failed))
        raise RunError(f"{len(outcome.failed)} runs failed; {first}: {outcome.failed[first]}", f"see {folder.path}")
    return outcome.results
