"""Counting abandoned rounds by a coordinator's metrics, as a real exposition writes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from covey_deploy.rollout.metrics import abandoned_rounds
from covey_protocol.errors import ConfigError, TransportError

PAGES = {
    "/metrics": (
        "# TYPE covey_rounds_total counter\n"
        'covey_rounds_total{outcome="published"} 12\n'
        'covey_rounds_total{outcome="abandoned"} 3\n'
    ),
    "/other": 'http_requests_total{code="200"} 3\n',
}


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PAGES[self.path].encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_abandoned_rounds_are_read_and_other_addresses_named(url: str) -> None:
    assert abandoned_rounds(f"{url}/metrics") == 3
    with pytest.raises(ConfigError, match="does not count rounds"):
        abandoned_rounds(f"{url}/other")
    with pytest.raises(ConfigError, match="no address of metrics"):
        abandoned_rounds("file:///etc/passwd")
    with pytest.raises(TransportError, match="does not answer"):
        abandoned_rounds("http://127.0.0.1:1/metrics")
