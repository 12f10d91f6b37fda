"""What connects us to one worker, and notices when it is gone: `Post`, one per address, over all the worker's lives.

A connection that fails is over for good (`_Link`); if the worker comes back, it gets a new one. TFF alone would repeat
a failed request for ever, and wait for ever for a worker that hangs. So a small question is put to the worker every
second, on a connection of its own, which a large value under way does not hold up; a worker that answers nothing for
`patience_s` is lost, and the requests that wait for it are cancelled.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from covey_coordinator.aggregation.worker import GRPC_OPTIONS, WithoutSubscriptions, execution_context
from covey_coordinator.simulation import gate
from covey_coordinator.simulation.addresses import split_address
from covey_protocol.errors import MachineError

PROBE_S = 1.0
ANSWER_S = 10.0  # for the hello and for one probe; one that has just thrown its memory away needs 1 s
MAX_HELLO_BYTES = 4096
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 1000))
NOTHING_TO_DISPOSE = "/tensorflow_federated.v0.ExecutorGroup/Dispose", b""  # a request that does nothing


class WorkerLost(Exception):
    """This worker computes no more for us. Never retryable for TFF."""


class Post:
    """One address and whoever works there. `open` first; `close` ends it.

    note: told, a sentence, when a worker is lost or comes back.
    """

    def __init__(self, address: str, patience_s: float, note: Callable[[str], None]) -> None:
        self.address = address
        self._patience_s, self._note = patience_s, note
        self._link: _Link | None = None
        self._told: _Link | None = None  # the last one whose loss was told
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._refusal = "not connected yet"

    def open(self) -> str:
        """Connect and watch. Returns why not, empty if connected. Raises MachineError for another version of TFF."""
        self._try_to_connect()
        if not self.is_living:
            return f"worker {self.address}: {self._refusal}"
        threading.Thread(target=self._watch, daemon=True, name=f"watch {self.address}").start()
        return ""

    def close(self, reason: str) -> None:
        self._closed.set()
        if self._link is not None:
            self._link.end(reason)

    @property
    def is_living(self) -> bool:
        return self._link is not None and not self._link.lost

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    @property
    def reason(self) -> str:
        """Why it is not living."""
        return (self._link is not None and self._link.lost) or self._refusal

    @property
    def reads_our_files(self) -> bool:
        return self._link is not None and self._link.who.get("place") == gate.place()

    def invoke(self, computation: Any, argument: Any, compiler: Callable[[Any], Any]) -> Any:
        """Raises WorkerLost; what TFF raises otherwise is the computation's own error."""
        link = self._link
        if link is None or link.lost:
            raise WorkerLost(self.reason)
        try:
            return link.context(compiler).invoke(computation, argument)
        except WorkerLost:
            self._tell_loss(link)
            raise

    def _watch(self) -> None:
        while not self._closed.wait(PROBE_S):
            link = self._link
            if link is not None and not link.lost:
                link.probe(self._patience_s)
                self._tell_loss(link)
            else:
                self._come_back()

    def _tell_loss(self, link: _Link) -> None:
        """Once, whoever notices it first; not when it was us who ended the link."""
        with self._lock:
            if link.lost and link is not self._told and not self.is_closed:
                self._told = link
                self._note(f"worker {self.address} was lost: {link.lost}")

    def _come_back(self) -> None:
        try:
            self._try_to_connect()
        except MachineError as error:
            self._refusal = str(error)
        if self.is_living:
            self._note(f"worker {self.address} is back")

    def _try_to_connect(self) -> None:
        try:
            who = hello(self.address)
        except (OSError, ValueError) as error:
            self._refusal = str(error) or type(error).__name__
            return
        check_same_tff(self.address, who)
        if self._link is not None and self.reads_our_files and who.get("place") != gate.place():
            self._refusal = "it is on another machine now, where our files are not"
            return
        link = _Link(self.address, who)
        if not link.answers(ANSWER_S):
            link.end("it does not answer")
            self._refusal = "TFF's worker behind the gate does not answer"
            return
        self._link = link
        if self._closed.is_set():  # meanwhile
            link.end("we disconnected")


class _Link:
    """One connection to one life of a worker. lost: why it is over, empty while it is not."""

    def __init__(self, address: str, who: dict[str, Any]) -> None:
        import grpc

        self.who, self.lost = who, ""
        self._channel = grpc.insecure_channel(address, (*GRPC_OPTIONS, *OWN_CONNECTION))
        self._probes = grpc.insecure_channel(address, OWN_CONNECTION)
        self._ask = self._probes.unary_unary(NOTHING_TO_DISPOSE[0])
        self._silent_since: float | None = None
        self._lock = threading.Lock()
        self._context: Any = None

    def context(self, compiler: Callable[[Any], Any]) -> Any:
        """Of TFF, made at the first call: it imports TFF."""
        with self._lock:
            if self._context is None:
                channel = WithoutSubscriptions(self._channel)
                self._context = execution_context(channel, lambda: not self.lost, compiler, self._told)
            return self._context

    def end(self, reason: str) -> None:
        """Cancel what is under way. The first reason stays."""
        self.lost = self.lost or reason
        self._channel.close()
        self._probes.close()

    def probe(self, patience_s: float) -> None:
        """Ask for a sign of life; end this link if there is none for too long, or nobody listens."""
        asked = time.monotonic()
        if self.answers(min(ANSWER_S, patience_s)):
            self._silent_since = None
            return
        self._silent_since = asked if self._silent_since is None else self._silent_since
        if time.monotonic() - self._silent_since >= patience_s:
            self.end(f"it has not answered for {patience_s:g} s")

    def answers(self, timeout_s: float) -> bool:
        """Whether TFF's worker answers in time. Ends this link where nobody listens any more."""
        import grpc

        try:
            self._ask(NOTHING_TO_DISPOSE[1], timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                self.end("its connection broke")
            return False
        except ValueError:  # closed meanwhile
            return False
        return True

    def _told(self, error: Exception) -> Exception:
        """WorkerLost for an error of the connection or a worker that knows our values no more."""
        import grpc
        import tensorflow_federated as tff

        if isinstance(error, tff.framework.RetryableError):
            gone = error.code() == grpc.StatusCode.UNAVAILABLE
            self.end("its connection broke" if gone else f"it refuses to go on: {error.details()}")
        return WorkerLost(self.lost) if self.lost else error


def hello(address: str) -> dict[str, Any]:
    """Who works there. Raises OSError where nobody answers, ValueError where it is no covey worker."""
    with socket.create_connection(split_address(address), timeout=ANSWER_S) as connection:
        connection.sendall(gate.HELLO)
        answer = b""
        while len(answer) < MAX_HELLO_BYTES and (piece := connection.recv(MAX_HELLO_BYTES)):
            answer += piece
    if not answer:
        raise ConnectionError("it closes the connection (a tunnel whose far end is gone, or not a covey worker)")
    with contextlib.suppress(ValueError):
        who = json.loads(answer)
        if isinstance(who, dict):
            return who
    raise ValueError("what listens there is not a covey worker")


def check_same_tff(address: str, who: dict[str, Any]) -> None:
    ours, theirs = version("tensorflow-federated"), who.get("tensorflow_federated")
    if ours != theirs:
        raise MachineError(
            f"worker {address} has TensorFlow Federated {theirs}, we have {ours}",
            "install the same version of covey on both machines",
        )
