"""Judges a recorded conversation by docs/protocol.md: what an onlooker can know of seals, bounds, order and repeats.

A transcript is JSON lines, one for each MQTT message as the broker delivered it (docs/protocol.md, section 11). The
judge sees what was said, not what was lost: a message that never reached the broker looks like one never sent.
Rules about order are judged only for rounds whose invitation was said during the recording, not before it. This file
does not read files or record anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Optional

import msgspec
from msgspec import Meta, Struct

from covey_protocol import codec
from covey_protocol.codec import COORDINATOR, ReplayGuard
from covey_protocol.errors import PeerError, ReleaseError
from covey_protocol.forms import offered_sizes
from covey_protocol.keys import KeyRing, Keys
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    Invitation,
    Message,
    Need,
    Offer,
    Presence,
    Receipt,
    RoundClosed,
    Seen,
    Verdict,
)
from covey_protocol.releases import described_unverified
from covey_protocol.seals import PublicKey
from covey_protocol.topics import DeviceTopic, Topics


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """One line. time_s: seconds since the recording began. retained: the broker had kept it before."""

    time_s: Annotated[float, Meta(ge=0)]
    topic: str
    payload: bytes
    retained: bool = False


_records = msgspec.json.Decoder(Record)


def write_record(record: Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


@dataclass(frozen=True)
class Violation:
    """section: of docs/protocol.md."""

    line: int
    section: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what} (docs/protocol.md, section {self.section})"


@dataclass
class _Device:
    """What one device and the coordinator said to each other about one round."""

    answer: Optional[bool] = None
    failed: bool = False
    offers: dict[bytes, Offer] = field(default_factory=dict)
    needed: dict[bytes, set[int]] = field(default_factory=dict)
    chunks: dict[bytes, dict[int, bytes]] = field(default_factory=dict)
    whole: set[bytes] = field(default_factory=set)
    kept: dict[bytes, bool] = field(default_factory=dict)
    verdict: Optional[Verdict] = None


@dataclass
class _Round:
    """live: its invitation was said during the recording."""

    invitation: Invitation
    live: bool
    closed: Optional[RoundClosed] = None
    devices: dict[str, _Device] = field(default_factory=dict)

    def device(self, device_id: str) -> _Device:
        return self.devices.setdefault(device_id, _Device())


class Judge:
    """Takes the records of one fleet in order. `keys`: of the devices; a device without one has its seals unchecked."""

    def __init__(
        self, fleet: str, coordinator: Optional[Keys] = None, keys: Optional[Mapping[str, Keys]] = None
    ) -> None:
        self.messages = 0
        self.unchecked: dict[str, int] = {}  # sender -> messages whose seal nobody could check
        self._topics = Topics(fleet)
        self._coordinator = None if coordinator is None else KeyRing(coordinator)
        self._keys = None if keys is None else {device_id: KeyRing(one) for device_id, one in keys.items()}
        self._sealed_by: dict[str, PublicKey] = {}
        self._guards: dict[str, ReplayGuard] = {}
        # (sender, its key, sequence) -> digest of topic and payload
        self._said: dict[tuple[str, Optional[PublicKey], int], bytes] = {}
        self._sessions: dict[str, int] = {}
        self._rounds: dict[str, _Round] = {}
        self._current = ""
        self._blobs: dict[bytes, dict[int, bytes]] = {}
        self._time_s = 0.0

    def line(self, text: bytes) -> None:
        """Judge one line. Raises PeerError with the section it breaks; what it said is then not counted as said."""
        try:
            record = _records.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise PeerError(f"not a record of a transcript ({exc})", section=11) from exc
        if record.time_s < self._time_s:
            raise PeerError("the time runs backwards", section=11)
        self._time_s = record.time_s
        self.messages += 1
        blob = self._topics.parse_blob(record.topic)
        if blob is not None:
            self._blob_chunk(blob.sha256, blob.chunk, record)
        elif record.topic == self._topics.round:
            self._from_coordinator(record, None)
        elif (place := self._topics.parse_device(record.topic)) is not None:
            self._at_device(place, record)
        elif record.topic == self._topics.release:
            _check_release(record.payload)
        else:
            raise PeerError(f"{record.topic[:120]!r} is no topic of the protocol", section=2)

    # --- who says it

    def _at_device(self, place: DeviceTopic, record: Record) -> None:
        if place.channel == "down":
            self._from_coordinator(record, place.device_id)
        elif record.payload or place.channel == "up":
            self._from_device(place, record)

    def _from_coordinator(self, record: Record, device_id: Optional[str]) -> None:
        if not record.payload and device_id is None:
            self._current = ""  # nobody serves the fleet
            return
        message, sequence = self._decode(record, COORDINATOR, self._coordinator)
        if isinstance(message, (Invitation, RoundClosed)) != (device_id is None):
            raise PeerError(f"{type(message).__name__} does not belong on {record.topic}", section=2)
        if self._is_copy(COORDINATOR, sequence, record):
            return
        if isinstance(message, Invitation):
            self._invitation(message, record)
        elif isinstance(message, RoundClosed):
            self._closed(message)
        else:
            self._told(device_id or "", message)

    def _from_device(self, place: DeviceTopic, record: Record) -> None:
        if self._keys is not None and place.device_id not in self._keys:
            raise PeerError(f"{place.device_id} is not in the roster", section=9)
        key = None if self._keys is None else self._keys[place.device_id]
        message, sequence = self._decode(record, place.device_id, key)
        if isinstance(message, Presence) != (place.channel == "presence"):
            raise PeerError(f"{type(message).__name__} does not belong on {record.topic}", section=2)
        if isinstance(message, Presence):
            self._presence(place.device_id, message)
        elif record.retained:
            raise PeerError(f"a retained message on {record.topic}", section=2)
        elif not self._is_copy(place.device_id, sequence, record):
            self._said_by(place.device_id, message)

    def _decode(self, record: Record, sender: str, ring: Optional[KeyRing]) -> tuple[Message, int]:
        if ring is None:
            self.unchecked[sender] = self.unchecked.get(sender, 0) + 1
            return codec.decode_unverified(record.payload, topic=record.topic, sender=sender)

        def decode(key: PublicKey) -> tuple[Message, int]:
            if sender == COORDINATOR:
                return codec.decode_from_coordinator(record.payload, topic=record.topic, key=key)
            return codec.decode_from_device(record.payload, topic=record.topic, sender=sender, key=key)

        taken = ring.take(decode)
        if self._sealed_by.setdefault(sender, taken.key) != taken.key:  # numbers and sessions begin anew with it
            self._sealed_by[sender] = taken.key
            self._guards.pop(sender, None)
            self._sessions.pop(sender, None)
        return taken.message, taken.sequence

    def _is_copy(self, sender: str, sequence: int, record: Record) -> bool:
        """True for the broker's own copy of a retained message that was said before."""
        digest = hashlib.sha256(record.topic.encode() + b"\0" + record.payload).digest()
        first = self._said.setdefault((sender, self._sealed_by.get(sender), sequence), digest)
        if self._guards.setdefault(sender, ReplayGuard()).accept(sequence):
            return False
        if first == digest and record.retained:
            return True
        how = "was said before" if first == digest else "is used twice or is too old"
        raise PeerError(f"number {sequence} of {sender} {how}: receivers drop this", section=3)

    # --- the coordinator's side, section 6

    def _invitation(self, invitation: Invitation, record: Record) -> None:
        known = self._rounds.get(invitation.round_id)
        if known is not None:
            _require(known.invitation == invitation, 6, f"round {invitation.round_id} is invited to in another form")
            _require(known.closed is None, 6, f"round {invitation.round_id} was closed before")
        else:
            self._earlier(invitation)
            self._rounds[invitation.round_id] = _Round(invitation, live=not record.retained)
        self._current = invitation.round_id
        for ref in () if record.retained else invitation.blobs:
            self._check_blob(ref)

    def _earlier(self, invitation: Invitation) -> None:
        for round_id in invitation.earlier:
            known = self._rounds.get(round_id)
            allowed = known is None or known.invitation.max_staleness > 0
            _require(allowed, 6, f"round {invitation.round_id} says that {round_id} goes on, which is not asynchronous")

    def _closed(self, closed: RoundClosed) -> None:
        known = self._rounds.get(closed.round_id)
        if known is None:
            _require(not self._rounds, 6, f"round {closed.round_id} is closed and nobody was invited to it")
            return
        _require(closed.outcome in ("published", "abandoned"), 4, f"a round cannot end as {closed.outcome!r}")
        same = known.closed is None or known.closed.outcome == closed.outcome
        _require(same, 6, f"round {closed.round_id} ends as {closed.outcome} after it ended otherwise")
        known.closed = closed

    def _told(self, device_id: str, message: Message) -> None:
        known = self._live_round(message)
        if known is None:
            return
        device = known.device(device_id)
        if isinstance(message, Need):
            self._need(device_id, device, message)
        elif isinstance(message, Receipt):
            self._receipt(device_id, device, message)
        elif isinstance(message, Verdict):
            self._verdict(device_id, device, message, known)

    def _need(self, device_id: str, device: _Device, need: Need) -> None:
        offer = device.offers.get(need.sha256)
        if offer is None:
            raise PeerError(f"{device_id} is asked for chunks of an update it has not offered", section=6)
        beyond = max(need.indices) >= offer.update.num_chunks
        _require(not beyond, 6, f"{device_id} is asked for a chunk that its update does not have")
        device.needed.setdefault(need.sha256, set()).update(need.indices)

    def _receipt(self, device_id: str, device: _Device, receipt: Receipt) -> None:
        _require(receipt.sha256 in device.offers, 6, f"{device_id} gets a receipt for what it has not offered")
        before = device.kept.get(receipt.sha256)
        _require(before in (None, receipt.kept), 6, f"{device_id} is told another fate of the same update than before")
        if receipt.kept:
            _require(
                receipt.sha256 in device.whole, 6, f"{device_id} is told that an update is kept before it is whole"
            )
        device.kept[receipt.sha256] = receipt.kept

    def _verdict(self, device_id: str, device: _Device, verdict: Verdict, known: _Round) -> None:
        _require(verdict.status in ("accepted", "rejected"), 4, f"a verdict cannot be {verdict.status!r}")
        _require(known.closed is not None, 6, f"{device_id} gets a verdict before the round is closed")
        # a later round may have taken the update
        asynchronous = known.invitation.max_staleness > 0
        used = asynchronous or (known.closed is not None and known.closed.outcome == "published")
        _require(used or verdict.status == "rejected", 6, f"{device_id} is accepted in a round that was not published")
        _require(True in device.kept.values(), 6, f"{device_id} gets a verdict on an update that was not kept")
        _require(device.verdict in (None, verdict), 6, f"{device_id} gets another verdict than before")
        device.verdict = verdict

    # --- a device's side, section 5

    def _presence(self, device_id: str, presence: Presence) -> None:
        newest = self._sessions.get(device_id, 0)
        # the last will of an earlier start may come late; its "online" can only be a replay
        older = presence.online and presence.session < newest
        _require(not older, 4, f"{device_id} is said to be online in a session older than its newest")
        if presence.session > newest:
            self._sessions[device_id] = presence.session
            self._restarted(device_id)

    def _restarted(self, device_id: str) -> None:
        """A new start of an agent does not know what it declined or gave up."""
        for known in self._rounds.values():
            device = known.devices.get(device_id)
            if device is not None:
                device.answer, device.failed = device.answer or None, False

    def _said_by(self, device_id: str, message: Message) -> None:
        known = self._live_round(message)
        if known is None:
            return
        invited = known.invitation.devices
        here = not invited or device_id in invited
        _require(here, 5, f"{device_id} was not invited to round {known.invitation.round_id}")
        device = known.device(device_id)
        over = device.failed or device.answer is False
        answers_again = isinstance(message, Answer) and not device.failed  # no again, or it joins later
        again = answers_again or (isinstance(message, Failure) and device.failed)
        again = again or (isinstance(message, Seen) and device.verdict is not None)  # withdrawn when it was taken
        what = type(message).__name__
        _require(again or not over, 5, f"{device_id} sends {what} for a round that it declined or gave up")
        if isinstance(message, Answer):
            device.answer = message.accept
        elif isinstance(message, Failure):
            device.failed = True
        elif isinstance(message, Offer):
            self._offer(device_id, device, message, known)
        elif isinstance(message, Chunk):
            self._chunk(device_id, device, message)
        elif isinstance(message, Seen):
            _require(device.verdict is not None, 5, f"{device_id} has seen a verdict that nobody gave it")

    def _offer(self, device_id: str, device: _Device, offer: Offer, known: _Round) -> None:
        restarted = bool(device.offers)  # from its outbox, without another answer
        _require(device.answer is True or restarted, 5, f"{device_id} offers an update without having accepted")
        least, most = offered_sizes(known.invitation)
        right = least <= offer.update.size <= most
        _require(right, 4, f"{device_id} offers {offer.update.size} bytes, not {least} to {most} as this round asks")
        bare = not known.invitation.encryption_key or (offer.num_examples == 1 and not offer.metrics)
        _require(bare, 4, f"{device_id} offers an encrypted update and says beside it what is to be hidden")
        device.offers[offer.update.sha256] = offer

    def _chunk(self, device_id: str, device: _Device, chunk: Chunk) -> None:
        offer = device.offers.get(chunk.sha256)
        if offer is None:
            raise PeerError(f"{device_id} sends a chunk of an update it has not offered", section=6)
        asked = chunk.index in device.needed.get(chunk.sha256, set())
        _require(asked, 5, f"{device_id} sends chunk {chunk.index}, which it was not asked for")
        right = len(chunk.data) == offer.update.chunk_size(chunk.index)
        _require(right, 8, f"{device_id} sends chunk {chunk.index} with {len(chunk.data)} bytes")
        if chunk.sha256 in device.whole:
            return  # a repeated one
        chunks = device.chunks.setdefault(chunk.sha256, {})
        chunks[chunk.index] = chunk.data
        if len(chunks) == offer.update.num_chunks:
            del device.chunks[chunk.sha256]
            whole = _digest(chunks, offer.update) == chunk.sha256
            _require(whole, 8, f"{device_id}'s chunks do not make the update it offered")
            device.whole.add(chunk.sha256)

    def _live_round(self, message: Message) -> Optional[_Round]:
        known = self._rounds.get(
            getattr(message, "round_id", "")
        )  # none: an update of an earlier round, out of an outbox
        return known if known is not None and known.live else None

    # --- blobs, section 8

    def _blob_chunk(self, sha256: bytes, index: int, record: Record) -> None:
        if record.payload:
            self._blobs.setdefault(sha256, {})[index] = record.payload
            return
        current = self._rounds.get(self._current)
        in_use = current is not None and current.closed is None and sha256 in self._models_of(current)
        _require(not in_use, 8, "a chunk of the parameters is cleared while their round is under way")
        self._blobs.get(sha256, {}).pop(index, None)

    def _models_of(self, current: _Round) -> set[bytes]:
        """Of the round and of those that it takes updates of."""
        earlier = [self._rounds[name] for name in current.invitation.earlier if name in self._rounds]
        models = [known.invitation.parameters for known in (current, *earlier)]
        return {ref.sha256 for ref in (*models, *current.invitation.vectors)}

    def _check_blob(self, ref: BlobRef) -> None:
        chunks = self._blobs.get(ref.sha256, {})
        name = f"blob {ref.sha256.hex()[:16]}"
        missing = [index for index in range(ref.num_chunks) if index not in chunks]
        _require(not missing, 6, f"{name} is invited to before its chunks {missing[:5]} are there")
        wrong = [index for index in range(ref.num_chunks) if len(chunks[index]) != ref.chunk_size(index)]
        _require(not wrong, 8, f"{name}: chunks {wrong[:5]} have the wrong size")
        _require(_digest(chunks, ref) == ref.sha256, 8, f"{name}: the chunks do not make it")


def _digest(chunks: Mapping[int, bytes], ref: BlobRef) -> bytes:
    return hashlib.sha256(b"".join(chunks[index] for index in range(ref.num_chunks))).digest()


def _check_release(payload: bytes) -> None:
    """Whose seal it must have, only devices know."""
    try:
        if payload:
            described_unverified(payload)
    except ReleaseError as exc:
        raise PeerError(str(exc), section=12) from exc


def _require(holds: bool, section: int, otherwise: str) -> None:
    if not holds:
        raise PeerError(otherwise, section=section)


def violations(judge: Judge, lines: Iterable[bytes]) -> Iterator[Violation]:
    """What breaks the protocol in a transcript, in order, at most one for a line."""
    for number, text in enumerate(lines, start=1):
        try:
            judge.line(text)
        except PeerError as exc:
            yield Violation(number, exc.section, exc.what)


def fleet_of(line: bytes) -> str:
    """The fleet that a transcript's line is about. PeerError if it is about none."""
    try:
        parts = _records.decode(line).topic.split("/")
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise PeerError(f"not a record of a transcript ({exc})", section=11) from exc
    if len(parts) < 4 or parts[0] != "covey":
        raise PeerError("not a topic of covey", section=2)
    return parts[2]
