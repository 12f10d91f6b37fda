"""A rollout as data: what has happened is a list of events, what is known is their fold, and what to do is a function.

`apply(state, event)` folds one event in; `decide(state, now)` names the next event that nobody outside brings about, or
None. Both are pure: no clock, no files, no broker. So a journal of events is all that must be durable, and who reads it
knows everything. docs/fleet.md says the rules in words.
"""

from __future__ import annotations

import enum
from typing import Optional, Union

import msgspec
from msgspec import Struct

from covey_deploy.rollout.rings import Ring
from covey_protocol.errors import UsageError
from covey_protocol.messages import reason_text
from covey_protocol.releases import is_newer

RESTARTS = 4  # starts of a healthy agent within the soak time (10 minutes at least) that make it a failed one
RESTARTS_S = 600.0
NAMED = 5  # devices that a reason names


class Gates(Struct, frozen=True, kw_only=True):
    """soak_s: a device must be healthy for so long, without a start anew. max_failures, max_failures_share: so many
    devices that failed are borne, the larger of the two. min_healthy: of a ring's devices that were here, this share
    must be healthy where patience_s is over and others still have not taken it. away_s: a device that was here and is
    away for so long has failed. metrics: a coordinator's, where abandoned rounds are counted; "" for nobody looks.
    max_abandoned: so many in one ring are borne."""

    soak_s: float = 1800.0
    max_failures: int = 0
    max_failures_share: float = 0.0
    min_healthy: float = 0.9
    patience_s: float = 86400.0
    away_s: float = 900.0
    metrics: str = ""
    max_abandoned: int = 2


class Plan(Struct, frozen=True, kw_only=True):
    """serial: of the first ring's description; ring number i has serial + i, the one that stops serial + len(rings)."""

    fleet: str
    version: str
    serial: int
    rings: tuple[Ring, ...]
    gates: Gates
    roster: tuple[str, ...]

    def members(self, ring: int) -> tuple[str, ...]:
        """Of this ring and those before it; none where ring is below 0."""
        return tuple(one for one in self.roster if ring >= 0 and self.rings[ring].has(self.version, one))


# --- events: at is Unix time in seconds, by the clock of who keeps the journal


class Began(Struct, frozen=True, tag="began"):
    at: float
    plan: Plan


class Opened(Struct, frozen=True, tag="opened"):
    """This ring's description is to be published."""

    at: float
    ring: int


class Published(Struct, frozen=True, tag="published"):
    at: float
    ring: int


class Saw(Struct, frozen=True, tag="saw", omit_defaults=True):
    """What a device's newest presence says; of one that is away nothing else is known."""

    at: float
    device: str
    online: bool
    session: int
    version: str = ""
    on_trial: bool = False
    bad: tuple[str, ...] = ()
    trouble: str = ""


class Rounds(Struct, frozen=True, tag="rounds"):
    """abandoned: as the coordinator counts them; its count begins again when it starts."""

    at: float
    abandoned: int


class Passed(Struct, frozen=True, tag="passed"):
    """left: devices that nobody waits for any more. skipped: the ring added no device."""

    at: float
    ring: int
    left: tuple[str, ...] = ()
    skipped: bool = False


class Stopping(Struct, frozen=True, tag="stopping"):
    """No further device is to take it. withdraw: our description is to be published; else somebody else's holds."""

    at: float
    reason: str
    withdraw: bool = True


class Stopped(Struct, frozen=True, tag="stopped"):
    at: float


class Resumed(Struct, frozen=True, tag="resumed"):
    """The plan goes on at its ring, with fresh serials and perhaps other gates."""

    at: float
    serial: int
    gates: Gates


class Finished(Struct, frozen=True, tag="finished"):
    at: float


Event = Union[Began, Opened, Published, Saw, Rounds, Passed, Stopping, Stopped, Resumed, Finished]


# --- what is known


class Phase(enum.Enum):
    BETWEEN = "between"  # the next ring is to be opened
    OPENING = "opening"  # its description is to be published
    WATCHING = "watching"
    STOPPING = "stopping"  # the description that stops is to be published
    STOPPED = "stopped"
    FINISHED = "finished"


ENDED = (Phase.STOPPED, Phase.FINISHED)


class Stand(enum.Enum):
    HEALTHY = "healthy"
    TRIAL = "on trial"
    PENDING = "pending"  # it is here, or was a moment ago, and has not taken it
    BAD = "bad"
    AWAY = "away"  # it was not here since the rollout began


