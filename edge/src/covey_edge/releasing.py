"""Making a release of wheels, and putting one on a broker. For its maker's desk; a device does not need it."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Optional

from covey_edge.inbox import Inbox
from covey_edge.mqtt import Broker, Incoming, MqttTransport, Refused
from covey_edge.wheels import AGENT, look_at
from covey_protocol.blobs import blob_ref, chunks
from covey_protocol.codec import CHUNK_ROOM_BYTES
from covey_protocol.errors import ConfigError, ReleaseError, TransportError
from covey_protocol.messages import DEFAULT_CHUNK_BYTES, reason_text
from covey_protocol.releases import Release, Wheel, open_release, seal_release
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.topics import Topics
from covey_protocol.versions import plain_name

PUBLISH_TIMEOUT_S = 120.0
RETAINED_S = 3.0  # for what the broker retains to come


def described(wheels: Mapping[str, bytes], *, serial: int, share: float, minimum_version: str, notes: str) -> Release:
    """What a release of these wheels, by file name, says. Each is looked at as a device will.

    Raises ReleaseError for one that a device would refuse, ConfigError for what cannot be said.
    """
    facts = {name: look_at(name, data) for name, data in wheels.items()}
    agents = [one for one in facts.values() if plain_name(one.name) == AGENT]
    if len(agents) != 1:
        raise ReleaseError(f"{len(agents)} of the wheels are covey-edge's", "a release has exactly one, beside others")
    try:
        made = Release(
            agents[0].version,
            serial,
            tuple(Wheel(name, blob_ref(data)) for name, data in wheels.items()),
            agents[0].requires_python,
            minimum_version,
            share,
            reason_text(notes),
        )
        open_release(seal_release(made, key := SealingKey.generate()), key.public)  # its bounds, as a device sees them
    except ValueError as exc:
        raise ConfigError(f"this cannot be a release ({exc})", "correct it") from exc
    except ReleaseError as exc:
        raise ConfigError(f"this cannot be a release: {exc.what}", "correct it") from exc
    return made


def publish_release(
    broker: Broker,
    fleet: str,
    sealed: bytes,
    release: Release,
    wheels: Sequence[bytes],
    key: PublicKey,
    say: Callable[[str], object],
) -> None:
    """Chunks first, the description last: who reads it finds all it names. Raises TransportError.

    ReleaseError where the broker has a newer one: devices would not follow.
    """
    inbox, topics = Inbox(), Topics(fleet)
    transport = MqttTransport(broker, f"covey-{fleet}-release-{os.getpid()}", inbox)
    transport.subscribe([topics.release])
    transport.connect()
    try:
        check_size(transport, release)
        before = _retained(inbox, topics, key)
        if before is not None and before.serial > release.serial:
            raise ReleaseError(
                f"{fleet} has release {before.version} with a newer serial ({before.serial})", "seal this one again"
            )
        put_release(transport, topics, sealed, release, wheels, before, say)
    finally:
        transport.close()


def put_release(
    transport: MqttTransport,
    topics: Topics,
    sealed: bytes,
    release: Release,
    wheels: Sequence[bytes],
    before: Optional[Release],
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Over a connection that is there. before: the release whose wheels are cleared where this one has them not.

    Blocks until the broker has acknowledged all. Raises TransportError.
    """
    for wheel, data in zip(release.wheels, wheels):
        say(f"{wheel.name}: {wheel.blob.num_chunks} chunks")
        for index, chunk in chunks(data, wheel.blob):
            _send(transport, topics.blob(wheel.blob.sha256, index), chunk)
    _send(transport, topics.release, sealed)
    kept = {wheel.blob.sha256 for wheel in release.wheels}
    for wheel in before.wheels if before is not None else ():
        if wheel.blob.sha256 not in kept:
            for index in range(wheel.blob.num_chunks):
                _send(transport, topics.blob(wheel.blob.sha256, index), b"")


def check_size(transport: MqttTransport, release: Release) -> None:
    """TransportError where this connection's broker takes no message of a chunk's size."""
    limit, needed = transport.max_message_bytes, DEFAULT_CHUNK_BYTES + CHUNK_ROOM_BYTES
    if limit is not None and limit < needed and release.size > limit:
        raise TransportError(
            f"{transport.broker} takes messages of at most {limit} bytes, a release needs {needed}",
            "raise the broker's limit, or give the file to `covey agent update`",
            transient=False,
        )


def _retained(inbox: Inbox, topics: Topics, key: PublicKey) -> Optional[Release]:
    """The release that devices find now; None where there is none, or not one of this maker's. Raises TransportError
    where the broker does not let us see it."""
    end = time.monotonic() + RETAINED_S
    while (left := end - time.monotonic()) > 0:
        try:
            item = inbox.get(timeout=left)
        except queue.Empty:
            return None
        if isinstance(item, Refused) and item.topic == topics.release:
            raise item.error
        if isinstance(item, Incoming) and item.topic == topics.release and item.payload:
            try:
                return open_release(item.payload, key)
            except ReleaseError:
                return None
    return None


def _send(transport: MqttTransport, topic: str, payload: bytes) -> None:
    number = transport.publish(topic, payload, retain=True)
    if not transport.flush([number], PUBLISH_TIMEOUT_S):
        raise TransportError(f"{transport.broker} did not take {topic} within {PUBLISH_TIMEOUT_S:g} s", "try again")
