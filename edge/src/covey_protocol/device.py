"""The device's side of the conversation: a sans-IO state table. docs/protocol.md, section 5.

Events in, effects out; the clock is an input. It never publishes, trains or stores: the agent performs the effects and
reports what came of them as further events. Every (state, event) pair is in `TABLE` or in `IGNORED`; a test holds that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional, Union

from covey_protocol.blobs import blob_ref, chunk
from covey_protocol.bundle import RESET_OPTIMIZER, TRAIN_INPUTS, Manifest
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Chunk,
    Failure,
    FromDevice,
    Invitation,
    Name,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    TrainingPlan,
    Verdict,
    reason_text,
)

RESEND_S = 5.0  # how long an unanswered offer waits before it is sent again
# beside the two of the first devices, what a bundle or a plan may need and an old device would pass over in silence
CAPABILITIES: tuple[Name, ...] = ("train", "float32", *TRAIN_INPUTS, RESET_OPTIMIZER)


def needed_capabilities(manifest: Manifest, plan: TrainingPlan) -> tuple[Name, ...]:
    """What an invitation to train this bundle by this plan must name in `requires`, in the order of CAPABILITIES."""
    needed = {"train", "float32", *manifest.train_inputs}
    if RESET_OPTIMIZER in manifest.signatures:
        needed.add(RESET_OPTIMIZER)
    if plan.gradient_clip_norm:
        needed.add("clip_norm")
    if plan.proximal_weight:
        needed.add("proximal")
    return tuple(name for name in CAPABILITIES if name in needed)


class State(Enum):
    IDLE = "idle"
    INVITED = "invited"
    FETCHING = "fetching"
    TRAINING = "training"
    REPORTING = "reporting"


# --- events: what happened


@dataclass(frozen=True)
class Invited:
    invitation: Invitation


@dataclass(frozen=True)
class ConditionsChecked:
    """The agent's answer to CheckConditions: whether the device's own policy and state allow this round."""

    round_id: str
    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class BlobReady:
    """A blob the machine asked for is complete, checked and stored."""

    sha256: bytes


@dataclass(frozen=True)
class Trained:
    """Training ended well. update: the bytes of the flat float32 update, already clipped and noised by policy."""

    round_id: str
    update: bytes
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingFailed:
    round_id: str
    reason: str


@dataclass(frozen=True)
class Needed:
    need: Need


@dataclass(frozen=True)
class Received:
    receipt: Receipt


@dataclass(frozen=True)
class Judged:
    verdict: Verdict


@dataclass(frozen=True)
class Closed:
    closed: RoundClosed


@dataclass(frozen=True)
class Connected:
    """The connection to the broker is (again) up."""


@dataclass(frozen=True)
class Tick:
    """Time passed. Sent about once a second."""


Event = Union[
    Invited,
    ConditionsChecked,
    BlobReady,
    Trained,
    TrainingFailed,
    Needed,
    Received,
    Judged,
    Closed,
    Connected,
    Tick,
]


# --- effects: what the agent is to do


@dataclass(frozen=True)
class Send:
    message: FromDevice


@dataclass(frozen=True)
class CheckConditions:
    invitation: Invitation


@dataclass(frozen=True)
class Fetch:
    """Get these blobs (from the cache or the broker) and report each with BlobReady."""

    blobs: tuple[BlobRef, ...]


@dataclass(frozen=True)
class Train:
    invitation: Invitation

    @property
    def plan(self) -> TrainingPlan:
        return self.invitation.plan


@dataclass(frozen=True)
class Keep:
    """Put the update into the outbox, durably, before anything else is sent about it."""

    round_id: str
    offer: Offer
    update: bytes


@dataclass(frozen=True)
class Discard:
    """The round is over for this device: drop its outbox entry and stop fetching and training for it."""

    round_id: str


@dataclass(frozen=True)
class Note:
    """One line for the device's history."""

    text: str


Effect = Union[Send, CheckConditions, Fetch, Train, Keep, Discard, Note]


