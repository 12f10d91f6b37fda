"""Starts, watches and ends the training child.

Requests are answered through a callback from a reader thread; at most one is under way. A child that dies or takes too
long is a Problem frame, and the next request starts a new child. A child that is paused is stopped by the kernel
(SIGSTOP): it keeps its memory and takes no time, neither of the processor nor of its request's.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import msgspec

from covey_edge.frames import Frame, Open, Problem, read_frame, write_frame
from covey_edge.sensors.host import free_memory_mb
from covey_protocol.errors import UsageError

# one BLAS thread: the model runs in TFLite, and idle BLAS threads only cost memory on a small device
CHILD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
OOM_FIRST = 1000  # of -1000 to 1000: where memory runs out the kernel ends the child, and never whoever started it
ROOT = Path("/")
VMSTAT = ROOT / "proc/vmstat"
IDLE_S = 30.0  # between the requests of a round are moments, between rounds often hours: the child holds 50 MB
LONG_S, OPENINGS, MOST_S = 5.0, 20.0, 3600.0  # where opening took longer, so many times that, and no more
MUCH_FREE_MB = 256.0  # that other programs can still have; with less the child goes after IDLE_S all the same


class TrainingProcess:
    """The child as a service: `request` frames in, `on_answer(token, frame)` out (in another thread)."""

    def __init__(self, on_answer: Callable[[object, Frame], None], memory_mb: int = 0, nice: int = 0) -> None:
        self._on_answer = on_answer
        self._memory_mb, self._nice = memory_mb, nice
        self._child: Optional[subprocess.Popen[bytes]] = None
        self._lock = threading.Lock()
        self._pending: Optional[object] = None
        self._timer: Optional[threading.Timer] = None
        self._timeout_s, self._left_s, self._timed_from = 0.0, 0.0, 0.0
        self._oom_kills = 0
        self._stopped = False  # the child, by `pause`
        self._asked = self._answered = time.monotonic()
        self._opens, self._opening_s = False, 0.0

    @property
    def busy(self) -> bool:
        return self._pending is not None

    @property
    def pid(self) -> Optional[int]:
        return self._child.pid if self._child and self._child.poll() is None else None

    def request(self, token: object, frame: Frame, timeout_s: float) -> None:
        """Send one request; `token` comes back with its answer."""
        with self._lock:
            if self._pending is not None:
                raise UsageError("the training child is busy")
            child = self._started()
            self._wake(child)  # or it would not read
            self._pending, self._oom_kills = token, oom_kills()
            self._asked, self._opens = time.monotonic(), isinstance(frame, Open)
            self._timeout_s = self._left_s = timeout_s
            self._start_timer(token)
        try:
            assert child.stdin is not None
            write_frame(child.stdin, frame)
        except OSError:
            pass  # the child died; its reader thread sees the end of the pipe and answers

    def pause(self) -> None:
        """Stop what is under way, until `go_on`, `stop` or another request. Nothing where nothing is."""
        with self._lock:
            child = self._child
            if self._pending is None or self._stopped or child is None:
                return
            self._cancel_timer()
            self._left_s -= time.monotonic() - self._timed_from
            self._stopped = True
            child.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `pause`."""
        with self._lock:
            if not self._stopped or self._child is None:
                return
            self._wake(self._child)
            if self._pending is not None:
                self._start_timer(self._pending)

    def rest(self) -> None:
        """End a child that has had nothing to do for IDLE_S; the next request starts another, in half a second.

        One that has read long for its data (a large table) is kept longer, while memory is not short.
        """
        if self._child is None or self.busy:
            return
        idle_s = time.monotonic() - self._answered
        kept_s = min(MOST_S, OPENINGS * self._opening_s) if self._opening_s > LONG_S else IDLE_S
        if idle_s > kept_s or (idle_s > IDLE_S and (free_memory_mb(ROOT) or 0.0) < MUCH_FREE_MB):
            self.stop()

    def stop(self) -> None:
        """End the child, whatever it is doing; no answer comes any more."""
        with self._lock:
            self._pending = None
            self._stopped = False
            self._cancel_timer()
            child, self._child = self._child, None
        if child is not None:
            _end(child)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "covey_edge.trainer", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **CHILD_ENVIRONMENT},
            )
            if self._memory_mb and sys.platform == "linux":
                limit = self._memory_mb * 1024 * 1024
                resource.prlimit(self._child.pid, resource.RLIMIT_AS, (limit, limit))
            _step_back(self._child.pid, self._nice)
            self._stopped, self._opening_s = False, 0.0
            threading.Thread(target=self._read, args=(self._child,), daemon=True).start()
        return self._child

    def _wake(self, child: subprocess.Popen[bytes]) -> None:
        if self._stopped:
            self._stopped = False
            child.send_signal(signal.SIGCONT)

    def _read(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        try:
            while (answer := read_frame(child.stdout)) is not None:
                self._answer(child, answer)
            why = self._death(child.wait())
        except msgspec.MsgspecError as exc:
            child.kill()
            child.wait()
            why = f"said what is no answer ({exc})"
        _close_pipes(child)
        self._answer(child, Problem("TrainingError", f"the training process {why}"))

    def _death(self, code: int) -> str:
        died = f"died ({_died_of(code)})"
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return f"{died}: the kernel was out of memory and ended it"
        if code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS) and self._memory_mb:
            return f"{died}, which may be for lack of memory (training.memory_mb is {self._memory_mb})"
        return died

    def _answer(self, child: subprocess.Popen[bytes], frame: Frame) -> None:
        with self._lock:
            if child is not self._child or self._pending is None:
                return
            token, self._pending = self._pending, None
            self._answered = time.monotonic()
            if self._opens:
                self._opening_s = max(self._opening_s, self._answered - self._asked)
            self._cancel_timer()
        self._on_answer(token, frame)

    def _too_slow(self, token: object, timeout_s: float) -> None:
        with self._lock:
            if self._pending is not token:
                return
            self._pending = None
            child, self._child = self._child, None
        if child is not None:
            _end(child)
        self._on_answer(
            token, Problem("TrainingError", f"training took longer than {timeout_s:g} s", "raise timeout_s")
        )

    def _start_timer(self, token: object) -> None:
        self._timed_from = time.monotonic()
        self._timer = threading.Timer(max(0.0, self._left_s), self._too_slow, (token, self._timeout_s))
        self._timer.daemon = True
        self._timer.start()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def oom_kills(vmstat: Path = VMSTAT) -> int:
    """How many programs the kernel has ended for lack of memory since it was started (Linux 4.13; 0 without)."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _step_back(pid: int, nice: int) -> None:
    """Other programs first, for the processor (and so for the disk), and for memory. Before the child has threads."""
    with contextlib.suppress(OSError):  # gone already; its reader thread says so
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    with contextlib.suppress(OSError):  # no Linux, or a system that does not let us (Android)
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_FIRST))


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    _close_pipes(child)


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # a half-written frame to a dead child
                stream.close()


def _died_of(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
