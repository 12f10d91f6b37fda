"""docs/first-fleet.md, run from the page itself: every command, in order, and what it promises is checked."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import free_port
from walkthrough import Step, read_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "first-fleet.md"
PORT = 8883
COMMAND_S, PROMISE_S = 3600.0, 2400.0  # a Debian is built where none is kept; two machines boot on a busy host

pytestmark = [pytest.mark.device, pytest.mark.timeout(10_800)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """covey and python of this environment first, and a sudo where root has none."""
    programs = tmp_path / "bin"
    programs.mkdir()
    if shutil.which("sudo") is None:
        if os.geteuid() != 0:
            pytest.skip("needs sudo, or root")
        (programs / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
        (programs / "sudo").chmod(0o755)
    return f"{Path(sys.executable).parent}:{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in reversed(processes):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    for process in reversed(processes):
        try:
            process.wait(180)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lacking(step: Step) -> list[str]:
    """Debian packages of an `apt install` that are not here."""
    names = [word for word in step.command.split("install", 1)[1].split() if not word.startswith("-")]
    return [name for name in names if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode]


def avoid_taken_port(steps: list[Step]) -> None:
    """The one change that is made to the page, where another broker runs on this machine: another port."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) != 0:
            return
    port = free_port()
    for step in steps:
        step.promised = [line.replace(f":{PORT}", f":{port}") for line in step.promised]
        if step.command.startswith("covey provision init"):
            step.command += f" --port {port}"


def test_a_new_user_has_a_running_fleet_after_the_pages_commands(
    tmp_path: Path, path: str, running: list[subprocess.Popen[bytes]]
) -> None:
    page, work = read_page(PAGE), tmp_path / "work"
    if missing := lacking(page.steps[0]):
        pytest.skip(f"needs the Debian packages {', '.join(missing)}")
    avoid_taken_port(page.steps)
    work.mkdir()
    for name, text in page.files.items():
        (work / name).write_text(text)
    began = time.monotonic()
    for number, step in enumerate(page.steps):
        log = tmp_path / f"{number}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", step.command],
                cwd=work,
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running.append(process)
        is_last = step is page.steps[-1]
        if step.stays or is_last:
            wait_for(step, process, log, PROMISE_S if is_last else 120)
        else:
            assert process.wait(COMMAND_S) == 0, (step.command, log.read_text()[-3000:])
            assert step.missing(log.read_text()) == "", (step.command, log.read_text()[-3000:])
        print(f"{time.monotonic() - began:6.0f} s  {step.command}", flush=True)


def wait_for(step: Step, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """What a command promises that goes on afterwards."""
    end = time.monotonic() + seconds
    while missing := step.missing(log.read_text(errors="replace")):
        said = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, (step.command, said)
        assert time.monotonic() < end, f"{step.command} has not said {missing!r}: {said}"
        time.sleep(0.5)