class Device(Struct, frozen=True):
    """saw: the newest of it. known: what it said when it was last here. trouble: what it had said before the rollout.
    reached: it has run the release. healthy_since, away_since: None where it is not. starts: when a healthy agent
    started anew, the newest few. restless: it did so too often."""

    saw: Saw
    known: Optional[Saw] = None
    trouble: str = ""
    reached: bool = False
    healthy_since: Optional[float] = None
    away_since: Optional[float] = None
    starts: tuple[float, ...] = ()
    restless: bool = False


class State(Struct, frozen=True):
    """ring: that is open, -1 before the first. since: when it was published. abandoned: rounds since then; counted:
    the coordinator's count when it was last read."""

    plan: Plan
    phase: Phase = Phase.BETWEEN
    ring: int = -1
    at: float = 0.0
    since: float = 0.0
    devices: dict[str, Device] = {}
    abandoned: int = 0
    counted: Optional[int] = None
    reason: str = ""
    withdraw: bool = True
    left: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        return self.plan.members(self.ring)


def begin(event: Event) -> State:
    if not isinstance(event, Began):
        raise UsageError("a journal that does not begin with its plan")
    return State(event.plan, at=event.at)


_replace = msgspec.structs.replace


def apply(state: State, event: Event) -> State:
    """With this event as well. UsageError for one that cannot come now."""
    state = _replace(state, at=max(state.at, event.at))
    if isinstance(event, Saw):
        device = seen(state.plan, state.devices.get(event.device), event)
        return _replace(state, devices={**state.devices, event.device: device})
    if isinstance(event, Rounds):
        before = event.abandoned if state.counted is None else state.counted
        more = event.abandoned - before if event.abandoned >= before else event.abandoned
        return _replace(state, counted=event.abandoned, abandoned=state.abandoned + more)
    return _step(state, event)


def _step(state: State, event: Event) -> State:
    phase = state.phase
    if isinstance(event, Opened) and phase is Phase.BETWEEN and event.ring == state.ring + 1:
        return _replace(state, phase=Phase.OPENING, ring=event.ring, abandoned=0)
    if isinstance(event, Published) and phase is Phase.OPENING and event.ring == state.ring:
        return _replace(state, phase=Phase.WATCHING, since=event.at)
    if isinstance(event, Passed) and _may_pass(state, event):
        return _replace(state, phase=Phase.BETWEEN, ring=event.ring, left=state.left if event.skipped else event.left)
    if isinstance(event, Stopping) and phase not in ENDED:
        return _replace(state, phase=Phase.STOPPING, reason=event.reason, withdraw=event.withdraw)
    if isinstance(event, Stopped) and phase is Phase.STOPPING:
        return _replace(state, phase=Phase.STOPPED)
    if isinstance(event, Resumed) and phase is Phase.STOPPED:
        plan = _replace(state.plan, serial=event.serial, gates=event.gates)
        ring = max(state.ring - 1, -1)  # the ring that was open opens again
        return _replace(state, plan=plan, phase=Phase.BETWEEN, ring=ring, reason="", withdraw=True, left=())
    if isinstance(event, Finished) and phase is Phase.BETWEEN and state.ring == len(state.plan.rings) - 1:
        return _replace(state, phase=Phase.FINISHED)
    raise UsageError(f"a rollout that is {phase.value} at ring {state.ring} cannot take {event!r}")


def _may_pass(state: State, event: Passed) -> bool:
    if event.skipped:
        return state.phase is Phase.BETWEEN and event.ring == state.ring + 1
    return state.phase is Phase.WATCHING and event.ring == state.ring


def seen(plan: Plan, device: Optional[Device], saw: Saw) -> Device:
    """A device after another look at it."""
    if device is None:
        device = Device(saw, trouble=saw.trouble)
    if not saw.online:
        away_since = device.away_since if device.away_since is not None else saw.at
        return _replace(device, saw=saw, away_since=away_since)
    before, healthy = device.known, _runs(plan, saw) and not saw.on_trial
    device = _replace(device, saw=saw, known=saw, away_since=None, reached=device.reached or _runs(plan, saw))
    if not healthy:
        return _replace(device, healthy_since=None)
    if device.healthy_since is None or before is None:
        return _replace(device, healthy_since=saw.at)
    return _started_anew(plan, device, saw.at) if saw.session != before.session else device


def _runs(plan: Plan, saw: Saw) -> bool:
    return saw.version != "" and not is_newer(plan.version, saw.version)


