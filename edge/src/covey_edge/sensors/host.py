"""Memory, disk, load and the clock of the machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Optional

from covey_edge.sensors.asking import read_text

MIB = 2**20
SET_YEAR = 2024  # a clock that says less was not set since the machine was started without a battery for it


def free_memory_mb(root: Path) -> Optional[float]:
    """What the kernel could give to a program without swapping: MemAvailable."""
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "MemAvailable:":
            return int(words[1]) / 1024
    return None


def free_disk_mb(folder: Path) -> Optional[float]:
    """What is left for this user on the file system of the folder, or of the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        there = os.statvfs(folder)
    except OSError:
        return None
    return there.f_bavail * there.f_frsize / MIB


def load(root: Path) -> Optional[float]:
    """Programs that run or wait for a disk, mean of about a minute, of the whole machine."""
    words = (read_text(root / "proc/loadavg") or "").split()
    try:
        return float(words[0])
    except (IndexError, ValueError):
        return None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def minute_of_day(unix_s: float) -> Optional[int]:
    """0 to 1439 by the clock on the wall here; None where the clock was never set. A changed time zone is followed."""
    time.tzset()
    here = time.localtime(unix_s)
    return 60 * here.tm_hour + here.tm_min if here.tm_year >= SET_YEAR else None
