"""What an audit says of a plan: a JSON file that `covey audit` writes and `covey serve` reads before the first round.

A verdict is bound to a bundle (the sha256 of its file) and to a plan. It holds for no other: a larger learning rate or
one epoch less is another leak. It also says what it took for granted of the devices (`Assumed`); whoever relies on it
must grant as much. The limits it was judged by are in it, and whoever relies on it judges the numbers again by its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from covey_edge.config import NotNegative, read_file
from covey_edge.files import DISK
from covey_protocol.errors import ConfigError
from covey_protocol.messages import TrainingPlan

FORMAT = 1
Decibels = Annotated[float, Meta(ge=-1000, le=1000)]
Share = Annotated[float, Meta(ge=0, le=1)]
Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]

# the numbers that a limit judges; `measured` may hold others
PSNR, LABELS, LINKABILITY = "psnr_db", "label_recovery", "linkability_auc"
UNBOUND = ("shuffle_seed", "task")  # of a plan: changes nothing of what an update tells


class Limits(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """None: not limited.

    max_psnr_db: of the closest that any attack comes to any one true example, over all updates audited; the range is
    the bundle's input range. max_label_recovery: the share of an update's labels that the best attack names, mean over
    the updates audited, 0 to 1. max_linkability_auc: of telling a device's updates from the others' over rounds, 0.5
    for chance.
    """

    max_psnr_db: Decibels | None = None
    max_label_recovery: Share | None = None
    max_linkability_auc: Share | None = None

    def given(self) -> dict[str, float]:
        """By the name of what is measured, only what is limited."""
        limits = {PSNR: self.max_psnr_db, LABELS: self.max_label_recovery, LINKABILITY: self.max_linkability_auc}
        return {name: limit for name, limit in limits.items() if limit is not None}


class Assumed(Struct, frozen=True, forbid_unknown_fields=True):
    """Of the devices: the fewest examples that one trains on, and its own clip_norm and noise_multiplier, 0 for none.
    The plan knows nothing of these; each device's owner sets them."""

    examples: Annotated[int, Meta(ge=1)]
    clip_norm: NotNegative = 0.0
    noise_multiplier: NotNegative = 0.0


class AuditVerdict(Struct, frozen=True, forbid_unknown_fields=True):
    """bundle: sha256 of the bundle's file, hex. plan: as `plan_facts` gives it; plan_digest: its `digest`.

    measured: by name; those of `Limits` and whatever else the audit found. attacks: the names of those that were run;
    incomplete: of those that ran out of time, whose numbers are lower bounds. reasons: why it failed, or what else is
    to be known. data: in words, which data were audited. made_at_ms: Unix time.
    """

    bundle: Hash
    plan: dict[str, Any]
    plan_digest: Hash
    assumed: Assumed
    limits: Limits
    measured: dict[str, float]
    passed: bool
    reasons: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    seed: int = 0
    data: str = ""
    covey: str = ""
    made_at_ms: int = 0
    format: int = FORMAT


def plan_facts(plan: TrainingPlan) -> dict[str, Any]:
    """Every setting of the plan that an update depends on, as JSON has it."""
    facts: dict[str, Any] = msgspec.to_builtins(plan)
    full = {**_plan_defaults(), **facts}
    told = {name: value for name, value in sorted(full.items()) if name not in UNBOUND and value != ()}
    as_read: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(told))
    return as_read


def digest(facts: Mapping[str, Any]) -> str:
    """sha256, hex, of the facts as sorted JSON."""
    return hashlib.sha256(msgspec.json.encode(dict(facts), order="sorted")).hexdigest()


def exceeded(measured: Mapping[str, float], limits: Limits) -> list[str]:
    """One sentence for each limit that is not kept, or of which nothing was measured."""
    found = []
    for name, limit in limits.given().items():
        if name not in measured:
            found.append(f"{name} was not measured, and max_{name} limits it")
        elif not measured[name] <= limit:
            found.append(f"{name} is {measured[name]:.3g}, above max_{name} = {limit:g}")
    return found


def write_verdict(path: Path, verdict: AuditVerdict) -> None:
    """Indented JSON, written whole or not at all."""
    DISK.write(path, msgspec.json.format(msgspec.json.encode(verdict), indent=1) + b"\n")


def read_verdict(path: Path) -> AuditVerdict:
    """ConfigError where it cannot be read, is of another format, or was changed by hand so that its digest is wrong."""
    try:
        verdict = msgspec.json.decode(read_file(path), type=AuditVerdict)
    except msgspec.MsgspecError as exc:
        raise ConfigError(f"{path} is no verdict of an audit ({exc})", "run `covey audit` again") from exc
    if verdict.format != FORMAT:
        raise ConfigError(f"{path} has format {verdict.format}, this covey reads {FORMAT}", "run `covey audit` again")
    if digest(verdict.plan) != verdict.plan_digest:
        raise ConfigError(f"{path}: plan_digest is not that of its plan", "run `covey audit` again")
    return verdict


def differences(verdict: AuditVerdict, bundle: bytes, plan: TrainingPlan, granted: Assumed) -> list[str]:
    """What the verdict is not about, one sentence each; none where it is about this round.

    bundle: the sha256 of its file. granted: what may be relied on of the devices.
    """
    found = [] if verdict.bundle == bundle.hex() else [f"the bundle ({verdict.bundle[:12]}, now {bundle.hex()[:12]})"]
    facts = plan_facts(plan)
    for name in sorted({*facts, *verdict.plan}):
        then, now = verdict.plan.get(name), facts.get(name)
        if then != now:
            found.append(f"plan.{name} ({_told(then)}, now {_told(now)})")
    assumed = verdict.assumed
    if granted.examples < assumed.examples:
        found.append(f"min_examples ({assumed.examples}, now {granted.examples})")
    if assumed.noise_multiplier:
        if granted.noise_multiplier < assumed.noise_multiplier:
            found.append(f"noise_multiplier ({assumed.noise_multiplier:g}, now {granted.noise_multiplier:g})")
        if granted.clip_norm != assumed.clip_norm:  # the noise is measured in it
            found.append(f"clip_norm ({assumed.clip_norm:g}, now {granted.clip_norm:g})")
    return found


def _plan_defaults() -> dict[str, Any]:
    defaults = msgspec.structs.fields(TrainingPlan)
    return {one.name: one.default for one in defaults if isinstance(one.default, (int, float, str))}


def _told(value: object) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
