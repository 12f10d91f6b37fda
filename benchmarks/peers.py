"""The peers' environment and a process in it: Flower (flwr) and ByzFL (byzfl), which need a torch of their own.

    python benchmarks/peers.py --setup [DIR]

makes a virtual environment in DIR (.bench/peers if none is given) from benchmarks/peers.txt and peers-alone.txt, about
1.5 GB. Nothing of it enters covey's own environment. `Peers` starts a process there and asks it to run their functions;
benchmarks/rules.py times them so, and tests compare with them where COVEY_PEERS_PYTHON names that Python.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

import numpy as np

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / ".bench" / "peers"
START_S = 120  # torch and flwr on a busy machine


class PeerError(Exception):
    """The peer raised, or its process ended."""


class TooSlow(Exception):
    """The call took longer than it may."""


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def set_up(folder: Path) -> None:
    """Make the environment, or bring it up to the pinned versions."""
    if not python_of(folder).exists():
        venv.create(folder, with_pip=True)
    pip = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(HERE / "peers.txt")], check=True)
    subprocess.run([*pip, "--no-deps", "-r", str(HERE / "peers-alone.txt")], check=True)


class Peers:
    """A running process of the peers' Python. `max_bytes` bounds its address space."""

    def __init__(self, python: Path, max_bytes: Optional[int] = None) -> None:
        self._command = [str(python), str(HERE / "peers_worker.py"), *([str(max_bytes)] if max_bytes else [])]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in stop)
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._path: Optional[Path] = None
        hello = self._ask({"do": "hello"}, START_S)
        self.versions: dict[str, str] = hello["versions"]
        self.default_threads: int = hello["threads"]

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def load(self, path: Path) -> None:
        """Have the process read this .npy file; it is the input of all that runs until the next."""
        self._path = path
        self._ask({"do": "load", "path": str(path)}, START_S)

    def seconds(
        self,
        job: dict[str, Any],
        threads: Optional[int] = None,
        save: Optional[Path] = None,
        timeout_s: float = 600,
    ) -> float:
        """Run the job once. Raises PeerError if it raises, TooSlow after timeout_s, when the process is replaced."""
        request = {"do": "run", "job": job, "threads": threads, "save": str(save) if save else None}
        return float(self._ask(request, timeout_s)["seconds"])

    def result(self, job: dict[str, Any], threads: Optional[int] = None, timeout_s: float = 600) -> np.ndarray:
        """What the peer gives for the job."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.npy"
            self.seconds(job, threads, path, timeout_s)
            return np.load(path)

    def stop(self) -> None:
        self._end()
        self._said.close()

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer = self._answer(process, timeout_s)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _answer(self, process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any]:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        if not ready:
            self._end()
            raise TooSlow
        line = process.stdout.readline()
        if not line:
            self._end()
            self._said.seek(0)
            raise PeerError("the process ended: " + "".join(self._said.readlines()[-5:]))
        return dict(json.loads(line))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment()
            )
            if self._path is not None:
                self._ask({"do": "load", "path": str(self._path)}, START_S)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def environment() -> dict[str, str]:
    """The peers get the threads they choose by themselves; limits are set per call."""
    ours = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", nargs="?", type=Path, const=DEFAULT, metavar="DIR", required=True)
    folder = parser.parse_args().setup.resolve()
    set_up(folder)
    with Peers(python_of(folder)) as peers:
        print(f"{python_of(folder)}: " + ", ".join(f"{name} {number}" for name, number in peers.versions.items()))


if __name__ == "__main__":
    sys.exit(main())
