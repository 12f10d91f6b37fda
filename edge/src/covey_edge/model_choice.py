"""What becomes of the models a device keeps, when a new one comes or has been tuned: `Kept` in, `Kept` out.

No files, no clock: what is scored and when comes from `personal_agent`, the rules of comparison are `model_rules`'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import msgspec

from covey_edge.config import TaskPersonal
from covey_edge.model_rules import Measure, Score, gain, is_preferred, is_worse
from covey_edge.model_store import Kept, Scored, Version


class Scores(msgspec.Struct, frozen=True):
    """Of models on the same held-out examples. counts: of the groups; measure: by which they are compared."""

    counts: tuple[int, ...]
    measure: Measure
    federated: Score
    current: Optional[Score] = None  # the federated model that was in place before
    personal: Optional[Score] = None
    tuned: Optional[Score] = None  # the newest personal model

    def told(self) -> dict[str, tuple[Optional[float], Optional[float]]]:
        """Name -> (mean loss, accuracy), for the history; JSON has no number that is not finite."""
        named = {"federated": self.federated, "current": self.current, "personal": self.personal, "tuned": self.tuned}
        return {
            name: (_finite(one.mean("loss", self.counts)), _finite(one.mean("accuracy", self.counts)))
            for name, one in named.items()
            if one is not None
        }


def _finite(value: float) -> Optional[float]:
    return value if math.isfinite(value) else None


def measure_of(settings: TaskPersonal, *, has_classes: bool) -> Measure:
    """Accuracy means nothing where answers are no classes."""
    return settings.measure if has_classes else "loss"


def comparable(kept: Kept, bundle: str) -> Sequence[Version]:
    """The federated model in place and the personal one, where they are of this bundle: another one's numbers mean
    another thing, and its data may be others."""
    versions = (kept.federated, kept.personal)
    return [one for one in versions if one is not None and one.bundle == bundle]


def with_federated(
    kept: Optional[Kept], new: Version, scores: Optional[Scores], settings: TaskPersonal, now_ms: int
) -> tuple[Kept, bool]:
    """After a round brought `new`. Returns also whether it was let in: not where the owner has refused it, or it is
    worse on the held-out data than the one in place. scores: None without held-out data; then everything is let in."""
    if kept is None:
        first = Kept(new, new)
        return _noted(first, new, scores, "the first model", now_ms), True
    if new.parameters in kept.refused:
        return kept, False
    if scores is not None and scores.current is not None:
        change = gain(scores.federated, scores.current, scores.counts, scores.measure)
        if is_worse(change, settings.min_gain):
            return _noted(kept, new, scores, f"kept out, worse by {scores.measure} ({change})", now_ms), False
        decision = f"let in ({scores.measure} {change})"
    else:
        decision = "let in"
    personal = kept.personal if kept.personal is not None and kept.personal.bundle == new.bundle else None
    updated = msgspec.structs.replace(kept, federated=new, personal=personal)
    preferred = scores.personal if scores is not None else None
    return _noted(_choose(updated, preferred, scores, settings), new, scores, decision, now_ms), True


def with_personal(
    kept: Kept, tuned: Version, scores: Optional[Scores], settings: TaskPersonal, now_ms: int
) -> tuple[Kept, bool]:
    """After `tuned` was made from the federated model. Returns also whether it was taken: not where it is worse on the
    held-out data than the personal model from before."""
    score = scores.tuned if scores is not None else None
    taken, decision = True, "tuned"
    if scores is not None and score is not None and scores.personal is not None:
        change = gain(score, scores.personal, scores.counts, scores.measure)
        taken = not is_worse(change, settings.min_gain)
        score = score if taken else scores.personal
        decision = f"{'tuned' if taken else 'the old personal model stays'} ({scores.measure} {change})"
    if taken:
        kept = msgspec.structs.replace(kept, personal=tuned)
    return _noted(_choose(kept, score, scores, settings), tuned, scores, decision, now_ms), taken


def _choose(kept: Kept, personal: Optional[Score], scores: Optional[Scores], settings: TaskPersonal) -> Kept:
    """With the one in use that the owner's `use` means."""
    if kept.personal is None or kept.personal.parameters in kept.refused or settings.use == "federated":
        return kept.using(kept.federated)
    if settings.use == "personal":
        return kept.using(kept.personal)
    if scores is None or personal is None:  # nothing says that it is better
        return kept.using(kept.federated)
    better = gain(personal, scores.federated, scores.counts, scores.measure)
    in_use = kept.used.kind == "personal"
    return kept.using(kept.personal if is_preferred(better, settings.min_gain, in_use=in_use) else kept.federated)


def _noted(kept: Kept, new: Version, scores: Optional[Scores], decision: str, now_ms: int) -> Kept:
    told = scores.told() if scores is not None else {}
    examples = sum(scores.counts) if scores is not None else 0
    line = f"{decision}; the {kept.used.kind} model is used"
    return kept.noting(Scored(now_ms, new.number, examples, told, line))
