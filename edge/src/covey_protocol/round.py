"""The coordinator's side of one round: a sans-IO state table. docs/protocol.md, section 6.

    INVITING -> COLLECTING -> AGGREGATING -> PUBLISHED
                                         \\-> ABANDONED (quorum not met by the deadline, or the rule refused)

Events in, effects out; the clock is an input. Aggregation, storage and publishing are the coordinator's: it performs
the effects in order and reports what came of them. Whatever an effect says to a device, the effect that makes it
durable comes before; so a machine can be `restored` from the durable facts after a crash between any two effects. A
device is never trusted: what breaks the protocol raises PeerError and changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional, Union

from covey_protocol.blobs import BlobAssembly
from covey_protocol.errors import PeerError, RuleError, UsageError
from covey_protocol.forms import offered_sizes
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    FromCoordinator,
    Invitation,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    Verdict,
    reason_text,
)


class Phase(Enum):
    INVITING = "inviting"
    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    PUBLISHED = "published"
    ABANDONED = "abandoned"


class Progress(Enum):
    """How far one invited device is. Those in FINAL stay for the round, but for a device that said no and joins later;
    a device that is GONE may return.

    POSTPONED: it declined for now. It is waited for only where too few others deliver.

    LOST: its update was stored and acknowledged, but the disk did not keep it; the device still has it.
    REVOKED: the operator wants nothing of it any more; what was stored of it does not enter the model.
    """

    INVITED = "invited"
    ACCEPTED = "accepted"
    UPLOADING = "uploading"
    STORING = "storing"
    STORED = "stored"
    LOST = "lost"
    DECLINED = "declined"
    POSTPONED = "postponed"
    FAILED = "failed"
    REFUSED = "refused"
    REVOKED = "revoked"
    GONE = "gone"


SAID_NO = frozenset({Progress.DECLINED, Progress.POSTPONED})
FINAL = frozenset({Progress.STORED, *SAID_NO, Progress.FAILED, Progress.REFUSED, Progress.REVOKED})


def is_revocable(progress: Progress) -> bool:
    """Whether there is something of the device that a revocation takes away: an update, or one that may come."""
    return progress is Progress.STORED or progress in SAID_NO or progress not in FINAL


@dataclass(frozen=True)
class Earlier:
    """An earlier round whose updates a round takes, too.

    staleness: by how many published models it is behind. taken: the devices whose update of it was stored before, in
    whichever round: of each round a device's update is taken once.
    """

    staleness: int
    taken: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RoundSettings:
    """quorum: fewest stored updates that may be aggregated. answer_s: how long to wait for answers to the invitation.
    grace_s: how long a device whose connection broke is waited for.
    update_bytes: the size of an update as it travels, 4 d unless it is compressed or encrypted. least_update_bytes:
    where it may also be smaller.
    goal: so many stored updates end the round at once, 0 for waiting for everyone.
    earlier: the invitation's earlier rounds, with what must be known of them.
    """

    quorum: int
    answer_s: float
    grace_s: float
    update_bytes: int
    least_update_bytes: Optional[int] = None
    goal: int = 0
    earlier: Mapping[str, Earlier] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        invitation: Invitation,
        quorum: int,
        answer_s: float,
        grace_s: float,
        goal: int = 0,
        earlier: Optional[Mapping[str, Earlier]] = None,
    ) -> RoundSettings:
        """With the sizes that updates for this invitation may have."""
        least, most = offered_sizes(invitation)
        return cls(quorum, answer_s, grace_s, most, least if least < most else None, goal, earlier or {})

    @property
    def sizes(self) -> range:
        least = self.update_bytes if self.least_update_bytes is None else self.least_update_bytes
        return range(least, self.update_bytes + 1)


@dataclass(frozen=True)
class DeviceFacts:
    """What is durable of one device in a round. chunks: of an update that was coming in, sha256 -> index -> bytes."""

    progress: Progress = Progress.INVITED
    reason: str = ""
    offer: Optional[Offer] = None
    chunks: Mapping[bytes, Mapping[int, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundFacts:
    """What is durable of a round that is under way. phase: INVITING, or AGGREGATING once it was decided."""

    invitation: Invitation
    settings: RoundSettings
    phase: Phase
    devices: Mapping[str, DeviceFacts]
    elapsed_s: float


# --- events


@dataclass(frozen=True)
class Opened:
    """The model's chunks are published; the invitation may go out."""


