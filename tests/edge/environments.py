"""Environments that hold the edge's dependencies alone, from its lock, on other Pythons of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).parent.parent.parent
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
FROM_LOCK = ("--require-hashes", "--only-binary", ":all:", "-r", str(ROOT / "locks" / "edge.txt"))
FROM_SOURCE = {**os.environ, "PYTHONPATH": str(ROOT / "edge" / "src")}  # where the distribution itself is not installed


def found_python(version: str) -> Optional[str]:
    """A Python of this version, from PATH or the places version managers keep them."""
    managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in (*map(str, managed), shutil.which(f"python{version}")):
        if candidate and subprocess.run([candidate, "-c", ""], check=False, capture_output=True).returncode == 0:
            return candidate
    return None


def make_environment(python: str, folder: Path) -> str:
    """A fresh environment; its Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    return str(folder / "bin" / "python")


def built_wheel(folder: Path) -> Path:
    """The edge distribution's wheel, built into this folder."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT / "edge")]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def install(python: str, *arguments: str) -> str:
    """What pip complained about; empty if all went well."""
    ended = subprocess.run([python, *PIP, *arguments], check=False, capture_output=True, text=True)
    return ended.stderr[-2000:] or "pip failed" if ended.returncode else ""
