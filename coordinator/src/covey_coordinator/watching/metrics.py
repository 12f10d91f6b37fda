"""The Prometheus metrics of a coordinator, in the text exposition format 0.0.4, over plain HTTP.

Nobody is asked who they are: listen on loopback, or behind something that asks. Names: docs/coordinator.md.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from covey_coordinator.watching.board import State
from covey_protocol.errors import ConfigError, TransportError

DEFAULT_LISTEN = "127.0.0.1:9464"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_TIMEOUT_S = 10.0  # of a client that connects and says nothing

Samples = Mapping[tuple[tuple[str, str], ...], float]  # labels -> value


class Metric(NamedTuple):
    name: str
    kind: str
    help: str
    samples: Samples


class Traffic(NamedTuple):
    """Bytes of MQTT payloads, and of the run's folder."""

    received: int
    sent: int
    stored: int


def exposition(state: State, traffic: Traffic, now: float) -> str:
    """The page that a scrape reads. now: in the time of the state."""
    return "".join(_text(metric) for metric in metrics(state, traffic, now))


def metrics(state: State, traffic: Traffic, now: float) -> list[Metric]:
    online = sum(line.online for line in state.devices.values())
    left_s = max(0.0, state.deadline_at - now) if state.phase else 0.0
    found = [
        Metric("covey_rounds_total", "counter", "Rounds that ended.", _by("outcome", state.outcomes, ENDINGS)),
        Metric("covey_rounds_published", "gauge", "Published rounds, all starts.", _one(_sum(state, "done"))),
        Metric("covey_rounds_asked", "gauge", "Rounds there shall be.", _one(_sum(state, "rounds"))),
        Metric("covey_round_deadline_left_seconds", "gauge", "0 where no round is open.", _one(left_s)),
        Metric("covey_devices_online", "gauge", "Devices that are connected.", _one(online)),
        Metric(
            "covey_updates_acknowledged_total", "counter", "Updates kept and acknowledged.", _one(state.acknowledged)
        ),
        Metric("covey_updates_rejected_total", "counter", "Verdict rejected.", _by("reason", state.rejected, REASONS)),
        Metric("covey_updates_missing_total", "counter", "Invited, but no update.", _by("reason", state.missing)),
        Metric("covey_received_bytes_total", "counter", "Payload bytes received over MQTT.", _one(traffic.received)),
        Metric("covey_sent_bytes_total", "counter", "Payload bytes sent over MQTT.", _one(traffic.sent)),
        Metric("covey_phase_seconds_total", "counter", "Time in a phase.", _by("phase", state.phase_seconds)),
        Metric("covey_phases_total", "counter", "How many times a phase ended.", _by("phase", state.phase_count)),
        Metric("covey_rule_measurement", "gauge", "Newest round, by rule.", _by("name", state.measurements)),
        Metric("covey_leakage", "gauge", "Newest round, by measure.", _by("measure", state.leakage)),
        Metric("covey_store_bytes", "gauge", "Disk used by the run's folder.", _one(traffic.stored)),
    ]
    if state.max_score is not None and state.median_score is not None:
        scores = {"max": state.max_score, "median": state.median_score}
        found.append(Metric("covey_rule_score", "gauge", "Newest round; larger is more suspicious.", _by("of", scores)))
    if len(state.runs) > 1:
        done = {run: float(line.done) for run, line in state.runs.items()}
        found.append(Metric("covey_run_rounds_published", "gauge", "Of each task's run.", _by("run", done)))
    return found + _evaluations(state)


def _sum(state: State, name: str) -> int:
    return sum(getattr(line, name) for line in state.runs.values())


def _evaluations(state: State) -> list[Metric]:
    """Of every run that has had one since the start."""
    runs = {run: line for run, line in state.runs.items() if line.evaluation}
    if not runs:
        return []
    values: Samples = {
        (("run", run), ("metric", one.name), ("of", of)): float(getattr(one, of))
        for run, line in runs.items()
        for one in line.evaluation
        for of in ("mean", "median", "spread")
    }
    numbers = {run: float(line.evaluated) for run, line in runs.items()}
    return [
        Metric("covey_evaluation", "gauge", "Newest evaluation over the devices.", values),
        Metric("covey_evaluation_round", "gauge", "Whose model that was.", _by("run", numbers)),
    ]


ENDINGS = ("published", "abandoned")
REASONS = ("rule", "screening", "round_abandoned", "revoked")


def _one(value: float) -> Samples:
    return {(): float(value)}


def _by(label: str, values: Mapping[str, float], always: Iterable[str] = ()) -> Samples:
    names = sorted({*values, *always})
    return {((label, name),): float(values.get(name, 0.0)) for name in names}


def _text(metric: Metric) -> str:
    lines = [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
    for labels, value in metric.samples.items():
        inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels)
        lines.append(f"{metric.name}{f'{{{inside}}}' if inside else ''} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def disk_used(folder: Path) -> int:
    """Bytes of all files below the folder. Files that vanish meanwhile do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name), follow_symlinks=False).st_blocks * 512
            except OSError:
                continue
    return total


def parse_listen(text: str) -> tuple[str, int]:
    """HOST:PORT; an IPv6 host in brackets."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.path or parts.username:
        raise ConfigError(f"[metrics] listen = {text!r}", f'write "HOST:PORT", for example "{DEFAULT_LISTEN}"')
    return host, port


class MetricsServer:
    """Answers GET /metrics with what `page` gives, in threads of its own, until `close`."""

    def __init__(self, listen: str, page: Callable[[], str]) -> None:
        host, port = parse_listen(listen)
        kind = _Server6 if ":" in host else ThreadingHTTPServer
        try:
            self._server = kind((host, port), _handler(page))
        except OSError as exc:
            raise TransportError(
                f"metrics cannot be served on {listen} ({exc.strerror or exc})", "choose another [metrics] listen"
            ) from exc
        self._server.daemon_threads = True
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server6(ThreadingHTTPServer):
    import socket

    address_family = socket.AF_INET6


def _handler(page: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            body = page().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A scrape every few seconds is no news."""

    return Handler


class StoreSize:
    """disk_used, measured at most every 10 s: a folder can hold many files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._bytes, self._at = folder, 0, float("-inf")

    def __call__(self) -> int:
        if time.monotonic() - self._at >= 10.0:
            self._bytes, self._at = disk_used(self._folder), time.monotonic()
        return self._bytes
