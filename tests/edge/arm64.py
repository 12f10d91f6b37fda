"""An arm64 Debian to run the agent in, by user emulation: made once, without running anything of it.

mmdebstrap's variant `extract` unpacks packages and runs no script of theirs, so it takes a minute and not an hour. The
agent's wheels come from pip on this machine, for that platform. Needs root (chroot), mmdebstrap and qemu-user-static.
Made in COVEY_CACHE, or .bench of the checkout: 75 MB of Debian, 130 MB of wheels.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from environments import PIP, ROOT, found_python

PACKAGES = "python3,libstdc++6,libgcc-s1,ca-certificates"  # Debian's Python, and what the wheels link to
WITHOUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
PLATFORMS = ("manylinux_2_34_aarch64", "manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
TARGET = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "abi3", "--abi", "none")
BINFMT = Path("/proc/sys/fs/binfmt_misc")
PACKED = "opt/covey"  # below the root: where the wheels are


def require_emulation() -> None:
    """Skip where programs of another architecture cannot be run."""
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    missing = [name for name in ("mmdebstrap", "qemu-aarch64-static", "chroot") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: apt install mmdebstrap qemu-user-static)")
    entry = BINFMT / "qemu-aarch64"
    if not entry.exists() or "enabled" not in entry.read_text() or "F" not in entry.read_text().split("flags:")[-1]:
        pytest.skip("arm64 programs are not given to qemu (binfmt_misc; Debian: systemctl restart systemd-binfmt)")


def userland(suite: str = "bookworm", *more: str) -> Path:
    """The root of the unpacked Debian, with these packages more."""
    root = Path(os.environ.get("COVEY_CACHE", ROOT / ".bench")) / "-".join(["arm64", suite, *more])
    if not (root / "usr/bin/python3").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        left_out = [f"--dpkgopt=path-exclude={pattern}" for pattern in WITHOUT]
        include = f"--include={','.join([PACKAGES, *more])}"
        what = ["--architectures=arm64", "--variant=extract", include, "--components=main", *left_out]
        subprocess.run(["mmdebstrap", "--quiet", *what, suite, str(root)], check=True)
    for name in ("bin", "lib", "sbin"):  # from trixie on packages lie below /usr alone, and base-files has the links
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    return root


def pack(root: Path, wheel: Path) -> None:
    """Put what the lock names and this wheel into the root; what the lock names only where it has changed."""
    lock, target = ROOT / "locks" / "edge.txt", root / PACKED
    stamp, state = target / ".made-of", hashlib.sha256(lock.read_bytes()).hexdigest()
    python = found_python("3.11") or sys.executable
    pip = [python, *PIP, "--no-deps", "--no-compile", "--only-binary", ":all:", "--target", str(target)]
    pip += [*TARGET, *(argument for name in PLATFORMS for argument in ("--platform", name))]
    if not stamp.exists() or stamp.read_text() != state:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run([*pip, "--require-hashes", "-r", str(lock)], check=True)
        stamp.write_text(state)
    for left in target.glob("covey_*"):
        shutil.rmtree(left)
    with zipfile.ZipFile(wheel) as archive:  # all that pip does with a wheel of pure Python, but for the command
        archive.extractall(target)
