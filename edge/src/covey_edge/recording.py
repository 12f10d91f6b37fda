"""Recording a fleet's conversation from a broker, and judging a recorded file by covey_protocol.transcript.

The recorder only listens. It needs the right to read all topics of the fleet.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from covey_edge.inbox import Inbox
from covey_edge.mqtt import Broker, ConnectionDown, Incoming, MqttTransport, Refused
from covey_protocol.errors import ConfigError, PeerError, StorageError
from covey_protocol.keys import Keys
from covey_protocol.topics import Topics, check_name
from covey_protocol.transcript import Judge, Record, fleet_of, violations, write_record


def check_file(
    path: Path,
    fleet: Optional[str],
    coordinator: Optional[Keys],
    keys: Optional[Mapping[str, Keys]],
    say: Callable[[str], None],
) -> int:
    """Say each violation of a transcript, and what was not checked; how many there are. ConfigError if it is empty."""
    try:
        with path.open("rb") as file:
            first = next(iter(file), b"")
            if not first:
                raise ConfigError(f"{path} is empty", "record again, before a round starts")
            judge = Judge(check_name(fleet or _fleet(path, first), "fleet"), coordinator, keys)
            file.seek(0)
            count = 0
            for violation in violations(judge, file):
                say(str(violation))
                count += 1
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read ({exc.strerror})", "check the path and the permissions") from exc
    for sender, messages in sorted(judge.unchecked.items()):
        say(f"not checked: the seals of {messages} messages of {sender}; give --coordinator-key and --roster")
    say(f"{judge.messages} messages, {count} violation{'' if count == 1 else 's'}")
    return count


def _fleet(path: Path, first: bytes) -> str:
    try:
        return fleet_of(first)
    except PeerError as exc:
        raise ConfigError(f"{path}, line 1: {exc.what}", "give --fleet, or another file") from exc


class Recorder:
    """Listens to one fleet and writes what comes to a new file, line by line."""

    def __init__(self, broker: Broker, fleet: str, path: Path) -> None:
        self._path = path
        self._inbox = Inbox()
        # a point is in no device's id, so that no device is thrown out
        self._transport = MqttTransport(broker, f"covey-{fleet}.recorder-{os.getpid()}", self._inbox)
        self._transport.subscribe([f"{Topics(fleet).root}/#"])

    def run(self, seconds: Optional[float], say: Callable[[str], None]) -> int:
        """Record until SIGINT or SIGTERM, or for so long; how many messages came. Blocks.

        Raises TransportError, or StorageError where the file cannot be written or is there already.
        """
        count = 0
        with _until_signalled(lambda: self._inbox.put(None)), self._opened() as file:
            self._transport.connect()
            started = time.monotonic()
            end = None if seconds is None else started + seconds
            say(f"recording into {self._path}")
            try:
                while (item := self._next(end)) is not None:
                    if isinstance(item, Incoming):
                        elapsed = round(time.monotonic() - started, 3)
                        file.write(write_record(Record(elapsed, item.topic, item.payload, item.retained)))
                        count += 1
                    elif isinstance(item, Refused):
                        raise item.error
                    elif isinstance(item, ConnectionDown):
                        say(f"connection lost ({item.reason}), trying again: the recording has a gap")
            except OSError as exc:
                raise StorageError(f"cannot write {self._path} ({exc.strerror})", "free some space") from exc
            finally:
                self._transport.close()
        return count

    def _opened(self) -> Any:
        try:
            return self._path.open("xb")
        except OSError as exc:
            raise StorageError(f"cannot write {self._path} ({exc.strerror})", "give another --output") from exc

    def _next(self, end: Optional[float]) -> Any:
        """The next item, None when it is time to stop."""
        try:
            return self._inbox.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except queue.Empty:
            return None


@contextlib.contextmanager
def _until_signalled(stop: Callable[[], None]) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
