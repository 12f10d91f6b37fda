"""The processes that `fleet.py` starts: many simulated devices in one event loop, and the counter of the raw transfer.

A simulated device is a device on the wire: its own MQTT connection, client id, key, last will and presence, and the
production code of the device's side (DeviceMachine, Performer, Fetching, codec, chunks and their hashes). Made up are:

- training: it gives at once the same numbers every round, a little different for every device;
- the outbox, which keeps the offers and makes the bytes of an update again when they are asked for, and the cache,
  which keeps the names of what is whole. Two thousand of each on one disk would measure the disk;
- the connection's threads: one loop serves all connections of a process with paho's own reading and writing. MQTT 5,
  QoS 1 and paho's window of 20 messages are as in covey_edge.mqtt. Reconnecting is left out: a lost connection ends the
  benchmark. The keep-alive is longer, because a loop that serves a thousand may not come to one of them for a while.

In the raw transfer the same connections move the same bytes in the same chunks, without covey: see `fleet.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Optional

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from covey_edge.agent import FETCH_RETRY_MOST_S, FETCH_RETRY_S, OFFER_EXPIRY_S
from covey_edge.fetching import Fetching
from covey_edge.mqtt import TOPICS_AT_ONCE
from covey_edge.outbox import Entry
from covey_edge.performer import Performer
from covey_edge.processes import die_with_parent
from covey_protocol import codec, device
from covey_protocol.codec import ReplayGuard, Sequence
from covey_protocol.errors import PeerError
from covey_protocol.messages import (
    BlobRef,
    FromDevice,
    Invitation,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    Verdict,
)
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import Topics

FLEET = "load"
RAW = "raw"  # first level of the topics of the raw transfer
TICK_S = 1.0
KEEPALIVE_S = 300
MISC_S = 5.0  # how often paho looks whether a ping is due
NUM_EXAMPLES = 100
SPIN = 20  # packets read from one connection before the others get a turn
TCP_INFO_ACKED = 120  # struct tcp_info: u64 tcpi_bytes_acked, u64 tcpi_bytes_received
EVENTS = {
    Invitation: device.Invited,
    RoundClosed: device.Closed,
    Need: device.Needed,
    Receipt: device.Received,
    Verdict: device.Judged,
}


@dataclass(frozen=True)
class Job:
    """What a process of devices is told: the numbers of its devices, and how to reach and trust the coordinator."""

    port: int
    first: int
    count: int
    coordinator: str
    d: int
    parent: int


def device_id(number: int) -> str:
    return f"device-{number:05d}"


def device_key(number: int) -> SealingKey:
    return SealingKey.from_seed(number.to_bytes(32, "big"))


def replayed_update(base: bytes, number: int, round_id: str) -> bytes:
    """The update of one device: everybody's, but for one number. Copies would be refused."""
    own = struct.pack("<f", 1e-3 * (1 + number) + 1e-6 * (zlib.crc32(round_id.encode()) % 1000))
    return own + base[len(own) :]


def base_update(d: int) -> bytes:
    return (np.random.default_rng(0).standard_normal(d) * 1e-3).astype("<f4").tobytes()


class ReplayedOutbox:
    """In place of covey_edge.outbox.Outbox, in memory."""

    def __init__(self, base: bytes, number: int) -> None:
        self._base, self._number = base, number
        self._offers: dict[str, Offer] = {}

    def keep(self, entry: Entry) -> None:
        self._offers[entry.offer.round_id] = entry.offer

    def offers(self) -> list[Offer]:
        return list(self._offers.values())

    def update(self, offer: Offer) -> Optional[bytes]:
        known = self._offers.get(offer.round_id)
        return replayed_update(self._base, self._number, offer.round_id) if known == offer else None

    def forget(self, round_id: str) -> None:
        self._offers.pop(round_id, None)


