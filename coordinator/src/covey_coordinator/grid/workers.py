"""Worker processes that train cells. Each is a fresh Python; none outlives its parent, whatever becomes of that."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from covey_coordinator.grid.settings import Cell, Plan
from covey_coordinator.libraries import prepare
from covey_edge.processes import die_with_parent
from covey_protocol.errors import CoveyError, RunError

POLL_S = 0.2


class Workers:
    """`jobs` processes. Use as a context manager; leaving it ends them at once, in the middle of a cell too."""

    def __init__(self, plan: Plan, jobs: int) -> None:
        self._plan, self._jobs = plan, jobs
        self._running: dict[Connection, Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.join()

    def results(self, cells: Sequence[Cell], check: Callable[[], None]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Each cell with its result, in the order in which they finish. check is called all the time."""
        waiting = list(reversed(cells))
        doing: dict[Connection, Cell] = {}
        for _ in range(min(self._jobs, len(cells))):
            connection = self._start()
            doing[connection] = waiting.pop()
            connection.send(doing[connection])
        while doing:
            check()
            for ready in wait(list(doing), POLL_S):
                connection = next(one for one in doing if one is ready)
                cell = doing.pop(connection)
                result = self._received(connection, cell)
                if waiting:
                    doing[connection] = waiting.pop()
                    connection.send(doing[connection])
                yield cell, result

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._plan, os.getpid()), daemon=True)
        # a blocked signal is inherited: Ctrl-C never strikes a worker, not even while it starts, and we get it after
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
            self._running[ours] = process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        return ours

    def _received(self, connection: Connection, cell: Cell) -> dict[str, Any]:
        try:
            answer = connection.recv()
        except (EOFError, ConnectionResetError) as exc:
            process = self._running[connection]
            process.join()
            raise RunError(
                f"the process that trained {cell.key} ended (code {process.exitcode})",
                "if memory is short, use fewer --jobs; finished cells are saved, run the same command again",
            ) from exc
        if isinstance(answer, CoveyError):
            raise answer
        if isinstance(answer, str):
            raise RunError(f"{cell.key} failed:\n{answer}")
        result: dict[str, Any] = answer
        return result


def _work(connection: Connection, plan: Plan, parent: int) -> None:
    """A worker's life. Ctrl-C goes to the parent, which ends us."""
    die_with_parent(parent)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # as many processes as cores: threads would only compete
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    prepare()
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        connection.send(_answer(plan, cell))


def _answer(plan: Plan, cell: Cell) -> Any:
    """The result, a CoveyError, or the text of an error nobody expected."""
    try:
        from covey_coordinator.grid.simulation import simulated

        return simulated(plan, cell)
    except CoveyError as error:
        return error
    except Exception:
        return traceback.format_exc()