class DeviceMachine:
    """One device's conversation. `handle` takes an event and the time in seconds and returns the effects in order."""

    def __init__(self, device_id: str, capabilities: tuple[str, ...] = CAPABILITIES) -> None:
        self.device_id = device_id
        self.capabilities = capabilities
        self.state = State.IDLE
        self.invitation: Optional[Invitation] = None
        self._awaited: set[bytes] = set()
        self._offer: Optional[Offer] = None
        self._update = b""
        self._deadline = 0.0
        self._last_sent = 0.0
        self._settled_round = ""  # the newest round that is over for us: its retained invitation may come again

    @property
    def round_id(self) -> str:
        return self.invitation.round_id if self.invitation else ""

    def restore(self, invitation: Invitation, offer: Offer, update: bytes, now: float) -> list[Effect]:
        """Go on with an update found in the outbox after a restart."""
        self.invitation, self.state = invitation, State.REPORTING
        self._offer, self._update = offer, update
        self._deadline = now + invitation.duration_ms / 1000
        return [Note(f"round {invitation.round_id}: an unsent update was found in the outbox")]

    def handle(self, event: Event, now: float) -> list[Effect]:
        action = TABLE.get((self.state, type(event)))
        return action(self, event, now) if action else []

    # --- transitions

    def _invited(self, event: Invited, now: float) -> list[Effect]:
        invitation = event.invitation
        if invitation.round_id in (self._settled_round, self.round_id):
            return []
        if invitation.devices and self.device_id not in invitation.devices:
            return []
        effects: list[Effect] = [Discard(self.round_id)] if self.invitation else []
        self._reset()
        self.invitation = invitation
        self._deadline = now + invitation.duration_ms / 1000
        missing = [name for name in invitation.requires if name not in self.capabilities]
        if missing:
            return effects + self._decline(f"this device cannot {', '.join(missing)}; update its agent")
        self.state = State.INVITED
        return [*effects, CheckConditions(invitation)]

    def _conditions_checked(self, event: ConditionsChecked, now: float) -> list[Effect]:
        invitation = self.invitation
        if invitation is None or event.round_id != invitation.round_id:
            return []
        if not event.ok:
            return self._decline(event.reason)
        self.state = State.FETCHING
        blobs = (invitation.bundle, invitation.parameters)
        self._awaited = {ref.sha256 for ref in blobs}
        return [Send(Answer(invitation.round_id, True)), Fetch(blobs)]

    def _blob_ready(self, event: BlobReady, now: float) -> list[Effect]:
        self._awaited.discard(event.sha256)
        if self._awaited or self.invitation is None:
            return []
        self.state = State.TRAINING
        return [Train(self.invitation)]

    def _trained(self, event: Trained, now: float) -> list[Effect]:
        if self.invitation is None or event.round_id != self.round_id:
            return []
        ref = blob_ref(event.update, self.invitation.parameters.chunk_bytes)
        self._offer = Offer(event.round_id, ref, event.num_examples, event.metrics)
        self._update = event.update
        self.state = State.REPORTING
        self._last_sent = now
        return [Keep(event.round_id, self._offer, event.update), Send(self._offer)]

    def _training_failed(self, event: TrainingFailed, now: float) -> list[Effect]:
        if event.round_id != self.round_id:
            return []
        return self._give_up(event.reason)

    def _needed(self, event: Needed, now: float) -> list[Effect]:
        need, offer = event.need, self._offer
        if offer is None or need.round_id != offer.round_id or need.sha256 != offer.update.sha256:
            return []
        self._last_sent = now
        known = [index for index in need.indices if index < offer.update.num_chunks]
        return [
            Send(Chunk(offer.round_id, need.sha256, index, chunk(self._update, offer.update, index)))
            for index in dict.fromkeys(known)
        ]

    def _received(self, event: Received, now: float) -> list[Effect]:
        receipt, offer = event.receipt, self._offer
        if offer is None or receipt.round_id != offer.round_id or receipt.sha256 != offer.update.sha256:
            return []
        note = "update delivered" if receipt.kept else f"update refused: {receipt.reason}"
        return self._settle(note)

    def _closed(self, event: Closed, now: float) -> list[Effect]:
        if event.closed.round_id != self.round_id:
            return []
        return self._settle(f"closed before this device was done ({event.closed.outcome})")

    def _judged(self, event: Judged, now: float) -> list[Effect]:
        verdict = event.verdict
        reason = f": {verdict.reason}" if verdict.reason else ""
        return [Note(f"round {verdict.round_id}: update {verdict.status}{reason}")]

    def _reconnected(self, event: Connected, now: float) -> list[Effect]:
        """What was said last may be lost with the connection: say it again. Repeats are harmless."""
        if self.invitation is None:
            return []
        if self.state is State.REPORTING and self._offer is not None:
            self._last_sent = now
            return [Send(self._offer)]
        effects: list[Effect] = [Send(Answer(self.round_id, True))]
        if self.state is State.FETCHING:
            effects.append(Fetch((self.invitation.bundle, self.invitation.parameters)))
        return effects

    def _tick(self, event: Tick, now: float) -> list[Effect]:
        if now >= self._deadline:
            return self._give_up("the round's time was over before this device was done")
        if self.state is State.REPORTING and self._offer is not None and now - self._last_sent >= RESEND_S:
            self._last_sent = now
            return [Send(self._offer)]
        return []

    # --- ends of a round

    def _decline(self, reason: str) -> list[Effect]:
        round_id = self.round_id
        self._reset(settled=round_id)
        return [
            Send(Answer(round_id, False, reason_text(reason))),
            Note(f"round {round_id}: declined, {reason}"),
        ]

    def _give_up(self, reason: str) -> list[Effect]:
        round_id = self.round_id
        self._reset(settled=round_id)
        failure = Send(Failure(round_id, reason_text(reason)))
        return [failure, Discard(round_id), Note(f"round {round_id}: failed, {reason}")]

    def _settle(self, note: str) -> list[Effect]:
        round_id = self.round_id
        self._reset(settled=round_id)
        return [Discard(round_id), Note(f"round {round_id}: {note}")]

    def _reset(self, settled: Optional[str] = None) -> None:
        self.state = State.IDLE
        self.invitation = None
        self._awaited = set()
        self._offer, self._update = None, b""
        if settled is not None:
            self._settled_round = settled