class NamesOfBlobs:
    """In place of the cache."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()

    def has(self, ref: BlobRef) -> bool:
        return ref.sha256 in self._names

    def put(self, data: bytes, sha256: bytes) -> None:
        self._names.add(sha256)

    def prune(self, keep: set[bytes]) -> None:
        self._names &= keep


@dataclass
class Counts:
    """Since the start. lost: connections. offers, chunks: said. ignored: messages that broke the protocol."""

    online: int = 0
    lost: int = 0
    offers: int = 0
    chunks: int = 0
    ignored: int = 0


class Link:
    """One MQTT connection in the loop. Whoever uses it sets `on_message`."""

    def __init__(self, loop: Loop, client_id: str, will: Optional[tuple[str, bytes]] = None) -> None:
        self._loop = loop
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, reconnect_on_failure=False
        )
        self.client.on_socket_register_write = self._wants_to_write
        if will is not None:
            self.client.will_set(*will, qos=1, retain=True)
        self.writing = False

    def connect(self, port: int) -> None:
        self.client.connect("127.0.0.1", port, KEEPALIVE_S, clean_start=True)
        self._loop.add(self)

    def publish(self, topic: str, payload: bytes, retain: bool = False, expiry_s: Optional[float] = None) -> None:
        properties = None
        if expiry_s is not None:
            properties = Properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = int(expiry_s)
        self.client.publish(topic, payload, qos=1, retain=retain, properties=properties)

    def subscribe(self, topics: Iterable[str]) -> None:
        for batch in _batches(topics):
            self.client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in batch])

    def unsubscribe(self, topics: Iterable[str]) -> None:
        for batch in _batches(topics):
            self.client.unsubscribe(batch)

    def forget(self, topics: Iterable[str]) -> None:
        """There is no reconnection."""

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes (up, down) on the wire since the connection began, as the kernel counts TCP payload."""
        connection = self.client.socket()
        if connection is None:
            return 0, 0
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_ACKED + 16)
        up, down = struct.unpack_from("<QQ", info, TCP_INFO_ACKED)
        return up, down

    def _wants_to_write(self, client: Any, userdata: Any, connection: Any) -> None:
        if not self.writing:
            self.writing = True
            self._loop.dirty.append(self)


def _batches(topics: Iterable[str]) -> Iterator[list[str]]:
    left = iter(topics)
    while batch := list(itertools.islice(left, TOPICS_AT_ONCE)):
        yield batch


