"""The agent as a systemd service: signs of life over $NOTIFY_SOCKET, and log lines as the journal likes them.

Speaks sd_notify(3) with the standard library alone. Started by anything else, all of it does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import MutableMapping
from typing import Optional

INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
PETS_PER_TIMEOUT = 3  # systemd asks for two; one may come late on a busy device
# syslog's priorities: what the journal reads off the start of a line
PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class Notifier:
    """Tells whoever started us how we are. Never raises; a message that cannot be sent at once is dropped.

    Takes its variables out of the environment, so that no child speaks for us; `inherited` has them for a program that
    takes our place. For one thread.
    """

    def __init__(self, environment: Optional[MutableMapping[str, str]] = None) -> None:
        environment = os.environ if environment is None else environment
        self.inherited = {name: environment.pop(name) for name in INHERITED if name in environment}
        address = self.inherited.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # an abstract one
        self._pet_every_s = watchdog_s(self.inherited) / PETS_PER_TIMEOUT
        self._next_pet = 0.0
        self._status = ""

    @property
    def heard(self) -> bool:
        """Whether anybody wants to know."""
        return bool(self._address)

    def ready(self) -> None:
        self.say("READY=1")

    def stopping(self) -> None:
        self.say("STOPPING=1")

    def status(self, text: str) -> None:
        """What `systemctl status` shows. Said when it changes."""
        if text != self._status:
            self._status = text
            self.say(f"STATUS={' '.join(text.split())}")

    def pet(self) -> None:
        """We are alive. Cheap: call it as often as you like, but only where it is true."""
        now = time.monotonic()
        if self._pet_every_s and now >= self._next_pet:
            self._next_pet = now + self._pet_every_s
            self.say("WATCHDOG=1")

    def say(self, text: str) -> None:
        if not self.heard:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.setblocking(False)
            with contextlib.suppress(OSError):  # nobody listens, or not at the moment
                out.sendto(text.encode(), self._address)


def watchdog_s(variables: MutableMapping[str, str]) -> float:
    """After how many seconds without a sign of life we are taken for hung; 0 for never."""
    text = variables.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdigit() else 0.0


def to_journal() -> bool:
    """Whether standard error ends in the journal."""
    try:
        file = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something without a descriptor
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


def error_prefix() -> str:
    """What the last line of a program that fails begins with."""
    return "<3>" if to_journal() else ""


class JournalFormatter(logging.Formatter):
    """A priority before every line, of a traceback too, and no time: the journal has its own."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def begin_to_log(*, quiet: bool) -> None:
    """The root logger to standard error, with times where the journal adds none."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JournalFormatter("%(message)s") if to_journal() else plain)
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler])
