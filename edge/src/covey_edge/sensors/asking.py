"""Small files and commands that may not be there, may fail, and may hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

COMMAND_TIMEOUT_S = 3.0  # Termux's commands hang for ever where the Termux:API app is missing
HUNG_S = 600.0  # what hung is not asked again for so long, since the agent waits for it

Ask = Callable[[Sequence[str]], Optional[str]]


def read_text(path: Path) -> Optional[str]:
    """A small file's content without white space around it; None where it cannot be read (sensors fail with EINVAL)."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def read_number(path: Path) -> Optional[int]:
    text = read_text(path)
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


class Commands:
    """Runs commands of the device and gives what they print; None where that is nothing. The caller waits.

    A command that is not installed is looked for again each time, one that hung not for HUNG_S.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        self._clock, self._timeout_s = clock, timeout_s
        self._hung: dict[str, float] = {}

    def __call__(self, command: Sequence[str]) -> Optional[str]:
        hung = self._hung.get(command[0])
        if hung is not None and self._clock() - hung < HUNG_S:
            return None
        nothing = subprocess.DEVNULL
        try:
            asked = subprocess.Popen(
                list(command), stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, start_new_session=True
            )
        except OSError:
            return None
        try:
            said, _ = asked.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            self._hung[command[0]] = self._clock()
            os.killpg(asked.pid, signal.SIGKILL)  # and what it started: Termux's commands are scripts
            asked.communicate()
            return None
        return said.decode(errors="replace").strip() if asked.returncode == 0 else None


def told(ask: Ask, command: str) -> dict[str, Any]:
    """The JSON object that a command prints; empty where it prints none."""
    try:
        value = json.loads(ask([command]) or "")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