class Loop:
    """Reads and writes all connections of this process as they are ready; no threads."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.dirty: list[Link] = []  # want to write, and the selector does not know yet
        self.links: list[Link] = []
        self.lost = 0

    def add(self, link: Link) -> None:
        self.links.append(link)
        self.selector.register(link.client.socket(), selectors.EVENT_READ | selectors.EVENT_WRITE, link)
        link.writing = True

    def turn(self, timeout_s: float) -> list[Any]:
        """Serve whoever is ready; the data of the ready things that are no links."""
        self._note_writers()
        others = []
        for key, mask in self.selector.select(timeout_s):
            if not isinstance(key.data, Link):
                others.append(key.data)
                continue
            self._serve(key.data, mask)
        return others

    def _note_writers(self) -> None:
        dirty, self.dirty = self.dirty, []
        for link in dirty:
            if link.client.socket() is not None:
                self.selector.modify(link.client.socket(), selectors.EVENT_READ | selectors.EVENT_WRITE, link)

    def _serve(self, link: Link, mask: int) -> None:
        client, connection = link.client, link.client.socket()
        if connection is None:
            return
        code = paho.MQTT_ERR_SUCCESS
        if mask & selectors.EVENT_READ:
            code = client.loop_read(SPIN)
        if code == paho.MQTT_ERR_SUCCESS and mask & selectors.EVENT_WRITE:
            code = client.loop_write()
        if code != paho.MQTT_ERR_SUCCESS or client.socket() is None:
            self.lost += 1
            self.selector.unregister(connection)
        elif mask & selectors.EVENT_WRITE and not client.want_write():
            link.writing = False
            self.selector.modify(connection, selectors.EVENT_READ, link)

    def misc(self) -> None:
        for link in self.links:
            if link.client.socket() is not None:
                link.client.loop_misc()


class SimulatedDevice:
    """What the performer finds around it, and one link."""

    def __init__(self, crowd: Crowd, number: int) -> None:
        self._crowd = crowd
        self._id = device_id(number)
        self._key = device_key(number)
        self._number = number
        self._sequence = Sequence(time.time_ns())
        self._session = self._sequence.next()
        self._guard = ReplayGuard()
        self._topics = Topics(FLEET)
        self.machine = device.DeviceMachine(self._id)
        outbox: Any = ReplayedOutbox(crowd.base, number)
        self._performer = Performer(self.machine, outbox, self, time.monotonic)
        topic = self._topics.presence(self._id)
        will = (topic, self._sealed(Presence(False, self._session), topic))
        self.link = Link(crowd.loop, f"covey-{FLEET}-{self._id}", will)
        self.link.client.on_connect = self._on_connect
        self.link.client.on_message = self._on_message
        self._cache: Any = NamesOfBlobs()
        self._fetching = Fetching(
            self._cache, self._topics, self.link, FETCH_RETRY_S, FETCH_RETRY_MOST_S, time.monotonic
        )
        self.raw: Optional[RawDevice] = None

    # --- what comes in

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            raise RuntimeError(f"{self._id} was refused: {reason}")
        self.link.subscribe([self._topics.round, self._topics.down(self._id)])
        topic = self._topics.presence(self._id)
        presence = Presence(True, self._session, "", "", self.machine.capabilities)
        self.link.publish(topic, self._sealed(presence, topic), retain=True)
        self._crowd.counts.online += 1
        self._performer.handle(device.Connected())

    def _on_message(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        topic = message.topic
        if self.raw is not None and topic.startswith(RAW):
            self.raw.take(topic, message.payload)
            return
        blob = self._topics.parse_blob(topic)
        try:
            if blob is not None:
                if self._fetching.take(blob.sha256, blob.chunk, message.payload):
                    self._performer.handle(device.BlobReady(blob.sha256))
            elif message.payload:
                self._take_message(topic, message.payload)
        except PeerError:
            self._crowd.counts.ignored += 1

    def _take_message(self, topic: str, payload: bytes) -> None:
        message, sequence = codec.decode_from_coordinator(payload, topic=topic, key=self._crowd.coordinator)
        if not self._guard.accept(sequence):
            return
        self._performer.handle(EVENTS[type(message)](message))  # type: ignore[operator]

    def tick(self) -> None:
        self._performer.handle(device.Tick())
        self._fetching.tick()

    # --- what the performer uses

    def say(self, message: FromDevice) -> None:
        topic = self._topics.up(self._id)
        offer = isinstance(message, Offer)
        self._crowd.counts.offers += offer
        self._crowd.counts.chunks += type(message).__name__ == "Chunk"
        self.link.publish(topic, self._sealed(message, topic), expiry_s=OFFER_EXPIRY_S if offer else None)

    def conditions(self, invitation: Invitation) -> device.ConditionsChecked:
        return device.ConditionsChecked(invitation.round_id, True)

    def fetch(self, blobs: tuple[BlobRef, ...]) -> None:
        for ref in self._fetching.fetch(blobs):
            self._performer.handle(device.BlobReady(ref.sha256))

    def train(self, invitation: Invitation) -> None:
        update = replayed_update(self._crowd.base, self._number, invitation.round_id)
        self._performer.handle(device.Trained(invitation.round_id, update, NUM_EXAMPLES, {"seconds": 0.0}))

    def stop_working(self) -> None:
        self._fetching.stop()
        invitation = self.machine.invitation
        if invitation is not None:
            self._cache.prune({ref.sha256 for ref in invitation.blobs})

    def _sealed(self, message: FromDevice, topic: str) -> bytes:
        return codec.encode(message, topic=topic, sender=self._id, sequence=self._sequence.next(), key=self._key)


class RawDevice:
    """The raw transfer of one device: fetch the chunks, then send as many bytes in as many messages."""

    def __init__(self, link: Link, name: str, pieces: list[bytes]) -> None:
        self._link, self._name, self._pieces = link, name, pieces
        self._topics = [f"{RAW}/blob/{index}" for index in range(len(pieces))]
        self._left = set(self._topics)
        link.subscribe(self._topics)

    def take(self, topic: str, payload: bytes) -> None:
        if not payload or topic not in self._left:
            return
        self._left.discard(topic)
        if not self._left:
            self._link.client.unsubscribe(self._topics)
            for piece in self._pieces:
                self._link.publish(f"{RAW}/{self._name}/up", piece)


class Crowd:
    """All devices of one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loop = Loop()
        self.coordinator = PublicKey.from_hex(job.coordinator)
        self.base = base_update(job.d)
        self.counts = Counts()
        self.devices = [SimulatedDevice(self, job.first + index) for index in range(job.count)]

    def run(self, orders: Connection) -> None:
        """Until the order to stop."""
        self.loop.selector.register(orders, selectors.EVENT_READ, "orders")
        waiting = iter(self.devices)
        ticks = self._ticks()
        misc_at = time.monotonic() + MISC_S
        while True:
            for one in itertools.islice(waiting, 10):  # a few at a time: a broker's backlog of connections is short
                one.link.connect(self.job.port)
            if self.loop.turn(0.02) and not self._obey(orders):
                return
            next(ticks)
            if time.monotonic() > misc_at:
                misc_at = time.monotonic() + MISC_S
                self.loop.misc()

    def _ticks(self) -> Iterator[None]:
        """Every device ticks once a second, spread over the second."""
        began, done = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) / TICK_S * len(self.devices))
            for index in range(max(done, due - len(self.devices)), due):
                self.devices[index % len(self.devices)].tick()
            done = due
            yield

    def _obey(self, orders: Connection) -> bool:
        what, *values = orders.recv()
        if what == "stop":
            for one in self.devices:
                one.link.client.disconnect()
            self.loop.turn(0.1)
            return False
        if what == "raw":
            (pieces,) = values
            for one in self.devices:
                one.raw = RawDevice(one.link, one.machine.device_id, pieces)
        self.counts.lost = self.loop.lost
        up, down = np.sum([one.link.wire_bytes() for one in self.devices], axis=0).tolist()
        orders.send((self.counts, up, down))
        return True


