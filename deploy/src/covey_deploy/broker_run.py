"""A local Mosquitto with a fleet's own configuration, in the foreground, as the user who asks for it.

The same access rules and settings as `covey broker config` writes; only the paths, the address and the user differ.
Files are read again by starting anew: Mosquitto 2.0.11 that gets SIGHUP while the session of a client waits for it to
come back reads freed memory when that session ends, and may crash (docs/broker.md).
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Optional

from covey_deploy import mosquitto
from covey_deploy.embedded_broker import check_port
from covey_edge.files import make_folder, write_atomic
from covey_edge.processes import die_with_parent
from covey_protocol.errors import ConfigError, MachineError, TransportError

RUN_CONFIG = "mosquitto-run.conf"
START_S = 30.0
POLL_S = 0.05
NEWEST_OLD = (1, 999)  # of Mosquitto versions that lack what the configuration asks for


def find_mosquitto() -> str:
    """The program's path. MachineError where it is not installed, or too old."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")
    if found is None:
        raise MachineError(
            "mosquitto is not installed, and covey's embedded broker knows neither certificates nor rights",
            "install it (Debian: apt install mosquitto)",
        )
    told = subprocess.run([found, "-h"], capture_output=True, text=True, check=False).stdout.split()
    version = tuple(int(part) for part in told[2].split(".")[:2] if part.isdigit()) if len(told) > 2 else ()
    if version <= NEWEST_OLD:
        raise MachineError(f"{found} is version {'.'.join(map(str, version))}", "install Mosquitto 2")
    return found


def run(
    fleet: str, folder: Path, host: Optional[str], port: int, ready: Callable[[str], None], say: Callable[[str], None]
) -> int:
    """Until Mosquitto ends; its exit code. SIGINT and SIGTERM end it, SIGHUP makes it read its files again:
    Mosquitto ends in order, keeping what is retained, and starts anew. With a torn file it is left as it runs.

    folder: with its certificates, where the configuration and the data go, too. port: 0 for a free one. ready: gets the
    address. Raises MachineError, TransportError (the port is taken), ConfigError (Mosquitto does not take its files).
    """
    program = find_mosquitto()
    port = port or _free_port(host)
    check_port(host or "", port)
    config = write_run_config(fleet, folder, host, port)
    running = _Running(program, config)
    _obey_signals(running, folder, say)
    _wait_until_open(running.child, host or "127.0.0.1", port, config)
    ready(f"mqtts://{host or socket.gethostname()}:{port}")
    code = running.child.wait()
    while running.again:
        running.start()
        _wait_until_open(running.child, host or "127.0.0.1", port, config)
        code = running.child.wait()
    if code > 0:
        say(f"mosquitto ended with code {code}")
    return max(code, 0)


class _Running:
    """The Mosquitto of now. again: it ends so that another starts. over: none is to follow it."""

    def __init__(self, program: str, config: Path) -> None:
        self._command = [program, "-c", str(config)]
        self.over = False
        self.start()

    def start(self) -> None:
        self.again = False
        self.child = subprocess.Popen(
            self._command,
            preexec_fn=functools.partial(die_with_parent, os.getpid(), signal.SIGTERM),
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
        if self.over:  # a signal came between the two
            self.child.terminate()

    def end(self, again: bool) -> None:
        self.over = self.over or not again
        self.again = not self.over
        self.child.terminate()


def write_run_config(fleet: str, folder: Path, host: Optional[str], port: int) -> Path:
    """The configuration and the access rules beside the certificates; the folder of the data. StorageError."""
    folder = folder.resolve()
    lacking = [name for name in mosquitto.CERTIFICATE_FILES if not (folder / name).is_file()]
    if lacking:
        raise ConfigError(f"{folder} lacks {', '.join(lacking)}", "make the fleet's folder: covey provision init")
    data = folder / "data"
    make_folder(data)
    data.chmod(0o700)  # what is retained is nobody else's
    user = pwd.getpwuid(os.geteuid()).pw_name
    settings = mosquitto.Settings(fleet, str(folder), str(data), port, host, user=user)
    write_atomic(folder / mosquitto.ACL_NAME, mosquitto.acl(fleet).encode(), mode=0o600)
    write_atomic(folder / RUN_CONFIG, mosquitto.config(settings).encode())
    return folder / RUN_CONFIG


def check_certificates(folder: Path) -> None:
    """ConfigError where one of the files in PEM form is torn, or key.pem is not that of cert.pem."""
    path, key, *trusted = (folder / name for name in mosquitto.CERTIFICATE_FILES)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(path, key)
        for path in trusted:
            context.load_verify_locations(path)
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(f"{path} cannot be used ({exc})", "copy it again, whole") from exc


def _free_port(host: Optional[str]) -> int:
    with socket.socket() as probe:
        probe.bind((host or "", 0))
        port: int = probe.getsockname()[1]
        return port


def _obey_signals(running: _Running, folder: Path, say: Callable[[str], None]) -> None:
    def obey(number: int, frame: Optional[FrameType]) -> None:
        again = number == signal.SIGHUP
        if again:
            try:
                check_certificates(folder)
            except ConfigError as exc:
                say(f"goes on with the files that were read before: {exc}")
                return
        running.end(again)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, obey)


def _wait_until_open(child: subprocess.Popen[bytes], host: str, port: int, config: Path) -> None:
    """Until the port takes connections, and signals do no harm any more."""
    end = time.monotonic() + START_S
    while child.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0 and takes_hangup(child.pid):
                return
        time.sleep(POLL_S)
    if child.poll() is None:
        child.kill()
        child.wait()
        raise TransportError(f"mosquitto did not listen on {host}:{port} within {START_S:g} s", "look at its lines")
    if child.returncode > 0:
        raise ConfigError(f"mosquitto does not take {config}", "its own lines above say why")


def takes_hangup(pid: int) -> bool:
    """Whether SIGHUP would be handled: Mosquitto listens a moment before that. True outside of Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)
