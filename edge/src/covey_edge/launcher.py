"""Starts the agent's newest release that has shown itself healthy; tries a new one, and goes back where it fails.

`python -m covey_edge.launcher --state STATE -- --config agent.toml`. It is always the launcher of the covey that is
installed, never a release's, and needs the standard library alone. A release that is known to be healthy takes the
launcher's place (exec). One on trial runs as its child, which the launcher watches as systemd would: READY=1 in time
and WATCHDOG=1 for a while. What it decides is durable in STATE/releases/boot.json before it is done.

It verifies no seal: what lies in STATE/releases was verified before it was put there (`covey_edge.updates`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from covey_edge import __version__
from covey_edge.boot import (
    ATTEMPTS,
    BASE_PATH,
    LAUNCHER,
    RELEASE,
    RELEASES,
    TRIAL,
    Boot,
    Folder,
    attempted,
    best,
    confirmed,
    failed,
    taken_up,
)
from covey_edge.service import Notifier, error_prefix, to_journal, watchdog_s
from covey_protocol.errors import EXIT_TRANSPORT, StorageError

AGAIN = 75  # an agent on trial that ends so wants to be started anew
READY_S, HEALTHY_S, PAUSE_S = 180.0, 60.0, 5.0
OUTAGE_PAUSE_S = 120.0  # after a trial that found no broker
WATCHDOG_S = 60.0  # of a release on trial
LOOK_S = 0.5  # how often a trial is looked at
STOP_S = 20.0  # for a trial that is to end


def say(text: str) -> None:
    start = "<4>" if to_journal() else time.strftime("%Y-%m-%d %H:%M:%S ")
    print(f"{start}launcher: {text}", file=sys.stderr, flush=True)


class Launcher:
    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self._options = options
        self._folder = Folder(Path(options.state).resolve() / "releases")
        self._arguments = list(arguments)
        self._notifier = Notifier()
        # an agent that ended itself to be started anew leaves us the path of a release
        base_path = os.environ.pop(BASE_PATH, os.environ.get("PYTHONPATH", ""))
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in (RELEASE, TRIAL, "PYTHONPATH")},
            **({"PYTHONPATH": base_path} if base_path else {}),
        }
        self._watchdog_s = min(options.watchdog, watchdog_s(self._notifier.inherited) or options.watchdog)
        self._stopping = 0.0  # since when
        self._unconfirmed = False  # and its owner knows

    def run(self) -> int:
        """The exit code of a trial that ended; where nothing is tried this does not return."""
        while True:
            boot = self._next()
            if not boot.trial:
                self._become(best(boot, self._folder.here(), __version__))
            code = self._try_out(boot)
            healthy = self._folder.boot().current == boot.trial
            if self._stopping or (healthy and code != AGAIN):
                return code  # whoever started us knows what to do about the end of one that was healthy
            if not healthy:
                self._sleep(OUTAGE_PAUSE_S if code == EXIT_TRANSPORT else PAUSE_S)

    def _next(self) -> Boot:
        """Takes up what is staged, counts the attempt: durably, before anything is started."""
        old = self._folder.boot()
        boot = taken_up(old, self._folder.staged(), self._folder.here(), __version__)
        boot = attempted(boot, self._folder.here(), __version__)
        try:
            if boot != old:
                self._folder.save(boot)
            self._folder.unstage()
        except (StorageError, OSError) as exc:  # an attempt that cannot be counted is not made
            say(f"{exc}; no release is tried")
            return replace(old, trial="")
        if boot.failed != old.failed:
            say(f"release {boot.failed}, and is not tried again")
        return boot

    def _command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "covey_edge", "agent", *self._arguments, *more]

    def _with(self, version: str) -> dict[str, str]:
        """The environment of an agent of this version."""
        path = self._environment.get("PYTHONPATH", "")
        parts = [str(self._folder.path / version)] if version else []
        joined = os.pathsep.join([*parts, *([path] if path else [])])
        return {
            **self._environment,
            **({"PYTHONPATH": joined} if joined else {}),
            RELEASES: str(self._folder.path),
            RELEASE: version,
            LAUNCHER: json.dumps([sys.executable, "-m", "covey_edge.launcher", *sys.argv[1:]]),
            BASE_PATH: path,
        }

    def _become(self, version: str) -> None:
        self._notifier.pet()  # the agent's first is to come in a full interval
        environment = {**self._with(version), **self._notifier.inherited}
        os.execve(sys.executable, self._command(), environment)  # noqa: S606 - our own program, no shell on purpose

    # --- a trial

    def _try_out(self, boot: Boot) -> int:
        """Run the release on trial as a child until it ends. It is confirmed while it runs, once it is healthy."""
        say(f"trying release {boot.trial}, attempt {boot.attempts} of {ATTEMPTS}")
        with (
            tempfile.TemporaryDirectory(prefix="covey-") as place,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as signs,
        ):
            address = os.path.join(place, "notify")
            signs.bind(address)
            signs.settimeout(LOOK_S)
            environment = {**self._with(boot.trial), TRIAL: "1", "NOTIFY_SOCKET": address}
            environment["WATCHDOG_USEC"] = str(int(self._watchdog_s * 1e6))
            child = subprocess.Popen(self._command("--parent", str(os.getpid())), env=environment)
            previous = {
                number: signal.signal(number, self._forward(child)) for number in (signal.SIGTERM, signal.SIGINT)
            }
            try:
                why = self._watch(child, signs, boot)
            finally:
                _end(child)
                for number, handler in previous.items():
                    signal.signal(number, handler)
        if why:
            say(f"release {boot.trial} {why}")
            if boot.attempts >= ATTEMPTS and self._folder.boot().trial:  # else it was healthy, and hung later
                self._folder.save(failed(boot, f"{boot.trial} {why}"))
                say(f"release {boot.trial} is not tried again")
        elif self._stopping and self._folder.boot().trial:
            self._folder.save(replace(boot, attempts=boot.attempts - 1))  # it was not its fault
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def _watch(self, child: subprocess.Popen[bytes], signs: socket.socket, boot: Boot) -> str:
        """Why the trial failed; "" where it was confirmed, or asked to end, before the child ended."""
        started = time.monotonic()
        ready: Optional[float] = None
        alive = -math.inf  # when it last said so
        healthy = False
        while child.poll() is None:
            words = self._pass_on(signs)
            now = time.monotonic()
            alive = now if "WATCHDOG=1" in words else alive
            ready = now if "READY=1" in words and ready is None else ready
            if self._stopping:
                if now - self._stopping > STOP_S:
                    break
                continue
            if ready is None and now - started > self._options.ready_within:
                return f"did not connect within {self._options.ready_within:g} s"
            if ready is not None and now - max(ready, alive) > self._watchdog_s:
                return f"gave no sign of life for {self._watchdog_s:g} s"
            if ready is None:
                self._notifier.pet()  # for us: of a release that is not there yet nothing else can be said
            elif not healthy and now - ready >= self._options.healthy_for and now - alive < self._watchdog_s / 2:
                # three signs are due in every interval: one that hangs already has not said so lately
                healthy = self._confirm(boot)
        if healthy or self._stopping:
            return ""
        code = child.returncode
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"

    def _confirm(self, boot: Boot) -> bool:
        """Whether it could be written down; on a full disk it is tried again and again, and the release runs on."""
        try:
            self._folder.save(confirmed(boot))
        except StorageError as exc:
            if not self._unconfirmed:
                say(f"release {boot.trial} is healthy, and {exc}")
            self._unconfirmed = True
            return False
        say(f"release {boot.trial} is healthy")
        return True

    def _pass_on(self, signs: socket.socket) -> list[str]:
        """What the child says goes on to whoever watches us; only a goodbye does not, unless it is ours."""
        try:
            words = signs.recv(4096).decode(errors="replace").splitlines()
        except socket.timeout:  # another class before Python 3.10
            return []
        for word in words:
            if word != "STOPPING=1" or self._stopping:
                self._notifier.say(word)
        return words

    def _forward(self, child: subprocess.Popen[bytes]) -> Any:
        def forward(number: int, frame: object) -> None:
            self._stopping = time.monotonic()
            with contextlib.suppress(OSError):
                child.send_signal(number)

        return forward

    def _sleep(self, longest_s: float) -> None:
        end = time.monotonic() + min(longest_s, self._options.pause or longest_s)
        while time.monotonic() < end:
            self._notifier.pet()
            time.sleep(LOOK_S)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def start_anew(inherited: dict[str, str]) -> None:
    """For an agent that has closed everything and wants the launcher to decide again. Does not return.

    inherited: of the agent's `Notifier`.
    """
    if os.environ.get(TRIAL):
        sys.exit(AGAIN)  # the launcher waits for us
    command = json.loads(os.environ[LAUNCHER])
    environment = {**os.environ, **inherited, "PYTHONPATH": os.environ.get(BASE_PATH, "")}
    os.execve(command[0], command, environment)  # noqa: S606 - the command that started us


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m covey_edge.launcher",
        description="Start the agent's newest healthy release; what follows -- goes to `covey agent`.",
    )
    parser.add_argument("--state", required=True, help="the agent's state_dir, as in its agent.toml")
    for name, default, words in (
        ("--ready-within", READY_S, "seconds that a new release has to connect"),
        ("--healthy-for", HEALTHY_S, "seconds that it must then run to be kept"),
        ("--watchdog", WATCHDOG_S, "seconds without a sign of life after which it is hung"),
        ("--pause", 0.0, "longest seconds between attempts, 0 for the usual ones"),
    ):
        parser.add_argument(name, type=float, default=default, help=words, metavar="S")
    try:
        return Launcher(parser.parse_args(arguments[:split]), arguments[split + 1 :]).run()
    except StorageError as exc:
        print(f"{error_prefix()}covey: error: {exc}", file=sys.stderr)
        return exc.exit_code


if __name__ == "__main__":
    sys.exit(main())