def run_crowd(job: Job, orders: Connection) -> None:
    die_with_parent(job.parent)
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        Crowd(job).run(orders)


def run_counter(port: int, parent: int, orders: Connection) -> None:
    """The raw transfer's other end: retains the chunks of a model, and counts what comes up.

    Orders: ("publish", chunks), answered when the broker has them; ("expect", messages), answered when so many came.
    """
    die_with_parent(parent)
    came = [0, 0]
    wanted = [0]
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="raw-counter", protocol=paho.MQTTv5)

    def on_message(client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        came[0] += 1
        came[1] += len(message.payload)
        if came[0] == wanted[0]:
            orders.send(tuple(came))

    client.on_message = on_message
    client.on_connect = lambda client, *rest: client.subscribe(f"{RAW}/+/up", 1)
    client.connect("127.0.0.1", port, KEEPALIVE_S)
    client.loop_start()
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        while True:
            what, value = orders.recv()
            if what == "stop":
                break
            if what == "expect":
                wanted[0], came[0], came[1] = value, 0, 0
            else:
                sent = [client.publish(f"{RAW}/blob/{i}", piece, 1, retain=True) for i, piece in enumerate(value)]
                for one in sent:
                    one.wait_for_publish()
                orders.send("published")
    client.disconnect()
    client.loop_stop()
