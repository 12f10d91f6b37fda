"""A local HTTP endpoint for the model that this device keeps: `covey infer serve`. A process of its own.

    POST /predict   JSON {"x": [[...], ...]} or a .npy file -> JSON {"outputs": [[...], ...], ...} or .npy
    GET /model      which model answers, what it takes and how it scored
    GET /health     200 while it can answer

HTTP/1.1 by the standard library, so that applications need no client of ours. On a Unix socket of mode 600, or on TCP,
where every program of this machine reaches it: a token keeps the others out. Three paths and no files, so there is none
to climb out of. A request has a bounded size, and a connection that sends nothing for TIMEOUT_S is closed; at most
CONNECTIONS are open.

Against web pages: TCP requests must name this server as their Host (DNS rebinding), and a body must have a content type
that a page of another site may not send without asking; such a question is refused.
"""

from __future__ import annotations

import hmac
import io
import logging
import os
import socket
import socketserver
import stat
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Optional, Union

import msgspec
import numpy as np
import numpy.typing as npt

from covey_edge import __version__
from covey_edge.inference import Predictor, labels
from covey_edge.model_store import ModelStore
from covey_protocol.errors import ConfigError, CoveyError, DataError, TransportError

log = logging.getLogger("covey.inference")

MAX_BODY_BYTES = 16 * 2**20  # 80,000 digits as JSON; a photograph of 1000 x 1000 as .npy is 12 MB
TIMEOUT_S = 30.0
CONNECTIONS = 8  # each may hold a body
DRAINED_BYTES = 64 * 1024  # of a refused request's body; after more the connection ends
JSON, NPY = "application/json", "application/x-npy"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PATHS = {"/predict": "POST", "/model": "GET", "/health": "GET"}


class Refusal(Exception):
    """What a client hears: status, the thing and the remedy."""

    def __init__(self, status: HTTPStatus, error: str, remedy: str) -> None:
        super().__init__(error)
        self.status, self.error, self.remedy = status, error, remedy


class InferenceServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """address: a path of a Unix socket, or (host, port); port 0 for a free one. token: asked for where not empty."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self,
        predictor: Predictor,
        store: ModelStore,
        address: Union[Path, tuple[str, int]],
        token: str = "",
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.predictor, self.store, self.token, self.max_body_bytes = predictor, store, token, max_body_bytes
        self.unix = isinstance(address, Path)
        self.path = address if isinstance(address, Path) else None
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._bound = False
        self.address_family = socket.AF_UNIX if self.unix else _family(address)
        if self.path is not None:
            _clear(self.path)
        try:
            super().__init__(str(address) if self.unix else address, Handler)  # type: ignore[arg-type]
        except OSError as exc:
            raise TransportError(
                f"cannot listen on {address if self.unix else ':'.join(map(str, address))} ({exc.strerror})",  # type: ignore[arg-type]
                "use another port or path",
            ) from exc

    def server_bind(self) -> None:
        before = os.umask(0o177)  # a socket is reachable from the moment it is bound
        try:
            super().server_bind()
            self._bound = True
        finally:
            os.umask(before)

    def server_close(self) -> None:
        super().server_close()
        if self.path is not None and self._bound:
            self.path.unlink(missing_ok=True)

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread for each connection; those that are too many are closed, so that a flood costs no memory."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("a connection broke", exc_info=log.isEnabledFor(logging.DEBUG))


def _family(address: Any) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def _clear(path: Path) -> None:
    """Remove a socket that a killed server left. ConfigError where it is another thing or somebody listens."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise ConfigError(f"{path} cannot be used ({exc.strerror})", "choose another path") from exc
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is no socket", "choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise TransportError(f"another program listens on {path}", "end it, or choose another path")


