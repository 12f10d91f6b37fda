"""Log lines of `covey serve`: plain, or one JSON object per line. Both go to standard error.

JSON lines hold time, level, event, and where they belong to one, round and device. What is logged is what `events`
hold and what the program's own warnings say: no keys, no passwords, no updates, no models.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, TextIO

import msgspec

from covey_coordinator.watching import events

PLAIN = "%(asctime)s %(levelname)s %(message)s"
FORMATS = ("plain", "json")
log = logging.getLogger("covey.events")


def set_up(kind: str) -> None:
    """Logs of level INFO and above go to what is standard error at the time: a live status takes it over and back."""
    handler = _StandardError()
    handler.setFormatter(JsonLines() if kind == "json" else logging.Formatter(PLAIN))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _StandardError(logging.StreamHandler[TextIO]):
    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class JsonLines(logging.Formatter):
    """event: "log" for a line that is only text, which is then in `message`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        facts: dict[str, Any] = getattr(record, "facts", None) or {"event": "log", "message": record.getMessage()}
        line = {"time": time, "level": record.levelname.lower(), **facts}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()  # NaN, which JSON has not, becomes null


class EventLog:
    """A watcher that logs what happens; of the devices' progress only what changed. For JSON lines."""

    def __init__(self) -> None:
        self._progress: dict[str, str] = {}

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            _log("run_started", fleet=event.fleet, run=event.run, rounds=event.rounds, done=event.done)
        elif isinstance(event, events.Waits):
            _log("waits", reason=event.reason)
        elif isinstance(event, events.RoundOpened):
            self._progress = {}
            facts: dict[str, Any] = {"number": event.number, "devices": list(event.devices), "quorum": event.quorum}
            facts.update({"evaluates": list(event.evaluates)} if event.evaluates else {})
            _log("round_resumed" if event.resumed else "round_opened", event.round, **facts, left_s=event.left_s)
        elif isinstance(event, events.PhaseBegan):
            _log("phase_began", event.round, phase=event.phase)
        elif isinstance(event, events.DevicesMoved):
            self._moved(event)
        elif isinstance(event, events.MessageCame) and event.online is not None:
            _log("device_online" if event.online else "device_offline", device=event.device)
        elif isinstance(event, events.DeviceRevoked):
            _log("device_revoked", device=event.device, reason=event.reason)
        elif isinstance(event, events.DeviceReadmitted):
            _log("device_readmitted", device=event.device)
        elif isinstance(event, events.RuleRan):
            _log("rule_ran", event.round, measurements=dict(event.measurements))
        elif isinstance(event, events.LeakageMeasured):
            _log("leakage_measured", event.round, measures=dict(event.measures))
        elif isinstance(event, events.RoundEnded):
            self._ended(event)
        elif isinstance(event, events.RunEnded):
            level, named = logging.ERROR if event.code else logging.INFO, {"run": event.run} if event.run else {}
            _log("run_ended", level=level, **named, code=event.code, reason=event.reason)

    def _moved(self, event: events.DevicesMoved) -> None:
        for device_id, word in event.progress.items():
            if self._progress.get(device_id) != word:
                self._progress[device_id] = word
                _log("device_moved", event.round, device_id, progress=word)

    def _ended(self, event: events.RoundEnded) -> None:
        for verdict in event.verdicts:
            facts: dict[str, Any] = {"status": verdict.status, "reason": verdict.reason, "score": verdict.score}
            facts["metrics"] = event.metrics.get(verdict.device_id, {})
            _log("verdict", event.round, verdict.device_id, **facts)
        end: dict[str, Any] = {"number": event.number, "outcome": event.outcome, "reason": event.reason}
        if event.evaluates:
            end["evaluates"] = list(event.evaluates)
        if event.evaluation:
            end["evaluation"] = [asdict(one) for one in event.evaluation]
        _log("round_ended", event.round, **end, seconds=round(event.seconds, 3))


def _log(event: str, round_id: str = "", device: str = "", *, level: int = logging.INFO, **facts: Any) -> None:
    where = {name: value for name, value in (("round", round_id), ("device", device)) if value}
    log.log(level, event, extra={"facts": {"event": event, **where, **facts}})
