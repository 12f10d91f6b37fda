"""The program of `covey reproduce`: what is to run, what is there already, processes for the rest, table and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from covey_coordinator.grid.display import Display
from covey_coordinator.pool import Pool, Tell
from covey_coordinator.reproduce import data
from covey_coordinator.reproduce.contract import Case, Measured, Outcome, Reproduction, Verdict
from covey_coordinator.reproduce.folder import Folder, Task, tasks_of
from covey_coordinator.reproduce.registry import reproduction_of
from covey_coordinator.reproduce.text import clock, report, table_lines, verdict_lines

Check = Callable[[], None]


class Request(NamedTuple):
    """seeds: None is the form's own number (one where quick). data_folder: of the files that the experiment needs."""

    reproduction: Reproduction
    quick: bool
    data_folder: Path | None
    seeds: int | None
    out: Path
    jobs: int

    @property
    def form(self) -> str:
        return "quick" if self.quick else "full"


def reproduce(request: Request, display: Display, check: Check = lambda: None) -> list[Verdict]:
    """Run what is missing, print the table and write the report. A claim that does not hold is no error.

    check: called all the time; raises to end the run. Runs that are finished by then are saved.
    """
    reproduction = request.reproduction
    for name in reproduction.needs:
        data.located(request.data_folder, name)
    cases = list(reproduction.cases(request.quick))
    tasks = tasks_of(cases, request.seeds or (1 if request.quick else reproduction.seeds))
    folder = Folder(request.out, reproduction.name, request.form)
    outcomes = {task.key: found for task in tasks if (found := folder.finished(task)) is not None}
    _introduce(display, request, len(tasks), len(outcomes))
    missing = [task for task in tasks if task.key not in outcomes]
    try:
        with display.cells(len(outcomes), len(tasks), "runs") as ticker:
            for task, outcome in _results(request, missing, check):
                folder.save(task, outcome)
                outcomes[task.key] = outcome
                shown = reproduction.shown(reproduction.value(outcome))
                ticker.finished(f"{task.label}, seed {task.seed}: {shown}")
    except BaseException:
        display.line(f"  {len(outcomes)} of {len(tasks)} runs are saved in {request.out}; the same command goes on")
        raise
    by_case = {case.label: [outcomes[task.key] for task in tasks if task.label == case.label] for case in cases}
    return _finish(request, folder, cases, Measured(by_case, reproduction.value), display)


def _introduce(display: Display, request: Request, runs: int, there: int) -> None:
    reproduction = request.reproduction
    display.line(f"covey reproduce {reproduction.name}: {reproduction.title}")
    display.line(f"  {reproduction.paper}")
    display.line(f"  {request.form} form, {runs} runs, {request.jobs} jobs; engine: {reproduction.engine}")
    if not request.quick:
        display.line(f"  {reproduction.full_time}")
    if there:
        display.line(f"  going on: {there} runs are there already")


def _results(request: Request, tasks: Sequence[Task], check: Check) -> Iterator[tuple[Task, Outcome]]:
    """Each run with its outcome, as they finish. Raises the error of the first that fails."""
    if not tasks:
        return
    shared = (request.reproduction.name, request.data_folder)
    with Pool(_run, shared, min(request.jobs, len(tasks))) as pool:
        yield from pool.results(tasks, check)


def _run(shared: tuple[str, Path | None], task: Task, tell: Tell) -> Outcome:
    del tell
    name, folder = shared
    return reproduction_of(name).run(task.settings, task.seed, folder)


def _finish(
    request: Request, folder: Folder, cases: Sequence[Case], measured: Measured, display: Display
) -> list[Verdict]:
    reproduction = request.reproduction
    verdicts = [measured.judged(claim) for claim in reproduction.claims]
    seconds = sum(outcome.get("seconds", 0.0) for found in measured.outcomes.values() for outcome in found)
    text = report(reproduction, cases, measured, verdicts, request.form, seconds)
    results = {
        "name": reproduction.name,
        "form": request.form,
        "seconds": round(seconds, 1),
        "cases": [
            {**case._asdict(), "measured": measured.values(case.label), "outcomes": measured.outcomes[case.label]}
            for case in cases
        ],
        "claims": [{**verdict._asdict(), "text": verdict.text} for verdict in verdicts],
    }
    folder.write_report(text, reproduction.figure(cases, measured), results)
    display.line()
    display.line(f"{reproduction.measure}:")
    found = filter(None, [reproduction.found(measured)])
    for line in [*table_lines(reproduction, cases, measured), "", *found, *verdict_lines(verdicts), ""]:
        display.line(line)
    display.line(f"{clock(seconds)} of computing; report: {folder.results / 'report.md'}")
    return verdicts
