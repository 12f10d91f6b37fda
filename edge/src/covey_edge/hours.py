"""Windows of the day, as an owner writes them: "22:00-07:00". By the clock on the wall, whatever it did in between.

So nothing has to be remembered: a clock that jumps, a change to summer time and another time zone count from the next
look on. In the hour that a clock lives twice a window holds twice; one that is skipped is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from covey_protocol.errors import ConfigError

DAY = 24 * 60
_WINDOW = re.compile(r"(\d\d):([0-5]\d)-(\d\d):([0-5]\d)")


class Window(NamedTuple):
    """Minutes of the day; the first belongs to it, the last does not. start >= end goes over midnight."""

    start: int
    end: int

    def holds(self, minute: int) -> bool:
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


def window_of(text: str, setting: str) -> Window:
    """ConfigError for what is no window, or an empty one."""
    found = _WINDOW.fullmatch(text)
    start, end = (60 * int(found[1]) + int(found[2]), 60 * int(found[3]) + int(found[4])) if found else (0, 0)
    if not found or start >= DAY or end > DAY or start == end:
        raise ConfigError(f"{setting}: {text!r} is no window of the day", 'write "22:00-07:00"; 24:00 may end one')
    return Window(start, end)


def is_within(minute: int, windows: Iterable[str], setting: str) -> bool:
    return any(window_of(text, setting).holds(minute) for text in windows)
