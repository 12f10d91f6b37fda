"""One TCP connection to a broker, counted in both directions."""

from __future__ import annotations

import socket
import threading
import time


class CountingProxy:
    """Passes one connection on to the broker and counts both directions."""

    def __init__(self, port: int) -> None:
        self.up = self.down = 0
        self._broker = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        device, _ = self._listener.accept()
        broker = socket.create_connection(("127.0.0.1", self._broker))
        threading.Thread(target=self._pass, args=(broker, device, "down"), daemon=True).start()
        self._pass(device, broker, "up")

    def _pass(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(65536):
                setattr(self, direction, getattr(self, direction) + len(data))
                sink.sendall(data)
        except OSError:
            pass  # one side has closed
        for end in (source, sink):
            end.close()

    def settled(self) -> tuple[int, int]:
        """(up, down) once nothing has moved for half a second."""
        seen = (-1, -1)
        while seen != (self.up, self.down):
            seen = (self.up, self.down)
            time.sleep(0.5)
        return seen

    def close(self) -> None:
        self._listener.close()
