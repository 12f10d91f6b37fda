"""What one round costs a device on the wire: every message of it, encoded by the real codec, and MQTT's framing.

Counted: the bytes of MQTT 3.1.1 packets in both directions for one round that goes well, with QoS 1 acknowledgements.
MQTT 5 adds 1 byte to a packet, 6 to one that expires.
Not counted: TCP, TLS and connecting, keep-alive, and what is repeated over a bad connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from covey_edge.mqtt import TOPICS_AT_ONCE
from covey_protocol import codec
from covey_protocol.bundle import Manifest
from covey_protocol.codec import COORDINATOR
from covey_protocol.device import needed_capabilities
from covey_protocol.errors import BundleError
from covey_protocol.forms import Compression, update_sizes
from covey_protocol.messages import (
    DEFAULT_CHUNK_BYTES,
    Answer,
    BlobRef,
    Chunk,
    Invitation,
    Message,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    TrainingPlan,
    Verdict,
)
from covey_protocol.seals import SealingKey
from covey_protocol.topics import Topics

PUBACK_BYTES = 4
PLAIN = Compression()
ROUND_ID = "living-room.12.19a1b2c3d4e"  # as long as a run's usual ones
NUMBER = 1_800_000_000_000_000  # message numbers are microseconds of Unix time
METRICS = {"loss_before": 1.5, "accuracy_before": 0.5, "training_loss": 1.0, "seconds": 10.5}


@dataclass(frozen=True)
class Traffic:
    """Bytes for one device. bundle_down, bundle_up: once per bundle. The rest: each round."""

    bundle_down: int
    bundle_up: int
    parameters_down: int
    messages_down: int
    update_up: int
    messages_up: int
    chunk_bytes: int

    @property
    def down(self) -> int:
        return self.parameters_down + self.messages_down

    @property
    def up(self) -> int:
        return self.update_up + self.messages_up


def traffic(
    manifest: Manifest,
    bundle_bytes: int,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    fleet: str = "living-room",
    device_id: str = "kitchen-pi-2",
    compression: Compression = PLAIN,
) -> Traffic:
    """Bytes per round of a device with these names, invited alone. Longer names and more invited devices cost their
    letters more. Of a compression whose sizes differ, the largest."""
    topics, key = Topics(fleet), SealingKey.from_seed(bytes(32))
    size = 4 * manifest.dimension
    update_size = update_sizes(compression, manifest.dimension)[1]
    try:
        bundle = BlobRef(bytes(32), bundle_bytes, chunk_bytes)
        parameters = BlobRef(bytes([1]) * 32, size, chunk_bytes)
    except ValueError as exc:
        raise BundleError(
            f"the model cannot travel in chunks of {chunk_bytes} bytes ({exc})", "use larger ones"
        ) from exc
    update = BlobRef(bytes([2]) * 32, update_size, chunk_bytes)

    def sealed(message: Message, topic: str, sender: str) -> int:
        return publish_bytes(topic, len(codec.encode(message, topic=topic, sender=sender, sequence=NUMBER, key=key)))

    down: list[tuple[str, Message]] = [
        (topics.round, _invitation(manifest, bundle, parameters, device_id, compression)),
        (topics.down(device_id), Need(ROUND_ID, update.sha256, tuple(range(update.num_chunks)))),
        (topics.down(device_id), Receipt(ROUND_ID, update.sha256, True)),
        (topics.round, RoundClosed(ROUND_ID, "published")),
        (topics.down(device_id), Verdict(ROUND_ID, "accepted")),
    ]
    up: list[Message] = [Answer(ROUND_ID, True), Offer(ROUND_ID, update, 1000, METRICS)]
    chunks = [
        sealed(Chunk(ROUND_ID, update.sha256, index, bytes(update.chunk_size(index))), topics.up(device_id), device_id)
        for index in range(update.num_chunks)
    ]
    (bundle_asks, bundle_answers), (asks, answers) = _asking(topics, bundle), _asking(topics, parameters)
    return Traffic(
        bundle_down=_retained(topics, bundle) + bundle_answers,
        bundle_up=bundle_asks + bundle.num_chunks * PUBACK_BYTES,
        parameters_down=_retained(topics, parameters),
        messages_down=sum(sealed(message, topic, COORDINATOR) for topic, message in down)
        + (len(up) + len(chunks)) * PUBACK_BYTES
        + answers,
        update_up=sum(chunks),
        messages_up=sum(sealed(message, topics.up(device_id), device_id) for message in up)
        + (len(down) + parameters.num_chunks) * PUBACK_BYTES
        + asks,
        chunk_bytes=chunk_bytes,
    )


def _invitation(
    manifest: Manifest, bundle: BlobRef, parameters: BlobRef, device_id: str, compression: Compression
) -> Invitation:
    plan = TrainingPlan(
        epochs=1,
        learning_rate=0.1,
        shuffle_seed=12,
        compression=compression.name,
        kept_fraction=compression.kept_fraction,
    )
    return Invitation(
        round_id=ROUND_ID,
        number=12,
        issued_at_ms=NUMBER // 1000,
        duration_ms=600_000,
        bundle=bundle,
        parameters=parameters,
        plan=plan,
        devices=(device_id,),
        requires=needed_capabilities(manifest, plan),
    )


def publish_bytes(topic: str, payload: int) -> int:
    """A QoS 1 PUBLISH packet: fixed header, topic with its length, packet identifier, payload."""
    return _packet(2 + len(topic) + 2 + payload)


def _packet(remaining: int) -> int:
    """One byte of type, the remaining length in one to four bytes of seven bits, the rest."""
    digits = 1
    while remaining >= 128**digits:
        digits += 1
    return 1 + digits + remaining


def _retained(topics: Topics, ref: BlobRef) -> int:
    return sum(publish_bytes(topics.blob(ref.sha256, i), ref.chunk_size(i)) for i in range(ref.num_chunks))


def _asking(topics: Topics, ref: BlobRef) -> tuple[int, int]:
    """(up, down) of subscribing to a blob's chunks, at most TOPICS_AT_ONCE in a packet, and of leaving them."""
    names = [2 + len(topics.blob(ref.sha256, index)) for index in range(ref.num_chunks)]
    up = down = 0
    for group in _groups(names):
        up += _packet(2 + sum(names_bytes + 1 for names_bytes in group))  # each with the QoS asked for
        up += _packet(2 + sum(group))
        down += _packet(2 + len(group)) + _packet(2)  # SUBACK: a code for each
    return up, down


def _groups(names: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(names), TOPICS_AT_ONCE):
        yield names[start : start + TOPICS_AT_ONCE]
