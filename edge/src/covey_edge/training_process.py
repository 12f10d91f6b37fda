"""Starts, watches and ends the training child.

Requests are answered through a callback from a reader thread; at most one is under way. A child that dies or takes too
long is a Problem frame, and the next request starts a new child.
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
from typing import Optional

import msgspec

from covey_edge.frames import Frame, Problem, read_frame, write_frame
from covey_protocol.errors import UsageError

# one BLAS thread: the model runs in TFLite, and idle BLAS threads only cost memory on a small device
CHILD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
IDLE_S = 30.0  # between the requests of a round are moments, between rounds often hours: the child holds 50 MB


class TrainingProcess:
    """The child as a service: `request` frames in, `on_answer(token, frame)` out (in another thread)."""

    def __init__(self, on_answer: Callable[[object, Frame], None], memory_mb: int = 0) -> None:
        self._on_answer = on_answer
        self._memory_mb = memory_mb
        self._child: Optional[subprocess.Popen[bytes]] = None
        self._lock = threading.Lock()
        self._pending: Optional[object] = None
        self._timer: Optional[threading.Timer] = None
        self._answered = time.monotonic()

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
            self._pending = token
            self._timer = threading.Timer(timeout_s, self._too_slow, (token, timeout_s))
            self._timer.daemon = True
            self._timer.start()
        try:
            assert child.stdin is not None
            write_frame(child.stdin, frame)
        except OSError:
            pass  # the child died; its reader thread sees the end of the pipe and answers

    def rest(self) -> None:
        """End a child that has had nothing to do for IDLE_S; the next request starts another, in half a second."""
        if self._child is not None and not self.busy and time.monotonic() - self._answered > IDLE_S:
            self.stop()

    def stop(self) -> None:
        """End the child, whatever it is doing; no answer comes any more."""
        with self._lock:
            self._pending = None
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
            threading.Thread(target=self._read, args=(self._child,), daemon=True).start()
        return self._child

    def _read(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        try:
            while (answer := read_frame(child.stdout)) is not None:
                self._answer(child, answer)
            why = f"died ({_died_of(child.wait())})"
        except msgspec.MsgspecError as exc:
            child.kill()
            child.wait()
            why = f"said what is no answer ({exc})"
        _close_pipes(child)
        self._answer(child, Problem("TrainingError", f"the training process {why}"))

    def _answer(self, child: subprocess.Popen[bytes], frame: Frame) -> None:
        with self._lock:
            if child is not self._child or self._pending is None:
                return
            token, self._pending = self._pending, None
            self._answered = time.monotonic()
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

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


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
