"""Coordinate-wise rules: the trimmed mean and the median, and what they say about devices.

These rules do not accept or reject updates; each column makes its own choice. A device's score is the share of its
coordinates that lie *strictly outside* the range of the values kept in their columns. If devices were exchangeable,
that share would be about `chance = 2k/n`, where k values are cut at each end, and never systematically more.
A device is *outvoted* (not accepted) when its share is more than three quarters of the way from chance to 1: with
n = 10 and k = 3, above 90%. Coordinates of one device hang together, and honest devices with unusual data or large
updates are above chance, so a significance test would accuse them; hence this deliberately high bar. An outvoted
device still has its few kept coordinates in the aggregate, and an attack that stays inside the kept range is not
seen at all: the score measures how loud a device is, not whether it is honest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices
from covey_coordinator.records import Array


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Coordinate-wise mean without the num_byzantine largest and smallest values. num_examples is not used.

    score: share of the device's coordinates that were trimmed (see the module). Needs n > 2f.
    Source: Yin et al. 2018 (arXiv:1803.01498), Definition 2, there with a fraction beta = f / n; we take the count.
    """

    num_byzantine: int = 0
    name = "trimmed-mean"
    facts = Facts(
        summary="per coordinate the mean without the f largest and f smallest",
        needs="n > 2f",
        breakdown="1/2",
        cost="n d log n",
        sums_only=False,
        source="Yin et al. 2018 (arXiv:1803.01498), Definition 2",
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        f = self.num_byzantine
        aggregate, outside = k.ranked_means(batch.updates, f, k.count(batch.updates) - f, cut=f)
        return Judgement(aggregate, *outvoted(k, batch.updates, outside, chance=2 * f), {})

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return explain_outvoted(score, self.num_byzantine, n)


@dataclass(frozen=True)
class Median(Rule):
    """Coordinate-wise median; the mean of the two middle values for even n. num_examples is not used.

    score: share of the device's coordinates among the f largest or smallest of their columns; with f = 0, where the
    operator says that all devices are honest, among the outer quarters, and nobody is outvoted. Needs n > 2f.
    Source: Yin et al. 2018 (arXiv:1803.01498), Definition 1.
    """

    num_byzantine: int = 0
    name = "median"
    facts = Facts(
        summary="per coordinate the median",
        needs="n > 2f",
        breakdown="1/2",
        cost="n d log n",
        sums_only=False,
        source="Yin et al. 2018 (arXiv:1803.01498), Definition 1",
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        n = k.count(batch.updates)
        cut = self.num_byzantine if self.num_byzantine else n // 4
        aggregate, outside = k.ranked_means(batch.updates, (n - 1) // 2, n // 2 + 1, cut)
        accepted, scores = outvoted(k, batch.updates, outside, chance=2 * cut)
        return Judgement(aggregate, accepted if self.num_byzantine else k.full((n,), True), scores, {})

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return explain_outvoted(score, self.num_byzantine, n)


def outvoted(k: Kernels, updates: Updates, outside: Any, chance: Any) -> tuple[Any, Any]:
    """Counts of outside coordinates -> accepted (n,) bool and scores (n,) float32, the shares.

    chance: how many of the n values of a column are outside. The bar is share <= c + 3/4 (1 - c) with c = chance / n,
    in whole numbers.
    """
    n, d = k.whole(k.count(updates)), k.whole(k.dimension(updates))
    accepted = 4 * n * outside <= d * (3 * n + k.whole(chance))
    return accepted, k.single(k.divide(outside, d))


def explain_outvoted(score: float, cut: int, n: int) -> str:
    """The reason of an outvoted device."""
    return (
        f"outvoted: {score:.0%} of its coordinates lie among the {cut} largest or smallest of {n} devices "
        f"({2 * cut / n:.0%} would be chance)"
    )
