"""Questions to a running agent, over a Unix socket in its state_dir: one JSON line asked, one answered.

Only the agent's own user and root may ask: the socket has mode 600, and whoever connects is looked up (SO_PEERCRED).
One thread waits in `accept`; it hands each question to the agent's loop and writes what that says. One conversation at
a time: who connects and says nothing is shut out after PATIENCE_S.

`StateLock` holds that one program at a time works in a state_dir.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import msgspec
from msgspec import Struct

from covey_edge.files import make_folder
from covey_protocol import errors
from covey_protocol.errors import ConfigError, CoveyError, StorageError, TransportError

log = logging.getLogger("covey.agent")

NAME, LOCK_NAME = "agent.sock", "agent.lock"  # in state_dir
MAX_LINE_BYTES = 2**20
PATIENCE_S = 2.0  # for whoever asks to say its line, and to take the answer
ANSWER_S = 15.0  # for the loop: a write to a slow card, a model that is hashed
MAX_PATH_BYTES = 107  # of a socket's address on Linux, without the closing zero


class NotRunning(TransportError):
    """No agent listens in this state_dir."""


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    ask: str
    given: dict[str, Any] = {}


class Reply(Struct, frozen=True):
    """kind, what, remedy: of the CoveyError, where there is no answer."""

    answer: Any = None
    kind: str = ""
    what: str = ""
    remedy: str = ""


class Question:
    """What the socket's thread puts into the agent's inbox. The loop must call `reply` once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._reply: queue.SimpleQueue[Reply] = queue.SimpleQueue()

    def reply(self, answer: Callable[[Request], object]) -> None:
        """With what `answer` says of the request, or with the CoveyError it raises."""
        try:
            self._reply.put(Reply(msgspec.to_builtins(answer(self.request))))
        except CoveyError as exc:
            self._reply.put(_problem(exc))
        except Exception as exc:  # a section of another part of the agent: its bug must not end the agent
            log.exception("a question over the local socket could not be answered")
            self._reply.put(Reply(kind="UsageError", what=f"the agent could not answer ({exc!r})", remedy="report it"))

    def wait(self, timeout_s: float) -> Reply:
        try:
            return self._reply.get(timeout=timeout_s)
        except queue.Empty:
            return _problem(TransportError(f"the agent did not answer within {timeout_s:g} s", "ask again"))


class LocalSocket:
    """Listens from `open` to `close`. put: takes a Question, never blocks."""

    def __init__(self, folder: Path, put: Callable[[Question], None]) -> None:
        self._folder, self._put = folder, put
        self._listener: Optional[socket.socket] = None

    def open(self) -> None:
        """Replaces the socket of an agent that died: the caller holds the StateLock. StorageError, ConfigError."""
        path = self._folder / NAME
        listener = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)
            os.fchmod(listener.fileno(), 0o600)  # before it has a name, so that nobody comes in between
            with _address(path) as address:
                listener.bind(address)
            path.chmod(0o600)
            listener.listen(4)
        except OSError as exc:
            listener.close()
            raise StorageError(f"cannot listen on {path} ({exc.strerror or exc})", "check the folder") from exc
        self._listener = listener
        threading.Thread(target=self._serve, args=(listener,), name="local socket", daemon=True).start()

    def close(self) -> None:
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        with contextlib.suppress(OSError):
            (self._folder / NAME).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`

    def _serve(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    asker, _ = listener.accept()
                except OSError as exc:
                    if self._listener is not listener:
                        return  # closed
                    log.error("the local socket cannot take a question (%s)", exc)  # no descriptor is free, say
                    time.sleep(PATIENCE_S)
                    continue
                with asker, contextlib.suppress(OSError):
                    asker.settimeout(PATIENCE_S)
                    asker.sendall(msgspec.json.encode(self._reply_to(asker)) + b"\n")

    def _reply_to(self, asker: socket.socket) -> Reply:
        user = _user_of(asker)
        if user not in (os.geteuid(), 0):
            log.warning("refused a question of user %d over the local socket", user)
            return _problem(ConfigError("this agent belongs to another user", "ask as that user, or as root"))
        try:
            request = msgspec.json.decode(_line(asker), type=Request)
        except (msgspec.MsgspecError, OSError) as exc:
            return _problem(ConfigError(f"not a question ({exc})", 'send one line such as {"ask": "status"}'))
        question = Question(request)
        self._put(question)
        return question.wait(ANSWER_S)


def ask(folder: Path, what: str, given: Optional[dict[str, Any]] = None) -> Any:
    """What the agent that works in this state_dir says. NotRunning where there is none; its own errors as they are."""
    path = folder / NAME
    with socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(ANSWER_S + PATIENCE_S)
        try:
            with _address(path) as address:
                asker.connect(address)
            with contextlib.suppress(BrokenPipeError):  # it may have refused us before we said a word
                asker.sendall(msgspec.json.encode(Request(what, given or {})) + b"\n")
            line = _line(asker)
        except PermissionError as exc:
            raise ConfigError(f"{path} belongs to another user", "ask as that user, or as root") from exc
        except OSError as exc:
            raise NotRunning(f"no agent answers on {path} ({exc.strerror or exc})", "start it") from exc
    try:
        reply = msgspec.json.decode(line, type=Reply)
    except msgspec.MsgspecError as exc:
        raise NotRunning(f"the agent went away while it answered on {path}", "ask again") from exc
    if reply.kind:
        kind = getattr(errors, reply.kind, errors.TransportError)
        raise kind(reply.what, reply.remedy)
    return reply.answer


class StateLock:
    """An exclusive lock of a state_dir, held until `close` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder. ConfigError where another program holds the lock, with its process id; StorageError."""
        path = folder / LOCK_NAME
        try:
            make_folder(folder)
            self._descriptor: Optional[int] = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise StorageError(f"cannot open {path} ({exc.strerror or exc})", "check the folder's permissions") from exc
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.read(self._descriptor, 20).decode("ascii", "replace").strip()
            self.close()
            raise ConfigError(
                f"another covey program (process {holder or 'unknown'}) works in {folder}",
                "stop it, or give each agent its own state_dir",
            ) from exc
        with contextlib.suppress(OSError):  # the number is for people; a full disk must not keep an agent from starting
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_holder(folder: Path) -> Optional[int]:
    """The process that works in this state_dir; None where none does. Takes nothing."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.read(descriptor, 20).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)
    return None


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """A name of `path` that fits a socket's address, also where the path is longer."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        yield str(path)
        return
    if sys.platform != "linux":
        raise ConfigError(f"{path} is too long for a socket", "choose a shorter state_dir")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _user_of(asker: socket.socket) -> int:
    """The user id at the other end. Where the system does not say (not Linux), the socket's mode is all there is."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.geteuid()
    _, user, _ = struct.unpack("3i", asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


def _line(connection: socket.socket) -> bytes:
    """Up to the first newline, or the end. ConnectionError where it is too long."""
    line = b""
    while not line.endswith(b"\n"):
        more = connection.recv(65_536)
        if not more:
            break
        line += more
        if len(line) > MAX_LINE_BYTES:
            raise ConnectionError("the line is too long")
    return line


def _problem(error: CoveyError) -> Reply:
    return Reply(kind=type(error).__name__, what=error.what, remedy=error.remedy)