Action = Callable[..., "list[Effect]"]  # each takes the machine, the one event type of its row, and the time
_BUSY = (State.INVITED, State.FETCHING, State.TRAINING, State.REPORTING)
_M = DeviceMachine

TABLE: dict[tuple[State, type], Action] = {
    **{(state, Invited): _M._invited for state in State},
    **{(state, Closed): _M._closed for state in _BUSY},
    **{(state, Judged): _M._judged for state in State},
    **{(state, Tick): _M._tick for state in _BUSY},
    (State.INVITED, ConditionsChecked): _M._conditions_checked,
    (State.FETCHING, BlobReady): _M._blob_ready,
    (State.FETCHING, Connected): _M._reconnected,
    (State.FETCHING, TrainingFailed): _M._training_failed,  # the blobs could not be fetched or stored
    (State.TRAINING, Trained): _M._trained,
    (State.TRAINING, TrainingFailed): _M._training_failed,
    (State.TRAINING, Connected): _M._reconnected,
    (State.REPORTING, Needed): _M._needed,
    (State.REPORTING, Received): _M._received,
    (State.REPORTING, Connected): _M._reconnected,
    (State.REPORTING, TrainingFailed): _M._training_failed,  # the outbox could not be written
}

# Pairs that may happen and mean nothing: late answers of a round already over, repeats, ticks while idle.
IGNORED: frozenset[tuple[State, type]] = frozenset(
    [(State.IDLE, kind) for kind in (Closed, Tick, Connected)]
    + [(state, ConditionsChecked) for state in State if state is not State.INVITED]
    + [(state, BlobReady) for state in State if state is not State.FETCHING]
    + [(state, Trained) for state in State if state is not State.TRAINING]
    + [(state, TrainingFailed) for state in (State.IDLE, State.INVITED)]
    + [(state, kind) for state in State if state is not State.REPORTING for kind in (Needed, Received)]
    + [(State.INVITED, Connected)]
)
