"""Tying a child process to its parent, so that nothing covey starts outlives it; and orderly ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """End this process when process `parent` ends, however it ends (Linux; elsewhere this does nothing).

    Linux sends the signal when the parent's *thread* that started us ends, so start children from a lasting thread.
    Ends this process at once if the parent is already gone.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def interrupted_by_signals() -> None:
    """Make SIGTERM and SIGHUP end this process as Ctrl-C does: through its clean-up."""

    def raise_interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, raise_interrupt)
