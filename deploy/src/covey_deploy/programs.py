"""Programs of this machine that a command needs: looked for before anything is begun."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from covey_protocol.errors import MachineError

# Debian keeps mke2fs, sfdisk, mkfs.vfat in sbin, which is not on every user's PATH
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def found_program(name: str) -> str | None:
    """Its path, also where only root's PATH would have it."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(SBIN))


def require_programs(packages: Mapping[str, str]) -> None:
    """packages: program -> the Debian package that has it. MachineError with one command that installs what lacks."""
    missing = [name for name in packages if found_program(name) is None]
    if missing:
        wanted = " ".join(sorted({packages[name] for name in missing}))
        raise MachineError(f"not installed here: {', '.join(missing)}", f"install it: sudo apt install {wanted}")
