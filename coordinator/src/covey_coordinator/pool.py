"""Worker processes that do tasks. Each is a fresh Python; none outlives its parent, whatever becomes of that."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from covey_coordinator.libraries import prepare
from covey_edge.processes import die_with_parent
from covey_protocol.errors import CoveyError, RunError

POLL_S = 0.2

Tell = Callable[[Any], None]
Work = Callable[[Any, Any, Tell], Any]  # (what all tasks share, a task, tell) -> its result


class Told(NamedTuple):
    """Something that the work said in the middle of a task."""

    value: Any


class Done(NamedTuple):
    """A task's result."""

    value: Any


class Failed(NamedTuple):
    """A task ended with this error. text: the traceback, empty for an error of covey's own, which speaks for itself."""

    error: CoveyError
    text: str = ""


class Died(NamedTuple):
    """The process that did a task ended in the middle of it, with this code; another takes its place."""

    exitcode: int | None


Event = Told | Done | Failed | Died


class Pool:
    """`jobs` processes that do `work`. Use as a context manager; leaving it ends them at once, also within a task.

    work: a function of a module, not a closure; it is called in the processes. shared: given to every call; pickled.
    """

    def __init__(self, work: Work, shared: Any, jobs: int) -> None:
        self._work, self._shared, self._jobs = work, shared, jobs
        self._running: dict[Connection, Any] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.join()

    def events(self, tasks: Sequence[Any], check: Callable[[], None]) -> Iterator[tuple[Any, Event]]:
        """What becomes of each task, as it happens: any number of Told, then one of the others.

        check: called all the time; raises to end the work.
        """
        waiting = list(reversed(tasks))
        doing: dict[Connection, Any] = {}

        def give(connection: Connection) -> None:
            doing[connection] = waiting.pop()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: received as Died
                connection.send(doing[connection])

        for _ in range(min(self._jobs, len(tasks))):
            give(self._start())
        while doing:
            check()
            for ready in wait(list(doing), POLL_S):
                connection = next(one for one in doing if one is ready)
                event = self._received(connection)
                task = doing[connection] if isinstance(event, Told) else doing.pop(connection)
                if not isinstance(event, Told) and waiting:
                    give(self._start() if isinstance(event, Died) else connection)
                yield task, event

    def results(self, tasks: Sequence[Any], check: Callable[[], None]) -> Iterator[tuple[Any, Any]]:
        """Each task with its result, in the order in which they finish; what is told meanwhile is left out.

        Tasks need a `key`, which errors name. Raises the error of the first task that fails.
        """
        for task, event in self.events(tasks, check):
            if isinstance(event, Died):
                raise RunError(
                    f"the process that did {task.key} ended (code {event.exitcode})",
                    "if memory is short, use fewer --jobs; what is finished is saved, run the same command again",
                )
            if isinstance(event, Failed):
                raise RunError(f"{task.key} failed:\n{event.text}") if event.text else event.error
            if not isinstance(event, Told):
                yield task, event.value

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self._work, self._shared, os.getpid())
        process = context.Process(target=_live, args=arguments, daemon=True)
        resource_tracker.ensure_running()  # now, as it unblocks SIGINT where it starts with the first worker
        # a blocked signal is inherited: Ctrl-C never strikes a worker, not even while it starts, and we get it after
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
            self._running[ours] = process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        return ours

    def _received(self, connection: Connection) -> Event:
        try:
            event: Event = connection.recv()
        except (EOFError, ConnectionResetError):
            process = self._running.pop(connection)
            process.join()
            return Died(process.exitcode)
        return event


def _live(connection: Connection, work: Work, shared: Any, parent: int) -> None:
    """A worker's life. Ctrl-C goes to the parent, which ends us."""
    die_with_parent(parent)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # as many processes as cores: threads would only compete
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    prepare()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(outcome_of(work, shared, task, lambda value: connection.send(Told(value))))


def outcome_of(work: Work, shared: Any, task: Any, tell: Tell) -> Done | Failed:
    """The work's result, or the error that it ended with."""
    try:
        return Done(work(shared, task, tell))
    except CoveyError as error:
        return Failed(error)
    except Exception as error:
        return Failed(RunError(f"{type(error).__name__}: {error}"), traceback.format_exc())
