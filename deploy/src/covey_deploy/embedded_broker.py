"""The embedded MQTT broker: amqtt on one address, for demos, tests and desks without Mosquitto.

MQTT 3.1.1, no persistence, no TLS: for a fleet use a real broker. Listens on loopback unless told otherwise. Runs in a
process of its own, so that the coordinator's work does not delay the fleet's messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

from covey_protocol.errors import TransportError


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(host: str, port: int) -> None:
    """TransportError if nothing can listen there."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise TransportError(
                f"port {port} on {host} is in use", "stop that program or choose another with --port", transient=False
            ) from exc
        raise TransportError(
            f"cannot listen on {host}:{port} ({exc.strerror})", "choose another address", transient=False
        ) from exc


def run(host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. port 0 picks a free one; `ready` is called with the broker's address."""
    port = port or free_port(host)
    check_port(host, port)
    logging.getLogger("amqtt").setLevel(logging.CRITICAL)
    logging.getLogger("transitions").setLevel(logging.CRITICAL)
    asyncio.run(_serve(host, port, ready))


async def _serve(host: str, port: int, ready: Callable[[str], None]) -> None:
    from amqtt.broker import Broker

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    config: dict[str, Any] = {
        "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}", "max_connections": 0}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    broker = Broker(config)
    await broker.start()
    ready(f"mqtt://{host}:{port}")
    await stop.wait()
    with contextlib.suppress(Exception):  # amqtt may complain about clients that left while it closes
        await asyncio.wait_for(broker.shutdown(), 5)
