"""Days of one agent's life on a virtual clock: the production agent, its state in real files, the rest made up.

Real: `AgentProgram` with its loop, machine, performer, outbox, ledger, logs, the launcher that starts it, releases of
it, its TLS, and every file it writes (below them `power.PoweredDisk`, which knows what would survive a power cut); the
codec, seals and message numbers of both sides; in `real_training` also the Trainer, in this process. Made up, and
driven by one seed: time, the broker, the coordinator's script, processes (`processes`), what a release does
(`releases`), when certificates are renewed (`certificates`), and when which misfortune comes.

Every message that leaves the agent is looked at when it leaves (`Inspector`): what it stands on must be sure by then.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import logging
import os
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import msgspec
import numpy as np
from release_helpers import MAKER

from covey_edge import __version__, agent, mqtt, mqtt_reasons, updates
from covey_edge.frames import Done, Frame, Problem, Run
from covey_edge.inbox import Inbox, waiting_bytes
from covey_edge.ledger import Book
from covey_edge.mqtt import ConnectionDown, ConnectionUp, Incoming
from covey_edge.mqtt_reasons import delay_s
from covey_edge.outbox import Entry
from covey_edge.sent_log import SentLog
from covey_protocol import codec
from covey_protocol.blobs import blob_ref, chunk, chunks
from covey_protocol.codec import COORDINATOR, ReplayGuard, Sequence
from covey_protocol.errors import EXIT_CONFIG, ConfigError, PeerError, StorageError, TransportError
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    Invitation,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    Seen,
    TrainingPlan,
    Verdict,
)
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics
from life.certificates import BROKER, HOST, Certificates, virtual
from life.power import PowerCut, PoweredDisk
from life.processes import Processes
from life.releases import Releases

FLEET, DEVICE = "home", "pi"
D, CHUNK_BYTES, NUM_EXAMPLES = 200, 320, 5
START_S = 1_800_000_000
HOUR_S = 3600.0
SETTLED_S = 200.0  # an agent that runs so long in the end has brought all to its end
PAUSES_S = [1.0, 10.0, 60.0]  # between an end and the next start
EVIL = "evil.1.a"  # a round that only somebody else can have made
CANARY = b"examples of the owner's; " * 40
TOPICS = Topics(FLEET)


class Broken(AssertionError):
    """What must never happen."""


class Clock:
    """Stands where the module `time` does. monotonic never jumps; the wall clock is off by `offset_s`."""

    def __init__(self, pass_time: Callable[[float, Callable[[], bool]], None]) -> None:
        self.now = 0.0
        self.offset_s = 0.0
        self.pass_time = pass_time

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds, lambda: False)

    def time(self) -> float:
        return START_S + self.now + self.offset_s

    def time_ns(self) -> int:
        return int(self.time() * 1e9)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@dataclass
class Trouble:
    """How often what happens: means, in seconds between two of a kind; 0 is never."""

    outage: float = 1800.0
    restart: float = 5400.0
    power_cut: float = 2700.0
    full: float = 3600.0
    jump: float = 4000.0
    drop: float = 0.02
    repeat: float = 0.02


QUIET = Trouble(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass
class Round:
    """As the coordinator knows it. offered: hashes it has heard of, the first that it kept is `kept`."""

    invitation: Invitation
    ends_at: float
    key: SealingKey
    offered: list[bytes] = field(default_factory=list)
    excused: bool = False
    pieces: dict[int, bytes] = field(default_factory=dict)
    kept: bytes = b""
    verdict: Optional[Verdict] = None
    seen: bool = False


class WaitingInbox(Inbox):
    """The production inbox; while it waits, the world goes on."""

    def __init__(self, world: Life) -> None:
        super().__init__()
        self._world = world

    def get(self, timeout: Optional[float] = None) -> Any:
        self._world.pass_time(timeout, lambda: not self._items.empty())
        return super().get(timeout=0)


class Wire:
    """In the place of MqttTransport: what the broker and the network do to one connection."""

    max_message_bytes: Optional[int] = None
    protocol = "5"
    alive = True

    def __init__(self, world: Life, broker: mqtt.Broker, inbox: Inbox) -> None:
        self._world, self._broker, self._inbox = world, broker, inbox
        mqtt.tls_context(broker)
        self.connected = False
        self._failures, self._ups, self._said = 0, 0, ""
        self.subscriptions: dict[str, None] = {}  # in their order: with a set's no life could be repeated
        self._will: Optional[tuple[str, bytes]] = None
        self._queue: list[tuple[str, bytes, bool]] = []
        self._numbers = 0

    def set_will(self, topic: str, payload: bytes) -> None:
        self._world.inspector.look(topic, payload)
        self._will = (topic, payload)

    def connect(self, timeout_s: float = 0.0) -> None:
        self._up(self._knock())

    def _knock(self) -> float:
        """For how long the broker lets us in. Raises as MqttTransport's connections do."""
        if not self._world.broker_up:
            raise TransportError("mqtt://made-up cannot be reached", "start it")
        context = mqtt.tls_context(self._broker)
        return self._world.certificates.admit(context) if context is not None else float("inf")

    def _up(self, seconds: float) -> None:
        self.connected = True
        self._ups, self._failures, self._said = self._ups + 1, 0, ""
        self._inbox.put(ConnectionUp())
        self._world.since = self._world.clock.now
        self._world.certificates.ups += 1
        queue, self._queue = self._queue, []
        for topic, payload, retain in queue:
            self._world.carry(topic, payload, retain)
        self.subscribe(list(self.subscriptions))
        ups = self._ups
        if seconds < float("inf"):
            self._world.at(seconds, lambda: self.lose() if ups == self._ups else None)  # its certificate has ended

    def lose(self, *, said: bool = True) -> None:
        """The connection breaks; the broker says the last will."""
        if not self.connected:
            return
        self.connected = False
        if self._will is not None:
            self._world.carry(*self._will, True)
        if said:
            self._inbox.put(ConnectionDown("made up"))
            self._wait(hopeless=False)

    def _wait(self, *, hopeless: bool) -> None:
        self._world.at(delay_s(self._failures, hopeless, self._world.rng), self._try_again)
        self._failures += 1

    def _try_again(self) -> None:
        if self._world.wire is not self or self.connected:
            return
        try:
            seconds = self._knock()
        except (ConfigError, TransportError) as exc:
            if str(exc) != self._said:
                self._inbox.put(ConnectionDown(str(exc)))
            self._said = str(exc)
            self._wait(hopeless=not getattr(exc, "transient", False))
            return
        self._up(seconds)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: Optional[float] = None) -> int:
        self._world.inspector.look(topic, payload)
        if self.connected:
            self._world.carry(topic, payload, retain)
        else:
            self._queue.append((topic, payload, retain))
        self._numbers += 1
        return self._numbers

    def flush(self, sent: Iterable[int], timeout_s: float) -> bool:
        return self.connected

    def subscribe(self, topics: Iterable[str]) -> None:
        wanted = list(topics)
        self.subscriptions.update(dict.fromkeys(wanted))
        for topic in wanted:
            if self.connected and topic in self._world.retained:
                self._world.deliver(topic, self._world.retained[topic])

    def unsubscribe(self, topics: Iterable[str]) -> None:
        for topic in topics:
            self.subscriptions.pop(topic, None)

    forget = unsubscribe

    def close(self) -> None:
        self.connected = False

    def hears(self, topic: str, payload: bytes) -> None:
        if self.connected and self._world.wire is self:
            item = Incoming(topic, payload)
            self._inbox.put_message(item, waiting_bytes(payload), lambda: None)


