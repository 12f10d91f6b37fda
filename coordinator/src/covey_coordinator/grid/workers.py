"""The grid's worker processes: each trains one cell after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from covey_coordinator.grid.settings import Cell, Plan
from covey_coordinator.pool import Died, Failed, Pool, Tell, Told
from covey_protocol.errors import RunError


class Workers(Pool):
    """`jobs` processes. Use as a context manager; leaving it ends them at once, in the middle of a cell too."""

    def __init__(self, plan: Plan, jobs: int) -> None:
        super().__init__(_train, plan, jobs)

    def __enter__(self) -> Workers:
        return self

    def results(self, cells: Sequence[Cell], check: Callable[[], None]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Each cell with its result, in the order in which they finish. check is called all the time.

        Raises the error of the first cell that fails.
        """
        for cell, event in self.events(cells, check):
            if isinstance(event, Died):
                raise RunError(
                    f"the process that trained {cell.key} ended (code {event.exitcode})",
                    "if memory is short, use fewer --jobs; finished cells are saved, run the same command again",
                )
            if isinstance(event, Failed):
                raise RunError(f"{cell.key} failed:\n{event.text}") if event.text else event.error
            if not isinstance(event, Told):
                yield cell, event.value


def _train(plan: Plan, cell: Cell, tell: Tell) -> dict[str, Any]:
    del tell
    from covey_coordinator.grid.simulation import simulated

    return simulated(plan, cell)
