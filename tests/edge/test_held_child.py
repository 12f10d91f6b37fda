"""How the training child is held: it steps back for others, can be paused, and what ends it is a reason and no more.

Real processes, real faults: a data source that is registered as any other one breaks its process on purpose.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

from covey_edge import training_process
from covey_edge.frames import Done, Frame, Probe, Problem
from covey_edge.training_process import TrainingProcess, oom_kills

SOURCE = """
import ctypes, os, time
import numpy as np

def faulty(path):
    what = path.read_text()
    if what == "segfault":
        ctypes.string_at(0)
    if what == "too much memory":
        np.ones(2**30)
    if what == "memory of a library that gives up":
        os.abort()
    if what == "works a while":
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
    if what == "hangs":
        time.sleep(3600)
    return np.zeros((3, 2), np.float32), np.zeros(3, np.float32)
"""
MEMORY_MB = 2048


class Child:
    """A training child that a test asks for faults."""

    def __init__(self, folder: Path, **settings: int) -> None:
        self.folder = folder
        self.answers: queue.Queue[Any] = queue.Queue()
        self.process = TrainingProcess(lambda token, frame: self.answers.put(frame), **settings)

    def ask(self, what: str, timeout_s: float = PATIENCE_S) -> None:
        path = self.folder / "data"
        path.write_text(what)
        self.process.request("round", Probe("faulty", str(path)), timeout_s)

    def answer(self, timeout_s: float = PATIENCE_S) -> Frame:
        answer: Frame = self.answers.get(timeout=timeout_s)
        return answer

    def made_to(self, what: str, timeout_s: float = PATIENCE_S) -> Frame:
        self.ask(what, timeout_s)
        return self.answer()

    def stat(self, field: int) -> str:
        """Of /proc/PID/stat; proc(5) counts from 1, and the second is the name in parentheses."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        return text.rpartition(")")[2].split()[field - 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With the faulty source on the path of all children."""
    folder = tmp_path_factory.mktemp("held")
    meta = folder / "faulty-1.dist-info"
    meta.mkdir()
    (folder / "faulty_source.py").write_text(SOURCE)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (meta / "entry_points.txt").write_text("[covey.data_sources]\nfaulty = faulty_source:faulty\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield folder


@pytest.fixture(scope="module")
def child(folder: Path) -> Iterator[Child]:
    """One for all tests: starting one takes half a second."""
    made = Child(folder, nice=7)
    yield made
    made.process.stop()


@pytest.fixture
def limited(folder: Path) -> Iterator[Child]:
    made = Child(folder, memory_mb=MEMORY_MB)
    yield made
    made.process.stop()


def until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def why(frame: Frame) -> str:
    assert isinstance(frame, Problem)
    return frame.what


def test_every_way_to_die_is_named_and_the_next_request_is_served(limited: Child) -> None:
    died = "the training process died ({}), which may be for lack of memory (training.memory_mb is 2048)"
    assert why(limited.made_to("segfault")) == died.format("SIGSEGV")
    assert why(limited.made_to("memory of a library that gives up")) == died.format("SIGABRT")
    assert "ran out of memory" in why(limited.made_to("too much memory"))
    assert isinstance(limited.made_to("nothing"), Done)


def test_without_a_limit_a_crash_is_not_laid_to_memory(child: Child) -> None:
    assert why(child.made_to("segfault")) == "the training process died (SIGSEGV)"


@pytest.mark.parametrize(("kills", "told"), [(7, ""), (8, ": the kernel was out of memory and ended it")])
def test_a_child_that_the_kernel_ended_for_memory_is_told_from_one_that_somebody_killed(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, told: str
) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 5\noom_kill 7\n")
    monkeypatch.setattr(training_process, "oom_kills", lambda: oom_kills(vmstat))
    child.ask("hangs")
    vmstat.write_text(f"nr_free_pages 5\noom_kill {kills}\n")
    assert child.process.pid is not None
    os.kill(child.process.pid, signal.SIGKILL)
    assert why(child.answer()) == f"the training process died (SIGKILL){told}"


def test_the_kernel_counts_what_it_ends() -> None:
    assert oom_kills() >= 0
    assert oom_kills(Path("/nowhere")) == 0


GROUP = Path("/sys/fs/cgroup/memory")


@pytest.mark.slow
@pytest.mark.skipif(not os.access(GROUP, os.W_OK), reason="needs a memory cgroup (v1) that this user may make")
def test_the_kernel_really_ends_the_child_and_not_its_agent(child: Child) -> None:
    """A cgroup that is too small for what the child asks for, and a kernel that means it."""
    group = GROUP / f"covey-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(300 * 2**20))
        assert isinstance(child.made_to("nothing"), Done)
        (group / "cgroup.procs").write_text(str(child.process.pid))
        assert why(child.made_to("too much memory")).endswith("the kernel was out of memory and ended it")
        assert isinstance(child.made_to("nothing"), Done)
    finally:
        group.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_steps_back_for_other_programs_and_for_its_agent(child: Child) -> None:
    assert isinstance(child.made_to("nothing"), Done)
    assert int(child.stat(19)) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)
    assert Path(f"/proc/{child.process.pid}/oom_score_adj").read_text().strip() == "1000"
    assert Path("/proc/self/oom_score_adj").read_text().strip() != "1000"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_paused_child_takes_no_time_of_the_processor_nor_of_its_request(child: Child) -> None:
    assert isinstance(child.made_to("nothing"), Done)
    child.ask("works a while", timeout_s=2.5)
    child.process.pause()
    until(lambda: child.stat(3) == "T")
    before = child.stat(14)
    with pytest.raises(queue.Empty):
        child.answer(timeout_s=2.6)  # longer than the request has
    assert (child.stat(3), child.stat(14)) == ("T", before)
    child.process.go_on()
    assert isinstance(child.answer(), Done)


def test_the_time_that_is_left_counts_after_a_pause(child: Child) -> None:
    assert isinstance(child.made_to("nothing"), Done)
    child.ask("hangs", timeout_s=0.5)
    child.process.pause()
    child.process.go_on()
    assert why(child.answer()) == "training took longer than 0.5 s"


def test_a_paused_child_can_be_killed_and_ended(child: Child) -> None:
    child.ask("hangs")
    child.process.pause()
    os.kill(child.process.pid or 0, signal.SIGKILL)
    assert "SIGKILL" in why(child.answer())
    child.ask("hangs")
    child.process.pause()
    child.process.stop()
    assert (child.process.busy, child.process.pid) == (False, None)
    assert child.answers.empty()


def test_a_child_that_was_paused_hears_the_next_request(child: Child) -> None:
    """Also where its answer was on its way already; and waking one that is awake does nothing."""
    child.ask("nothing")
    until(lambda: not child.answers.empty())
    child.process.pause()  # nothing is under way
    assert isinstance(child.answer(), Done)
    child.ask("nothing")
    child.process.pause()
    child.process.go_on()
    child.process.go_on()
    assert isinstance(child.answer(), Done)
    child.process._stopped = True  # as if it had answered at the moment of the pause
    os.kill(child.process.pid or 0, signal.SIGSTOP)
    assert isinstance(child.made_to("nothing"), Done)