class Handler(BaseHTTPRequestHandler):
    """One connection, which may carry many requests."""

    server: InferenceServer
    protocol_version = "HTTP/1.1"
    server_version = f"covey/{__version__}"
    sys_version = ""
    timeout = TIMEOUT_S
    wbufsize = -1  # a whole answer in one packet
    disable_nagle_algorithm = False

    def setup(self) -> None:
        if not self.server.unix:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        super().setup()

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        self._unread = True
        try:
            self._admitted(method)
            body = self._body()
            if self.path == "/predict":
                self._predict(body)
            elif self.path == "/model":
                self._send(HTTPStatus.OK, _encoded(self._model()), JSON)
            else:
                self._send(HTTPStatus.OK, _encoded({"status": "ok", "model": str(self.server.predictor.version)}), JSON)
        except Refusal as exc:
            self._refuse(exc)
        except DataError as exc:
            self._refuse(Refusal(HTTPStatus.BAD_REQUEST, exc.what, exc.remedy))
        except CoveyError as exc:
            log.error("%s", exc)
            self._refuse(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, exc.what, exc.remedy))

    def _body(self) -> bytes:
        """b"" where there is none. What is too large is not read: the connection ends."""
        length, most = self._length(), self.server.max_body_bytes
        if length is None:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "a body without a length", "send a Content-Length of bytes")
        if length > most:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body of {length} bytes", f"send at most {most}")
        data = self.rfile.read(length)
        if len(data) < length:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"a body of {len(data)} bytes, not {length}", "send it whole")
        self._unread = False
        return data

    def _length(self) -> Optional[int]:
        text = self.headers.get("Content-Length", "0").strip()
        known = "Transfer-Encoding" not in self.headers and text.isascii() and text.isdigit() and len(text) < 16
        return int(text) if known else None

    def _admitted(self, method: str) -> None:
        if not self.server.unix and self._host() not in (*LOOPBACK, str(self.server.server_address[0])):
            raise Refusal(HTTPStatus.MISDIRECTED_REQUEST, f"Host is {self._host()!r}", "use this machine's address")
        if self.server.token:
            given = self.headers.get("Authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
                raise Refusal(HTTPStatus.UNAUTHORIZED, "no token, or another one", "send Authorization: Bearer TOKEN")
        if self.path not in PATHS:
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is no {self.path[:80]!r}", f"use {', '.join(PATHS)}")
        if PATHS[self.path] != method:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"{method} {self.path}", f"use {PATHS[self.path]}")

    def _host(self) -> str:
        host = self.headers.get("Host", "")
        return host[1:].split("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0] if ":" in host else host

    def _predict(self, body: bytes) -> None:
        kind = self.headers.get_content_type()
        if kind not in (JSON, NPY):
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"a body of {kind}", f"send {JSON} or {NPY}")
        x = _from_json(body) if kind == JSON else from_npy(body)
        output, version, manifest = self.server.predictor.answered(x)
        if self.headers.get("Accept") == NPY:
            buffer = io.BytesIO()
            np.save(buffer, output)
            self._send(HTTPStatus.OK, buffer.getvalue(), NPY)
            return
        answer = {"outputs": output.tolist(), "classes": labels(output, manifest), "model": str(version)}
        self._send(HTTPStatus.OK, _encoded(answer), JSON)

    def _model(self) -> dict[str, Any]:
        predictor = self.server.predictor
        version, manifest, kept = predictor.version, predictor.manifest, self.server.store.load()
        return {
            "model": str(version),
            "name": manifest.name,
            "version": msgspec.to_builtins(version),
            "input": msgspec.to_builtins(manifest.input),
            "num_classes": manifest.num_classes,
            "class_names": manifest.class_names,
            "scores": msgspec.to_builtins(kept.history[-1]) if kept is not None and kept.history else None,
        }

    def _refuse(self, refusal: Refusal) -> None:
        if self._unread:  # the next request would begin in the middle of this one's body
            length = self._length()
            if length is None or length > DRAINED_BYTES or len(self.rfile.read(length)) < length:
                self.close_connection = True
        self._send(refusal.status, _encoded({"error": refusal.error, "remedy": refusal.remedy}), JSON)

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def address_string(self) -> str:
        return "unix" if self.server.unix else str(self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        """Of what the standard library says only at DEBUG: a request's line is the application's own business."""
        log.debug("%s %s", self.address_string(), (format % args).encode("ascii", "backslashreplace").decode())


def _encoded(answer: dict[str, Any]) -> bytes:
    return msgspec.json.encode(answer)  # null for what is no number, as a model that has diverged answers


def _from_json(body: bytes) -> npt.NDArray[Any]:
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise DataError(f"the body is no JSON ({exc})", 'send {"x": [[...], ...]}') from exc
    return from_lists(content["x"] if isinstance(content, dict) and set(content) == {"x"} else content)


def from_lists(content: object) -> npt.NDArray[Any]:
    """Nested lists of numbers as an array; DataError for anything else."""
    try:
        x = np.asarray(content)
    except ValueError as exc:
        raise DataError("the rows are not equally long", "send every example in the model's shape") from exc
    if not isinstance(content, list) or x.dtype.kind not in "fiub":
        raise DataError("the examples are no lists of numbers", 'send {"x": [[...], ...]}')
    return x


def from_npy(data: bytes) -> npt.NDArray[Any]:
    """Pickled objects are never loaded."""
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError, SyntaxError) as exc:
        raise DataError(f"not a .npy file ({str(exc)[:100]})", "write it with numpy.save") from exc
    if not isinstance(found, np.ndarray):
        raise DataError("not a .npy file but an archive", "send one array, written with numpy.save")
    return found
