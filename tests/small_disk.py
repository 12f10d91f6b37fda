"""A small file system of its own for one folder, that can be filled: a disk that is really full, without being root.

A holder process makes a user and a mount namespace and mounts a tmpfs in it; programs are started inside with nsenter,
and tests look into it through the holder's /proc. It ends with the holder.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o "size=$1" covey-test "$2" && echo ready && exec sleep 86400'


class SmallDisk:
    """seen: the folder as this process sees it. before: what to put before a command that is to run on it."""

    def __init__(self, folder: Path, size: int) -> None:
        """Skips the test where namespaces or mounts are not permitted."""
        folder.mkdir(parents=True, exist_ok=True)
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", str(size), str(folder)]
        try:
            self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except FileNotFoundError:
            pytest.skip("there is no unshare (util-linux) to mount a small file system with")
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline().strip()
        if said != "ready":
            self.close()
            pytest.skip(f"no small file system can be mounted here: {said}")
        pid = str(self._holder.pid)
        self.seen = Path("/proc", pid, "root", folder.relative_to("/"))
        self.before = ["nsenter", "--user", "--mount", "--preserve-credentials", "--target", pid, "--"]
        self._ballast = self.seen / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Until this many bytes are free, or none."""
        with self._ballast.open("ab", buffering=0) as file:
            while (left := self.free_bytes() - leave) > 0:
                file.write(bytes(min(left, 1 << 20)))

    def free_bytes(self) -> int:
        there = os.statvfs(self.seen)
        return there.f_bavail * there.f_frsize

    def free(self) -> None:
        self._ballast.unlink()

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()
