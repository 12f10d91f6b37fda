"""The device's side of the conversation: a sans-IO state table. docs/protocol.md, section 5.

Events in, effects out; the clock is an input. It never publishes, trains or stores: the agent performs the effects and
reports what came of them as further events. Every (state, event) pair is in `TABLE` or in `IGNORED`; a test holds that.

Beside the one round it works for, a device *owes* updates: those in its outbox. An update is owed from before it is
offered until the coordinator's verdict, or its word that it will never be taken.

Where later rounds may take a round's update, too (Invitation.max_staleness), the device goes on with its work when the
round is closed. The newest invitation *waits* until it has trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional, Union

from msgspec import UNSET

from covey_protocol.blobs import blob_ref
from covey_protocol.bundle import RESET_OPTIMIZER, TRAIN_INPUTS, Manifest
from covey_protocol.encryption import ENCRYPTION
from covey_protocol.forms import COMPRESSIONS
from covey_protocol.messages import (
    Answer,
    BlobRef,
    Failure,
    FromDevice,
    Invitation,
    Name,
    Need,
    Offer,
    Receipt,
    RoundClosed,
    Seen,
    TrainingPlan,
    Verdict,
    reason_text,
)
from covey_protocol.works import CAPABILITY_OF, CYCLIC, SCAFFOLD, SVRG, TEACH

RESEND_S = 5.0  # how long an unanswered offer waits before it is sent again; doubled each time, up to ASK_S
ASK_S = 30.0  # the same for an offer of a round that this device no longer works for
MAX_OWED = 8  # updates in the outbox; a verdict that has not come over so many later rounds is not waited for
# beside the two of the first devices, what a bundle or a plan may need and an old device would pass over in silence
LATE = "late"  # goes on with its work when the round is closed, where later rounds may take the update
EVALUATE, TASKS = "evaluate", "tasks"
CAPABILITIES: tuple[Name, ...] = (
    "train",
    "float32",
    *TRAIN_INPUTS,
    RESET_OPTIMIZER,
    *COMPRESSIONS,
    LATE,
    ENCRYPTION,
    EVALUATE,
    TASKS,
    SVRG,
    SCAFFOLD,
    TEACH,
    CYCLIC,
)


def needed_capabilities(
    manifest: Manifest, plan: TrainingPlan, *, encrypt: bool = False, late: bool = False
) -> tuple[Name, ...]:
    """What an invitation to train this bundle by this plan must name in `requires`, in the order of CAPABILITIES."""
    needed = {"train", "float32", *manifest.train_inputs}
    if RESET_OPTIMIZER in manifest.signatures:
        needed.add(RESET_OPTIMIZER)
    if plan.gradient_clip_norm:
        needed.add("clip_norm")
    if plan.proximal_weight:
        needed.add("proximal")
    needed.add(plan.compression)
    if late:
        needed.add(LATE)
    if encrypt:
        needed.add(ENCRYPTION)
    if plan.evaluate:
        needed.add(EVALUATE)
    if plan.task:
        needed.add(TASKS)
    needed.add(CAPABILITY_OF.get(plan.work, plan.work))
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
    """The agent's answer to CheckConditions: whether the device's own policy and state allow this round.

    for_now: a no that may become a yes before the round is over (a battery that is being charged).
    """

    round_id: str
    ok: bool
    reason: str = ""
    for_now: bool = False


@dataclass(frozen=True)
class Reconsidered:
    """What stood against the round that was declined for now is over."""


@dataclass(frozen=True)
class BlobReady:
    """A blob the machine asked for is complete, checked and stored."""

    sha256: bytes


@dataclass(frozen=True)
class Trained:
    """Training ended well. update: its bytes as they travel: clipped and noised by policy, then compressed, then
    encrypted; then num_examples is 1 and metrics is empty, since the offer is not encrypted."""

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
class Lost:
    """The update could not be written to the outbox, cannot be read from it any more, or its owner withdraws it."""

    round_id: str
    reason: str


@dataclass(frozen=True)
class Connected:
    """The connection to the broker is (again) up."""


@dataclass(frozen=True)
class Tick:
    """Time passed. Sent about once a second."""


Event = Union[
    Invited,
    ConditionsChecked,
    Reconsidered,
    BlobReady,
    Trained,
    TrainingFailed,
    Needed,
    Received,
    Judged,
    Closed,
    Lost,
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
    """Put the update into the outbox, durably, before anything is sent about it; report Lost if that fails.

    evaluates: whether it holds the metrics of an evaluation.
    """

    round_id: str
    offer: Offer
    update: bytes
    evaluates: bool = False


@dataclass(frozen=True)
class SendChunks:
    """Send these chunks of the update in the outbox; report Lost if it cannot be read."""

    offer: Offer
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Forget:
    """Take the round's update out of the outbox. It is harmless if it comes back: it is offered and judged again."""

    round_id: str