@dataclass(frozen=True)
class Answered:
    device_id: str
    answer: Answer


@dataclass(frozen=True)
class Offered:
    device_id: str
    offer: Offer


@dataclass(frozen=True)
class ChunkArrived:
    device_id: str
    chunk: Chunk


@dataclass(frozen=True)
class Stored:
    """The device's update is durable (file written and synced) before anything that follows from this is done."""

    device_id: str


@dataclass(frozen=True)
class Malformed:
    """The device's update is complete, but does not decrypt, or is not what the plan's compression makes. Nothing of it
    was stored."""

    device_id: str
    reason: str


@dataclass(frozen=True)
class Failed:
    device_id: str
    failure: Failure


@dataclass(frozen=True)
class PresenceChanged:
    device_id: str
    online: bool


@dataclass(frozen=True)
class Aggregated:
    """The rule ran. verdicts: every aggregated device -> reason, empty where its update was accepted."""

    verdicts: dict[str, str]


@dataclass(frozen=True)
class AggregationRefused:
    reason: str


@dataclass(frozen=True)
class Aborted:
    """The operator ends the round."""

    reason: str


@dataclass(frozen=True)
class Revoked:
    """The operator wants nothing of this device any more. reason: for operator and device."""

    device_id: str
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = Union[
    Opened,
    Answered,
    Offered,
    ChunkArrived,
    Stored,
    Malformed,
    Failed,
    PresenceChanged,
    Aggregated,
    AggregationRefused,
    Aborted,
    Revoked,
    Tick,
]


# --- effects


@dataclass(frozen=True)
class PublishRound:
    """Retain this on `fleet/round`."""

    message: Union[Invitation, RoundClosed]


@dataclass(frozen=True)
class SendTo:
    device_id: str
    message: FromCoordinator


@dataclass(frozen=True)
class Record:
    """Make this durable before what follows: how far the device is."""

    device_id: str
    progress: Progress
    reason: str = ""


@dataclass(frozen=True)
class SaveChunk:
    """Keep the chunk, so that a restart need not ask for it again. It need not be durable."""

    device_id: str
    offer: Offer
    index: int
    data: bytes


@dataclass(frozen=True)
class Recall:
    """An offer for a round that is over. Answer with the stored Verdict; without one, that the round is over."""

    device_id: str
    offer: Offer


@dataclass(frozen=True)
class Store:
    """Make the update durable, then report Stored: only then is the device told that it was kept; or Malformed."""

    device_id: str
    offer: Offer
    data: bytes
    staleness: int = 0


@dataclass(frozen=True)
class Aggregate:
    """Make it durable that these devices' updates (sorted) are the round's, run the rule over them, and report
    Aggregated or AggregationRefused."""

    device_ids: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """The round is over. Make it durable, in one step with the new model, before what follows.

    rejected: of the devices whose update was acknowledged, those whose update did not enter the model, and why; of an
    abandoned round all. missing: device -> why no usable update of it came.
    """

    outcome: str
    reason: str
    missing: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


Effect = Union[PublishRound, SendTo, Record, SaveChunk, Recall, Store, Aggregate, Finished]


@dataclass
class _Participant:
    progress: Progress = Progress.INVITED
    reason: str = ""
    offer: Optional[Offer] = None  # of this round or of an earlier one that it takes
    assembly: Optional[BlobAssembly] = None
    gone: bool = False
    gone_at: float = 0.0
    acknowledged: Optional[str] = None  # told that its update of this round is kept, so it is owed a verdict
    chunks: Mapping[bytes, Mapping[int, bytes]] = field(default_factory=dict)  # from before a restart

    def begin(self, ref: BlobRef) -> BlobAssembly:
        """An assembly of the chunks that are still here from before a restart."""
        assembly = BlobAssembly(ref)
        for index, data in self.chunks.get(ref.sha256, {}).items():
            if index < ref.num_chunks - 1 and len(data) == ref.chunk_size(index):
                assembly.add(index, data)
        self.chunks = {}
        return assembly


