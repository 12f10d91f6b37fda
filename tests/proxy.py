"""A TCP proxy in front of a broker: counts bytes, and throttles, stalls and cuts connections."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Passes connections on to `port` on loopback and counts both directions (up: towards the broker).

    bytes_per_s: how fast each direction of a connection may be; 0 for as fast as it goes.
    cut_every: every connection is cut (reset, as by a router) after so many bytes upwards; 0 for never.
    """

    PIECE = 4096

    def __init__(self, port: int, bytes_per_s: int = 0, cut_every: int = 0) -> None:
        self.up = self.down = self.connections = self.cuts = 0
        self.bytes_per_s, self.cut_every = bytes_per_s, cut_every
        self._broker = port
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def stall(self) -> None:
        """Let nothing through, and close nothing: a dead radio link."""
        self._flowing.clear()

    def go_on(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        """Reset all connections."""
        self.cuts += 1
        ends, self._open = self._open, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def settled(self) -> tuple[int, int]:
        """(up, down) once nothing has moved for half a second."""
        seen = (-1, -1)
        while seen != (self.up, self.down):
            seen = (self.up, self.down)
            time.sleep(0.5)
        return seen

    def close(self) -> None:
        self._listener.close()
        self.go_on()
        self.cut()

    def _serve(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                broker = socket.create_connection(("127.0.0.1", self._broker))
            except OSError:
                device.close()
                continue
            self.connections += 1
            self._open += [device, broker]
            for source, sink, direction in ((device, broker, "up"), (broker, device, "down")):
                threading.Thread(target=self._pass, args=(source, sink, direction), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        passed = 0
        with contextlib.suppress(OSError):  # one side has closed
            while data := source.recv(self.PIECE):
                self._flowing.wait()
                if self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
                passed += len(data)
                if direction == "up" and self.cut_every and passed > self.cut_every:
                    self.cuts += 1
                    break
                setattr(self, direction, getattr(self, direction) + len(data))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
