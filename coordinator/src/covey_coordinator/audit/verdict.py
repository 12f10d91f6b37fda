"""From results to a verdict: what was measured, which limits it keeps, and what stays open."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from covey_coordinator.audit.bench import Bench
from covey_coordinator.audit.policy import Judged, Policy, as_limits, judged, measured
from covey_coordinator.audit.results import PLAN, Result
from covey_coordinator.audit.suite import Piece
from covey_coordinator.inversion.verdict import Assumed, AuditVerdict, digest, plan_facts

MOST_NAMED = 5


@dataclass(frozen=True)
class Outcome:
    """results: in the order of the suite. left_out: pieces that did not fit the time, in words. guess_db: what a guess
    of the average reaches on the best of the plan's examples; None where no update of the plan was attacked.
    """

    results: tuple[Result, ...]
    left_out: tuple[str, ...]
    judged: tuple[Judged, ...]
    verdict: AuditVerdict
    guess_db: float | None


def concluded(
    policy: Policy, bench: Bench, planned: Sequence[Piece], done: Mapping[str, Result], bundle: bytes
) -> Outcome:
    """done: results by the key of their piece."""
    results = [done[piece.key] for piece in planned if piece.key in done]
    left_out = [piece.said for piece in planned if piece.key not in done]
    attacked = all(piece.key in done and not done[piece.key].cut for piece in planned if piece.needed)
    of_plan = [one for one in results if one.case == PLAN and not one.refused]
    guesses = [one.metrics["guess_db"] for one in of_plan if "guess_db" in one.metrics]
    guess_db = max(guesses, default=None)
    found = measured(results)
    limits = judged(policy, found, guess_db, attacked=attacked)
    verdict = _verdict(bench, bundle, of_plan, limits, {name: value for name, (value, _) in found.items()}, left_out)
    return Outcome(tuple(results), tuple(left_out), tuple(limits), verdict, guess_db)


def _verdict(
    bench: Bench,
    bundle: bytes,
    of_plan: Sequence[Result],
    limits: Sequence[Judged],
    numbers: dict[str, float],
    left_out: Sequence[str],
) -> AuditVerdict:
    privacy, facts = bench.settings.privacy, plan_facts(bench.settings.plan(1))
    on_devices = privacy.by == "device"
    attacked = [one.examples for one in of_plan if one.examples]
    reasons = [one.said for one in limits if not one.kept]
    if left_out:
        more = f" and {len(left_out) - MOST_NAMED} more" if len(left_out) > MOST_NAMED else ""
        reasons.append(f"did not fit the time: {', '.join(left_out[:MOST_NAMED])}{more}")
    return AuditVerdict(
        bundle=hashlib.sha256(bundle).hexdigest(),
        plan=facts,
        plan_digest=digest(facts),
        assumed=Assumed(min(attacked, default=1), privacy.clip_norm, privacy.noise_multiplier if on_devices else 0.0),
        limits=as_limits({one.name: one.limit for one in limits}),
        measured=numbers,
        passed=all(one.kept for one in limits),
        reasons=tuple(reasons),
        attacks=tuple(dict.fromkeys(one.name for one in of_plan)),
        incomplete=tuple(dict.fromkeys(one.name for one in of_plan if one.cut)),
        seed=bench.seed,
        data=f"{bench.data.name}: {len(bench.data.devices)} devices, {sum(map(len, bench.data.devices))} examples",
        covey=version("covey-coordinator"),
        made_at_ms=int(time.time() * 1000),
    )
