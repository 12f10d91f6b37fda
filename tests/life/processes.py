"""The processes of a device: the production launcher and the agents that it starts, all in this process.

exec is an exception. A child is a thread that runs only while the launcher waits for its words, so that never two run
and a life can be repeated. The socket of sd_notify is a list of datagrams.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Optional

from covey_edge import __version__, agent, launcher, service, updates
from covey_edge.boot import BASE_PATH, LAUNCHER, RELEASE, RELEASES, TRIAL
from covey_edge.config import load_agent
from covey_protocol.errors import CoveyError
from life.power import PowerCut

if TYPE_CHECKING:
    from life.world import Life

VARIABLES = (RELEASES, RELEASE, TRIAL, LAUNCHER, BASE_PATH, "PYTHONPATH", *service.INHERITED)


class Exec(BaseException):
    """This process goes on as another program."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        super().__init__(command)
        self.command, self.environment = command, environment


class Killed(BaseException):
    """SIGKILL: no code of the program runs any more."""


class Crash(Exception):
    """A bug in a release."""


class Os:
    """`os` as the launcher sees it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def execve(self, path: str, command: list[str], environment: dict[str, str]) -> None:
        raise Exec(list(command), dict(environment))


class Datagrams:
    """In the place of a socket: what the child of the launcher says to it."""

    def __init__(self, processes: Processes) -> None:
        self._processes, self._words = processes, deque[bytes]()
        self._timeout_s = 0.0

    def __enter__(self) -> Datagrams:
        return self

    def __exit__(self, *given: object) -> None:
        self._processes.ends = {place: end for place, end in self._processes.ends.items() if end is not self}

    def bind(self, address: str) -> None:
        self._processes.ends[address] = self

    def settimeout(self, seconds: float) -> None:
        self._timeout_s = seconds

    def setblocking(self, flag: bool) -> None:
        pass

    def sendto(self, data: bytes, address: str) -> None:
        end, child = self._processes.ends.get(address), self._processes.child
        if end is None or child is None:
            raise FileNotFoundError(address)
        end._words.append(data)
        child.says(data.decode())

    def recv(self, size: int) -> bytes:
        assert self._processes.child is not None
        if not self._words:
            self._processes.child.let_run(self._timeout_s)
        if not self._words:
            raise socket.timeout
        return self._words.popleft()


class Child:
    """In the place of Popen."""

    pid = 0

    def __init__(self, processes: Processes, environment: dict[str, str]) -> None:
        self._processes, self._world = processes, processes.world
        self.environment = environment
        self.returncode: Optional[int] = None
        self.asked = False  # to end
        self.ready_at: Optional[float] = None
        self._killed, self._turn = False, 0
        self._error: Optional[BaseException] = None
        self._ours, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        processes.child = self
        threading.Thread(target=self._run, daemon=True).start()

    # --- its own thread

    def _run(self) -> None:
        self._theirs.acquire()
        code = 1
        try:
            if not self._killed:
                code = self._processes.live_on_trial(self)
        except Killed:
            code = -signal.SIGKILL
            self._world.disk.close_all()
        except BaseException as exc:  # the power, or what must never happen: the launcher's thread hears it
            self._error = exc
        self.returncode = code
        self._ours.release()

    def _give_back(self, turn: int) -> None:
        """The launcher's turn again, unless it has been since."""
        if turn != self._turn or self.returncode is not None:
            return
        self._ours.release()
        self._theirs.acquire()
        if self._killed:
            raise Killed

    def says(self, text: str) -> None:
        now = self._world.clock.now
        if "READY=1" in text:
            self.ready_at = now
        elif "WATCHDOG=1" in text and self.ready_at is not None:
            self._world.releases.lives(self.environment[RELEASE], now - self.ready_at)
        turn = self._turn
        self._world.at(0.0, lambda: self._give_back(turn))

    # --- the launcher's

    def let_run(self, timeout_s: float) -> None:
        """Until it says something or the time is over."""
        self._turn += 1
        turn = self._turn
        self._world.at(timeout_s, lambda: self._give_back(turn))
        self._go_on()

    def _go_on(self) -> None:
        self._theirs.release()
        self._ours.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def poll(self) -> Optional[int]:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.asked = True
        if self._world.program is not None:
            self._world.program.stop()

    def terminate(self) -> None:
        if isinstance(sys.exc_info()[1], (PowerCut, AssertionError)):
            self.kill()  # nothing goes on
        else:
            self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 0.0) -> None:
        end = self._world.clock.now + timeout
        while self.returncode is None:
            if self._world.clock.now >= end:
                raise subprocess.TimeoutExpired("a release", timeout)
            self.let_run(end - self._world.clock.now)

    def kill(self) -> None:
        self._killed = True
        self._go_on()


