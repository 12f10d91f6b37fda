"""Simulations on the workers of several machines: `connect(["host:port", ...])`, then as one `Worker`.

Each address is a `covey worker`, mostly the near end of a tunnel (docs/scale-out.md). One that dies, hangs or cannot be
reached any more is noticed (`links.py`), and what it was computing is computed by another: a shard is a pure function
of what was sent, and the shards stay as they were, so the result is the same to the bit. A worker that comes back is
used again from the next shard on. What happened is in the notes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any, TypeVar

from covey_coordinator.aggregation.worker import Computing
from covey_coordinator.simulation.addresses import split_address
from covey_coordinator.simulation.links import Post, WorkerLost
from covey_protocol.errors import ConfigError, RunError

T = TypeVar("T")

PATIENCE_S = 10.0  # without an answer a worker is lost; without any worker the run is
POLL_S = 0.2
KEPT_COMPUTATIONS = 128  # as many as TFF keeps; a sweep makes new ones for every run
MAX_LOSSES = 3  # workers that one shard may cost: it is the shard that kills them


def connect(addresses: Sequence[str], patience_s: float = PATIENCE_S) -> RemoteWorkers:
    """The workers at these addresses, all of them connected. Raises as `RemoteWorkers.start`."""
    workers = RemoteWorkers(addresses, patience_s)
    workers.start()
    return workers


class RemoteWorkers(Computing):
    """Several workers on other machines, with the interface of `aggregation.worker.Worker`.

    patience_s: how long a worker may be silent before its work is moved, and how long to wait for one when none is
    left. Threads: TFF's contexts are per thread; `call` runs on a thread of its own, and calls may overlap.
    """

    def __init__(self, addresses: Sequence[str], patience_s: float = PATIENCE_S) -> None:
        for address in addresses:
            split_address(address)
        if not addresses or len(set(addresses)) != len(addresses):
            raise ConfigError(f"workers = {list(addresses)}", "name one worker or more, each once")
        self.addresses = tuple(addresses)
        self._patience_s = patience_s
        self._posts: list[Post] = []
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._context: Any = None
        self._compile = lru_cache(KEPT_COMPUTATIONS)(_compiled)  # once for all workers

    @property
    def is_running(self) -> bool:
        return bool(self._posts)

    @property
    def living(self) -> list[str]:
        """The addresses of the workers that answer."""
        return [post.address for post in self._posts if post.is_living]

    @property
    def read_our_files(self) -> bool:
        """Whether every worker runs here, as our user and with our mounts, and so can open the paths that we can.

        Connects if needed.
        """
        self.start()
        return all(post.reads_our_files for post in self._posts)

    def start(self) -> None:
        """Connect to all workers, unless that is done.

        Raises RunError naming those that do not answer, MachineError naming one with another version of TFF.
        """
        with self._lock:
            if self.is_running:
                return
            posts = [Post(address, self._patience_s, self._notes.put) for address in self.addresses]
            try:
                refusals = [refusal for post in posts if (refusal := post.open())]
                if refusals:
                    raise RunError("; ".join(refusals), "start them with `covey worker`, and look at the tunnels")
            except BaseException:
                for post in posts:
                    post.close("not used")
                raise
            self._posts = posts

    def stop(self) -> None:
        """Disconnect. The workers go on for others; when there are none, they throw away what we left (`gate.py`)."""
        with self._lock:
            posts, self._posts, self._context = self._posts, [], None
        for post in posts:
            post.close("we disconnected")

    def take_notes(self) -> tuple[str, ...]:
        """What happened to the workers since this was last asked, a sentence each."""
        notes = []
        with contextlib.suppress(queue.Empty):
            while True:
                notes.append(self._notes.get_nowait())
        return tuple(notes)

    def context(self) -> Any:
        """The TFF context over all workers; connects if needed."""
        with self._lock:
            self.start()
            if self._context is None:
                from covey_coordinator.simulation.sharded import ShardedContext

                self._context = ShardedContext(len(self.addresses), self._run, self._cannot_split)
            return self._context

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments) with these workers as TFF's context; blocks until it returns.

        Raises RunError when no worker is left. An exception in the waiting thread (KeyboardInterrupt) disconnects.
        """
        self.context()
        future: Future[T] = Future()
        threading.Thread(target=self._called, args=(future, function, arguments), daemon=True).start()
        try:
            while not wait([future], timeout=POLL_S).done:
                pass  # in pieces, so that Ctrl-C is noticed
        except (KeyboardInterrupt, SystemExit):
            self.stop()
            raise
        return future.result()

    def _called(self, future: Future[T], function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        try:
            with self.installed():
                future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    def _run(self, tasks: Sequence[tuple[Any, Any]]) -> list[Any]:
        """The results of (computation, argument), in their order, from whichever workers live."""
        with self._lock:
            for computation, _ in tasks:
                self._compile(computation)
        return _Allotment(self._posts, tasks, self._compile, self._patience_s, self._notes.put).results()

    def _cannot_split(self, reason: str) -> None:
        self._notes.put(f"a computation runs on one worker, because TFF cannot split it: {reason}")


def _compiled(computation: Any) -> Any:
    import tensorflow_federated as tff

    return tff.backends.native.desugar_and_transform_to_native(computation)


class _Allotment:
    """Who computes which of some tasks, until all are done."""

    def __init__(
        self,
        posts: Sequence[Post],
        tasks: Sequence[tuple[Any, Any]],
        compiler: Callable[[Any], Any],
        patience_s: float,
        note: Callable[[str], None],
    ) -> None:
        self._posts, self._tasks, self._compiler, self._note = posts, tasks, compiler, note
        self._patience_s = patience_s
        self._waiting = deque(range(len(tasks)))
        self._running: dict[Future[Any], tuple[int, Post]] = {}
        self._results: dict[int, Any] = {}
        self._losses = [0] * len(tasks)

    def results(self) -> list[Any]:
        with ThreadPoolExecutor(len(self._posts) or 1, thread_name_prefix="shard") as pool:
            while len(self._results) < len(self._tasks):
                self._start_what_can(pool)
                done = wait(self._running, timeout=POLL_S, return_when=FIRST_COMPLETED).done
                for future in done:
                    self._take(future)
        return [self._results[number] for number in range(len(self._tasks))]

    def _start_what_can(self, pool: ThreadPoolExecutor) -> None:
        if not self._running:
            self._wait_for_any()
        busy = {post for _, post in self._running.values()}
        for post in self._posts:
            if self._waiting and post.is_living and post not in busy:
                number = self._waiting.popleft()
                future = pool.submit(post.invoke, *self._tasks[number], self._compiler)
                self._running[future] = number, post

    def _wait_for_any(self) -> None:
        deadline = time.monotonic() + self._patience_s
        while not any(post.is_living for post in self._posts):
            if time.monotonic() > deadline or not self._posts or all(post.is_closed for post in self._posts):
                reasons = "; ".join(f"worker {post.address}: {post.reason}" for post in self._posts)
                raise RunError(
                    f"no worker is left ({reasons})",
                    "start them again with `covey worker`, then resume: finished rounds are kept",
                )
            time.sleep(POLL_S)

    def _take(self, future: Future[Any]) -> None:
        number, post = self._running.pop(future)
        try:
            self._results[number] = future.result()
        except WorkerLost as lost:
            self._losses[number] += 1
            if self._losses[number] > MAX_LOSSES:
                raise RunError(
                    f"a part of the round has cost {MAX_LOSSES + 1} workers, the last one {post.address}: {lost}",
                    "look at the workers' output and memory",
                ) from lost
            self._waiting.appendleft(number)
            if len(self._tasks) > 1:
                self._note(
                    f"part {number + 1} of {len(self._tasks)} is computed again, after the loss of {post.address}"
                )