class NoSocket:
    """In the place of LocalSocket, whose thread has no part in a made-up time."""

    def __init__(self, *given: object) -> None:
        pass

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass


class Child:
    """In the place of TrainingProcess: makes updates up, and notes which may leave."""

    pid = None

    def __init__(self, world: Life, on_answer: Callable[[object, Frame], None]) -> None:
        self._world, self._on_answer = world, on_answer
        self._pending: Optional[object] = None
        self._work = 0

    @property
    def busy(self) -> bool:
        return self._pending is not None

    def request(self, token: object, frame: Frame, timeout_s: float) -> None:
        if self.busy:
            raise Broken("two requests at once")
        self._pending = token
        self._work += 1
        work, answer = self._work, self._world.work(frame)
        seconds = self._world.rng.uniform(1.0, 60.0) if isinstance(frame, Run) else 0.2

        def done() -> None:
            if work == self._work and self.busy:
                self._pending = None
                self._on_answer(token, answer)

        self._world.at(seconds, done)

    def stop(self) -> None:
        self._pending = None
        self._work += 1

    def rest(self) -> None:
        pass

    def pause(self) -> None:
        pass

    def go_on(self) -> None:
        pass


class Inspector:
    """Looks at every message when the agent hands it over to be sent."""

    def __init__(self, world: Life) -> None:
        self._world = world
        self._last = -1
        self.allowed: dict[bytes, tuple[str, bytes, dict[str, float]]] = {}  # sha256 -> round, update, metrics
        self.secrets: list[bytes] = [CANARY[:16], CANARY[5:21]]

    def look(self, topic: str, payload: bytes) -> None:
        world, require = self._world, self._world.require
        require(topic in (TOPICS.up(DEVICE), TOPICS.presence(DEVICE)), "speaks on a topic that is not its own", topic)
        for secret in (*self.secrets, *world.certificates.secrets):
            require(secret not in payload, "a secret leaves the device", topic)
        try:
            message, number = codec.decode_from_device(payload, topic=topic, sender=DEVICE, key=world.device_key.public)
        except PeerError as exc:
            raise Broken(f"sends what is no message: {exc}") from exc
        require(number > self._last, "a message number is used twice or goes back", number, self._last)
        self._last = number
        reserved = world.disk.sure(world.state / "sequence")
        require(reserved is not None and int(reserved) >= number, "a message number that is not reserved", number)
        self._look_at(message)

    def _look_at(self, message: Any) -> None:
        require = self._world.require
        gone = isinstance(message, (Offer, Chunk)) and self._world.left
        require(not gone, "tells of the data after its owner has opted out", message)
        if isinstance(message, Offer):
            self._look_at_offer(message)
        elif isinstance(message, Chunk):
            made = self.allowed.get(message.sha256)
            require(made is not None, "sends pieces of what was never trained", message.round_id)
            assert made is not None
            ref = blob_ref(made[1], CHUNK_BYTES)
            require(message.data == chunk(made[1], ref, message.index), "a piece is not the update's", message.index)
        else:
            require(isinstance(message, (Presence, Answer, Failure, Seen)), "an unknown kind of message", message)

    def _look_at_offer(self, offer: Offer) -> None:
        world, require = self._world, self._world.require
        made = self.allowed.get(offer.update.sha256)
        require(made is not None and made[0] == offer.round_id, "offers what was not trained for it", offer.round_id)
        assert made is not None
        require(offer.metrics == made[2], "other metrics than the training gave", offer.metrics)
        data = world.disk.sure(world.state / "outbox" / f"{offer.round_id}.msgpack")
        require(data is not None, "offers what is not surely in its outbox", offer.round_id)
        assert data is not None
        require(msgspec.msgpack.decode(data, type=Entry) == Entry(offer, made[1]), "the outbox holds another update")
        book = world.disk.sure(world.state / "ledger.json")
        counted = book is not None and offer.update.sha256.hex() in msgspec.json.decode(book, type=Book).last
        require(counted, "offers what is not surely in the ledger", offer.round_id)
        written = any(offer.update.sha256.hex().encode() in world.disk.at_least(path) for path in world.sent_logs())
        require(written, "offers what is not surely in the log of what leaves", offer.round_id)


