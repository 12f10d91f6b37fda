"""Worker processes and Ctrl-C, in a program of their own: what multiprocessing starts with the first one matters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_S

PROGRAM = """
import signal

from covey_coordinator.pool import Pool


def is_shielded(shared, task, tell):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())


if __name__ == "__main__":
    with Pool(is_shielded, None, 2) as pool:
        print([event.value for _, event in pool.events([1, 2], lambda: None)])
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set()))
"""


def test_no_worker_can_be_struck_by_ctrl_c_also_not_the_first_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "[True, True]\nFalse\n", done.stderr
