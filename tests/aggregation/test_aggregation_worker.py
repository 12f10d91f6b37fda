"""The TFF worker's life: it never outlives the process that started it, however that one ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from patience import PATIENCE_S

from covey_coordinator.aggregation import worker as worker_module
from covey_coordinator.aggregation.worker import Worker
from covey_protocol.errors import MachineError

# A program that uses a worker. It prints the worker's pid and then does what its first argument says.
PROGRAM = """
import os, sys, threading, time
from covey_coordinator.aggregation.worker import Worker

worker = Worker()
if sys.argv[1] == "started in a thread":
    thread = threading.Thread(target=worker.start); thread.start(); thread.join()
    time.sleep(0.2)  # a worker bound to that thread would be gone now, and its pid None
else:
    worker.start()
if sys.argv[1] == "computing":
    import numpy as np, tensorflow as tf, tensorflow_federated as tff

    @tff.tensorflow.computation(np.int32)
    def spin(steps):
        return tf.while_loop(lambda i: i < steps, lambda i: (i + 1,), (tf.constant(0),))[0]

    assert worker.call(spin, 3) == 3
if sys.argv[1] == "restarting":
    for _ in range(3):
        worker.stop()
        worker.start()
print(worker.pid, flush=True)
if sys.argv[1] == "crashing":
    raise RuntimeError("as asked")
if sys.argv[1] == "aborting":
    os.abort()
if sys.argv[1] == "computing":
    worker.call(spin, 2**31 - 1)
if sys.argv[1] in ("ending", "restarting"):
    sys.exit(0)
time.sleep(600)  # longer than any test waits: it ends as it was told or fails the test
"""


def is_gone(pid: int) -> bool:
    """No process has this pid (a zombie is gone: it only waits for its parent)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not (gone := is_gone(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return gone


MARK = "COVEY_TEST_RUN"  # in the environment of the programs, and so of their workers


def marked_processes(mark: str) -> list[str]:
    """The command lines of all living processes that carry this mark, whoever their parent is by now."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def run_program(tmp_path: Path, doing: str, mark: str = "") -> tuple[subprocess.Popen[str], int]:
    """The program, and the pid of its worker."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), doing],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, MARK: mark},
    )
    assert program.stdout is not None
    return program, int(program.stdout.readline())


def end_program(tmp_path: Path, doing: str, how: signal.Signals | None, mark: str = "") -> None:
    """Run the program, end it this way, and see that its worker is gone."""
    program, worker_pid = run_program(tmp_path, doing, mark)
    try:
        if how is not None:
            assert Path(f"/proc/{worker_pid}").exists()
            time.sleep(0.3)
            program.send_signal(how)
        program.communicate(timeout=PATIENCE_S)
        assert wait_until_gone(worker_pid)
    finally:
        program.kill()
        program.communicate()


ENDINGS = {
    "SIGKILL while idle": ("idle", signal.SIGKILL),
    "SIGKILL while computing": ("computing", signal.SIGKILL),
    "SIGKILL after a start in a thread that is over": ("started in a thread", signal.SIGKILL),
    "Ctrl-C while idle": ("idle", signal.SIGINT),
    "Ctrl-C while computing": ("computing", signal.SIGINT),
    "SIGTERM while idle": ("idle", signal.SIGTERM),
    "a normal end": ("ending", None),
    "an exception that nobody catches": ("crashing", None),
    "an abort": ("aborting", None),
    "a normal end after several starts": ("restarting", None),
}
QUICK_ENDINGS = [(doing, how) for doing, how in ENDINGS.values() if doing != "computing"]


@pytest.mark.parametrize(("doing", "how"), ENDINGS.values(), ids=ENDINGS.keys())
def test_the_worker_goes_with_its_parent(tmp_path: Path, doing: str, how: signal.Signals | None) -> None:
    end_program(tmp_path, doing, how)


def no_orphan_after(tmp_path: Path, endings: list[tuple[str, signal.Signals | None]]) -> None:
    """Run and end a program per entry; then no process of any of them is left."""
    mark = str(tmp_path)
    for doing, how in endings:
        end_program(tmp_path, doing, how, mark)
    deadline = time.monotonic() + PATIENCE_S
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_no_run_of_several_leaves_an_orphan(tmp_path: Path) -> None:
    no_orphan_after(tmp_path, QUICK_ENDINGS[:4])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_run_of_fifty_leaves_an_orphan_however_it_ends(tmp_path: Path) -> None:
    every = list(ENDINGS.values())
    no_orphan_after(tmp_path, [every[number % len(every)] for number in range(50)])


def test_the_search_for_orphans_finds_a_worker_that_lives(tmp_path: Path) -> None:
    mark = str(tmp_path)
    program, worker_pid = run_program(tmp_path, "idle", mark)
    try:
        assert any("worker_binary" in line for line in marked_processes(mark))
    finally:
        program.kill()
        program.communicate()
    assert wait_until_gone(worker_pid)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(50))
