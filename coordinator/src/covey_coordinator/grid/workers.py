"""The grid's worker processes: each trains one cell after another."""

from __future__ import annotations

from typing import Any

from covey_coordinator.grid.settings import Cell, Plan
from covey_coordinator.pool import Pool, Tell


class Workers(Pool):
    """`jobs` processes. Use as a context manager; leaving it ends them at once, in the middle of a cell too."""

    def __init__(self, plan: Plan, jobs: int) -> None:
        super().__init__(_train, plan, jobs)

    def __enter__(self) -> Workers:
        return self


def _train(plan: Plan, cell: Cell, tell: Tell) -> dict[str, Any]:
    del tell
    from covey_coordinator.grid.simulation import simulated

    return simulated(plan, cell)
