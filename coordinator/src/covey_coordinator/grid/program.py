"""The grid's program: what is to do, what is done already, workers for the rest, tables and the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from covey_coordinator.grid.display import Display, said_of
from covey_coordinator.grid.folder import Folder
from covey_coordinator.grid.settings import Cell, GridSettings, Plan, canonical, plan_of
from covey_coordinator.grid.summary import panels_of, seeds, summary_of, table_lines
from covey_coordinator.grid.workers import Workers
from covey_coordinator.simulation.trusted_data import TrustedSettings, parted
from covey_edge.files import write_atomic
from covey_protocol.errors import RuleError


def run_grid(
    settings: GridSettings, output: Path, jobs: int, display: Display, check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run what is missing and write results.csv, results.json and heatmap.png into output. Returns the summary.

    check: called all the time; raises to end the run. Cells that are finished by then are saved.
    """
    plan = plan_of(settings)
    _check_data(settings)
    folder = Folder(output, canonical(plan))
    cells = plan.cells()
    with folder.opened():
        results = folder.finished(cells)
        there = len(results)
        results.update(_refusals(plan, folder, [cell for cell in cells if cell not in results]))
        _introduce(display, plan, cells, there, jobs)
        missing = [cell for cell in cells if cell not in results]
        try:
            _train(plan, folder, missing, results, jobs, display, check)
        except BaseException:
            display.line(f"  {len(results)} of {len(cells)} cells are saved in {output}; the same command goes on")
            raise
        return _finish(plan, folder, [results[cell] for cell in cells], display)


def _check_data(settings: GridSettings) -> None:
    """DataError for data that are not there, before processes are started."""
    from covey_models import datasets, partitions

    dataset = datasets.load(settings.data)
    train, _ = datasets.split(dataset, 0.2, seed=0)
    _, train = parted(train, TrustedSettings(settings.trusted), seed=0)
    partitions.dirichlet(train.y, settings.devices, settings.alpha, 0, 8)


def _refusals(plan: Plan, folder: Folder, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """Cells in which the rule refuses so many corrupted devices among so many: results too, with the reason."""
    found = {}
    for cell in cells:
        reason = _refusal(plan, cell)
        if reason:
            found[cell] = _refused(plan, cell, reason)
            folder.save(cell, found[cell])
    return found


def _refusal(plan: Plan, cell: Cell) -> str:
    try:
        plan.rules[cell.rule].made(cell.num_hostile).check(plan.settings.devices)
    except RuleError as error:
        return str(error)
    return ""


def _refused(plan: Plan, cell: Cell, reason: str) -> dict[str, Any]:
    told = plan.rules[cell.rule].num_byzantine
    return {
        **cell._asdict(),
        "told": cell.num_hostile if told is None else told,
        "refused": reason,
        "accuracy": None,
        "best_accuracy": None,
        "backdoor_success": None,
        "rounds_refused": 0,
        "last_refusal": "",
        "curve": [],
        "seconds": 0.0,
    }


def _introduce(display: Display, plan: Plan, cells: Sequence[Cell], there: int, jobs: int) -> None:
    settings = plan.settings
    shares = ", ".join(f"{fraction:.0%}" for fraction in settings.fractions)
    display.line(f"covey grid: {len(plan.rules)} rules, {len(plan.attacks)} attacks, {shares} of {settings.devices}")
    display.line(f"  {settings.data}, {settings.rounds} rounds, {seeds(settings)}: {len(cells)} cells, {jobs} jobs")
    for note in plan.notes:
        display.line(f"  {note}")
    if there:
        display.line(f"  going on: {there} cells are there already")


def _train(
    plan: Plan,
    folder: Folder,
    missing: Sequence[Cell],
    results: dict[Cell, dict[str, Any]],
    jobs: int,
    display: Display,
    check: Callable[[], None],
) -> None:
    if not missing:
        return
    with Workers(plan, jobs) as workers, display.cells(len(results), len(results) + len(missing)) as ticker:
        for cell, result in workers.results(missing, check):
            folder.save(cell, result)
            results[cell] = result
            ticker.finished(said_of(result))


def _finish(plan: Plan, folder: Folder, results: list[dict[str, Any]], display: Display) -> dict[str, Any]:
    from covey_coordinator.grid.picture import heat_map

    panels = panels_of(plan, results)
    summary = summary_of(plan, panels)
    folder.write_tables(results, summary)
    write_atomic(folder.path / "heatmap.png", heat_map(plan, panels))
    display.line()
    for line in table_lines(plan, panels):
        display.line(line)
    display.line()
    display.line(f"heat map: {folder.path / 'heatmap.png'}")
    return summary