@dataclass(frozen=True)
class Discard:
    """The round is over for this device: stop fetching and training for it. The outbox stays as it is."""

    round_id: str


@dataclass(frozen=True)
class Note:
    """One line for the device's history."""

    text: str


Effect = Union[Send, CheckConditions, Fetch, Train, Keep, SendChunks, Forget, Discard, Note]


@dataclass
class _Owed:
    offer: Offer
    last_sent: float
    repeats: int = 0  # since something was heard of it: whoever is far behind must not hear more and more


class DeviceMachine:
    """One device's conversation. `handle` takes an event and the time in seconds and returns the effects in order.

    It holds no update, only the offers of those in the outbox.
    """

    def __init__(self, device_id: str, capabilities: tuple[str, ...] = CAPABILITIES) -> None:
        self.device_id = device_id
        self.capabilities = capabilities
        self.state = State.IDLE
        self.invitation: Optional[Invitation] = None
        self._waiting: Optional[Invitation] = None  # to be taken up when the training in progress is over
        self._postponed: Optional[Invitation] = None  # declined for now, and not over: the settled round
        self._awaited: set[bytes] = set()
        self._owed: dict[str, _Owed] = {}  # round id -> what is in the outbox, the oldest first
        self._deadline = 0.0
        self._settled_round = ""  # the newest round that is over for us: its retained invitation may come again
        self._excuse: Optional[FromDevice] = None  # Answer(no) or Failure, where that is how it ended for us

    @property
    def round_id(self) -> str:
        return self.invitation.round_id if self.invitation else ""

    @property
    def postponed(self) -> Optional[Invitation]:
        """The round that this device declined for now, as long as it may still join it."""
        return self._postponed

    @property
    def deadline(self) -> float:
        """When the current or the postponed round is over, on the clock that `handle` is given."""
        return self._deadline

    @property
    def owed(self) -> tuple[str, ...]:
        """The rounds whose updates are in the outbox, the oldest first."""
        return tuple(self._owed)

    def restore(self, offers: Sequence[Offer], now: float) -> list[Effect]:
        """Go on with the updates found in the outbox after a restart. The next connection offers them."""
        self._owed = {offer.round_id: _Owed(offer, now) for offer in offers}
        return [Note(f"round {offer.round_id}: its update is in the outbox") for offer in offers]

    def handle(self, event: Event, now: float) -> list[Effect]:
        action = TABLE.get((self.state, type(event)))
        effects = action(self, event, now) if action else []
        if self._waiting is None or self.state in _WORKING:
            return effects
        waiting, self._waiting = self._waiting, None
        return [*effects, *self._invited(Invited(waiting), now)]

    # --- transitions

    def _invited(self, event: Invited, now: float) -> list[Effect]:
        invitation = event.invitation
        if invitation.round_id in (self._settled_round, self.round_id):
            return self._answer_again()  # a coordinator that started again says it again, and may have missed us
        self._postponed = None
        if invitation.round_id in self._owed:
            return []
        wanted = [self._owed[name] for name in invitation.earlier if name in self._owed]
        offers = self._offer_again(now, [owed for owed in wanted if owed.last_sent < now])
        named = not invitation.devices or self.device_id in invitation.devices
        if self.state in _WORKING and self.round_id in invitation.earlier:
            self._waiting = invitation if named else None
            return offers
        if not named:
            return offers
        effects: list[Effect] = [*offers, *([Discard(self.round_id)] if self.invitation else [])]
        self._waiting = None
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
            return self._decline(event.reason, for_now=event.for_now)
        self.state = State.FETCHING
        self._awaited = {ref.sha256 for ref in invitation.blobs}
        return [Send(Answer(invitation.round_id, True)), Fetch(invitation.blobs)]

    def _reconsidered(self, event: Reconsidered, now: float) -> list[Effect]:
        invitation = self._postponed
        if invitation is None:
            return []
        self._reset(settled="")
        self.invitation, self.state = invitation, State.INVITED
        return [CheckConditions(invitation)]

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
        offer = Offer(event.round_id, ref, event.num_examples, event.metrics)
        self.state = State.REPORTING
        effects = self._give_way()
        self._owed[event.round_id] = _Owed(offer, now)
        keep = Keep(event.round_id, offer, event.update, bool(self.invitation.plan.evaluate))
        return [*effects, keep, Send(offer)]

    def _training_failed(self, event: TrainingFailed, now: float) -> list[Effect]:
        if event.round_id != self.round_id:
            return []
        return self._give_up(event.reason)

    def _needed(self, event: Needed, now: float) -> list[Effect]:
        need = event.need
        owed = self._owed.get(need.round_id)
        if owed is None or need.sha256 != owed.offer.update.sha256:
            return []
        owed.last_sent, owed.repeats = now, 0
        known = [index for index in need.indices if index < owed.offer.update.num_chunks]
        return [SendChunks(owed.offer, tuple(dict.fromkeys(known)))] if known else []

    def _received(self, event: Received, now: float) -> list[Effect]:
        receipt = event.receipt
        owed = self._owed.get(receipt.round_id)
        if owed is None or receipt.sha256 != owed.offer.update.sha256:
            return []
        owed.last_sent, owed.repeats = now, 0
        if not receipt.kept:
            return self._forget(receipt.round_id, f"update refused: {receipt.reason}")
        return self._settle("update delivered") if receipt.round_id == self.round_id else []

    def _judged(self, event: Judged, now: float) -> list[Effect]:
        """Also where no receipt came. A repeated verdict is only answered, so that it stops."""
        verdict = event.verdict
        seen = Send(Seen(verdict.round_id))
        if verdict.round_id not in self._owed:
            return [seen]
        reason = f": {verdict.reason}" if verdict.reason else ""
        return [*self._forget(verdict.round_id, f"update {verdict.status}{reason}"), seen]

    def _over(self, event: Closed, now: float) -> list[Effect]:
        """Nobody waits for our excuse any more."""
        if event.closed.round_id == self._settled_round:
            self._excuse = self._postponed = None
        return []

    def _closed(self, event: Closed, now: float) -> list[Effect]:
        """An update that is owed stays so: what became of it, the coordinator says when it is offered again."""
        if self._waiting is not None and event.closed.round_id == self._waiting.round_id:
            self._waiting = None
        if event.closed.round_id != self.round_id:
            return []
        if self.state in _WORKING and self.invitation is not None and self.invitation.max_staleness:
            return []  # a later round may take the update
        return self._settle(f"closed ({event.closed.outcome})")

    def _lost(self, event: Lost, now: float) -> list[Effect]:
        if event.round_id not in self._owed:
            return []
        failure, current = Failure(event.round_id, reason_text(event.reason)), event.round_id == self.round_id
        effects = [Send(failure), *self._forget(event.round_id, f"failed, {event.reason}")]
        if current:
            self._excuse = failure
        return effects

    def _connected(self, event: Connected, now: float) -> list[Effect]:
        """What was said last may be lost with the connection: say it again. Repeats are harmless."""
        effects = self._answer_again()
        if self.state is State.FETCHING and self.invitation is not None:
            effects.append(Fetch(self.invitation.blobs))
        return [*effects, *self._offer_again(now, list(self._owed.values()))]

    def _tick(self, event: Tick, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self.invitation is not None and now >= self._deadline:
            late = "the round's time was over before this device was done"
            effects = self._settle(late) if self.state is State.REPORTING else self._give_up(late)
        if now >= self._deadline:
            self._postponed = None
        due = [owed for owed in self._owed.values() if now - owed.last_sent >= self._patience_s(owed)]
        for owed in due:
            owed.repeats += 1
        return [*effects, *self._offer_again(now, due)]

    # --- what is owed

    def _patience_s(self, owed: _Owed) -> float:
        return min(ASK_S, RESEND_S * 2**owed.repeats) if owed.offer.round_id == self.round_id else ASK_S

    def _offer_again(self, now: float, owed: list[_Owed]) -> list[Effect]:
        for one in owed:
            one.last_sent = now
        return [Send(one.offer) for one in owed]

    def _give_way(self) -> list[Effect]:
        """Room for one more update: the disk of a device is not endless."""
        if len(self._owed) < MAX_OWED:
            return []
        return self._forget(next(iter(self._owed)), f"no verdict came over {MAX_OWED} later updates")

    def _forget(self, round_id: str, note: str) -> list[Effect]:
        """The update is no longer owed; if this device still worked for its round, that is over, too.

        What became of it is in the log before it leaves the outbox.
        """
        del self._owed[round_id]
        if round_id == self.round_id:
            return [*self._settle(note), Forget(round_id)]
        return [Note(f"round {round_id}: {note}"), Forget(round_id)]

    # --- ends of a round

    def _answer_again(self) -> list[Effect]:
        """What the coordinator waits for and may have missed. An update's Offer is repeated without it."""
        if self.state in (State.FETCHING, State.TRAINING):
            return [Send(Answer(self.round_id, True))]
        return [Send(self._excuse)] if self._excuse is not None else []

    def _decline(self, reason: str, *, for_now: bool = False) -> list[Effect]:
        round_id, invitation = self.round_id, self.invitation
        self._reset(settled=round_id)
        self._postponed = invitation if for_now else None
        self._excuse = Answer(round_id, False, reason_text(reason), for_now or UNSET)
        return [Send(self._excuse), Note(f"round {round_id}: declined, {reason}")]

    def _give_up(self, reason: str) -> list[Effect]:
        round_id = self.round_id
        self._reset(settled=round_id)
        self._excuse = Failure(round_id, reason_text(reason))
        return [Send(self._excuse), Discard(round_id), Note(f"round {round_id}: failed, {reason}")]

    def _settle(self, note: str) -> list[Effect]:
        round_id = self.round_id
        self._reset(settled=round_id)
        return [Discard(round_id), Note(f"round {round_id}: {note}")]

    def _reset(self, settled: Optional[str] = None) -> None:
        self.state = State.IDLE
        self.invitation = None
        self._excuse = self._postponed = None
        self._awaited = set()
        if settled is not None:
            self._settled_round = settled


Action = Callable[..., "list[Effect]"]  # each takes the machine, the one event type of its row, and the time
_BUSY = (State.INVITED, State.FETCHING, State.TRAINING, State.REPORTING)
_WORKING = (State.FETCHING, State.TRAINING)  # later its update is owed, whatever else it does
_M = DeviceMachine

TABLE: dict[tuple[State, type], Action] = {
    **{(state, Invited): _M._invited for state in State},
    **{(state, Needed): _M._needed for state in State},
    **{(state, Received): _M._received for state in State},
    **{(state, Judged): _M._judged for state in State},
    **{(state, Lost): _M._lost for state in State},
    **{(state, Connected): _M._connected for state in State},
    **{(state, Tick): _M._tick for state in State},
    **{(state, Closed): _M._closed for state in _BUSY},
    (State.IDLE, Closed): _M._over,
    (State.INVITED, ConditionsChecked): _M._conditions_checked,
    (State.IDLE, Reconsidered): _M._reconsidered,
    (State.FETCHING, BlobReady): _M._blob_ready,
    (State.FETCHING, TrainingFailed): _M._training_failed,  # the blobs could not be fetched or stored
    (State.TRAINING, Trained): _M._trained,
    (State.TRAINING, TrainingFailed): _M._training_failed,
}

# Pairs that may happen and mean nothing: late answers of a round already over, repeats.
IGNORED: frozenset[tuple[State, type]] = frozenset(
    [(state, ConditionsChecked) for state in State if state is not State.INVITED]
    + [(state, Reconsidered) for state in State if state is not State.IDLE]
    + [(state, BlobReady) for state in State if state is not State.FETCHING]
    + [(state, Trained) for state in State if state is not State.TRAINING]
    + [(state, TrainingFailed) for state in (State.IDLE, State.INVITED, State.REPORTING)]
)