def test_the_worker_goes_with_its_killed_parent_every_time(tmp_path: Path, repeat: int) -> None:
    end_program(tmp_path, "computing" if repeat % 2 else "idle", signal.SIGKILL)


def test_stop_leaves_no_process_and_can_be_repeated() -> None:
    for _ in range(3):
        worker = Worker()
        assert not worker.is_running
        worker.start()
        pid = worker.pid
        assert pid is not None
        worker.stop()
        worker.stop()
        assert is_gone(pid)
        assert worker.pid is None


def test_a_stopped_worker_starts_again_on_demand() -> None:
    worker = Worker()
    try:
        assert worker.call(os.getpid) == os.getpid()
        first = worker.pid
        worker.stop()
        worker.call(os.getpid)
        assert worker.pid not in (None, first)
    finally:
        worker.stop()


def test_install_is_for_the_calling_thread_only(worker: Worker) -> None:
    import numpy as np
    import tensorflow_federated as tff

    add = tff.tensorflow.computation(lambda a, b: a + b, np.int32, np.int32)
    answers: list[object] = []

    def with_it() -> None:
        worker.install()
        answers.append(add(1, 2))

    def without_it() -> None:
        try:
            answers.append(add(1, 2))
        except Exception as error:
            answers.append(type(error))

    for target in (with_it, without_it):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert answers[0] == 3
    assert answers[1] is not None
    assert answers[1] != 3


def test_an_exception_in_a_call_reaches_the_caller_and_the_worker_lives(worker: Worker) -> None:
    def fail() -> None:
        raise ValueError("as asked")

    pid = worker.pid
    with pytest.raises(ValueError, match="as asked"):
        worker.call(fail)
    assert worker.pid == pid


def test_a_worker_that_dies_during_a_call_is_a_machine_error_and_is_replaced() -> None:
    with Worker() as worker:
        pid = worker.pid
        assert pid is not None
        over = threading.Event()

        def killed() -> None:
            os.kill(pid, signal.SIGKILL)
            over.wait(PATIENCE_S)

        with pytest.raises(MachineError, match="ended with code -9"):
            worker.call(killed)
        over.set()
        assert worker.call(os.getpid) == os.getpid()
        assert worker.pid not in (None, pid)


def test_the_workers_output_goes_to_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Worker(tmp_path / "worker.log") as worker:
        assert worker.is_running
    assert (tmp_path / "worker.log").exists()
    assert capfd.readouterr() == ("", "")


def test_a_platform_without_the_worker_is_a_machine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MachineError, match="not on darwin"):
        worker_module.worker_binary()


def test_a_missing_binary_is_a_machine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="not installed"):
        worker_module.worker_binary()


def test_a_binary_that_does_not_start_is_a_machine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "worker_binary", lambda: Path("/bin/false"))
    with pytest.raises(MachineError, match="did not start"):
        Worker().start()


def test_importing_the_package_imports_no_tensorflow() -> None:
    code = (
        "import sys, covey_coordinator.aggregation as a;"
        "from covey_coordinator.aggregation import registry, rules, screening, worker;"
        "assert len(a.RULE_NAMES) >= 5;"
        "assert not any(m in sys.modules for m in ('tensorflow', 'tensorflow_federated', 'grpc')), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
