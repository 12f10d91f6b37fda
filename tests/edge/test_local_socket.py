"""The agent's local socket and its lock: only its owner asks, lines are bounded, a dead agent leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from patience import PATIENCE_S

from covey_edge import local_socket
from covey_edge.local_socket import (
    MAX_LINE_BYTES,
    NAME,
    LocalSocket,
    NotRunning,
    Question,
    Request,
    StateLock,
    ask,
    lock_holder,
)
from covey_protocol.errors import ConfigError, DataError, TransportError


class Loop:
    """What an agent's loop does with questions."""

    def __init__(self, folder: Path) -> None:
        self.inbox: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self.socket = LocalSocket(folder, self.inbox.put)
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> Loop:
        self.socket.open()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.inbox.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (question := self.inbox.get()) is not None:
            question.reply(self._answer)

    def _answer(self, request: Request) -> object:
        if request.ask == "fail":
            raise DataError("data.npz is torn", "mend it")
        if request.ask == "bug":
            raise KeyError("nothing")
        return {"asked": request.ask, **request.given}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with Loop(tmp_path):
        yield tmp_path


def said(path: Path, line: bytes) -> dict[str, object]:
    with socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(PATIENCE_S)
        asker.connect(str(path))
        with contextlib.suppress(BrokenPipeError):  # it stops listening to a line that is too long
            asker.sendall(line)
        answer: dict[str, object] = msgspec.json.decode(asker.recv(65_536))
        return answer


def test_a_question_is_answered_with_what_was_given(folder: Path) -> None:
    assert ask(folder, "status", {"round": "r.1"}) == {"asked": "status", "round": "r.1"}
    assert ask(folder, "again") == {"asked": "again"}


def test_the_agents_errors_reach_who_asked_and_a_bug_ends_nothing(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.npz is torn; mend it"):
        ask(folder, "fail")
    with pytest.raises(Exception, match=r"could not answer \(KeyError"):
        ask(folder, "bug")
    assert ask(folder, "status") == {"asked": "status"}


def test_the_socket_is_its_owners_alone(folder: Path) -> None:
    assert (folder / NAME).stat().st_mode & 0o777 == 0o600


def test_another_user_is_refused_even_where_the_mode_let_it_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.geteuid()
    monkeypatch.setattr(local_socket, "_user_of", lambda asker: mine + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        ask(folder, "status")


def test_the_kernel_names_the_user_at_the_other_end() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert local_socket._user_of(one) == os.geteuid()


@pytest.mark.parametrize("line", [b"\n", b"hello\n", b'{"ask": 1}\n', b'{"asks": "status"}\n', b"\xff\xfe\n", b"[]\n"])
def test_nonsense_is_refused_and_the_next_question_answered(folder: Path, line: bytes) -> None:
    answer = said(folder / NAME, line)
    assert answer["kind"] == "ConfigError"
    assert ask(folder, "status") == {"asked": "status"}


def test_a_line_without_an_end_is_cut_off(folder: Path) -> None:
    answer = said(folder / NAME, b"x" * (MAX_LINE_BYTES + 70_000))
    assert "too long" in str(answer["what"])
    assert ask(folder, "status") == {"asked": "status"}


def test_whoever_says_nothing_is_shut_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_socket, "PATIENCE_S", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(folder / NAME))
        assert ask(folder, "status") == {"asked": "status"}


def test_an_agent_too_busy_to_answer_is_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_socket, "ANSWER_S", 0.05)
    deaf = LocalSocket(tmp_path, lambda question: None)
    deaf.open()
    with pytest.raises(TransportError, match=r"did not answer within 0\.05 s"):
        ask(tmp_path, "status")
    deaf.close()


def test_nobody_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="no agent answers"):
        ask(tmp_path, "status")


def test_the_socket_of_a_dead_agent_is_replaced(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / NAME))
    left.close()
    with pytest.raises(NotRunning):
        ask(tmp_path, "status")
    with Loop(tmp_path):
        assert ask(tmp_path, "status") == {"asked": "status"}
    assert not (tmp_path / NAME).exists()


def test_a_path_longer_than_a_sockets_address_works(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    with Loop(folder):
        assert ask(folder, "status") == {"asked": "status"}
        assert (folder / NAME).is_socket()


def test_one_program_at_a_time_works_in_a_state_dir(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert lock_holder(folder) is None
    first = StateLock(folder)
    assert lock_holder(folder) == os.getpid()
    with pytest.raises(ConfigError, match=rf"process {os.getpid()}\) works in .*its own state_dir"):
        StateLock(folder)
    first.close()
    assert lock_holder(folder) is None
    StateLock(folder).close()


def test_a_killed_program_holds_no_lock(tmp_path: Path) -> None:
    script = f"""
import pathlib, time
from covey_edge.local_socket import StateLock
lock = StateLock(pathlib.Path({str(tmp_path)!r}))
print("held", flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert lock_holder(tmp_path) == holder.pid
        with pytest.raises(ConfigError, match=str(holder.pid)):
            StateLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
    StateLock(tmp_path).close()


class FewDescriptors(socket.socket):
    """Its first `accept` finds no free descriptor."""

    refused = 0

    def accept(self) -> tuple[socket.socket, object]:
        if not self.refused:
            self.refused += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_a_program_without_free_descriptors_listens_again_when_it_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_socket, "PATIENCE_S", 0.05)
    monkeypatch.setattr(socket, "socket", FewDescriptors)
    with Loop(tmp_path):
        monkeypatch.undo()
        assert ask(tmp_path, "status") == {"asked": "status"}
