"""`covey worker`: this machine computes for simulations that run elsewhere. Imports no TensorFlow, ever.

The work is done by `gate.py` in a process of its own; this is its parent, which reads the options, says what happens
and ends it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import IO, Any

import click

from covey_coordinator.aggregation.worker import LAUNCHER, worker_binary
from covey_coordinator.simulation import gate
from covey_coordinator.simulation.addresses import split_address
from covey_protocol.errors import ConfigError, CoveyError, MachineError, TransportError

DEFAULT_LISTEN = "127.0.0.1:8470"
POLL_S = 0.2
STOP_TIMEOUT_S = 10.0


@click.command(name="worker", short_help="Compute for simulations on other machines.")
@click.option("--listen", default=DEFAULT_LISTEN, show_default=True, help="HOST:PORT; port 0 takes a free one.")
@click.option("--log", type=click.File("ab"), help="File for the output of TFF's worker [standard error].")
@click.option("--memory-limit-mb", type=click.IntRange(1000), help="Address space of TFF's worker [any].")
@click.option("--trusted-network", is_flag=True, help="Allow --listen on other addresses than loopback.")
@click.option(
    "--unconfined", is_flag=True, help="Where no network namespace can be had. TFF's worker is then open to all."
)
def worker_command(
    listen: str, log: IO[bytes] | None, memory_limit_mb: int | None, trusted_network: bool, unconfined: bool
) -> None:
    """Run TFF's worker until SIGTERM or Ctrl-C, for `workers = ["HOST:PORT", ...]` of an experiment.

    Whoever can connect runs anything TensorFlow can do, as this user: nothing asks who is there. The worker listens on
    loopback; come to it through an SSH tunnel or WireGuard (docs/scale-out.md).
    """
    from covey_edge.processes import interrupted_by_signals

    host, port = checked_listen(listen, trusted_network)
    if unconfined:
        click.echo("covey worker: WARNING: TFF's worker listens on ALL interfaces, on a port of its own", err=True)
    check = interrupted_by_signals(at_once=False)
    settings = {"host": host, "port": port, "confined": not unconfined, "memory_limit_mb": memory_limit_mb or 0}
    with contextlib.suppress(KeyboardInterrupt), _gate(settings, log) as said:
        run(said, check)
    click.echo("covey worker: stopped")


def checked_listen(listen: str, trusted_network: bool) -> tuple[str, int]:
    """Host and port. Raises ConfigError for an address beyond loopback, unless the network is said to be trusted."""
    host, port = split_address(listen)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(
            f"--listen {listen}: {host} is not an address of this machine", "give 127.0.0.1:PORT"
        ) from None
    if not loopback and not trusted_network:
        raise ConfigError(
            f"--listen {listen} is open to the network, and whoever connects runs code as this user",
            "listen on 127.0.0.1 and use a tunnel (docs/scale-out.md), or add --trusted-network for WireGuard",
        )
    if not loopback:
        click.echo(f"covey worker: WARNING: whoever reaches {listen} runs code as this user", err=True)
    return host, port


def run(said: Callable[[], dict[str, Any] | None], check: Callable[[], None]) -> None:
    """Tell what the gate says, until a signal (KeyboardInterrupt) or the worker's end, an error."""
    while True:
        check()
        line = said()
        if line is None:
            continue
        if "listening" in line:
            click.echo(f"covey worker: listening on {line['listening']}, TFF {version('tensorflow-federated')}")
        else:
            raise _error(line)


def _error(line: dict[str, Any]) -> CoveyError:
    if "refused" in line:
        kind = TransportError if line["kind"] == ["listen"] else MachineError
        return kind(line["refused"], line["remedy"])
    told = f"TFF's worker ended with code {line['ended']}" if "ended" in line else "the gate of TFF's worker ended"
    return MachineError(told, "look at its output and at the free memory, then start it again")


@contextlib.contextmanager
def _gate(settings: dict[str, Any], output: IO[bytes] | None) -> Iterator[Callable[[], dict[str, Any] | None]]:
    """The gate's process; what it says next, or None after POLL_S of silence. It is gone when the block is left."""
    told = {**settings, "binary": str(worker_binary()), "launcher": LAUNCHER, "parent": os.getpid(), "who": who()}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", gate.__file__, json.dumps(told)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=output,
        start_new_session=True,  # Ctrl-C in the terminal is for us
    )
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    assert process.stdout is not None  # it is a pipe
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()

    def said() -> dict[str, Any] | None:
        with contextlib.suppress(queue.Empty):
            return lines.get(timeout=POLL_S)
        return None

    try:
        yield said
    finally:
        _stop(process)


def _read(pipe: IO[bytes], lines: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in pipe:
        lines.put(json.loads(line))
    lines.put({})  # its end, said last


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:  # a killed gate takes its worker along
        process.kill()
        process.wait()


def who() -> dict[str, Any]:
    """What a worker answers to HELLO, and what a coordinator holds it against."""
    return {
        "covey": version("covey-coordinator"),
        "tensorflow_federated": version("tensorflow-federated"),
        "place": gate.place(),
    }
