"""What may leak: the policy an audit is judged by, and the verdict.

Only the plan's own updates are judged, and the model that they make. The worst cases beside it are shown, because a
plan is a promise of the coordinator's; who does not trust it sets the device's policy by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from covey_coordinator.audit.results import PLAN, Result
from covey_coordinator.inversion.verdict import LABELS, LINKABILITY, PSNR, Decibels, Limits, Share
from covey_edge.config import read_toml
from covey_protocol.errors import ConfigError

MEMBERSHIP, RESOLVED, IDENTIFIED, PROPERTY = "membership_auc", "resolved_share", "identified", "property_auc"
BY_ATTACKS = (PSNR, LABELS, IDENTIFIED, PROPERTY)
# what is measured -> in words
WORDS = {
    PSNR: "the closest copy of one example, in dB",
    LABELS: "share of the labels read off an update",
    LINKABILITY: "how well updates of one device can be told from others' (AUC)",
    MEMBERSHIP: "how well the finished model tells who was trained on (AUC)",
    RESOLVED: "share of an update's examples that it determines (Tarantola)",
    IDENTIFIED: "share of examples whose copy picks them out of all others",
    PROPERTY: "how well updates tell whether a device's data have a property (AUC)",
}


class Policy(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits; one that is left out is the default here, and `false` is no limit. docs/audit.md has the reasons.

    max_psnr_above_guess_db: where max_psnr_db is not given; above the PSNR of the average of data that no device has.
    """

    max_psnr_db: Decibels | None = None
    max_psnr_above_guess_db: Annotated[float, Meta(ge=0, le=200)] | bool = 6.0
    max_label_recovery: Share | bool = 0.9
    max_linkability_auc: Share | bool = False
    max_membership_auc: Share | bool = 0.6
    max_resolved_share: Share | bool = False
    max_identified: Share | bool = 0.5
    max_property_auc: Share | bool = False

    def limits(self, guess_db: float | None) -> dict[str, float]:
        """By what is measured. guess_db: None where it is not known; then a limit above it cannot be kept."""
        told = {
            PSNR: self._psnr(guess_db),
            LABELS: self.max_label_recovery,
            LINKABILITY: self.max_linkability_auc,
            MEMBERSHIP: self.max_membership_auc,
            RESOLVED: self.max_resolved_share,
            IDENTIFIED: self.max_identified,
            PROPERTY: self.max_property_auc,
        }
        return {name: float(limit) for name, limit in told.items() if limit is not False}

    def _psnr(self, guess_db: float | None) -> float | bool:
        if self.max_psnr_db is not None:
            return self.max_psnr_db
        if self.max_psnr_above_guess_db is False:
            return False
        return round((guess_db or 0.0) + self.max_psnr_above_guess_db, 1)


def read_policy(path: Path | None) -> Policy:
    """ConfigError naming the file and the key."""
    if path is None:
        return Policy()
    policy = read_toml(path, Policy)
    for name in policy.__struct_fields__:
        if getattr(policy, name) is True:
            raise ConfigError(f"{path}: {name} = true", "give a number, or false for no limit")
    return policy


@dataclass(frozen=True)
class Judged:
    """One limit. measured: None where nothing was. complete: False where not all attacks that the level has for it ran
    to their end on at least one of the plan's updates; what was measured is then a lower bound.
    """

    name: str
    limit: float
    measured: float | None
    by: str = ""
    complete: bool = True

    @property
    def kept(self) -> bool:
        return self.complete and self.measured is not None and self.measured <= self.limit

    @property
    def words(self) -> str:
        return WORDS[self.name]

    @property
    def said(self) -> str:
        words = self.words
        if self.measured is None:
            return f"not measured: {words}, which the policy limits to {self.limit:g}"
        if self.measured <= self.limit and not self.complete:
            return f"not measured to the end: {words}, at least {self.measured:.3g} (the limit is {self.limit:g})"
        told = "within" if self.kept else "above"
        return f"{words}: {self.measured:.3g}, {told} the limit of {self.limit:g}{f' ({self.by})' if self.by else ''}"


def measured(results: Iterable[Result]) -> dict[str, tuple[float, str]]:
    """By name, with who found it: of the plan's own updates and of the model they make.

    The largest of any attack on any update; of labels, resolution and identified examples the largest of any attack's
    mean over the updates, because one update of one example has all its labels or none.
    """
    plan = [one for one in results if one.case == PLAN and not one.refused]
    found: dict[str, tuple[float, str]] = {}
    for name in WORDS:
        values: dict[str, list[float]] = {}
        for one in plan:
            if name in one.metrics:
                values.setdefault(one.name, []).append(one.metrics[name])
        mean = name in (LABELS, RESOLVED, IDENTIFIED)
        scores = {attack: sum(v) / len(v) if mean else max(v) for attack, v in values.items()}
        if scores:
            best = max(scores, key=lambda attack: scores[attack])
            found[name] = (scores[best], best)
    return found


def judged(
    policy: Policy, found: Mapping[str, tuple[float, str]], guess_db: float | None, *, attacked: bool = True
) -> list[Judged]:
    """attacked: whether all attacks on the first of the plan's updates ran to their end."""
    limits = []
    for name, limit in policy.limits(guess_db).items():
        value, by = found.get(name, (None, ""))
        limits.append(Judged(name, limit, value, by, attacked or name not in BY_ATTACKS))
    return limits


def as_limits(limits: Mapping[str, float]) -> Limits:
    """Those that a verdict's readers know."""
    return Limits(limits.get(PSNR), limits.get(LABELS), limits.get(LINKABILITY))