class Coordinator:
    """Follows a script: a round every few minutes, everything acknowledged and judged as docs/protocol.md says.

    It forgets nothing. `every_s` is the mean time between two rounds.
    """

    def __init__(self, world: Life, every_s: float) -> None:
        self._world, self._every_s = world, every_s
        self.keys = [SealingKey.from_seed(bytes([number]) * 32) for number in (1, 2)]
        self.key = self.keys[0]
        self._sequence = Sequence(1)
        self.rounds: dict[str, Round] = {}
        self._blobs: list[list[str]] = []
        self.excuses: Counter[str] = Counter()
        self._forging = False

    def start(self) -> None:
        self._world.at(5.0, self._new_round)

    def rotate(self) -> None:
        """The next key speaks from now on; the old one is somebody else's."""
        self.key = self.keys[1]

    def _forge(self) -> None:
        """An invitation under the key that is no longer the coordinator's; again and again, since its owner has it."""
        fake = msgspec.structs.replace(next(iter(self.rounds.values())).invitation, round_id=EVIL)
        payload = codec.encode(fake, topic=TOPICS.round, sender=COORDINATOR, sequence=2**40, key=self.keys[0])
        self._world.deliver(TOPICS.round, payload)
        if not self._world.over:
            self._world.at(300.0, self._forge)

    def _say(self, topic: str, message: Any, *, retain: bool = False) -> None:
        payload = codec.encode(message, topic=topic, sender=COORDINATOR, sequence=self._sequence.next(), key=self.key)
        if retain:
            self._world.retained[topic] = payload
        self._world.deliver(topic, payload)

    def tell(self, message: Any) -> None:
        self._say(TOPICS.down(DEVICE), message)

    def _new_round(self) -> None:
        world, number = self._world, len(self.rounds) + 1
        if world.over:
            return
        refs = [self._publish(world.bundle), self._publish(world.parameters(number))]
        duration_s = world.rng.uniform(60.0, 300.0)
        invitation = Invitation(
            f"run.{number}.{number}",
            number,
            0,
            int(1000 * duration_s),
            refs[0],
            refs[1],
            world.plan(number),
            (DEVICE,),
            ("train", "float32"),
        )
        one = self.rounds[invitation.round_id] = Round(invitation, world.clock.now + duration_s, self.key)
        self._say(TOPICS.round, invitation, retain=True)
        world.at(duration_s, lambda: self._close(one))
        world.at(duration_s + world.rng.uniform(0.2, 1.8) * self._every_s, self._new_round)

    def _publish(self, data: bytes) -> BlobRef:
        ref = blob_ref(data, CHUNK_BYTES)
        for index, piece in chunks(data, ref):
            self._world.retained[TOPICS.blob(ref.sha256, index)] = piece
        return ref

    def _close(self, one: Round) -> None:
        for ref in one.invitation.blobs:
            for index in range(ref.num_chunks):
                self._world.retained.pop(TOPICS.blob(ref.sha256, index), None)
        if one.kept:
            one.verdict = Verdict(one.invitation.round_id, "accepted")
            self._repeat(one)
        self._say(
            TOPICS.round, RoundClosed(one.invitation.round_id, "published" if one.kept else "abandoned"), retain=True
        )

    def _repeat(self, one: Round) -> None:
        if one.verdict is not None and not one.seen:
            self.tell(one.verdict)
            self._world.at(30.0, lambda: self._repeat(one))

    def hear(self, topic: str, payload: bytes) -> None:
        message, _ = codec.decode_from_device(payload, topic=topic, sender=DEVICE, key=self._world.device_key.public)
        if isinstance(message, Presence):
            self._world.releases.heard(message)
        one = self.rounds.get(getattr(message, "round_id", ""))
        if one is not None and one.key is self.keys[1] and not self._forging:
            self._forging = True  # the agent has heard the new key: from here on the old one is nothing to it
            self._forge()
        if one is None:
            self._world.require(isinstance(message, Presence), "answers a round that there is not", message)
        elif isinstance(message, Offer):
            self._offered(one, message)
        elif isinstance(message, Chunk) and not one.kept and one.ends_at > self._world.clock.now:
            self._piece(one, message)  # a later one is passed over: its offer comes again, and hears that it is late
        elif isinstance(message, Failure) or (isinstance(message, Answer) and not message.accept):
            one.excused = True
            self.excuses[message.reason.split(" (")[0][:40]] += 1
        elif isinstance(message, Seen):
            one.seen = True

    def _offered(self, one: Round, offer: Offer) -> None:
        sha256 = offer.update.sha256
        if sha256 not in one.offered:
            self._world.require(not one.kept, "another update for a round after one was acknowledged", offer.round_id)
            one.offered.append(sha256)
            one.pieces = {}
        if one.verdict is not None:
            self.tell(one.verdict)
        elif one.kept:
            self.tell(Receipt(offer.round_id, sha256, True))
        elif self._world.clock.now > one.ends_at:
            self.tell(Receipt(offer.round_id, sha256, False, "that round is over"))
            one.excused = True
        else:
            missing = [index for index in range(offer.update.num_chunks) if index not in one.pieces]
            self.tell(Need(offer.round_id, sha256, tuple(missing)))

    def _piece(self, one: Round, piece: Chunk) -> None:
        made = self._world.inspector.allowed[piece.sha256][1]
        if not one.offered or piece.sha256 != one.offered[-1]:
            return
        one.pieces[piece.index] = piece.data
        if len(one.pieces) < blob_ref(made, CHUNK_BYTES).num_chunks:
            return
        whole = b"".join(data for _, data in sorted(one.pieces.items()))
        self._world.require(hashlib.sha256(whole).digest() == piece.sha256, "an update that is not what was offered")
        one.kept = piece.sha256
        self.tell(Receipt(one.invitation.round_id, piece.sha256, True))