def _started_anew(plan: Plan, device: Device, at: float) -> Device:
    starts = (*device.starts, at)[-RESTARTS:]
    often = len(starts) == RESTARTS and at - starts[0] <= max(plan.gates.soak_s, RESTARTS_S)
    return _replace(device, healthy_since=at, starts=starts, restless=device.restless or often)


def stand(state: State, device_id: str, now: float) -> tuple[Stand, str]:
    """Where a device stands, and of a bad one why."""
    device = state.devices.get(device_id)
    if device is None or device.known is None:
        return Stand.AWAY, ""
    said, plan = device.known, state.plan
    if plan.version in said.bad:
        return Stand.BAD, said.trouble or f"does not take {plan.version}"
    if device.restless:
        return Stand.BAD, f"its agent started {RESTARTS} times in a short while"
    if said.trouble and said.trouble != device.trouble:
        return Stand.BAD, said.trouble
    if device.away_since is not None:
        long = now - device.away_since >= plan.gates.away_s
        return (Stand.BAD, f"went away while it ran {said.version}") if long else (Stand.PENDING, "")
    if _runs(plan, said):
        return (Stand.TRIAL if said.on_trial else Stand.HEALTHY), ""
    return (Stand.BAD, f"went back to {said.version}") if device.reached else (Stand.PENDING, "")


def stands(state: State, now: float, ring: Optional[int] = None) -> dict[str, tuple[Stand, str]]:
    """Of the devices of the rings that are open, or of those up to `ring`."""
    members = state.members if ring is None else state.plan.members(ring)
    return {one: stand(state, one, now) for one in members}


# --- what to do next


def decide(state: State, now: float) -> Optional[Event]:
    """The next event, if one is due. `now` must not lie before the newest event."""
    if state.phase is Phase.BETWEEN:
        return _next_ring(state, now)
    if state.phase is not Phase.WATCHING:
        return None  # somebody has something to do first, or all is over
    found = stands(state, now)
    reason = _too_much(state, found)
    if reason:
        return Stopping(now, reason)
    return _passes(state, found, now)


def _next_ring(state: State, now: float) -> Event:
    ring, last = state.ring + 1, len(state.plan.rings) - 1
    if ring > last:
        return Finished(now)
    if ring < last and state.plan.members(ring) == state.members:
        return Passed(now, ring, skipped=True)
    return Opened(now, ring)


def _too_much(state: State, found: dict[str, tuple[Stand, str]]) -> str:
    """Why the rollout is to stop; "" where it is not."""
    gates = state.plan.gates
    bad = {name: why for name, (where, why) in found.items() if where is Stand.BAD}
    here = sum(where is not Stand.AWAY for where, _ in found.values())
    borne = max(gates.max_failures, int(gates.max_failures_share * here + 1e-9))
    if len(bad) > borne:
        named = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:NAMED])
        hidden = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        return reason_text(f"{len(bad)} of {here} devices failed, {borne} are borne ({named}{hidden})")
    if state.abandoned > gates.max_abandoned:
        return f"{state.abandoned} rounds were abandoned in this ring, {gates.max_abandoned} are borne"
    return ""


def _passes(state: State, found: dict[str, tuple[Stand, str]], now: float) -> Optional[Event]:
    gates, before = state.plan.gates, state.plan.members(state.ring - 1)
    here = [name for name, (where, _) in found.items() if where is not Stand.AWAY]
    ready = [name for name in here if found[name][0] is Stand.HEALTHY and _soaked(state, name, now)]
    waits = [name for name in here if name not in ready and found[name][0] is not Stand.BAD]
    new = [name for name in found if name not in before]
    news = not new or any(name in ready for name in new)
    if ready and not waits and news:
        return Passed(now, state.ring, _others(found, ready))
    if now - state.since < gates.patience_s:
        return None
    if ready and len(ready) >= gates.min_healthy * len(here):
        return Passed(now, state.ring, _others(found, ready))
    return Stopping(now, f"after {gates.patience_s:g} s {len(ready)} of {len(here)} devices that were here are healthy")


def _others(found: dict[str, tuple[Stand, str]], ready: list[str]) -> tuple[str, ...]:
    return tuple(name for name in found if name not in ready)


def _soaked(state: State, device_id: str, now: float) -> bool:
    since = state.devices[device_id].healthy_since
    return since is not None and now - since >= state.plan.gates.soak_s
