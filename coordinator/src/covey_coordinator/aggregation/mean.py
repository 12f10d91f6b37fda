"""The mean, weighted by capped numbers of examples. It resists no hostile device: one can move it anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import as_scores, median_of
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices, times_median
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError, RuleError


@dataclass(frozen=True)
class Mean(Rule):
    """Federated averaging with a bound on what a device can gain by claiming many examples.

    A device counts with min(num_examples, cap_ratio * median of num_examples). num_examples is what a device says, so
    without the cap one device claiming 1e9 examples owns the aggregate. All updates are accepted.
    score: distance from the mean, as a multiple of the median distance (1 is ordinary).
    Source: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1; the cap is ours.
    """

    num_byzantine: int = 0
    cap_ratio: float = 10.0
    name = "mean"
    facts = Facts(
        summary="average, weighted by capped numbers of examples",
        needs="f = 0",
        breakdown="0",
        cost="n d",
        sums_only=True,
        source="McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1",
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cap_ratio) and self.cap_ratio >= 1.0):
            raise ConfigError(f"mean: cap_ratio = {self.cap_ratio}", "set cap_ratio to a finite number of at least 1")

    def check(self, n: int) -> None:
        require_devices(self, n, least=1, because="n >= 1")
        if self.num_byzantine > 0:
            raise RuleError(
                f"mean bears no corrupted device, but num_byzantine = {self.num_byzantine}",
                "set num_byzantine to 0, or choose median, trimmed-mean, krum or multi-krum",
            )

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        shares = capped_shares(k, batch.num_examples, self.cap_ratio)
        aggregate = k.combination(batch.updates, shares)
        accepted = k.full((k.count(batch.updates),), True)
        scores = relative_distances(k, batch.updates, aggregate)
        return Judgement(aggregate, accepted, scores, {"largest_share": k.single(k.largest(shares))})

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"distance from the mean is {times_median(score, accepted_scores)}"


def capped_shares(k: Kernels, num_examples: Any, cap_ratio: float) -> Any:
    """(n,) float32 -> (n,) float64 with sum 1: proportional to min(num_examples, cap_ratio * their median)."""
    examples = k.real(num_examples)
    weights = k.minimum(examples, median_of(k, examples) * cap_ratio)
    return k.divide(weights, k.sum_rows(weights))


def relative_distances(k: Kernels, updates: Updates, aggregate: Any) -> Any:
    """(n,) float32: distance of each row from the aggregate over the median of these distances; 0 if that is 0."""
    distances = k.sqrt(k.square_norms(updates, aggregate))
    return as_scores(k, k.divide(distances, median_of(k, distances)))
