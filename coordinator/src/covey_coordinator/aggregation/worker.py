"""TFF's `worker_binary` as a process that we own: it starts on demand and never outlives us.

TFF's own factory starts its worker with our standard streams and ends it in `__del__`, which leaves orphans at exit
and at Ctrl-C. Here a *keeper* thread forks the worker, through a small launcher that asks the kernel to kill it when
its parent goes (PR_SET_PDEATHSIG); that covers SIGKILL of this process. The kernel means the forking *thread*, not the
process, so the keeper stays alive until the worker is stopped. Only Linux has this; elsewhere it is a MachineError.

worker_binary knows neither authentication nor TLS and listens on *all* interfaces; only the port can be chosen. We
connect over loopback. Whoever else can reach the port can run TensorFlow graphs as this user, so a machine that runs
the TFF engine on a network it does not trust needs a firewall. The direct engine opens no port.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from covey_protocol.errors import MachineError, RuleError

T = TypeVar("T")
Own = TypeVar("Own", bound="Computing")

# Runs in the child before the worker: die with the parent, also if it went before we could ask, then become the worker.
LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
START_ATTEMPTS = 3  # another program may take the port between our look and the worker's bind
START_TIMEOUT_S = 180.0  # about 1 s on an idle desktop; slow disks read 300 MB first, busy machines make it wait
STOP_TIMEOUT_S = 5.0  # the worker ends within 10 ms of SIGTERM, busy or idle
POLL_S = 0.2
LISTEN_POLL_S = 0.02
# as the rules' doors (factory) and draco word it; the assertion of a graph is all that leaves the worker
REFUSED = re.compile(r"\[([^\];]* needs at least \d+ (?:usable|equal) updates|the row of trusted data [^\];]*)[\];]")
GRPC_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


class Computing(ABC):
    """Something that TFF computes on. Used as a context manager it starts at once and stops at the end."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def context(self) -> Any:
        """The TFF execution context on it; starts it if needed. Contexts are per thread in TFF."""

    def install(self) -> None:
        """Make it TFF's default context of the calling thread."""
        import tensorflow_federated as tff

        tff.framework.set_default_context(self.context())

    @contextlib.contextmanager
    def installed(self: Own) -> Iterator[Own]:
        """Use it for all TFF calls of this thread inside the with block."""
        import tensorflow_federated as tff

        with tff.framework.get_context_stack().install(self.context()):
            yield self

    def __enter__(self: Own) -> Own:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Worker(Computing):
    """One worker process and the TFF execution context on it.

    log_path: where the worker's output goes; None discards it. Not started until needed; safe to stop twice.
    `call` runs TFF code on the keeper thread and can be interrupted by Ctrl-C; `installed` and `install` are for code
    that calls TFF itself. Used as a context manager it starts at once and stops at the end.
    """

    read_our_files = True  # its process runs here, as our user

    def __init__(self, log_path: str | os.PathLike[str] | None = None) -> None:
        self._log_path = log_path
        self._keeper: _Keeper | None = None
        self._lock = threading.RLock()

    def take_notes(self) -> tuple[str, ...]:
        """Nothing: this worker's end is an error. As `simulation.remote.RemoteWorkers`."""
        return ()

    @property
    def pid(self) -> int | None:
        """The process id of the worker, None when it is not running."""
        return self._keeper.process.pid if self._keeper and self._keeper.is_running else None

    @property
    def is_running(self) -> bool:
        return self.pid is not None

    def start(self) -> None:
        """Start the worker unless it runs; one that died is replaced. Raises MachineError if it cannot."""
        with self._lock:
            if self.is_running:
                return
            self.stop()
            self._keeper = _Keeper(worker_binary(), self._log_path)
            atexit.register(self.stop)

    def stop(self) -> None:
        """End the worker and wait until it is gone: terminate, then kill. Calls under way fail with MachineError."""
        with self._lock:
            atexit.unregister(self.stop)
            if self._keeper is not None:
                self._keeper.stop()
                self._keeper = None

    def context(self) -> Any:
        """The TFF execution context on this worker; starts it if needed."""
        with self._lock:
            self.start()
            assert self._keeper is not None  # start made it or raised
            return self._keeper.context

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments) with this worker as TFF's context; blocks until it returns.

        Raises MachineError if the worker dies meanwhile (TFF alone would try again for ever). An exception in the
        waiting thread (KeyboardInterrupt) stops the worker, so that no computation goes on unseen.
        """
        with self._lock:
            self.start()
            keeper = self._keeper
            assert keeper is not None  # start made it or raised
        try:
            return keeper.call(function, arguments)
        except (KeyboardInterrupt, SystemExit):
            self.stop()
            raise


class _Keeper:
    """The thread that forks the worker, stays its parent, and runs the calls on it. One per worker process."""

    def __init__(self, binary: Path, log_path: str | os.PathLike[str] | None) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, args=(binary, log_path), daemon=True, name="tff-worker-keeper"
        )
        self._started: Future[tuple[subprocess.Popen[bytes], Any]] = Future()
        self._thread.start()
        self.process, self._channel = self._started.result()

    @cached_property
    def context(self) -> Any:
        """Made when first used: it imports TFF, which takes far longer than the start of the worker."""
        return execution_context(self._channel, lambda: self.is_running and not self._stopping)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def call(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        future: Future[T] = Future()
        self._calls.put((future, function, arguments))
        while True:
            try:
                return future.result(timeout=POLL_S)
            except FutureTimeoutError:
                if not future.done() and not self.is_running:
                    self.stop()
                    raise MachineError(
                        f"the TFF worker ended with code {self.process.returncode} during a computation",
                        "look at the worker's log and at the free memory, then run again",
                    ) from None

    def stop(self) -> None:
        self._stopping = True
        self._calls.put(None)
        _end(self.process)
        self._channel.close()

    def _run(self, binary: Path, log_path: str | os.PathLike[str] | None) -> None:
        try:
            self._started.set_result(_start(binary, log_path))
        except BaseException as error:
            self._started.set_exception(error)
            return
        while (item := self._calls.get()) is not None:
            future, function, arguments = item
            try:
                future.set_result(self._in_context(function, arguments))
            except BaseException as error:
                future.set_exception(error)

    def _in_context(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        import tensorflow_federated as tff

        with tff.framework.get_context_stack().install(self.context):
            return function(*arguments)


def worker_binary() -> Path:
    """The worker that TFF ships. Raises MachineError where there is none or where we could not make it die with us."""
    if not sys.platform.startswith("linux"):
        raise MachineError(
            f"TFF's worker runs on Linux, not on {sys.platform}",
            "use the direct engine, or a Linux machine or container",
        )
    package = importlib.util.find_spec("tensorflow_federated")  # finds it without the seconds that an import takes
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "data" / "worker_binary"
        if path.is_file():
            return path
    raise MachineError("TFF's worker_binary is not installed", "install tensorflow-federated, or use the direct engine")


def _start(binary: Path, log_path: str | os.PathLike[str] | None) -> tuple[subprocess.Popen[bytes], Any]:
    """The process, ready to serve, and a channel to it."""
    for _ in range(START_ATTEMPTS):
        port = _free_port()
        process = _launch(binary, port, log_path)
        channel = _channel_when_ready(process, port)
        if channel is not None:
            return process, channel
        _end(process)
    raise MachineError(
        f"TFF's worker did not start: it ended with code {process.returncode}",
        "start it with a log_path and read what it says; it needs 1 GB of free memory and a free loopback port",
    )


def _launch(binary: Path, port: int, log_path: str | os.PathLike[str] | None) -> subprocess.Popen[bytes]:
    """Start the worker through the launcher: no Python code runs between fork and exec, which threads make unsafe."""
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(binary), f"--port={port}"]
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
    with open(os.devnull if log_path is None else log_path, "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for us; we stop the worker
        )


def _channel_when_ready(process: subprocess.Popen[bytes], port: int) -> Any:
    """A gRPC channel once the worker listens; None if it ended. Raises MachineError if it takes too long."""
    import grpc

    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=POLL_S):
            return grpc.insecure_channel(f"127.0.0.1:{port}", GRPC_OPTIONS)
        if time.monotonic() > deadline:
            _end(process)
            raise MachineError(
                f"TFF's worker did not answer within {START_TIMEOUT_S:.0f} s", "try on a less busy machine"
            )
        time.sleep(LISTEN_POLL_S)
    return None


class WithoutSubscriptions:
    """A gRPC channel on which watching the connection does nothing.

    TFF's stub watches it, for a flag that only TFF's own worker manager reads; gRPC then polls in a thread of its own,
    which dies of an exception when the channel is closed at the wrong moment.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate, wait, kill, wait. Returns when the process is gone and reaped."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def execution_context(
    channel: Any,
    is_alive: Callable[[], bool],
    compiler: Callable[[Any], Any] | None = None,
    failed: Callable[[Exception], Exception] = lambda error: error,
) -> Any:
    """A synchronous TFF context on the worker behind this channel.

    compiler: None for TFF's own. failed: given the error of a request, what to raise instead; what TFF holds to be
    retryable (`tff.framework.RetryableError`) it tries again for ever.
    TFF frees values on the worker 20 at a time by default; at 40 MB per round that is 1 GB more than freeing each.
    """
    import tensorflow_federated as tff
    from tensorflow_federated.python.core.environments.tensorflow_frontend import tensorflow_computation

    class Stub(tff.framework.RemoteExecutorGrpcStub):  # type: ignore[misc]
        """Frees values on a living worker only: the finalizers of an interrupted call come after the worker's end."""

        def dispose(self, request: Any) -> None:
            self._if_alive(super().dispose, request)

        def dispose_executor(self, request: Any) -> None:
            self._if_alive(super().dispose_executor, request)

        def _if_alive(self, free: Callable[[Any], object], request: Any) -> None:
            try:
                if is_alive():
                    free(request)
            except Exception:
                if is_alive():
                    raise

    for name in ("get_executor", "create_value", "create_struct", "create_call", "create_selection", "compute"):
        setattr(Stub, name, _translated(getattr(Stub, name), failed))
    stub = Stub(WithoutSubscriptions(channel))

    def executor(cardinalities: Any) -> Any:
        cardinalities.setdefault(tff.CLIENTS, 0)
        remote = tff.framework.RemoteExecutor(stub, dispose_batch_size=1)
        remote.set_cardinalities(cardinalities)
        return remote

    return tff.framework.SyncExecutionContext(
        tff.framework.ResourceManagingExecutorFactory(executor),
        compiler or tff.backends.native.desugar_and_transform_to_native,
        transform_args=tensorflow_computation.transform_args,
        transform_result=tensorflow_computation.transform_result,
    )


def _translated(request: Callable[..., Any], failed: Callable[[Exception], Exception]) -> Callable[..., Any]:
    def asked(*arguments: Any) -> Any:
        try:
            return request(*arguments)
        except Exception as error:
            told = failed(error)
            if told is error:
                raise
            raise told from error

    return asked


def refusal_of(error: Exception) -> RuleError | None:
    """What the rule said inside the worker, where TFF's error is about too few updates, or the trusted one."""
    told = REFUSED.search(str(error))
    return RuleError(told[1], "lower the learning rate, or choose a rule that bears more") if told else None
