"""The program of an experiment: what is left to do, processes that do it, and the table at the end.

A cell that fails is recorded and leaves the others running. A cell whose rule cannot bear its corrupted devices is a
result, too: without rounds, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from covey_coordinator.grid.display import Display
from covey_coordinator.pool import Died, Done, Event, Failed, Pool, Tell, Told, outcome_of
from covey_coordinator.simulation.display import shown
from covey_coordinator.simulation.folder import ExperimentFolder
from covey_coordinator.simulation.memory import bounded_jobs, job_bytes, require_for_updates
from covey_coordinator.simulation.reading import Experiment
from covey_coordinator.simulation.remote import connect
from covey_coordinator.simulation.report.html import write_experiment_report
from covey_coordinator.simulation.results import RunResult
from covey_coordinator.simulation.running import Progress, run_cell
from covey_coordinator.simulation.sweep import Cell
from covey_coordinator.simulation.table import table_lines
from covey_coordinator.simulation.world import World, learning_of, people_key, world_of
from covey_protocol.errors import CoveyError, RuleError

MOST_TOLD = 10  # cells that are named one by one before the start
HERE = 0  # jobs: train in this process

Check = Callable[[], None]


class Outcome(NamedTuple):
    """results: of the cells that are finished, in the order of the cells. failed: key -> what was wrong."""

    results: list[RunResult]
    failed: dict[str, str]


class Shared(NamedTuple):
    """What every process is told once. scratch: for its temporary files, "" for the usual place."""

    folder: Path
    as_fleet: bool
    scratch: str = ""


def run_experiment(
    experiment: Experiment,
    folder: ExperimentFolder,
    jobs: int,
    display: Display,
    check: Check = lambda: None,
) -> Outcome:
    """Run what is missing in the folder.

    jobs: processes, or HERE. check: called all the time; raises to end the run, which can be resumed.
    Raises ConfigError, DataError, RuleError or MachineError, before anything starts, for what cannot work.
    """
    with folder.held(), _forgotten_if_refused(folder):
        missing = [cell for cell in experiment.cells if folder.cell(cell.key).result() is None]
        _introduce(experiment, len(missing), folder, display)
        ready, largest = _checked(missing, folder, display, check)
        if len(ready) < len(experiment.cells) and not ready and not _any_rounds(experiment, folder):
            raise RuleError(_first_refusal(experiment, folder), "lower num_byzantine, or take more devices")
        _reach_workers(ready)
        jobs = _usable(jobs, ready, largest, experiment.notes.as_fleet, display)
        try:
            failed = _train(experiment, folder, ready, jobs, display, check)
        except BaseException:
            display.line(f"  what is done is saved; covey simulate --resume {folder.path} goes on")
            raise
        results = folder.results([cell.key for cell in experiment.cells])
    _conclude(experiment, results, failed, folder, display)
    return Outcome(results, failed)


# ---- before the start


@contextlib.contextmanager
def _forgotten_if_refused(folder: ExperimentFolder) -> Iterator[None]:
    """An experiment that cannot work leaves no folder, unless there are rounds to go on with."""
    try:
        yield
    except CoveyError:
        if not folder.has_rounds:
            folder.delete()
        raise


def _introduce(experiment: Experiment, missing: int, folder: ExperimentFolder, display: Display) -> None:
    cells = experiment.cells
    seeds = len({cell.seed for cell in cells})
    points = len(cells) // seeds
    display.line(f"covey simulate: {experiment.name}, {_many(points, 'point')} x {_many(seeds, 'seed')}")
    display.line(f"  in {folder.path}")
    if missing < len(cells):
        display.line(f"  going on: {len(cells) - missing} of {len(cells)} runs are there already")


def _checked(cells: Sequence[Cell], folder: ExperimentFolder, display: Display, check: Check) -> tuple[list[Cell], int]:
    """The cells that can run, and the bytes that the largest needs. Those whose rule refuses become results."""
    refused: dict[str, str] = {}
    largest = 0
    for cell in sorted(cells, key=people_key):  # so that each data set is divided once
        check()
        try:
            largest = max(largest, job_bytes(world_of(cell)))
        except RuleError as error:
            refused[cell.key] = str(error)
            notes = (f"refused: {error}",)
            folder.cell(cell.key).finish(RunResult(cell.key, cell.seed, cell.varied, notes=notes))
    told = [refused[cell.key] for cell in cells if cell.key in refused]
    for text in told[:MOST_TOLD]:
        display.line(f"  will not run: {text}")
    if len(told) > MOST_TOLD:
        display.line(f"  and {len(told) - MOST_TOLD} more")
    return [cell for cell in cells if cell.key not in refused], largest


def _reach_workers(ready: Sequence[Cell]) -> None:
    """Raises RunError or MachineError, before anything starts, if one cannot be used."""
    if ready and ready[0].settings.workers:
        connect(ready[0].settings.workers).stop()


def _any_rounds(experiment: Experiment, folder: ExperimentFolder) -> bool:
    return any(result.rounds for result in folder.results([cell.key for cell in experiment.cells]))


def _first_refusal(experiment: Experiment, folder: ExperimentFolder) -> str:
    return folder.results([cell.key for cell in experiment.cells])[0].notes[0]


def _usable(jobs: int, ready: Sequence[Cell], largest: int, as_fleet: bool, display: Display) -> int:
    """Fleets and workers elsewhere serve one run at a time."""
    if jobs == HERE or not ready or as_fleet or ready[0].settings.workers:
        return HERE
    wanted = min(jobs, len(ready))
    usable = bounded_jobs(wanted, largest)
    if usable < wanted:
        display.line(f"  {_many(usable, 'job')} instead of {wanted}: there is no memory for more")
    return usable


# ---- training


def _train(
    experiment: Experiment,
    folder: ExperimentFolder,
    cells: Sequence[Cell],
    jobs: int,
    display: Display,
    check: Check,
) -> dict[str, str]:
    """Returns what failed."""
    failed: dict[str, str] = {}
    shared = Shared(folder.path, experiment.notes.as_fleet)
    with shown(display, len(cells), sum(cell.settings.rounds for cell in cells)) as show:

        def told(cell: Cell, value: Any) -> None:
            if isinstance(value, Progress):
                show.advanced(cell, value)
            else:
                show.line(f"  {cell.said}: {value}")

        for cell, event in _events(shared, cells, jobs, told, check):
            if isinstance(event, Told):
                told(cell, event.value)
                continue
            show.ended(cell)
            if not isinstance(event, Done):
                failed[cell.key] = _recorded(folder, cell, event)
                show.line(f"  failed: {cell.said}: {failed[cell.key]}")
    return failed


def _events(
    shared: Shared, cells: Sequence[Cell], jobs: int, told: Callable[[Cell, Any], None], check: Check
) -> Iterator[tuple[Cell, Event]]:
    """As `Pool.events`; what is said by runs in this process goes to `told` at once."""
    if jobs == HERE:
        work = functools.partial(train, check=check)
        with _stopping_worker(cells):
            for cell in cells:
                check()
                yield cell, outcome_of(work, shared, cell, functools.partial(told, cell))
        return
    # a process that is ended in the middle leaves its files: they lie where we delete them
    with (
        tempfile.TemporaryDirectory(prefix="covey-simulate-") as scratch,
        Pool(train, shared._replace(scratch=scratch), jobs) as pool,
    ):
        yield from pool.events(cells, check)


def _recorded(folder: ExperimentFolder, cell: Cell, event: Event) -> str:
    if isinstance(event, Failed):
        folder.cell(cell.key).fail(str(event.error), event.text)
        return str(event.error)
    assert isinstance(event, Died)  # the only other end of a task
    what = f"its process ended (code {event.exitcode}); if memory is short, use fewer --jobs"
    folder.cell(cell.key).fail(what)
    return what


def train(shared: Shared, cell: Cell, tell: Tell, check: Check = lambda: None) -> None:
    """One cell, in whatever process this is. Its result is in its folder."""
    from covey_coordinator.simulation.boards import tensor_board

    if shared.scratch:
        tempfile.tempdir = shared.scratch
    folder = ExperimentFolder(shared.folder)
    place, world = folder.cell(cell.key), world_of(cell)

    def advanced(progress: Progress) -> None:
        """Without what only the folder needs: with many devices that is most of a record."""
        brief = msgspec.structs.replace(progress.record, verdicts={}, measurements={})
        tell(progress._replace(record=brief))
        for note in progress.notes:
            tell(note)

    def learner() -> Any:
        return _fleet(world, place.path / "fleet", tell, check) if shared.as_fleet else _simulation(world)

    run_cell(world, place, learner, tensor_board(folder.board(cell.key), cell), advanced, check)


def _simulation(world: World) -> Any:
    if world.settings.teaching is not None:
        from covey_coordinator.teaching.simulation import TaughtWorld

        return TaughtWorld(world, worker(world.settings.workers))
    from covey_coordinator.simulation.process import Simulation

    learning = learning_of(world)
    require_for_updates(world, learning.model.count_params())
    return Simulation(learning, world.devices, worker=worker(world.settings.workers))


def _fleet(world: World, place: Path, tell: Tell, check: Check) -> Any:
    """Real agents, and the simulation beside them, so that the result says how far the two lie apart."""
    from covey_coordinator.simulation.agreement import fleet_of

    learning, test = learning_of(world), (world.test.x, world.test.y)
    return fleet_of(
        learning, world.devices, place, test, title=world.cell.said, worker=worker(()), say=tell, check=check
    )


@functools.lru_cache(maxsize=1)
def worker(addresses: tuple[str, ...]) -> Any:
    """This process's TFF worker, or the ones at these addresses: its cells share them. It ends with the process."""
    from covey_coordinator.aggregation.worker import Worker
    from covey_coordinator.simulation.remote import RemoteWorkers

    return RemoteWorkers(addresses) if addresses else Worker()


@contextlib.contextmanager
def _stopping_worker(cells: Sequence[Cell]) -> Iterator[None]:
    """In the user's own process the worker ends with the experiment."""
    addresses = cells[0].settings.workers if cells else ()  # the same in all
    try:
        yield
    finally:
        worker(addresses).stop()
        worker.cache_clear()


# ---- after the end


def _conclude(
    experiment: Experiment,
    results: Sequence[RunResult],
    failed: dict[str, str],
    folder: ExperimentFolder,
    display: Display,
) -> None:
    display.line()
    for line in table_lines(experiment.cells, results, set(failed)):
        display.line(line)
    display.line()
    display.line(f"results: {folder.path}")
    if results:
        display.line(f"report: {write_experiment_report(folder.path, len(experiment.cells))}")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