AGENT = """
device_id = "{device}"
fleet = "{fleet}"
state_dir = "state"

[broker]
{broker}

[identity]
key_file = "device.pem"
coordinator_key = ["{first}", "{second}"]

[data]
path = "data.npz"

[update]
release_key = "{maker}"

{more}
"""
NOISED = "[privacy]\nclip_norm = 1.0\nnoise_multiplier = 0.5\nepsilon_limit = 1e6\n"


BOUNDED = (ReplayGuard, SentLog)  # what these remember has bounds: 2 * ReplayGuard.WINDOW, sent_log.REMEMBERED


def held(thing: object, known: set[int]) -> int:
    """How many things the objects of covey's classes hold in their containers, from this one on."""
    if id(thing) in known or isinstance(thing, (str, bytes, int, float, Life, *BOUNDED)):
        return 0
    known.add(id(thing))
    if isinstance(thing, dict):
        return len(thing) + sum(held(one, known) for one in thing.values())
    if isinstance(thing, (list, tuple, set, frozenset, deque)):
        return len(thing) + sum(held(one, known) for one in thing)
    ours = type(thing).__module__.split(".")[0] in ("covey_edge", "covey_protocol")
    return sum(held(one, known) for one in vars(thing).values()) if ours and hasattr(thing, "__dict__") else 0


