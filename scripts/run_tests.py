"""The everyday tests in four pytest processes side by side, for machines with two cores or more.

Those of the first two parts keep one core busy with Python; those of the edge, the coordinator and deploy mostly wait
for processes, brokers and clocks, so two cores bear four parts. The parts share nothing: ports are free ones, folders
pytest's own, and each has its own TFF worker. The first part's lines are seen as they come, the others' when they have
ended. Arguments go to one plain pytest. Each part takes up to 2.5 GB of memory. Exit code: the largest of the four.
Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest"]
# folders of tests; what is named nowhere here is in the last part
PARTS = (
    ("audit", "capture", "grid", "inversion", "models", "report", "reproduce"),
    ("aggregation", "algorithms", "experiments", "teaching"),
    ("coding", "demo", "edge", "life", "protocol", "simulation"),
)


def main(arguments: list[str]) -> int:
    if arguments or len(os.sched_getaffinity(0)) < 2:
        return run(arguments)
    first, *others = parts(ROOT)
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in others]
        running = [
            subprocess.Popen([*PYTEST, *part], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            for part, file in zip(others, said)
        ]
        codes = []
        try:
            codes.append(run(first))
        finally:
            codes += [exit_code(process.wait()) for process in running]
        for file in said:
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    return max(codes)


def parts(root: Path) -> list[list[str]]:
    """Folders and files of tests, each in one of the parts; a part without any is left out."""
    there = [
        path
        for path in sorted((root / "tests").iterdir())
        if (path.is_dir() and any(path.rglob("test_*.py"))) or path.match("test_*.py")
    ]
    named = {name for part in PARTS for name in part}
    rest = tuple(path.name for path in there if path.name not in named)
    found = [[str(path.relative_to(root)) for path in there if path.name in part] for part in (*PARTS, rest)]
    return [part for part in found if part]


def run(arguments: list[str]) -> int:
    return exit_code(subprocess.run([*PYTEST, *arguments], cwd=ROOT, check=False).returncode)


def exit_code(returned: int) -> int:
    """As a shell tells it: 139 for a process that ended by signal 11, which subprocess calls -11."""
    return 128 - returned if returned < 0 else returned


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