class Processes:
    """What systemd starts on the device, and what becomes of it."""

    def __init__(self, world: Life) -> None:
        self.world = world
        self.child: Optional[Child] = None
        self.ends: dict[str, Datagrams] = {}
        self._handlers: dict[int, Any] = {}
        self._pid = 1000  # of the newest: each has its own, as each names the files that it has not finished by it

    @property
    def trying(self) -> bool:
        """Whether a release is on trial."""
        return self.child is not None and self.child.returncode is None

    def start(self) -> int:
        """The unit's process, whatever it becomes by exec, until it ends: its exit code."""
        self._handlers, self.child = {}, None
        self._pid += 1
        environment: dict[str, str] = {}
        is_agent = False
        while True:
            _put(environment)
            try:
                if is_agent:
                    return self._agent(environment)
                return launcher.main(["--state", str(self.world.state), "--", "--config", str(self.world.config)])
            except Exec as exc:
                environment, is_agent = exc.environment, "covey_edge.launcher" not in exc.command

    def terminate(self) -> None:
        """SIGTERM to the unit's process."""
        handler = self._handlers.get(signal.SIGTERM)
        if callable(handler):
            assert self.child is not None
            self.world.releases.stops(self.child.environment[RELEASE])
            handler(signal.SIGTERM, None)
        elif self.world.program is not None:
            self.world.program.stop()

    def instead(self) -> list[tuple[Any, str, Any]]:
        """What to put where in the modules of the launcher and of sd_notify."""
        sockets = SimpleNamespace(
            **{name: getattr(socket, name) for name in ("AF_UNIX", "SOCK_DGRAM", "SOCK_CLOEXEC", "timeout")},
            socket=lambda *kind: Datagrams(self),
        )
        children = SimpleNamespace(
            Popen=lambda command, env: Child(self, env), TimeoutExpired=subprocess.TimeoutExpired
        )
        signals = SimpleNamespace(SIGTERM=signal.SIGTERM, SIGINT=signal.SIGINT, signal=self._handle)
        return [
            (os, "getpid", lambda: self._pid),
            (launcher, "os", Os()),
            (launcher, "socket", sockets),
            (service, "socket", sockets),
            (launcher, "subprocess", children),
            (launcher, "signal", signals),
            (launcher, "say", self.world.releases.said),
        ]

    def _handle(self, number: int, handler: Any) -> Any:
        old = self._handlers.get(number)
        self._handlers[number] = handler
        return old

    # --- agents

    def _agent(self, environment: dict[str, str]) -> int:
        """As `covey agent` does it: an exit code."""
        world = self.world
        world.releases.starts(environment)
        for module in (agent, updates):
            module.__version__ = environment[RELEASE] or __version__
        try:
            world.program = program = agent.AgentProgram(load_agent(world.config))
            world.since = world.clock.now
            world.releases.began(environment)
            try:
                program.start()
                program.run()
            finally:
                if not isinstance(sys.exc_info()[1], (PowerCut, Killed)):
                    program.close()
            if program.starts_anew:
                launcher.start_anew(program.service.inherited)
            return 0
        except CoveyError as exc:  # systemd, or the launcher, starts it again
            world.log(f"ends: {exc}")
            world.seen[f"ends: {type(exc).__name__}"] += 1
            return exc.exit_code
        except (PowerCut, Killed):
            if world.wire is not None:
                world.wire.lose(said=False)
            raise
        finally:
            world.program, world.wire = None, None

    def live_on_trial(self, child: Child) -> int:
        """A release does what its own file says."""
        world, behaves = self.world, self.world.releases.behaviour(child.environment)
        _put(child.environment)
        self._pid += 1
        if behaves == "ends at once":
            world.releases.starts(child.environment)
            return 2
        if behaves == "never connects":
            world.releases.starts(child.environment)
            while not child.asked:
                world.pass_time(60.0, lambda: child.asked)
            return 0
        end: dict[str, Callable[[], None]] = {"dies": self._crash, "hangs": self._hang}
        if behaves in end:
            world.at(world.rng.uniform(5.0, 30.0), lambda: end[behaves]() if child is self.child else None)
        try:
            return self._agent(child.environment)
        except Crash:
            return 1
        except SystemExit as exc:
            return int(exc.code or 0)

    def _crash(self) -> None:
        if self.trying:
            raise Crash

    def _hang(self) -> None:
        while self.trying:
            self.world.pass_time(60.0, lambda: False)


def _put(variables: dict[str, str]) -> None:
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({name: variables[name] for name in VARIABLES if name in variables})
