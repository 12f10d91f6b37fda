"""The everyday tests in two pytest processes side by side, for machines with two cores or more.

Most tests keep one core busy with Python. The halves share nothing: ports are free ones, folders pytest's own, and each
half has its own TFF worker. The second half is told when the first has ended. Arguments go to one plain pytest.
Each half takes up to 2.5 GB of memory. Exit code: the larger of the two. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest"]
FIRST = (
    "algorithms",
    "demo",
    "edge",
    "grid",
    "inversion",
    "models",
    "protocol",
    "report",
    "reproduce",
    "simulation",
)  # about half of the time


def main(arguments: list[str]) -> int:
    if arguments or len(os.sched_getaffinity(0)) < 2:
        return run(arguments)
    first, second = halves(ROOT)
    with tempfile.TemporaryFile() as said:
        other = subprocess.Popen([*PYTEST, *second], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            code = run(first)
        finally:
            other_code = other.wait()
        said.seek(0)
        shutil.copyfileobj(said, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    return max(code, other_code)


def halves(root: Path) -> tuple[list[str], list[str]]:
    """Folders and files of tests, each in one of the two."""
    parts = [
        path
        for path in sorted((root / "tests").iterdir())
        if (path.is_dir() and any(path.rglob("test_*.py"))) or path.match("test_*.py")
    ]
    first = [str(path.relative_to(root)) for path in parts if path.name in FIRST]
    second = [str(path.relative_to(root)) for path in parts if path.name not in FIRST]
    return first, second


def run(arguments: list[str]) -> int:
    return subprocess.run([*PYTEST, *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