def _is_same(stored: Optional[Offer], offer: Offer) -> bool:
    known = (stored.round_id, stored.update.sha256) if stored is not None else None
    return known == (offer.round_id, offer.update.sha256)


class RoundMachine:
    """One round. `handle` takes an event and the time in seconds and returns the effects in order.

    Raises PeerError where a device broke the protocol; the state is then unchanged.
    """

    def __init__(self, invitation: Invitation, device_ids: Sequence[str], settings: RoundSettings) -> None:
        if settings.quorum < 1 or settings.quorum > len(device_ids):
            raise RuleError(
                f"a quorum of {settings.quorum} cannot be met by {len(device_ids)} invited devices",
                "lower the quorum or wait for more devices",
            )
        if settings.goal and settings.goal < settings.quorum:
            raise RuleError(
                f"a goal of {settings.goal} updates is below the quorum of {settings.quorum}",
                "lower the quorum or raise the goal",
            )
        self.invitation = invitation
        self.settings = settings
        self.phase = Phase.INVITING
        self._devices = {device_id: _Participant() for device_id in sorted(device_ids)}
        self._names = list(self._devices)
        self._found: dict[Optional[Progress], int] = {}  # whom `_awaits` saw last
        self._opened_at = 0.0

    @classmethod
    def restored(cls, facts: RoundFacts, now: float) -> RoundMachine:
        """The machine of a round that was under way, as it was when these facts were made durable.

        Time goes on at elapsed_s. What was being uploaded is asked for again when its device offers it again.
        """
        machine = cls(facts.invitation, list(facts.devices), facts.settings)
        for device_id, known in facts.devices.items():
            machine._devices[device_id] = _Participant(
                known.progress,
                known.reason,
                known.offer if known.progress is Progress.STORED else None,
                acknowledged=known.offer.round_id if known.offer is not None else None,
                chunks=known.chunks,
            )
        lost = any(known.progress is Progress.LOST for known in facts.devices.values())
        machine.phase = Phase.INVITING if lost else facts.phase
        machine._opened_at = now - facts.elapsed_s
        return machine

    def resume(self, now: float) -> list[Effect]:
        """What to do first after `restored`: the invitation may never have gone out, the rule may not have run."""
        if self.phase is Phase.AGGREGATING:
            return self._decide()  # as before, but for devices that were revoked meanwhile
        return [PublishRound(self.invitation), *self._advance(now)]

    def progress(self) -> dict[str, Progress]:
        """How far every invited device is, for displays."""
        return {
            device_id: Progress.GONE if peer.gone and peer.progress not in FINAL else peer.progress
            for device_id, peer in self._devices.items()
        }

    def received(self) -> dict[str, tuple[int, int]]:
        """Bytes (received, expected) of every update that was offered, for displays."""
        return {
            device_id: (
                peer.assembly.received_bytes if peer.assembly else peer.offer.update.size,
                peer.offer.update.size,
            )
            for device_id, peer in self._devices.items()
            if peer.offer is not None and peer.progress is not Progress.REFUSED
        }

    def offer_of(self, device_id: str) -> Offer:
        offer = self._devices[device_id].offer
        if offer is None:
            raise PeerError(f"{device_id} has not offered an update")
        return offer

    def handle(self, event: Event, now: float) -> list[Effect]:
        action = TABLE.get((self.phase, type(event)))
        return action(self, event, now) if action else []

    @property
    def asynchronous(self) -> bool:
        """Whether later rounds may take this one's updates. Then nobody is waited for, but for the goal."""
        return self.invitation.max_staleness > 0

    def staleness(self, offer: Offer) -> int:
        """By how many published models the update is behind this round's."""
        earlier = self.settings.earlier.get(offer.round_id)
        return earlier.staleness if earlier is not None else 0

    def _peer(self, device_id: str, round_id: str) -> Optional[_Participant]:
        """The participant, None for talk about another round, PeerError for somebody who was not invited."""
        if round_id != self.invitation.round_id:
            return None
        if device_id not in self._devices:
            raise PeerError(f"{device_id} was not invited to round {round_id}")
        return self._devices[device_id]

    def _taker(self, device_id: str, round_id: str) -> Optional[_Participant]:
        """The participant where this round takes an update that the device trained for `round_id`; else as `_peer`."""
        earlier = self.settings.earlier.get(round_id)
        if earlier is None:
            return self._peer(device_id, round_id)
        return self._devices.get(device_id) if device_id not in earlier.taken else None

    def _is_for_a_later_round(self, peer: _Participant, offer: Offer) -> bool:
        """A round takes one update of each device, and the one that it acknowledged before any other."""
        if peer.acknowledged is not None:
            return peer.acknowledged != offer.round_id
        another = peer.offer is not None and peer.offer.round_id != offer.round_id
        return another and peer.progress in (Progress.UPLOADING, Progress.STORED, Progress.REFUSED)

    def _sends_an_earlier_one(self, peer: _Participant) -> bool:
        """What such a device says of this round changes nothing: it takes part."""
        another = peer.offer is not None and peer.offer.round_id != self.invitation.round_id
        return another and peer.progress is Progress.UPLOADING

    def _comes_all_the_same(self, peer: _Participant, offer: Offer) -> bool:
        """An update of a device that declined and may have joined later; or an earlier round's, of one that does not
        work for this one."""
        earlier = offer.round_id != self.invitation.round_id
        return peer.progress in SAID_NO or (earlier and peer.progress is Progress.FAILED)

    # --- transitions while updates come in

    def _opened(self, event: Opened, now: float) -> list[Effect]:
        self._opened_at = now
        return [PublishRound(self.invitation)]

    def _answered(self, event: Answered, now: float) -> list[Effect]:
        peer = self._peer(event.device_id, event.answer.round_id)
        if peer is None:
            return []
        for_now = event.answer.for_now is True
        joins = peer.progress in SAID_NO and event.answer.accept
        for_good = peer.progress is Progress.POSTPONED and not event.answer.accept and not for_now
        if peer.progress in FINAL and not (joins or for_good):
            return []
        peer.gone = False
        if self._sends_an_earlier_one(peer):
            return []
        if not event.answer.accept and not peer.acknowledged:
            declined = Progress.POSTPONED if for_now else Progress.DECLINED
            return self._settle(event.device_id, declined, f"declined: {event.answer.reason}", now)
        if joins or peer.progress is Progress.INVITED:
            return self._settle(event.device_id, Progress.ACCEPTED, "", now)
        return self._advance(now)

    def _offered(self, event: Offered, now: float) -> list[Effect]:
        offer = event.offer
        peer = self._taker(event.device_id, offer.round_id)
        if peer is None:
            return [Recall(event.device_id, offer)]
        peer.gone = False
        if peer.progress is Progress.STORED and _is_same(peer.offer, offer):
            return [SendTo(event.device_id, Receipt(offer.round_id, offer.update.sha256, True))]
        if self.asynchronous and self._is_for_a_later_round(peer, offer):
            return []  # the device offers it again
        if peer.progress is Progress.REVOKED and peer.acknowledged:
            return []  # readmitted; its verdict comes when the round ends
        if peer.progress in FINAL and not self._comes_all_the_same(peer, offer):
            reason = peer.reason or "an update of this device is already stored for this round"
            return [SendTo(event.device_id, Receipt(offer.round_id, offer.update.sha256, False, reason_text(reason)))]
        if peer.progress is Progress.STORING:
            return []
        sizes = self.settings.sizes
        if offer.update.size not in sizes:
            needed = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
            reason = f"the update has {offer.update.size} bytes, the model needs {needed}"
            return self._refuse(event.device_id, peer, offer, reason, now)
        if peer.assembly is None or peer.offer is None or peer.offer.update != offer.update:
            peer.assembly = peer.begin(offer.update)
        said_yes = peer.progress is Progress.INVITED or (
            peer.progress in SAID_NO and offer.round_id == self.invitation.round_id
        )
        accepted = [Record(event.device_id, Progress.ACCEPTED)] if said_yes else []
        peer.offer, peer.progress = offer, Progress.UPLOADING
        need = Need(offer.round_id, offer.update.sha256, peer.assembly.missing())
        return [*accepted, SendTo(event.device_id, need)]

    def _offered_late(self, event: Offered, now: float) -> list[Effect]:
        """The doors are closed. What became of a stored update is known when the rule has run."""
        offer = event.offer
        peer = self._devices.get(event.device_id)
        stored = peer.offer if peer is not None and peer.progress is Progress.STORED else None
        if self.phase is Phase.AGGREGATING and _is_same(stored, offer):
            return [SendTo(event.device_id, Receipt(offer.round_id, offer.update.sha256, True))]
        return [Recall(event.device_id, offer)]

    def _chunk_arrived(self, event: ChunkArrived, now: float) -> list[Effect]:
        chunk = event.chunk
        peer = self._taker(event.device_id, chunk.round_id)
        if peer is None or peer.progress in FINAL or peer.progress is Progress.STORING:
            return []
        offered = (peer.offer.round_id, peer.offer.update.sha256) if peer.offer is not None else None
        if peer.assembly is None or peer.offer is None or offered != (chunk.round_id, chunk.sha256):
            if chunk.round_id != self.invitation.round_id:
                return []  # that round asked for it and ended meanwhile; the device offers it again
            raise PeerError(f"{event.device_id} sent a chunk of an update it has not offered")
        corrupt = peer.assembly.corrupt
        whole = peer.assembly.add(chunk.index, chunk.data)
        if peer.assembly.corrupt > corrupt:
            return self._refuse(
                event.device_id,
                peer,
                peer.offer,
                "the update does not match the hash it was offered with",
                now,
            )
        if whole is None:
            return [SaveChunk(event.device_id, peer.offer, chunk.index, chunk.data)]
        peer.progress, peer.assembly = Progress.STORING, None
        return [Store(event.device_id, peer.offer, whole, self.staleness(peer.offer))]

    def _stored(self, event: Stored, now: float) -> list[Effect]:
        peer = self._devices[event.device_id]
        if peer.progress is Progress.REVOKED:  # while it was being made durable
            return [Record(event.device_id, peer.progress, peer.reason)]
        if peer.progress is not Progress.STORING or peer.offer is None:
            return []
        peer.progress, peer.acknowledged, peer.reason = Progress.STORED, peer.offer.round_id, ""
        receipt = Receipt(peer.offer.round_id, peer.offer.update.sha256, True)
        return [SendTo(event.device_id, receipt), *self._advance(now)]

    def _malformed(self, event: Malformed, now: float) -> list[Effect]:
        peer = self._devices[event.device_id]
        if peer.progress is not Progress.STORING or peer.offer is None:
            return []
        return self._refuse(event.device_id, peer, peer.offer, event.reason, now)

    def _failed(self, event: Failed, now: float) -> list[Effect]:
        peer = self._taker(event.device_id, event.failure.round_id)
        if peer is None or peer.progress in FINAL or peer.progress is Progress.STORING:
            return []
        if peer.offer is not None and peer.offer.round_id == event.failure.round_id != self.invitation.round_id:
            peer.progress, peer.offer, peer.assembly = Progress.ACCEPTED, None, None
            return []  # it may still deliver for this round
        if event.failure.round_id != self.invitation.round_id or self._sends_an_earlier_one(peer):
            return []
        return self._settle(event.device_id, Progress.FAILED, f"failed: {event.failure.reason}", now)

    def _presence_changed(self, event: PresenceChanged, now: float) -> list[Effect]:
        peer = self._devices.get(event.device_id)
        if peer is None:
            return []
        if not event.online and not peer.gone:
            peer.gone_at = now
        peer.gone = not event.online
        return self._advance(now)

    def _revoked(self, event: Revoked, now: float) -> list[Effect]:
        peer = self._devices.get(event.device_id)
        if peer is None or not is_revocable(peer.progress):
            return []
        peer.assembly = None
        return self._settle(event.device_id, Progress.REVOKED, event.reason, now)

    def _tick(self, event: Tick, now: float) -> list[Effect]:
        return self._advance(now)

    def _refuse(self, device_id: str, peer: _Participant, offer: Offer, reason: str, now: float) -> list[Effect]:
        peer.progress, peer.reason, peer.assembly = Progress.REFUSED, f"refused: {reason}", None
        receipt = Receipt(offer.round_id, offer.update.sha256, False, reason_text(reason))
        return [Record(device_id, peer.progress, peer.reason), SendTo(device_id, receipt), *self._advance(now)]

    def _settle(self, device_id: str, progress: Progress, reason: str, now: float) -> list[Effect]:
        peer = self._devices[device_id]
        peer.progress, peer.reason = progress, reason
        return [Record(device_id, progress, reason), *self._advance(now)]

    # --- moving on

    def _advance(self, now: float) -> list[Effect]:
        reached = 0 < self.settings.goal <= len(self._stored_devices())
        over = reached or now - self._opened_at >= self.invitation.duration_ms / 1000
        if self.phase is Phase.INVITING and (over or not self._awaits(now, Progress.INVITED)):
            self.phase = Phase.COLLECTING
        if self.phase is not Phase.COLLECTING:
            return []
        if not over and (self.asynchronous or self._awaits(now) or self._needs_who_may_join(now)):
            return []
        if any(peer.progress is Progress.STORING for peer in self._devices.values()):
            return []  # never decide over the head of an update that is being made durable
        return self._decide()

    def _awaits(self, now: float, progress: Optional[Progress] = None) -> bool:
        """Whether anyone (with this progress) is still waited for.

        Goes on from whom it saw last, who mostly still is: to look at all for every message costs n^2 in a round.
        """
        start = self._found.get(progress, 0)
        for place in itertools.chain(range(start, len(self._names)), range(start)):
            peer = self._devices[self._names[place]]
            if progress in (None, peer.progress) and self._still_waited_for(peer, now):
                self._found[progress] = place
                return True
        return False

    def _needs_who_may_join(self, now: float) -> bool:
        """Whether the round has no quorum, and would reach it with devices that declined for now."""
        may = sum(
            peer.progress is Progress.POSTPONED and not (peer.gone and now - peer.gone_at >= self.settings.grace_s)
            for peer in self._devices.values()
        )
        stored = len(self._stored_devices())
        return stored < self.settings.quorum <= stored + may

    def _still_waited_for(self, peer: _Participant, now: float) -> bool:
        if peer.progress in FINAL:
            return False
        if peer.gone:
            return now - peer.gone_at < self.settings.grace_s
        if peer.progress is Progress.INVITED:  # its update is still taken if it comes before the round is decided
            return now - self._opened_at < self.settings.answer_s
        return True

    def _decide(self) -> list[Effect]:
        stored = self._stored_devices()
        if len(stored) < self.settings.quorum:
            return self._abandon(f"{len(stored)} updates came, the quorum is {self.settings.quorum}")
        self.phase = Phase.AGGREGATING
        return [Aggregate(stored)]

    def _stored_devices(self) -> tuple[str, ...]:
        return tuple(name for name, peer in self._devices.items() if peer.progress is Progress.STORED)

    def _aggregated(self, event: Aggregated, now: float) -> list[Effect]:
        if set(event.verdicts) != set(self._stored_devices()):
            raise UsageError(f"verdicts on {sorted(event.verdicts)} for the updates of {self._stored_devices()}")
        return self._finish(Phase.PUBLISHED, "", {name: reason for name, reason in event.verdicts.items() if reason})

    def _aggregation_refused(self, event: AggregationRefused, now: float) -> list[Effect]:
        return self._abandon(event.reason)

    def _aborted(self, event: Aborted, now: float) -> list[Effect]:
        return self._abandon(event.reason)

    def _abandon(self, reason: str) -> list[Effect]:
        return self._finish(
            Phase.ABANDONED, reason, dict.fromkeys(self._stored_devices(), f"the round was abandoned: {reason}")
        )

    def _finish(self, phase: Phase, reason: str, rejected: dict[str, str]) -> list[Effect]:
        """Every acknowledged update gets its verdict."""
        self.phase = phase
        missing = self._missing()
        owed = {name: peer.acknowledged for name, peer in self._devices.items() if peer.acknowledged is not None}
        rejected = {**rejected, **{name: missing[name] for name in owed if name in missing}}
        verdicts: list[Effect] = [
            SendTo(name, Verdict(round_id, "rejected" if name in rejected else "accepted", reason_text(why)))
            for name, round_id, why in ((name, round_id, rejected.get(name, "")) for name, round_id in owed.items())
        ]
        closed = PublishRound(RoundClosed(self.invitation.round_id, phase.value, reason_text(reason)))
        return [Finished(phase.value, reason, missing, rejected), closed, *verdicts]

    def _missing(self) -> dict[str, str]:
        why = {
            Progress.INVITED: "did not answer the invitation",
            Progress.ACCEPTED: "accepted, but sent no update in time",
            Progress.UPLOADING: "did not finish sending its update in time",
        }

        def reason(peer: _Participant) -> str:
            if peer.acknowledged and peer.progress is not Progress.REVOKED:
                return "the stored update was damaged and did not come again"
            if peer.gone and peer.progress not in FINAL:
                return "connection lost"
            if enough and peer.progress in why:
                return f"{enough} updates came before its own"
            return why.get(peer.progress, peer.reason)

        goal = self.settings.goal
        enough = goal if 0 < goal <= len(self._stored_devices()) else 0
        left = {name: peer for name, peer in self._devices.items() if peer.progress is not Progress.STORED}
        if self.asynchronous:  # who is not done yet may deliver to a later round
            left = {name: peer for name, peer in left.items() if peer.acknowledged or peer.progress in FINAL}
        return {name: reason(peer) for name, peer in left.items()}


