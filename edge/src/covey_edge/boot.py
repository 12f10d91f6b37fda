"""What is known of the agent's releases on a device, as data and as files; and which one is to run next.

STATE/releases holds an unpacked release under its version, boot.json (what the launcher knows) and staged.json (what
the agent wants tried). The standard library alone: the launcher uses this.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from covey_edge.files import sync_folder, write_atomic

ATTEMPTS = 3
# the environment between the launcher and the agent
RELEASES, RELEASE, TRIAL = "COVEY_RELEASES", "COVEY_RELEASE", "COVEY_TRIAL"
LAUNCHER, BASE_PATH = "COVEY_LAUNCHER", "COVEY_BASE_PYTHONPATH"

_VERSION = re.compile(r"\d{1,6}(?:\.\d{1,6}){0,3}")


@dataclass(frozen=True)
class Boot:
    """What the launcher knows. current, previous: releases that were healthy, "" for the covey that is installed.
    trial: the release that is tried, attempts: how often it was started. bad: releases that failed, by version.
    failed: of the newest of them, in words."""

    current: str = ""
    previous: str = ""
    trial: str = ""
    attempts: int = 0
    bad: tuple[str, ...] = field(default=())
    failed: str = ""


@dataclass(frozen=True)
class Staged:
    """A release that is unpacked and wants to be tried. again: also where it has failed before (its owner says so)."""

    version: str = ""
    again: bool = False


def newer(version: str, other: str) -> bool:
    def numbers(text: str) -> list[int]:
        found = [int(number) for number in re.findall(r"\d+", text)][:4]
        return found + [0] * (4 - len(found))

    return numbers(version) > numbers(other)


# --- what to do next: no files, no processes


def taken_up(boot: Boot, staged: Staged, here: Sequence[str], base: str) -> Boot:
    """The staged release goes on trial, if it is unpacked, newer than all that runs, and not known to fail."""
    version = staged.version
    runs = best(boot, here, base) or base
    if version not in here or not newer(version, runs) or (version in boot.bad and not staged.again):
        return boot
    return replace(boot, trial=version, attempts=0, bad=tuple(one for one in boot.bad if one != version))


def best(boot: Boot, here: Sequence[str], base: str) -> str:
    """The release to run when nothing is tried; "" for the covey that is installed, also where that is newer."""
    for version in (boot.current, boot.previous):
        if version in here and newer(version, base):
            return version
    return ""


def attempted(boot: Boot, here: Sequence[str], base: str) -> Boot:
    """Before a start: one attempt more for what is on trial, or its end."""
    if not boot.trial:
        return boot
    if boot.trial not in here or not newer(boot.trial, base):
        return replace(boot, trial="", attempts=0)
    if boot.attempts >= ATTEMPTS:
        return failed(boot, f"{boot.trial} was not healthy in {ATTEMPTS} attempts")
    return replace(boot, attempts=boot.attempts + 1)


def failed(boot: Boot, why: str) -> Boot:
    return replace(boot, trial="", attempts=0, bad=(*boot.bad, boot.trial)[-16:], failed=why)


def confirmed(boot: Boot) -> Boot:
    return replace(boot, current=boot.trial, previous=boot.current, trial="", attempts=0, failed="")


# --- the files


class Folder:
    """STATE/releases. Only the launcher writes boot.json, only the agent staged.json."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def boot(self) -> Boot:
        """What cannot be read is as if nothing was ever installed."""
        content = _json(self.path / "boot.json")
        bad = content.pop("bad", [])
        default = asdict(Boot())
        right = all(type(value) is type(default.get(name)) for name, value in content.items())
        if not right or not isinstance(bad, list) or not all(isinstance(one, str) for one in bad):
            return Boot()
        return Boot(**content, bad=tuple(bad))

    def save(self, boot: Boot) -> None:
        write_atomic(self.path / "boot.json", (json.dumps(asdict(boot), indent=1) + "\n").encode(), mode=0o600)

    def staged(self) -> Staged:
        content = _json(self.path / "staged.json")
        return Staged(str(content.get("version", "")), bool(content.get("again", False)))

    def stage(self, staged: Staged) -> None:
        write_atomic(self.path / "staged.json", json.dumps(asdict(staged)).encode(), mode=0o600)

    def unstage(self) -> None:
        """Durable: what was tried once must not be tried again by a file that a power cut brings back."""
        path = self.path / "staged.json"
        if path.exists():
            path.unlink()
            sync_folder(self.path)

    def here(self) -> list[str]:
        """The versions that are unpacked."""
        try:
            return sorted(name for name in os.listdir(self.path) if _VERSION.fullmatch(name))
        except OSError:
            return []

    def remove_others(self, keep: Sequence[str]) -> None:
        """What is neither run nor tried any more, and what installing or writing a file left unfinished."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path):
                unfinished = name.startswith(".") and name.endswith(".tmp")
                if unfinished or (_VERSION.fullmatch(name) and name not in keep):
                    _remove(self.path / name)


def _remove(path: Path) -> None:
    """A file, or a folder with all that is in it. What cannot be removed stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
