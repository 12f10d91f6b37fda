"""Meamed and Bulyan: per coordinate, the mean of the values nearest the median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.distances import distances_between, to_others
from covey_coordinator.aggregation.kernels import Kernels
from covey_coordinator.aggregation.kernels.mathematics import as_scores
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices, times_median
from covey_coordinator.aggregation.trimmed_mean import outvoted
from covey_coordinator.records import Array


@dataclass(frozen=True)
class MeanAroundMedian(Rule):
    """Meamed: per coordinate the mean of the n - f values nearest the median. num_examples is not used.

    Of windows of n - f sorted values equally near, the lower one is taken. score: share of the device's coordinates
    that were left out; a device is outvoted as in the trimmed mean, where chance is f / n. Needs n > 2f.
    Source: Xie et al. 2018 (arXiv:1802.10116), "mean around median".
    """

    num_byzantine: int = 0
    name = "meamed"
    facts = Facts(
        summary="per coordinate the mean of the n - f values nearest the median",
        needs="n > 2f",
        breakdown="1/2",
        cost="n d log n",
        sums_only=False,
        source="Xie et al. 2018 (arXiv:1802.10116)",
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        aggregate, left_out = k.nearest_means(batch.updates, k.count(batch.updates) - self.num_byzantine)
        return Judgement(aggregate, *outvoted(k, batch.updates, left_out, chance=self.num_byzantine), {})

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        f = self.num_byzantine
        return f"outvoted: {score:.0%} of its coordinates are far from the medians ({f / n:.0%} would be chance)"


@dataclass(frozen=True)
class Bulyan(Rule):
    """Krum again and again until n - 2f updates are chosen, then per coordinate the mean of those nearest the median.

    Choice: the update with the least Krum score among those left, whose score sums the squared distances to its
    m - f - 2 nearest of the m left (at least one); it is taken out, and so on; ties go to the smaller index. Of the
    theta = n - 2f chosen, each coordinate is the mean of the theta - 2f values nearest their median. num_examples is
    not used. Not accepted: never chosen. score: the Krum score among all. Needs n >= 4f + 3.
    Source: El Mhamdi et al. 2018 (arXiv:1802.07927), section 4.
    """

    num_byzantine: int = 0
    name = "bulyan"
    facts = Facts(
        summary="Krum chooses n - 2f updates; per coordinate the mean of those nearest their median",
        needs="n >= 4f + 3",
        breakdown="1/4",
        cost="n^2 d + n^3",
        sums_only=False,
        source="El Mhamdi et al. 2018 (arXiv:1802.07927)",
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=4 * self.num_byzantine + 3, because="n >= 4f + 3")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        f, n = self.num_byzantine, k.count(batch.updates)
        distances = to_others(k, distances_between(k, batch.updates))
        order = k.argsort(distances)
        ascending = k.take_along(distances, order)

        def scores_among(left: Any) -> Any:
            """(n,): Krum scores among those left; infinite for the others."""
            others = k.take(left, order)
            wanted = k.maximum(k.number_true(left) - (f + 2), 1)
            counted = others & (k.running_counts(others) <= wanted) & (ascending < float("inf"))
            sums = k.sum_rows(k.transpose(k.where(counted, ascending, 0.0)))
            return k.where(left, sums, float("inf"))

        def choose(chosen: Any, number: Any) -> Any:
            best = k.argmin(scores_among(chosen <= 0.0))
            return k.where(k.equal(k.arange(n), best), 1.0 + chosen, chosen), number + 1

        start = k.full((n,), 0.0), k.whole(0)
        chosen, _ = k.while_loop(lambda chosen, number: number < k.whole(n - 2 * f), choose, start)
        accepted = chosen > 0.0
        members = k.argsort(1.0 - chosen)[: n - 2 * f]  # stable: in the order of the devices
        selected = batch.updates.through(members[:, None], k.full((n - 2 * f, 1), 1.0))
        aggregate, _ = k.nearest_means(selected, n - 4 * f)
        return Judgement(aggregate, accepted, as_scores(k, scores_among(chosen >= 0.0)), {})

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        company = times_median(score, accepted_scores)
        return f"not among the {len(accepted_scores)} of {n} that Krum chose: its score {score:.1e} is {company}"
