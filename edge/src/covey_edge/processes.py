"""Tying a child process to its parent, so that nothing covey starts outlives it; and orderly ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT_BYTES = 128 * 1024  # glibc's own default, which setting it keeps
PATIENCE = 3  # signals after which nobody is patient any more


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """End this process when process `parent` ends, however it ends (Linux; elsewhere this does nothing).

    number: the signal that it gets; it outlives `exec`.

    Linux sends the signal when the parent's *thread* that started us ends, so start children from a lasting thread.
    Ends this process at once if the parent is already gone.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(0)


def frugal_memory() -> None:
    """Have the C library give memory back (glibc; elsewhere this does nothing). Before the first thread is started.

    By default glibc learns from large blocks that come and go, model weights for instance, to keep them: 7 MB in a
    child that trains the reference CNN. And it makes a heap for each thread.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_THRESHOLD, KEPT_BYTES), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def interrupted_by_signals(*, at_once: bool = True) -> Callable[[], None]:
    """Make SIGTERM and SIGHUP end this process as Ctrl-C does: through its clean-up.

    Returns a check that raises KeyboardInterrupt if one of the three has come. Call it in every loop that waits.
    at_once: the first signal raises KeyboardInterrupt also where it strikes. That is for programs that compute for long
    without a check. It is lost where it strikes inside a destructor or a C callback (seen while TFF is imported), and
    an object whose making it cuts off may complain when it is destroyed. Without at_once the first signal waits for the
    check, and only a second one that comes before the check strikes at once. No later signal disturbs the clean-up, but
    a third ends the process. Signals that were ignored when we started (nohup) stay ignored.
    """
    came: list[int] = []
    checked: list[bool] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        if len(came) >= PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if len(came) == (1 if at_once else 2) and not checked:
            raise KeyboardInterrupt

    def check() -> None:
        if came:
            checked.append(True)
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    sys.unraisablehook = _without_interrupts(sys.unraisablehook)
    return check


def _without_interrupts(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`hook` for everything but a KeyboardInterrupt in a place that cannot raise: the check raises it again."""

    def quiet(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    return quiet
