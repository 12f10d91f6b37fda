"""The gate: TFF's `worker_binary` in a network of its own, and the one door to it, on an address we choose.

`worker_binary` can only be told a port; it listens on all interfaces, without TLS and without asking who is there.
So this program opens the door first, then leaves the machine's network for an empty one (Linux namespaces, no root
needed), and starts the worker there: nobody but this program can connect to the worker, and what is run on the worker
reaches no network either. It still reads and writes the files of its user, and can open Unix sockets that lie among
them.

Run as a file by `covey worker`, with a JSON object as its argument; only the standard library, one thread until the
worker runs (a process with threads cannot leave its user namespace). It says one JSON object a line on its standard
output: {"listening": address}, {"refused": what, "remedy": ..., "kind": [...]} or {"ended": code}.

A connection that begins with HELLO is answered with one line of JSON, who we are, and closed. All others are gRPC and
are passed on byte by byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

HELLO = b"COVEY\n"  # gRPC begins with "PRI * HTTP/2.0"
HELLO_TIMEOUT_S = 10.0
INNER_PORT = 10000  # in a network of its own every port is free
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 5.0
FORGET_AFTER_S = 2.0  # a tunnel that is made anew within that finds what it had
POLL_S = 0.1
PIECE = 1 << 18
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """(what is wrong, what to do about it, "listen" if the address is what is wrong)"""


def main(settings: dict[str, Any]) -> int:
    """settings: binary, launcher (`aggregation.worker.LAUNCHER`), host, port, parent (a pid), confined,
    memory_limit_mb (0: none), who (the answer to HELLO).
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    guests = Guests()
    try:
        door = _door(settings["host"], settings["port"])
        if settings["confined"]:
            _leave_the_network()
        _die_with(settings["parent"])
        port = INNER_PORT if settings["confined"] else _free_port()
        first = Inner(settings, port)
        threading.Thread(target=_serve, args=(door, port, settings["who"], guests), daemon=True).start()
        say({"listening": address(*door.getsockname()[:2])})
        say({"ended": _one_after_another(first, guests)})
    except Refused as refused:
        what, remedy, *kind = refused.args
        say({"refused": what, "remedy": remedy, "kind": kind})
    return 1


def _one_after_another(inner: Inner, guests: Guests) -> int:
    """A new worker whenever all guests of the old one have left, so that none inherits the memory and the unfinished
    computations of another. The code of the first that ends by itself.
    """
    while True:
        with inner:
            while (code := inner.process.poll()) is None and not guests.have_left():
                time.sleep(POLL_S)
        if code is not None:
            return code
        inner = Inner(inner.settings, inner.port)


class Guests:
    """Counts gRPC connections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._present = 0
        self._left_at: float | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._present += 1
            self._left_at = None

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._present -= 1
            self._left_at = None if self._present else time.monotonic()

    def have_left(self) -> bool:
        """Whether there were some, and the last one left FORGET_AFTER_S ago. Says so once."""
        with self._lock:
            left = self._left_at is not None and time.monotonic() - self._left_at > FORGET_AFTER_S
            self._left_at = None if left else self._left_at
            return left


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def place() -> str:
    """Equal for two processes of one user that see the same files: the boot, the mounts and the user."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
        return f"{boot.read().strip()}/{os.stat('/proc/self/ns/mnt').st_ino}/{os.getuid()}"


def _door(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        told = f"cannot listen on {address(host, port)}: {os.strerror(error.errno or 0)}"
        raise Refused(told, "choose another --listen", "listen") from error


def _leave_the_network() -> None:
    """Into a user and a network namespace of our own, with nothing but loopback. Sockets opened before stay outside."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        raise Refused(
            f"the worker cannot be given a network of its own: {os.strerror(ctypes.get_errno())}",
            "allow user namespaces to this user (docs/scale-out.md), or use --unconfined behind a firewall",
        )
    try:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
        with socket.socket() as any_socket:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    except OSError as error:
        raise Refused(
            f"the worker's own network cannot be set up: {error}",
            "allow user namespaces to this user (docs/scale-out.md), or use --unconfined behind a firewall",
        ) from error


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _die_with(parent: int) -> None:
    """Be killed when the parent goes. After the change of namespaces, which would cancel it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


class Inner:
    """One life of TFF's worker, ready to serve once this is made; the end of the with block ends it."""

    def __init__(self, settings: dict[str, Any], port: int) -> None:
        self.settings, self.port = settings, port
        command = [sys.executable, "-I", "-S", "-c", settings["launcher"], str(os.getpid())]
        self.process = subprocess.Popen(
            [*command, settings["binary"], f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ},
        )
        with contextlib.ExitStack() as on_error:
            on_error.enter_context(self)
            if limit := settings["memory_limit_mb"] * 1_000_000:
                resource.prlimit(self.process.pid, resource.RLIMIT_AS, (limit, limit))
            self._wait_until_it_listens()
            on_error.pop_all()

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        code = self.process.poll()
        told = "did not start in time" if code is None else f"ended with code {code}"
        raise Refused(f"TFF's worker {told}", "look at its output; it needs 1 GB of memory, also of --memory-limit-mb")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:  # it was stopped (SIGSTOP)
                self.process.kill()
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _serve(door: socket.socket, port: int, who: dict[str, Any], guests: Guests) -> None:
    while True:
        guest, _ = door.accept()
        threading.Thread(target=_admit, args=(guest, port, who, guests), daemon=True).start()


def _admit(guest: socket.socket, port: int, who: dict[str, Any], guests: Guests) -> None:
    with guest, contextlib.suppress(OSError):
        guest.settimeout(HELLO_TIMEOUT_S)
        if _first_bytes(guest) == HELLO:
            guest.recv(len(HELLO))  # unread, it would make the close a reset
            guest.sendall(json.dumps(who).encode() + b"\n")
            return
        guest.settimeout(None)
        with guests, _connection(port) as worker:
            for end in (guest, worker):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_pass, args=(worker, guest), daemon=True)
            back.start()
            _pass(guest, worker)
            back.join()


def _first_bytes(guest: socket.socket) -> bytes:
    """As many bytes as HELLO has, left unread; fewer if the guest left."""
    deadline = time.monotonic() + HELLO_TIMEOUT_S
    while time.monotonic() < deadline:
        seen = guest.recv(len(HELLO), socket.MSG_PEEK)
        if len(seen) == len(HELLO) or not seen:
            return seen
        time.sleep(0.01)
    raise TimeoutError


def _connection(port: int) -> socket.socket:
    """To TFF's worker, which may just be starting."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _pass(source: socket.socket, sink: socket.socket) -> None:
    """Bytes from one to the other until either closes, which then ends both."""
    with contextlib.suppress(OSError):
        while data := source.recv(PIECE):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