Action = Callable[..., "list[Effect]"]  # each takes the machine, the one event type of its row, and the time
_OPEN = (Phase.INVITING, Phase.COLLECTING)
_M = RoundMachine

TABLE: dict[tuple[Phase, type], Action] = {
    (Phase.INVITING, Opened): _M._opened,
    **{(phase, Answered): _M._answered for phase in _OPEN},
    **{(phase, Offered): _M._offered for phase in _OPEN},
    **{(phase, Offered): _M._offered_late for phase in Phase if phase not in _OPEN},
    **{(phase, ChunkArrived): _M._chunk_arrived for phase in _OPEN},
    **{(phase, Stored): _M._stored for phase in _OPEN},
    **{(phase, Malformed): _M._malformed for phase in _OPEN},
    **{(phase, Failed): _M._failed for phase in _OPEN},
    **{(phase, PresenceChanged): _M._presence_changed for phase in _OPEN},
    **{(phase, Revoked): _M._revoked for phase in _OPEN},
    **{(phase, Tick): _M._tick for phase in _OPEN},
    (Phase.AGGREGATING, Aggregated): _M._aggregated,
    (Phase.AGGREGATING, AggregationRefused): _M._aggregation_refused,
    **{(phase, Aborted): _M._aborted for phase in (*_OPEN, Phase.AGGREGATING)},
}

# Pairs that may happen and mean nothing: talk after the doors closed, ticks while the rule runs.
IGNORED: frozenset[tuple[Phase, type]] = frozenset(
    [(phase, Opened) for phase in Phase if phase is not Phase.INVITING]
    + [(phase, kind) for phase in Phase if phase not in _OPEN for kind in (Answered, ChunkArrived, Stored, Malformed)]
    + [(phase, kind) for phase in Phase if phase not in _OPEN for kind in (Failed, PresenceChanged, Revoked, Tick)]
    + [(phase, kind) for phase in Phase if phase is not Phase.AGGREGATING for kind in (Aggregated, AggregationRefused)]
    + [(phase, Aborted) for phase in (Phase.PUBLISHED, Phase.ABANDONED)]
)
