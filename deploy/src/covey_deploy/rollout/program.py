"""A rollout at work: joins the journal, the broker, the clock and whoever looks on. All decisions are `state.decide`'s.

One loop in one thread. Whatever is done to the broker was journaled before, and is done again after a kill: it is the
same bytes. While the broker cannot be heard nothing is decided.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol

import msgspec

from covey_deploy.rollout.journal import STOP, Journal
from covey_deploy.rollout.metrics import abandoned_rounds
from covey_deploy.rollout.state import (
    ENDED,
    Phase,
    Published,
    Rounds,
    Saw,
    State,
    Stopped,
    Stopping,
    decide,
)
from covey_deploy.rollout.watching import Watch, seen_as
from covey_edge.inbox import Inbox
from covey_edge.mqtt import Broker, ConnectionDown, ConnectionUp, Incoming, MqttTransport, Refused
from covey_edge.releasing import check_size, put_release
from covey_protocol.errors import ReleaseError, TransportError
from covey_protocol.keys import Keys
from covey_protocol.releases import Release, open_release, read_release_file
from covey_protocol.seals import PublicKey

TICK_S = 0.5
SETTLE_S = 3.0  # after the connection: for what the broker retains to come, before anything is decided
AGAIN_S = 10.0  # between attempts to publish, and looks at the metrics
PATIENCE_S = 5.0  # at most for a look at a fleet
QUIET_S = 1.5  # without a message: then what was retained has come


@dataclass(frozen=True)
class Desk:
    """Where a fleet is, as its operator reaches it. key: of who makes releases, its public half. revoked: devices whose
    certificates were taken back, as far as this desk knows."""

    broker: Broker
    fleet: str
    roster: Mapping[str, Keys]
    rollouts: Path
    key: PublicKey
    revoked: frozenset[str] = frozenset()

    @property
    def standing(self) -> tuple[str, ...]:
        """The devices that a rollout is for: those that a broker lets in."""
        return tuple(sorted(self.roster.keys() - self.revoked))


class Shows(Protocol):
    """What is told while it goes on."""

    def state(self, state: State, now: float) -> None: ...

    def say(self, text: str) -> None: ...


class Rollout:
    """Runs until the rollout ends. Raises StorageError, TransportError where the broker refuses or is not there."""

    def __init__(self, desk: Desk, journal: Journal, shows: Shows, clock: Callable[[], float] = time.time) -> None:
        self._desk, self._journal, self._shows, self._clock = desk, journal, shows, clock
        self._watch = Watch(desk.fleet, desk.roster)
        self._inbox = Inbox()
        self._settled = float("inf")  # monotonic time from which on the broker's word is known
        self._there: Optional[Release] = None  # that the broker has, as far as it was heard
        self._unheard: set[str] = set()  # devices of which this connection has brought nothing yet
        self._try_at = self._metrics_at = 0.0
        self._wheels = read_release_file(journal.release(), desk.key)[2]

    def run(self) -> State:
        name = f"covey-{self._desk.fleet}-rollout-{os.getpid()}"
        transport = self._transport = MqttTransport(self._desk.broker, name, self._inbox)
        transport.connect()
        try:
            while self._journal.state.phase not in ENDED:
                self._take_all()
                self._obey_operator()
                if time.monotonic() >= self._settled:
                    self._miss()
                    self._look_at_rounds()
                    self._go_on()
                self._shows.state(self._journal.state, self._now())
        finally:
            transport.close()
        return self._journal.state

    def _now(self) -> float:
        """Never before what has happened, whatever is done to the clock."""
        return max(self._clock(), self._journal.state.at)

    # --- what comes in

    def _take_all(self) -> None:
        wait_s = TICK_S
        while True:
            try:
                item = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                return
            self._take(item)
            wait_s = 0.0

    def _take(self, item: object) -> None:
        if isinstance(item, ConnectionUp):
            self._listen()
        elif isinstance(item, ConnectionDown):
            self._settled = float("inf")
            self._shows.say(f"the broker is lost ({item.reason}); nothing is decided until it is back")
        elif isinstance(item, Refused):
            raise item.error
        elif isinstance(item, Incoming) and item.topic == self._watch.topics.release:
            self._hear_release(item.payload)
        elif isinstance(item, Incoming):
            self._hear_device(item.topic, item.payload)

    def _listen(self) -> None:
        """Have all retained again, also where the broker has kept our session: what it has lost is known by that."""
        topics = self._watch.topics
        self._transport.subscribe([topics.all_presence, topics.release])
        self._unheard = set(self._journal.state.plan.roster)
        self._settled = time.monotonic() + SETTLE_S

    def _miss(self) -> None:
        """A device of which a broker knows nothing is away, whatever it was before the broker lost its memory."""
        for device_id in sorted(self._unheard & self._journal.state.devices.keys()):
            saw = self._journal.state.devices[device_id].saw
            if saw.online:
                self._journal.add(Saw(self._now(), device_id, False, saw.session))
        self._unheard.clear()

    def _hear_device(self, topic: str, payload: bytes) -> None:
        device_id = self._watch.take(topic, payload)
        if device_id not in self._journal.state.plan.roster:
            return
        self._unheard.discard(device_id)
        saw = seen_as(device_id, self._watch.newest[device_id], 0.0)
        known = self._journal.state.devices.get(device_id)
        if known is None or _differs(known.saw, saw):
            self._journal.add(msgspec.structs.replace(saw, at=self._now()))

    def _hear_release(self, payload: bytes) -> None:
        """Another one of the same maker with a newer serial holds from now on, for every device."""
        other, plan = _opened(payload, self._desk.key), self._journal.state.plan
        self._there = other or self._there
        if other is not None and other.serial > plan.serial + len(plan.rings):
            reason = f"another release took its place: {other.version}, serial {other.serial}"
            self._journal.add(Stopping(self._now(), reason, withdraw=False))

    def _obey_operator(self) -> None:
        path = self._desk.rollouts / STOP
        if path.exists():
            if self._journal.state.phase is not Phase.STOPPING:
                self._journal.add(Stopping(self._now(), "its operator stopped it"))
            path.unlink(missing_ok=True)

    def _look_at_rounds(self) -> None:
        url = self._journal.state.plan.gates.metrics
        if not url or time.monotonic() < self._metrics_at:
            return
        self._metrics_at = time.monotonic() + AGAIN_S
        try:
            count = abandoned_rounds(url)
        except TransportError as exc:
            self._shows.say(f"{exc}")
            return
        if count != self._journal.state.counted:
            self._journal.add(Rounds(self._now(), count))

    # --- what is done

    def _go_on(self) -> None:
        """All that is due now, each step durable before the next."""
        while True:
            phase = self._journal.state.phase
            if phase is Phase.OPENING or phase is Phase.STOPPING:
                if not self._publish(phase):
                    return
                continue
            event = decide(self._journal.state, self._now())
            if event is None:
                return
            self._journal.add(event)
            if self._journal.state.phase in ENDED:
                return

    def _publish(self, phase: Phase) -> bool:
        """Whether the broker has it, and the journal knows."""
        state = self._journal.state
        if time.monotonic() < self._try_at:
            return False
        ring = state.ring if phase is Phase.OPENING else len(state.plan.rings)
        try:
            if phase is Phase.OPENING or state.withdraw:
                self._put(ring)
        except TransportError as exc:
            self._try_at = time.monotonic() + AGAIN_S
            if not exc.transient:
                raise
            self._shows.say(f"{exc}")
            return False
        done = Published(self._now(), ring) if phase is Phase.OPENING else Stopped(self._now())
        self._journal.add(done)
        return True

    def _put(self, ring: int) -> None:
        """Over the one connection: many brokers let a certificate in once, and a second would end the first."""
        sealed = self._journal.sealed(ring)
        release = open_release(sealed, self._desk.key)
        check_size(self._transport, release)
        put_release(self._transport, self._watch.topics, sealed, release, self._wheels, self._there)
        self._there = release


def _differs(known: Saw, saw: Saw) -> bool:
    return known != msgspec.structs.replace(saw, at=known.at)


def _opened(payload: bytes, key: PublicKey) -> Optional[Release]:
    """None for what is not this maker's."""
    try:
        return open_release(payload, key)
    except ReleaseError:
        return None


# --- a look at a fleet


def look(desk: Desk) -> tuple[Watch, Optional[Release]]:
    """What a fleet's devices have said last, and the release on the broker. Blocks for a second or a few."""
    watch, inbox = Watch(desk.fleet, desk.roster), Inbox()
    transport = MqttTransport(desk.broker, f"covey-{desk.fleet}-status-{os.getpid()}", inbox)
    transport.subscribe([watch.topics.all_presence, watch.topics.release])
    transport.connect()
    release: Optional[Release] = None
    end = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < end:
            try:
                item = inbox.get(timeout=QUIET_S)
            except queue.Empty:
                break
            if isinstance(item, Refused):
                raise item.error
            if isinstance(item, Incoming) and item.topic == watch.topics.release:
                release = _opened(item.payload, desk.key)
            elif isinstance(item, Incoming):
                watch.take(item.topic, item.payload)
    finally:
        transport.close()
    return watch, release
