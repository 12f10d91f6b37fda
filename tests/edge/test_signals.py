"""A signal ends a program in order, wherever it finds it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from patience import PATIENCE_S

# Where the signal strikes, then what ends the loop. Every program prints "cleaned up" on its way out.
PROGRAM = """
import os, signal, sys, time
from covey_edge.processes import interrupted_by_signals

check = interrupted_by_signals(at_once={at_once})

def struck(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)

class Destroyed:
    def __del__(self):
        struck()

class HalfMade:
    def __init__(self):
        struck()
        self.whole = True

    def __del__(self):
        self.whole

try:
    {strike}
    while True:
        check()
        time.sleep(0.01)
except KeyboardInterrupt:
    {clean_up}
    print("cleaned up")
    sys.exit(130)
"""
STRIKES = {
    "in plain code": "struck()",
    "in a destructor": "Destroyed()",
    "in a constructor whose object needs it to be destroyed": "HalfMade()",
}


def ended(strike: str, *, at_once: bool = False, clean_up: str = "") -> subprocess.CompletedProcess[str]:
    text = PROGRAM.format(strike=strike, at_once=at_once, clean_up=clean_up)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@pytest.mark.parametrize("where", STRIKES)
def test_a_first_signal_waits_for_the_check_and_says_nothing(where: str) -> None:
    done = ended(STRIKES[where])
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "")


def test_one_that_strikes_at_once_may_leave_a_complaint() -> None:
    """Why `covey serve` does not let it."""
    done = ended(STRIKES["in a constructor whose object needs it to be destroyed"], at_once=True)
    assert done.returncode == 130
    assert "AttributeError" in done.stderr


def test_a_second_signal_does_not_wait_for_a_check_that_does_not_come() -> None:
    done = ended("struck(2); time.sleep(3600)")
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "")


def test_a_second_signal_does_not_disturb_the_clean_up() -> None:
    done = ended("struck()", clean_up="struck()")
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "")


def test_a_third_signal_ends_the_program() -> None:
    done = ended("struck()", clean_up="struck(2); time.sleep(3600)")
    assert done.returncode == -signal.SIGTERM
