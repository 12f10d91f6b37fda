"""The operating-system processes of a fleet on this machine: the embedded broker and the agents.

Every child runs in a session of its own, so that Ctrl-C reaches the demo or simulation alone, which then ends them in
order; and every child asks Linux to end it with its parent, so that even a killed parent leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from covey_protocol.errors import RunError, TransportError

STOP_S = 5.0
BROKER_START_S = 30.0


class Process:
    """One child; its output goes to a log file."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, *, pipe: bool = False) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "covey_edge", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def stdout(self) -> int:
        assert self._popen.stdout is not None
        return self._popen.stdout.fileno()

    def ended(self) -> str | None:
        """How it ended, or None while it runs."""
        code = self._popen.poll()
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def last_line(self) -> str:
        """The last thing it logged."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""

    def terminate(self) -> None:
        if self._popen.poll() is None:
            self._popen.terminate()

    def wait(self, timeout_s: float) -> None:
        """Wait for the end; kill what does not end in time."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()


def stop_all(processes: Sequence[Process]) -> None:
    """End them together and wait for all."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + STOP_S
    for process in processes:
        process.wait(max(0.1, end - time.monotonic()))


class BrokerProcess:
    """`covey broker run` on a free loopback port."""

    def __init__(self, log: Path) -> None:
        self._process = Process(
            "broker", ["broker", "run", "--port", "0", "--parent", str(os.getpid())], log, pipe=True
        )
        try:
            self.url = self._read_url()
        except BaseException:
            self.stop()
            raise

    def _read_url(self) -> str:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(BROKER_START_S):
                raise TransportError(f"the embedded broker did not start within {BROKER_START_S:g} s")
        line = os.read(self._process.stdout, 4096).decode(errors="replace").strip()
        if not line.startswith("listening on "):
            self._process.wait(STOP_S)
            raise TransportError(f"the embedded broker did not start ({self._process.last_line()})")
        return line.removeprefix("listening on ")

    def check(self) -> None:
        ended = self._process.ended()
        if ended is not None:
            raise TransportError(
                f"the embedded broker at {self.url} ended ({ended})", f"see {self._process.log} and run again"
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        stop_all([self._process])


class AgentProcesses:
    """The fleet: one `covey agent` per configuration file."""

    def __init__(self, configs: dict[str, Path], logs: Path) -> None:
        self._agents: dict[str, Process] = {}
        self._lost: dict[str, str] = {}
        try:
            for device_id, config in configs.items():
                arguments = ["agent", "--config", str(config), "--parent", str(os.getpid())]
                self._agents[device_id] = Process(device_id, arguments, logs / f"{device_id}.log")
        except BaseException:
            self.stop()
            raise

    def pids(self) -> dict[str, int]:
        return {device_id: process.pid for device_id, process in self._agents.items()}

    def newly_lost(self) -> dict[str, str]:
        """Agents that ended since the last call, and how."""
        new = {}
        for device_id, process in self._agents.items():
            ended = process.ended()
            if ended is not None and device_id not in self._lost:
                new[device_id] = self._lost[device_id] = ended
        return new

    def check_start(self) -> None:
        """RunError (with the agent's own words) if one ended before it was ever online."""
        for device_id, ended in self.newly_lost().items():
            words = self._agents[device_id].last_line().removeprefix("covey: error: ")
            raise RunError(f"the agent of {device_id} ended at its start ({ended}): {words}", "mend that and run again")

    def stop(self) -> None:
        stop_all(list(self._agents.values()))