class Life:
    """One agent's life in `folder`. `run` raises Broken, with the seed and the end of the story.

    cut_at: the power goes before that step of the disk, once, and the files are then in `state`; otherwise misfortunes
    come as `trouble` says. full_at: from that step on the disk is full for a minute. release_s: mean time between two
    releases, which are of these kinds first. certificate_s: how long each client certificate lives. 0: none.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        trouble: Trouble = QUIET,
        *,
        every_s: float = 240.0,
        cut_at: int = -1,
        state: str = "least",
        full_at: int = -1,
        work: Optional[Callable[[Life, Frame], Frame]] = None,
        bundle: bytes = b"",
        release_s: float = 0.0,
        kinds: tuple[str, ...] = (),
        certificate_s: float = 0.0,
    ) -> None:
        folder = folder.resolve()
        self.rng, self.seed, self.trouble = random.Random(seed), seed, trouble
        self.clock, self.over, self.left = Clock(self.pass_time), False, False
        self.noised = seed % 2 == 1
        self.device_key = SealingKey.from_seed(bytes([9]) * 32)
        self.state, self.config = folder / "device" / "state", folder / "device" / "agent.toml"
        self.trace: list[tuple[float, str]] = []
        self.seen: Counter[str] = Counter()
        self.steps: list[str] = []  # of the disk
        self.quiet = trouble is QUIET and cut_at < 0 and full_at < 0 and not certificate_s
        self.measured: list[tuple[float, dict[str, int]]] = []
        self.retained: dict[str, bytes] = {}
        self.broker_up = True
        self.off = False  # the device is, for want of power
        self.since = 0.0  # its agent has been running and connected
        self.wire: Optional[Wire] = None
        self.program: Optional[agent.AgentProgram] = None
        self.inspector = Inspector(self)
        self.coordinator = Coordinator(self, every_s)
        self.releases = Releases(self, release_s, kinds)
        self.certificates = Certificates(self, folder / "device", certificate_s)
        self.processes = Processes(self)
        self.bundle = bundle or self.rng.randbytes(700)
        self._work = work
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0
        self._cut_at, self._full_at, self._state, self._full_until = cut_at, full_at, state, -1.0
        self._write_files(folder / "device")
        self.disk = PoweredDisk(folder / "device")
        self.disk.now = lambda: int(1e9 * (START_S + self.clock.now))
        self.disk.on_step, self.disk.full = self._step, lambda: self.clock.now < self._full_until

    def _write_files(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        pem = self.device_key.pem()
        (folder / "device.pem").write_bytes(pem)
        first, second = (key.public.hex() for key in self.coordinator.keys)
        more = NOISED if self.noised else ""
        broker = f'url = "mqtts://{HOST}"{BROKER}' if self.certificates.on else f'url = "mqtt://{HOST}"'
        text = AGENT.format(
            device=DEVICE, fleet=FLEET, first=first, second=second, more=more, broker=broker, maker=MAKER.public.hex()
        )
        self.config.write_text(text)
        if not (folder / "data.npz").exists():
            (folder / "data.npz").write_bytes(CANARY)
        self.inspector.secrets += [bytes([9]) * 16, pem.splitlines()[1][-20:]]

    # --- what the coordinator and the child ask

    def plan(self, number: int) -> TrainingPlan:
        compression = "top-k" if not self.noised and number % 3 == 0 else "none"
        return TrainingPlan(1, 0.1, compression=compression)

    def parameters(self, number: int) -> bytes:
        return np.random.default_rng((self.seed, number)).standard_normal(D).astype("<f4").tobytes()

    def work(self, frame: Frame) -> Frame:
        """What the training child would answer. What it gives for an update may leave, and nothing else."""
        answer = self._work(self, frame) if self._work is not None else self._made_up(frame)
        if isinstance(frame, Run) and isinstance(answer, Done):
            sha256 = hashlib.sha256(answer.update).digest()
            self.inspector.allowed[sha256] = (frame.round_id, answer.update, answer.metrics)
        return answer

    def _made_up(self, frame: Frame) -> Frame:
        if not isinstance(frame, Run):
            return Done(num_examples=NUM_EXAMPLES, runtime="made up")
        if self.rng.random() < 0.05:
            return Problem("TrainingError", "the training process died (SIGSEGV)")
        update = self.rng.randbytes(4 * D)
        withheld = self.rng.randbytes(4 * D) if frame.plan.compression == "top-k" else b""
        metrics = {} if self.noised else {"loss_before": self.rng.random()}
        return Done(update, NUM_EXAMPLES, metrics, "made up", withheld)

    # --- time

    def true_time(self) -> datetime:
        """Not the device's."""
        return datetime.fromtimestamp(START_S + self.clock.now, timezone.utc)

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        self._counter += 1
        heapq.heappush(self._events, (self.clock.now + delay_s, self._counter, action))

    def pass_time(self, timeout: Optional[float], ready: Callable[[], bool]) -> None:
        end = float("inf") if timeout is None else self.clock.now + timeout
        while not ready() and self._events and self._events[0][0] <= end:
            self.clock.now, _, action = heapq.heappop(self._events)
            action()
        if not ready():
            if end == float("inf"):
                raise Broken("waits for ever")
            self.clock.now = max(self.clock.now, end)

    def _sometimes(self, mean_s: float, action: Callable[[], None]) -> None:
        """At times drawn from an exponential distribution, until the end."""
        if not mean_s:
            return

        def once() -> None:
            if not self.over:
                self.at(self.rng.expovariate(1 / mean_s), once)
                action()

        self.at(self.rng.expovariate(1 / mean_s), once)

    # --- misfortunes

    def _step(self, what: str) -> None:
        self.steps.append(what)
        if len(self.steps) == self._full_at:
            self._full_until = self.clock.now + 60.0
            self.log(f"the disk is full at {what}")
        if len(self.steps) == self._cut_at:
            self.log(f"power cut at {what}")
            self.seen[f"power cut at {what.split('.')[0]}"] += 1
            self.disk.cut()

    def _outage(self) -> None:
        if not self.broker_up:
            return
        self.seen["outage"] += 1
        self.broker_up = False
        if self.wire is not None:
            self.wire.lose()

        def back() -> None:
            self.broker_up = True

        self.at(self.rng.choice([5.0, 60.0, 900.0]), back)

    def _restart(self) -> None:
        if self.program is not None or self.processes.trying:
            self.seen["restart"] += 1
            self.processes.terminate()

    def misfortunes(self) -> dict[str, int]:
        return {what: count for what, count in self.seen.items() if what.startswith(("outage", "full", "clock"))}

    def _cut(self) -> None:
        """At one of the next steps of the disk, or at once."""
        if self.program is None:
            return
        self._state = self.rng.choice(["least", "most", "mixed", "mixed"])
        if self.rng.random() < 0.3:
            self.seen["power cut between steps"] += 1
            self.disk.cut()
        self._cut_at = len(self.steps) + self.rng.randrange(1, 60)

    def _fill(self) -> None:
        self.seen["full disk"] += 1
        self._full_until = self.clock.now + self.rng.choice([10.0, 120.0, 900.0])

    def leave(self) -> None:
        """The owner opts out; tried again where the agent is off or its disk is full."""
        try:
            if self.program is None:
                raise StorageError("the agent is off")
            self.program.leave()
            self.left = True
        except StorageError:
            self.at(30.0, self.leave)

    def sent_logs(self) -> list[Path]:
        return sorted(self.state.glob("sent*.jsonl"))

    def _jump(self) -> None:
        year_s = 365 * 86400.0
        self.seen["clock jump"] += 1
        self.clock.offset_s += self.rng.choice([-year_s, -5000.0, -1.0, 1.0, 5000.0, year_s])
        if self.certificates.on:  # with a clock that is wrong for ever there is no TLS: the network tells the time
            self.at(self.rng.choice([5.0, 300.0, 1800.0]), self._set_clock)

    def _set_clock(self) -> None:
        self.clock.offset_s = 0.0

    # --- the broker

    def carry(self, topic: str, payload: bytes, retain: bool) -> None:
        """From the agent to the coordinator."""
        for _ in range(self._copies()):
            self.at(self.rng.uniform(0.01, 0.5), lambda: self.coordinator.hear(topic, payload))

    def deliver(self, topic: str, payload: bytes) -> None:
        """To the agent, where it has subscribed."""
        wire = self.wire
        if wire is None or not wire.connected or topic not in wire.subscriptions:
            return
        for _ in range(self._copies()):
            self.at(self.rng.uniform(0.01, 0.5), lambda: wire.hears(topic, payload))

    def _copies(self) -> int:
        drawn = self.rng.random()
        return 0 if drawn < self.trouble.drop else 2 if drawn > 1 - self.trouble.repeat else 1

    # --- the whole life

    def run(self, hours: float, calm_s: float = 1200.0) -> Life:
        """calm_s: how long at the end everything works, so that all can come to its end."""
        with self._instead_of_the_world():
            for mean_s, misfortune in (
                (self.trouble.outage, self._outage),
                (self.trouble.restart, self._restart),
                (self.trouble.power_cut, self._cut),
                (self.trouble.full, self._fill),
                (self.trouble.jump, self._jump),
            ):
                self._sometimes(mean_s, misfortune)
            for start in (self.coordinator.start, self.releases.start, self.certificates.start):
                self.at(0.0, start)
            self.at(hours * HOUR_S / 2, self.coordinator.rotate)
            for quarter in range(1, int(4 * hours) + 1):
                self.at(quarter * HOUR_S / 4 - 1.0, self._measure)
            self.at(hours * HOUR_S, self._calm)
            self.at(hours * HOUR_S + calm_s, self._finish)
            while not (self._one_start() and self.clock.now >= hours * HOUR_S + calm_s):
                if self.clock.now >= hours * HOUR_S + calm_s:
                    self.at(calm_s, self._finish)
        self.check_end()
        return self

    def _calm(self) -> None:
        """From here on everything works: all must come to a good end."""
        self.over = self.broker_up = True
        if self.trouble is not QUIET:
            self.trouble, self._full_until, self._cut_at = QUIET, -1.0, -1
        if self.certificates.on:
            self._set_clock()
            self.certificates.calm()

    def _finish(self) -> None:
        """The end, when an agent that is not on trial has been connected for a while."""
        connected = self.wire is not None and self.wire.connected and not self.processes.trying
        if connected and self.clock.now >= self.since + SETTLED_S:
            self._restart()
        else:
            self.at(5.0, self._finish)

    def _one_start(self) -> bool:
        """Whether the agent ran until it was asked to end."""
        code = -1
        self.seen["start"] += 1
        try:
            with self.disk.watched():
                code = self.processes.start()
                self.disk.check_complete()
                # not started again after code 2 (systemd): its owner sees it
                self.pass_time(self.rng.choice([60.0, 900.0] if code == EXIT_CONFIG else PAUSES_S), lambda: False)
        except PowerCut:
            self.log("the power is gone")
            self.releases.note()
            self.disk.lose_power(self._state, self.rng)  # type: ignore[arg-type]
            self.releases.woke()
            self.off = True
            self.pass_time(self.rng.choice(PAUSES_S), lambda: False)
            self.off = False
        return code == 0

    @contextlib.contextmanager
    def _instead_of_the_world(self) -> Iterator[None]:
        """The agent's modules see this world's time, inbox, connection and child."""

        def wire(broker: Any, client_id: str, inbox: Inbox, *more: Any, **named: Any) -> Wire:
            self.wire = Wire(self, broker, inbox)
            return self.wire

        names: dict[str, Any] = {
            "LocalSocket": NoSocket,
            "Inbox": lambda *more: WaitingInbox(self),
            "MqttTransport": wire,
            "TrainingProcess": lambda on_answer, *more, **named: Child(self, on_answer),
        }
        new: list[tuple[Any, str, Any]] = [(agent, name, one) for name, one in names.items()]
        new += [*self.processes.instead(), (mqtt_reasons, "datetime", virtual(self.clock))]
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("covey_edge", "covey_protocol") and getattr(module, "time", None) is time:
                new.append((module, "time", self.clock))
        new += [(module, "__version__", __version__) for module in (agent, updates)]  # releases change these
        old = [(module, name, getattr(module, name)) for module, name, _ in new]
        logger, environment, listener = logging.getLogger("covey"), dict(os.environ), self.certificates.listener()
        level, propagates = logger.level, logger.propagate
        try:
            logger.addHandler(listener)
            logger.setLevel(logging.WARNING if self.certificates.on else logging.CRITICAL + 1)
            logger.propagate = False
            for module, name, value in new:
                setattr(module, name, value)
            yield
        finally:
            logger.removeHandler(listener)
            logger.setLevel(level)
            logger.propagate = propagates
            for module, name, value in old:
                setattr(module, name, value)
            os.environ.clear()
            os.environ.update(environment)

    # --- what must hold

    def require(self, holds: object, what: str, *more: object) -> None:
        if not holds:
            raise Broken(f"{what} {' '.join(map(str, more))}\n{self.story()}")

    def _measure(self) -> None:
        """What must not grow. Where the agent is off, nothing."""
        if self.program is None or self.wire is None:
            return
        logs = self.sent_logs()  # these grow, to a bound of their own
        apart = self.state / "releases"
        files = [path for path in self.state.rglob("*") if path.is_file() and path not in logs]
        files = [path for path in files if apart not in path.parents]
        self.measured.append(
            (
                self.clock.now,
                {
                    "files": len(files),
                    "bytes": sum(path.stat().st_size for path in files),
                    "topics": len(self.wire.subscriptions),
                    "threads": threading.active_count(),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "held": held(self.program, set()),
                    **self.releases.sizes(),
                },
            )
        )

    def check_end(self) -> None:
        for round_id, one in self.coordinator.rounds.items():
            if self.left:
                continue  # what was under way then has no end
            if one.kept:
                self.require(one.verdict is not None and one.seen, "an acknowledged update has no end", round_id)
            elif one.offered:
                self.require(one.excused, "an update that was offered was never delivered", round_id)
        self.require(EVIL not in self.coordinator.rounds, "works for a stranger")
        left = sorted(path.name for path in (self.state / "outbox").glob("*"))
        self.require(not left, "the outbox is not empty in the end", left)
        self.require(not list(self.state.rglob("*.tmp")), "unfinished files are left")
        self.releases.check_end()
        self.certificates.check_end()

    def log(self, what: str) -> None:
        self.trace.append((self.clock.now, what))

    def story(self, last: int = 30) -> str:
        lines = [f"{now:10.2f}  {what}" for now, what in self.trace[-last:]]
        return "\n".join([f"seed {self.seed}, {len(self.steps)} steps of the disk", *lines])
