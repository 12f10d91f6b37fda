"""The coordinator's connection to its fleet: verified messages in, sealed messages and chunks out, and who is online.

Joins the MQTT adapter with the codec and the roster. Takes no decisions about rounds (see `coordinator`).
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covey_coordinator.retained import RetainedNote
from covey_coordinator.roster import Roster
from covey_edge.inbox import HOLD_BYTES, Inbox, waiting_bytes
from covey_edge.mqtt import Broker, ConnectionDown, ConnectionUp, Incoming, MqttTransport, Refused
from covey_protocol import codec
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.codec import CHUNK_ROOM_BYTES, COORDINATOR
from covey_protocol.device import RESEND_S
from covey_protocol.errors import PeerError, StorageError, TransportError
from covey_protocol.keys import Keys
from covey_protocol.messages import (
    DEFAULT_CHUNK_BYTES,
    BlobRef,
    FromCoordinator,
    FromDevice,
    Invitation,
    Need,
    Presence,
    RoundClosed,
)
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import Topics

log = logging.getLogger("covey.coordinator")

PUBLISH_TIMEOUT_S = 60.0
BROKER_PATIENCE_S = 30.0
POLL_S = 0.2
CONFIRM_S = 10.0
MAX_REFUSED = 10_000  # names of strangers that are counted
MIN_CHUNK_BYTES = 1024  # smaller ones would be half envelope
BLOB_EXPIRY_S = 24 * 3600.0  # MQTT 5 brokers then forget what a coordinator that died has left; renewed at half of it


@dataclass(frozen=True)
class FromFleet:
    """A message whose seal was checked."""

    device_id: str
    message: FromDevice


class Fleet:
    """Devices as the coordinator sees them.

    roster: the public keys of every device that may take part; everybody else is ignored and counted in `refused`.
    chunk_bytes: of models on the wire; less where the broker says that it takes less.
    sequence: the coordinator's message numbers; without it they come from the clock alone.
    note: of the blobs that are retained, over restarts.
    patience_s: how long the broker may be away before waiting for it raises TransportError.
    check: called a few times a second while waiting; may raise (a broker process died).
    """

    def __init__(
        self,
        broker: Broker,
        name: str,
        key: SealingKey,
        roster: Mapping[str, Keys] | Roster,
        *,
        sequence: codec.Sequence | None = None,
        note: RetainedNote | None = None,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        patience_s: float = BROKER_PATIENCE_S,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.broker = broker
        self.topics = Topics(name)
        self.roster = roster if isinstance(roster, Roster) else Roster(roster)
        self.refused: dict[str, int] = {}
        self.sent_bytes = self.received_bytes = 0  # payloads of MQTT messages
        self._key = key
        self._chunk_bytes = chunk_bytes
        self._patience_s = patience_s
        self._check = check
        self._inbox = Inbox()
        self._held: deque[Any] = deque()  # taken from the inbox while we waited for something else
        self._transport = MqttTransport(broker, f"covey-{name}-{COORDINATOR}", self._inbox)
        self._sequence = sequence if sequence is not None else codec.Sequence(time.time_ns())
        self._note = note if note is not None else RetainedNote()
        self._left_over = dict(self._note.noted)  # by an earlier start, and not published again by this one
        self._clearing: dict[bytes, list[int]] = {}  # sha256 -> the messages that clear its chunks
        self._presence: dict[str, tuple[Presence, PublicKey]] = {}  # with the key that sealed it
        self._blobs: dict[bytes, tuple[BlobRef, bytes]] = {}
        self._renew_at = 0.0
        self._confirmed_bytes = 0
        self._round: Invitation | RoundClosed | None = None
        self._in_use: frozenset[bytes] = frozenset()
        self._was_up = False
        self._down_since: float | None = None

    def connect(self) -> None:
        """Raises TransportError naming the broker, also where it takes only messages too small for a chunk."""
        self._transport.subscribe([self.topics.all_presence, self.topics.all_up])
        self._transport.connect()
        self._renew_at = time.monotonic() + BLOB_EXPIRY_S / 2
        limit = self._transport.max_message_bytes
        if limit is None or self._chunk_bytes + CHUNK_ROOM_BYTES <= limit:
            return
        self._chunk_bytes = limit - CHUNK_ROOM_BYTES
        if self._chunk_bytes < MIN_CHUNK_BYTES:
            self._transport.close()
            least = MIN_CHUNK_BYTES + CHUNK_ROOM_BYTES
            raise TransportError(
                f"{self.broker} takes messages of at most {limit} bytes, covey needs {least}",
                "raise the broker's limit, or broker.max_message_bytes",
                transient=False,
            )
        log.info("%s takes messages of %d bytes: chunks have %d", self.broker, limit, self._chunk_bytes)

    def close(self) -> None:
        """Take the retained round and chunks off the broker and leave."""
        try:
            for sha256 in list(self._blobs):
                self.clear_blob(sha256)
            self._clear_left_over()
            if self._round is not None:
                sent = self._publish(self.topics.round, b"", retain=True)
                self._transport.flush([sent], timeout_s=2.0)
            self._forget_cleared()
        except (TransportError, StorageError) as exc:
            log.warning("the broker could not be tidied: %s", exc)
        self._transport.close()

    def online(self) -> list[str]:
        """The ids of the devices that are connected now, sorted."""
        here = [device_id for device_id, (presence, _) in self._presence.items() if presence.online]
        return sorted(device_id for device_id in here if device_id in self.roster)

    def known(self) -> list[str]:
        """The ids of all devices of the roster, sorted."""
        return self.roster.ids()

    def capabilities(self, device_id: str) -> Sequence[str]:
        """What the device says that it can do; nothing where it has not said."""
        found = self._presence.get(device_id)
        return found[0].capabilities if found is not None else ()

    # --- sending

    def send(self, device_id: str, message: FromCoordinator) -> None:
        topic = self.topics.down(device_id)
        # a Need that comes late asks for chunks that a repeated Offer has brought meanwhile
        expiry_s = RESEND_S if isinstance(message, Need) else None
        try:
            self._publish(topic, self._sealed(message, topic), expiry_s=expiry_s)
        except TransportError as exc:  # a Need of very many chunks: that device is lost for the round, the run is not
            log.error("%s", exc)

    def publish_round(self, message: Invitation | RoundClosed, in_use: Collection[bytes] = ()) -> None:
        """Retain the message. in_use: hashes of models that devices may still work with, beside the round's own."""
        self._round, self._in_use = message, frozenset(in_use)
        expiry_s = message.duration_ms / 1000 if isinstance(message, Invitation) else None
        sealed = self._sealed(message, self.topics.round)
        self._publish(self.topics.round, sealed, retain=True, expiry_s=expiry_s)
        if isinstance(message, Invitation):  # whose bundle and model are published by now
            self._clear_left_over(self._in_use)

    def publish_blob(self, data: bytes) -> BlobRef:
        """Retain the blob's chunks on the broker; returns when the broker has them all."""
        ref = blob_ref(data, self._chunk_bytes)
        self._forget_cleared()
        if ref.sha256 not in self._blobs:
            self._clearing.pop(ref.sha256, None)
            self._left_over.pop(ref.sha256, None)
            self._note.add(ref)
            self._blobs[ref.sha256] = (ref, data)
            self._publish_chunks(ref, data)
            self._confirm(ref)
        return ref

    def clear_blob(self, sha256: bytes) -> None:
        """What only an earlier start published is cleared with the rest that it left."""
        known = self._blobs.pop(sha256, None)
        if known is not None:
            self._clear(known[0])

    def _clear(self, ref: BlobRef) -> None:
        topics = [self.topics.blob(ref.sha256, index) for index in range(ref.num_chunks)]
        self._clearing[ref.sha256] = [self._publish(topic, b"", retain=True) for topic in topics]

    def _clear_left_over(self, but: Collection[bytes] = ()) -> None:
        for sha256 in [one for one in self._left_over if one not in but]:
            self._clear(self._left_over.pop(sha256))

    def _forget_cleared(self) -> None:
        """Of the note: what the broker has acknowledged meanwhile."""
        for sha256, sent in list(self._clearing.items()):
            if self._transport.flush(sent, timeout_s=0.0):
                del self._clearing[sha256]
                self._note.remove(sha256)

    def _publish(self, topic: str, payload: bytes, retain: bool = False, expiry_s: float | None = None) -> int:
        self.sent_bytes += len(payload)
        return self._transport.publish(topic, payload, retain=retain, expiry_s=expiry_s)

    def _send_chunks(self, ref: BlobRef, data: bytes) -> list[int]:
        return [
            self._publish(self.topics.blob(ref.sha256, index), payload, retain=True, expiry_s=BLOB_EXPIRY_S)
            for index, payload in chunks(data, ref)
        ]

    def _publish_chunks(self, ref: BlobRef, data: bytes) -> None:
        sent = self._send_chunks(ref, data)
        end = time.monotonic() + PUBLISH_TIMEOUT_S
        while not self._transport.flush(sent, POLL_S):
            self._watch()
            if time.monotonic() > end:
                raise TransportError(
                    f"{self.broker} did not take the model within {PUBLISH_TIMEOUT_S:g} s",
                    f"check that it accepts messages of {self._chunk_bytes} bytes",
                )

    def _confirm(self, ref: BlobRef) -> None:
        """Raises TransportError where the broker does not give back a chunk that it acknowledged.

        MQTT 3.1.1 has no word for a message that is too large: the broker acknowledges it and drops it.
        """
        size, topic = ref.chunk_size(0), self.topics.blob(ref.sha256, 0)
        if self._transport.protocol != "3.1.1" or size <= self._confirmed_bytes:
            return
        self._transport.subscribe([topic])
        end, held_bytes = time.monotonic() + CONFIRM_S, 0
        while size > self._confirmed_bytes:
            self._watch()
            if time.monotonic() > end:
                raise TransportError(
                    f"{self.broker} acknowledged a message of {size} bytes and did not keep it",
                    "set chunk_bytes below the broker's message limit, and let the coordinator read blob/#",
                    transient=False,
                )
            try:
                item = self._inbox.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, Incoming) and item.topic == topic:
                self._confirmed_bytes = size
            elif isinstance(item, ConnectionUp):
                self._restore()
            else:
                held_bytes += waiting_bytes(item.payload) if isinstance(item, Incoming) else 0
                if held_bytes < HOLD_BYTES or not isinstance(item, Incoming):  # devices say again what is dropped
                    self._held.append(item)
        self._transport.unsubscribe([topic])

    def _sealed(self, message: FromCoordinator, topic: str) -> bytes:
        return codec.encode(message, topic=topic, sender=COORDINATOR, sequence=self._sequence.next(), key=self._key)

    # --- receiving

    def next(self, timeout_s: float) -> FromFleet | None:
        """The next verified message, or None when none came in time. Raises TransportError when the broker stays away.

        Presence is recorded and returned; what is not sealed by a device of the roster is counted and dropped.
        """
        end = time.monotonic() + timeout_s
        while True:
            self._watch()
            try:
                item = self._held.popleft() if self._held else self._inbox.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            if isinstance(item, Incoming):
                self.received_bytes += len(item.payload)
                try:
                    received = self._verified(item)
                except PeerError as exc:
                    log.warning("ignored a message: %s", exc)
                    continue
                if received is not None:
                    return received
            elif isinstance(item, ConnectionUp):
                self._restore()
            elif isinstance(item, ConnectionDown):
                log.warning("connection to %s lost (%s), trying again", self.broker, item.reason)
            elif isinstance(item, Refused):
                self._take_refusal(item)

    def _take_refusal(self, item: Refused) -> None:
        """What one device does not get costs that device; without the rest there is no round."""
        place = self.topics.parse_device(item.topic)
        if place is None:
            raise item.error
        log.error("%s", item.error)

    def _watch(self) -> None:
        """While we wait: is everything that we wait for still there?"""
        self._check()
        if time.monotonic() > self._renew_at:
            self._renew_at = time.monotonic() + BLOB_EXPIRY_S / 2
            self._send_all_chunks()
        if self._transport.connected:
            self._down_since = None
            return
        self._down_since = self._down_since or time.monotonic()
        if time.monotonic() - self._down_since > self._patience_s:
            raise TransportError(
                f"{self.broker} went away and did not come back within {self._patience_s:g} s",
                "start the broker again and repeat the command",
            )

    def _restore(self) -> None:
        """After a reconnection: a broker that was restarted may have forgotten what we retained."""
        if not self._was_up:
            self._was_up = True
            return
        log.info("%s is back", self.broker)
        self._send_all_chunks()
        if self._round is not None:
            self.publish_round(self._round, self._in_use)

    def _send_all_chunks(self) -> None:
        for ref, data in self._blobs.values():
            self._send_chunks(ref, data)

    def _verified(self, item: Incoming) -> FromFleet | None:
        place = self.topics.parse_device(item.topic)
        if place is None or not item.payload:
            return None
        ring = self.roster.ring(place.device_id)
        if ring is None:
            self._refuse(place.device_id, f"{place.device_id} is not in the roster")
            return None
        taken = ring.take(
            lambda key: codec.decode_from_device(item.payload, topic=item.topic, sender=place.device_id, key=key)
        )
        message = taken.message
        if isinstance(message, Presence) != (place.channel == "presence"):
            raise PeerError(f"{place.device_id} sent {type(message).__name__} on {place.channel}")
        if isinstance(message, Presence):
            known, sealed_by = self._presence.get(place.device_id, (Presence(False, message.session), taken.key))
            if sealed_by == taken.key and message.session < known.session:
                return None  # an older start's last will, or a replay
            if message.trouble and message.trouble != known.trouble:
                log.warning("%s says: %s", place.device_id, message.trouble)
            self._presence[place.device_id] = (message, taken.key)
        elif not ring.is_new(taken):
            return None
        return FromFleet(place.device_id, message)

    def _refuse(self, device_id: str, why: str) -> None:
        if device_id not in self.refused and len(self.refused) >= MAX_REFUSED:
            return  # a stranger may take a new name for every message
        self.refused[device_id] = self.refused.get(device_id, 0) + 1
        if self.refused[device_id] == 1:
            log.warning("ignored a message: %s", why)
