"""The doctor as an MQTT client: does a chunk fit, is it kept and given back, and do the access rules hold?

It writes on its own probe topic, an empty message on its own `up` (a coordinator passes over it), and empty messages
that are not retained on topics that no program looks at, which must be refused. It listens to what it must not hear for
as long as its own message would take. Its probe is cleared at the end; it expires within a minute in any case (MQTT 5).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from covey_deploy.access import COORDINATOR, DEVICE, Access
from covey_edge.inbox import Inbox
from covey_edge.mqtt import (
    CONNECT_TIMEOUT_S,
    PACKET_HEADER_BYTES,
    TOPIC_BYTES,
    Broker,
    Incoming,
    MqttTransport,
    Refused,
)
from covey_edge.preflight import OK, WARNING, WRONG, Finding, arrivals, said_of_the_round, wrong
from covey_protocol.codec import CHUNK_ROOM_BYTES
from covey_protocol.errors import EXIT_TRANSPORT, TransportError
from covey_protocol.messages import DEFAULT_CHUNK_BYTES
from covey_protocol.seals import PublicKey

PROBE_EXPIRY_S = 60.0
TAKEOVER_S = 2.0
RULES = "give the broker the access rules that covey broker config writes"


@dataclass
class Patient:
    """Who we are to the broker. keys: the coordinator's, as far as they are known here.

    broker: with the certificate of `name`. role: as in `access`.
    """

    broker: Broker
    fleet: str
    role: str
    name: str
    keys: Iterable[PublicKey] = ()
    inbox: Inbox = field(default_factory=Inbox)


def probe(patient: Patient) -> Iterator[Finding]:
    """Raises TransportError where the broker does not take us."""
    transport = MqttTransport(patient.broker, f"covey-{patient.fleet}-{patient.name}-doctor", patient.inbox)
    transport.connect()
    try:
        yield _version(patient, transport)
        yield from _size(patient, transport)
        yield from _chunk(patient, transport)
        yield from _own_rights(patient, transport)
        yield _refusals(patient, transport)
        yield from _hearing(patient, transport)
    finally:
        transport.close()


def _version(patient: Patient, transport: MqttTransport) -> Finding:
    said = f"{patient.broker} takes us as {patient.name}: MQTT {transport.protocol}"
    if transport.protocol == "5":
        return Finding("mqtt", OK, said)
    return Finding("mqtt", WARNING, f"{said}, which has no word for what it refuses", "use a broker that speaks MQTT 5")


def _size(patient: Patient, transport: MqttTransport) -> Iterator[Finding]:
    limit, needed = transport.max_message_bytes, DEFAULT_CHUNK_BYTES + CHUNK_ROOM_BYTES
    if limit is not None and limit < needed:
        what = f"{patient.broker} takes messages of at most {limit} bytes, a chunk is {needed}"
        least = needed + TOPIC_BYTES + PACKET_HEADER_BYTES
        remedy = f"raise it to {least} or more (Mosquitto: max_packet_size)"
        yield Finding("payload", WRONG, what, remedy, EXIT_TRANSPORT)


def _published(transport: MqttTransport, topic: str, payload: bytes, **options: Any) -> Optional[TransportError]:
    """None where the broker took it."""
    try:
        sent = transport.publish(topic, payload, **options)
        if transport.flush([sent], CONNECT_TIMEOUT_S):
            return None
    except TransportError as exc:
        return exc
    return TransportError(f"{transport.broker} did not acknowledge {len(payload)} bytes on {topic}", "look at its log")


def _denied(error: Optional[TransportError]) -> bool:
    return error is not None and "Not authorized" in error.what


def _chunk(patient: Patient, transport: MqttTransport) -> Iterator[Finding]:
    """A chunk on our own probe topic: taken whole, kept, given back."""
    topic = Access(patient.fleet).own("probe", patient.name)
    limit = transport.max_message_bytes
    room = DEFAULT_CHUNK_BYTES if limit is None else limit - TOPIC_BYTES - PACKET_HEADER_BYTES
    payload = os.urandom(max(1, min(DEFAULT_CHUNK_BYTES, room)))
    error = _published(transport, topic, payload, retain=True, expiry_s=PROBE_EXPIRY_S)
    if _denied(error):
        what = f"the access rules give {patient.name} no probe topic: whether a chunk fits and is kept is not known"
        yield Finding("payload", WARNING, what, RULES)
        return
    if error is not None:
        yield wrong("payload", error)
        return
    transport.subscribe([topic])
    came = [item.payload for item in arrivals(patient.inbox) if isinstance(item, Incoming) and item.topic == topic]
    if payload in came:
        yield Finding("payload", OK, f"{len(payload)} bytes were taken, kept and given back")
    else:
        what = f"{patient.broker} acknowledged {len(payload)} retained bytes and does not give them back"
        remedy = "raise its limit of message sizes, let it retain messages, and let us read our probe topic"
        yield Finding("payload", WRONG, what, remedy, EXIT_TRANSPORT)
    _published(transport, topic, b"", retain=True)


def _own_rights(patient: Patient, transport: MqttTransport) -> Iterator[Finding]:
    access = Access(patient.fleet)
    if patient.role == DEVICE:
        topic = access.own("up", patient.name)
    elif patient.role == COORDINATOR:
        topic = access.nobodys[1]
    else:
        return
    error = _published(transport, topic, b"", expiry_s=1.0)
    if _denied(error):
        what = f"the broker does not let us write {topic}"
        remedy = f"it must take us for {patient.name} (use_identity_as_username), and know the rules: {RULES}"
        yield Finding("rights", WRONG, what, remedy, EXIT_TRANSPORT)
    elif error is not None:
        yield wrong("rights", error)
    else:
        yield Finding("rights", OK, f"may write as {patient.name}")


def _refusals(patient: Patient, transport: MqttTransport) -> Finding:
    """Topics that are not ours. Empty and not retained: where they are taken, nobody is disturbed."""
    if transport.protocol != "5":
        what = "whether forbidden messages are refused cannot be told over MQTT 3.1.1"
        return Finding("rights", WARNING, what, "use a broker that speaks MQTT 5")
    nobodys = Access(patient.fleet).nobodys
    forbidden = nobodys[:1] if patient.role == COORDINATOR else nobodys
    taken = [topic for topic in forbidden if _published(transport, topic, b"", expiry_s=1.0) is None]
    if taken:
        what = f"{patient.name} may write {', '.join(taken)}: the broker lets its clients write what is not theirs"
        return Finding("rights", WRONG, what, RULES, EXIT_TRANSPORT)
    return Finding("rights", OK, "what is not ours is refused")


def _hearing(patient: Patient, transport: MqttTransport) -> Iterator[Finding]:
    """What the fleet retains for us; and for a device, that it does not hear what devices say."""
    access = Access(patient.fleet)
    listened = [access.round, access.release, access.own("down", patient.name)]
    foreign = [access.all_up, access.all_down] if patient.role == DEVICE else []
    transport.subscribe([*listened, *foreign])
    if foreign:
        _published(transport, access.own("up", patient.name), b"", expiry_s=1.0)
    items = arrivals(patient.inbox)
    yield from (wrong("rights", one.error) for one in items if isinstance(one, Refused) and one.topic in listened)
    incoming = [one for one in items if isinstance(one, Incoming)]
    own_down = access.own("down", patient.name)
    overheard = {one.topic for one in incoming} - {access.round, access.release, own_down}
    overheard = {topic for topic in overheard if topic.endswith(("/up", "/down"))}
    if foreign and overheard:
        what = f"{patient.name} hears what is not for it, for example {min(overheard)}"
        yield Finding("rights", WRONG, what, RULES, EXIT_TRANSPORT)
    if patient.keys:
        rounds = [one for one in incoming if one.topic == access.round]
        yield from said_of_the_round(patient.fleet, patient.keys, rounds)[0]


def takeover(patient: Patient) -> Iterator[Finding]:
    """Whether a client id alone ends somebody's connection. patient: one whose connection nobody misses."""
    ours = MqttTransport(patient.broker, f"covey-{patient.fleet}-{patient.name}-first", Inbox())
    thief = MqttTransport(patient.broker, f"covey-{patient.fleet}-{patient.name}-second", Inbox())
    ours.connect()
    try:
        thief.connect()
        end, ended = time.monotonic() + TAKEOVER_S, False
        while not ended and time.monotonic() < end:
            time.sleep(0.02)
            ended = not ours.connected  # for half a second at least: then it tries again
    finally:
        ours.close()
        thief.close()
    if ended:
        yield Finding("names", OK, "the broker goes by certificates: nobody ends another's connection by its client id")
    else:
        what = "client ids are not bound to certificates: a device can end another's connection by using its id"
        yield Finding("names", WARNING, what, "set use_username_as_clientid true (covey broker config does)")
