"""Devices that are only what a rollout sees of them: they hear of releases on a real broker and publish presences."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import TracebackType

import msgspec
from brokers import RunningBroker
from release_helpers import MAKER

from covey_edge.inbox import Inbox
from covey_edge.mqtt import Incoming, MqttTransport, parse_broker
from covey_protocol.codec import encode
from covey_protocol.messages import Presence
from covey_protocol.releases import is_for, is_newer, open_release
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

TOPICS = Topics("home")


def key_of(name: str) -> SealingKey:
    return SealingKey.from_seed(name.encode().ljust(32, b"."))


class Puppets:
    """bad: names that find every release bad. One connection speaks for all; a thread answers until `close`."""

    def __init__(self, broker: RunningBroker, names: tuple[str, ...], bad: tuple[str, ...] = ()) -> None:
        self.bad, self._number, self._inbox, self._ends = bad, 0, Inbox(), threading.Event()
        self.saying = {name: Presence(True, 1, "0.1.0") for name in names}
        self.took: list[tuple[str, str]] = []  # device and version
        self._serial = 0
        self._transport = MqttTransport(parse_broker(broker.url), "puppets", self._inbox)
        self._transport.subscribe([TOPICS.release])
        self._transport.connect()
        for name in names:
            self.say(name)
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def __enter__(self) -> Puppets:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()
        self._transport.close()

    def say(self, name: str, **changes: object) -> None:
        self._number += 1
        presence = self.saying[name] = msgspec.structs.replace(self.saying[name], **changes)
        topic = TOPICS.presence(name)
        data = encode(presence, topic=topic, sender=name, sequence=self._number, key=key_of(name))
        self._transport.publish(topic, data, retain=True)

    def _answer(self) -> None:
        while not self._ends.is_set():
            try:
                item = self._inbox.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(item, Incoming) and item.payload:
                self._hear(item.payload)

    def _hear(self, payload: bytes) -> None:
        release = open_release(payload, MAKER.public)
        if release.serial < self._serial:
            return
        self._serial = release.serial
        for name, said in self.saying.items():
            known = release.version in (said.bad or ()) or not is_newer(release.version, said.agent_version)
            if not is_for(release, name) or known:
                continue
            self.took.append((name, release.version))
            if name in self.bad:
                self.say(name, session=said.session + 2, bad=(release.version,), trouble="it ended with code 1")
            else:
                self.say(name, session=said.session + 1, agent_version=release.version, on_trial=True)
                self.say(name, session=said.session + 2, on_trial=msgspec.UNSET)


def write_roster(path: Path, names: tuple[str, ...]) -> Path:
    path.write_text("[devices]\n" + "".join(f'{name} = "{key_of(name).public.hex()}"\n' for name in names))
    return path
