"""A coordinator of one device, by hand: what a test tells it to invite to, over a real broker, and what it answers."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

from patience import PATIENCE_S

from covey_edge.inbox import Inbox
from covey_edge.mqtt import Incoming, MqttTransport, parse_broker
from covey_protocol import codec
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.codec import COORDINATOR, Sequence
from covey_protocol.messages import (
    BlobRef,
    Chunk,
    Failure,
    Invitation,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    TrainingPlan,
    Verdict,
)
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import Topics

CHUNK_BYTES = 65_536


class LoneCoordinator:
    """Use as a context. heard: all messages of the device, in order."""

    def __init__(self, url: str, fleet: str, device_id: str, key: SealingKey, device: PublicKey) -> None:
        self._topics, self._device_id, self._key, self._device = Topics(fleet), device_id, key, device
        self._inbox = Inbox()
        self._transport = MqttTransport(parse_broker(url), "coordinator", self._inbox)
        self._sequence = Sequence(time.time_ns())
        self._rounds = 0
        self.heard: list[Any] = []

    def __enter__(self) -> LoneCoordinator:
        self._transport.subscribe([self._topics.up(self._device_id)])
        self._transport.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._transport.close()

    def invite(self, bundle: bytes, parameters: bytes, plan: TrainingPlan, **more: Any) -> Invitation:
        """Publish the blobs and a new round."""
        self._rounds += 1
        invitation = Invitation(
            f"test.{self._rounds}.{time.time_ns():x}",
            self._rounds,
            int(time.time() * 1000),
            600_000,
            self._blob(bundle),
            self._blob(parameters),
            plan,
            **more,
        )
        self._say(self._topics.round, invitation, retain=True)
        return invitation

    def close_round(self, invitation: Invitation) -> None:
        closed = RoundClosed(invitation.round_id, "published")
        self._say(self._topics.round, closed, retain=True)

    def take(self, invitation: Invitation, verdict: str = "accepted") -> tuple[Offer, bytes]:
        """Have the whole update sent, acknowledge it, close the round and say what became of it."""
        offer = self.wait_for(lambda one: isinstance(one, Offer) and one.round_id == invitation.round_id)
        ref = offer.update
        self.tell(Need(offer.round_id, ref.sha256, tuple(range(ref.num_chunks))))
        update = b"".join(
            self.wait_for(lambda one, index=index: isinstance(one, Chunk) and one.index == index).data
            for index in range(ref.num_chunks)
        )
        self.tell(Receipt(offer.round_id, ref.sha256, True))
        self.close_round(invitation)
        self.tell(Verdict(offer.round_id, verdict))
        return offer, update

    def tell(self, message: Any) -> None:
        self._say(self._topics.down(self._device_id), message)

    def wait_for(self, holds: Callable[[Any], bool]) -> Any:
        """The first message of the device for which this holds, also one that was heard before."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for one in self.heard:
                if holds(one):
                    return one
            self._hear(end - time.monotonic())
        raise AssertionError(f"not heard; heard: {[type(one).__name__ for one in self.heard]}")

    def failure(self, invitation: Invitation) -> str:
        """The reason for which the device gives this round up."""
        return self.wait_for(lambda one: isinstance(one, Failure) and one.round_id == invitation.round_id).reason

    def _hear(self, timeout_s: float) -> None:
        try:
            item = self._inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return
        if isinstance(item, Incoming) and item.payload:
            message, _ = codec.decode_from_device(
                item.payload, topic=item.topic, sender=self._device_id, key=self._device
            )
            self.heard.append(message)

    def _blob(self, data: bytes) -> BlobRef:
        ref = blob_ref(data, CHUNK_BYTES)
        for index, payload in chunks(data, ref):
            self._transport.publish(self._topics.blob(ref.sha256, index), payload, retain=True)
        return ref

    def _say(self, topic: str, message: Any, retain: bool = False) -> None:
        payload = codec.encode(message, topic=topic, sender=COORDINATOR, sequence=self._sequence.next(), key=self._key)
        self._transport.publish(topic, payload, retain=retain)
