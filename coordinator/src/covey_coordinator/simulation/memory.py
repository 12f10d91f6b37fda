"""How much memory runs need, as far as can be known before: so that an experiment does not end by the kernel's hand."""

from __future__ import annotations

import psutil

from covey_coordinator.simulation.world import World
from covey_protocol.errors import MachineError

MB = 1_000_000
BASE_BYTES = (
    1_100 * MB
)  # of one job without data: measured 700 MB of Python with TFF, up to 250 of its worker, and room
COPIES_OF_DATA = 3  # the data set, the devices' copy of it, what is being built
COPIES_OF_UPDATES = 4  # in the worker, while rows are gathered
KEPT_FREE = 0.1  # of what is free now


def data_bytes(world: World) -> int:
    return sum(part.x.nbytes + part.y.nbytes for part in (world.train, world.test))


def job_bytes(world: World) -> int:
    """Of a process that trains such cells, and of its worker. The updates come on top: see `require_for_updates`."""
    return BASE_BYTES + COPIES_OF_DATA * data_bytes(world)


def bounded_jobs(jobs: int, largest: int) -> int:
    """As many of the jobs as there is free memory for. largest: bytes of the largest one. MachineError for none."""
    free = free_bytes()
    if largest > free:
        raise MachineError(
            f"a run needs about {largest // MB} MB and {free // MB} MB are free",
            "close other programs, take fewer data, or another machine",
        )
    return max(1, min(jobs, free // largest))


def require_for_updates(world: World, dimension: int) -> None:
    """MachineError where a round's updates would not fit into memory."""
    needed, free = COPIES_OF_UPDATES * 4 * dimension * world.settings.cohort_size, free_bytes()
    if needed > free:
        raise MachineError(
            f"the updates of {world.settings.cohort_size} devices with {dimension} parameters need about"
            f" {needed // MB} MB, and {free // MB} MB are free",
            "set sample lower, use fewer --jobs, or take a smaller model",
        )


def free_bytes() -> int:
    """What can be used without swapping, less a reserve."""
    return int(psutil.virtual_memory().available * (1 - KEPT_FREE))
