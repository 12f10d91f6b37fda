"""The geometric median: the point with the least sum of distances to the updates, however far off a minority is.

It is found among the weighted means of the updates, by iterations on n weights: distances of such a mean from the
updates follow from one Gram matrix, so the d numbers are read about as often as by Multi-Krum, and written once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.distances import centred_gram, most_central
from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Kernels
from covey_coordinator.aggregation.kernels.mathematics import as_scores, square_distances
from covey_coordinator.aggregation.mean import capped_shares
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices, times_median
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError

FAR = 10.0  # times the median distance: such a device has a tenth of the weight of one at the median distance


@dataclass(frozen=True)
class GeometricMedian(Rule):
    """The point z with the least sum of a_i |u_i - z|, by Weiszfeld's iteration with smoothing.

    w_i <- a_i / max(nu * s, |u_i - z|), made to sum to 1; z <- sum w_i u_i; until z moves by less than tolerance * s,
    or max_iterations times. s is the median (by a) of the distances from the start, and the start is the mean of the
    n // 2 + 1 updates nearest to the one with the nearest majority, so neither depends on how far a minority is. If
    updates holding half of a coincide with the start, that point is the answer. Smoothing moves z by nu * s or less.
    a_i: equal, or with `weighted` proportional to min(num_examples, cap_ratio * their median).
    score: |u_i - z| over s', the median of these distances. Not accepted: a score above 10, that is less than a tenth
    of the weight of a device at the median distance.
    Needs n > 2f. With `weighted`, n > 2f (1 + cap_ratio): at least n / 2 - f honest devices count the median or more,
    and f hostile ones cap_ratio medians at most. Each iteration needs weighted sums of updates and a distance that
    every device can tell by itself, so RFA runs it under secure aggregation; here the updates are seen.
    Source: Pillutla, Kakade, Harchaoui 2022 (arXiv:1912.13445), Algorithm 2. There nu is a length and the iterations
    are few from the mean; here nu is relative, the start robust and the iterations run until z stands still.
    """

    num_byzantine: int = 0
    weighted: bool = False
    cap_ratio: float = 10.0
    nu: float = 1e-6
    tolerance: float = 1e-6
    max_iterations: int = 100
    name = "geometric-median"
    facts = Facts(
        summary="the point with the least sum of distances to the updates",
        needs="n > 2f; weighted: n > 2f (1 + cap_ratio)",
        breakdown="1/2",
        cost="n^2 d",
        sums_only=True,
        source="Pillutla, Kakade, Harchaoui 2022 (arXiv:1912.13445), Algorithm 2",
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cap_ratio) and self.cap_ratio >= 1.0):
            raise ConfigError(
                f"{self.name}: cap_ratio = {self.cap_ratio}", "set cap_ratio to a finite number of at least 1"
            )
        for setting in ("nu", "tolerance"):
            if not 0.0 < getattr(self, setting) < 1.0:
                raise ConfigError(
                    f"{self.name}: {setting} = {getattr(self, setting)}", f"set {setting} to a number between 0 and 1"
                )
        if self.max_iterations < 1:
            raise ConfigError(f"{self.name}: max_iterations = {self.max_iterations}", "set max_iterations to 1 or more")

    def check(self, n: int) -> None:
        f = self.num_byzantine
        if self.weighted:
            least, because = math.floor(2 * f * (1 + self.cap_ratio)) + 1, "n > 2f (1 + cap_ratio)"
        else:
            least, because = 2 * f + 1, "n > 2f"
        require_devices(self, n, least=least, because=because)

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        shares = self._shares(k, batch)
        centre, inner_products = centred_gram(k, batch.updates)
        start = majority_shares(k, shares, square_distances(k, inner_products))
        weights, iterations, moved = self._weiszfeld(k, shares, inner_products, start)
        distances = distances_from_mean(k, inner_products, weights)
        scores = far_scores(k, distances, median_by(k, distances, shares))
        aggregate = k.combination(batch.updates, weights, centre)
        measured = {"iterations": k.single(iterations), "moved": k.single(moved)}
        return Judgement(aggregate, scores <= FAR, scores, measured)

    def _shares(self, k: Kernels, batch: Batch) -> Any:
        if self.weighted:
            return capped_shares(k, batch.num_examples, self.cap_ratio)
        n = k.count(batch.updates)
        return k.full((n,), 1.0) * k.divide(1.0, k.real(n))

    def _weiszfeld(self, k: Kernels, shares: Any, inner_products: Any, start: Any) -> tuple[Any, Any, Any]:
        """Weights (n,) of the median, iterations, and how far the last one moved it, as a share of s."""
        scale = median_by(k, distances_from_mean(k, inner_products, start), shares)

        def again(iterations: Any, weights: Any, moved: Any) -> Any:
            distances = distances_from_mean(k, inner_products, weights)
            pulls = k.divide(shares, k.maximum(distances, scale * self.nu))
            pulls = k.where(scale > 0.0, pulls, k.where(distances > 0.0, 0.0 * shares, shares))
            following = k.divide(pulls, k.sum_rows(pulls))
            step = length_of(k, inner_products, following - weights)
            return iterations + 1, following, k.divide(step, scale)

        def goes_on(iterations: Any, weights: Any, moved: Any) -> Any:
            return (iterations < self.max_iterations) & (moved > self.tolerance)

        iterations, weights, moved = k.while_loop(goes_on, again, (k.whole(0), start, k.full((), 1.0)))
        return weights, iterations, moved

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"its distance from the geometric median is {times_median(score, accepted_scores)}"


def majority_shares(k: Kernels, shares: Any, distances: Any) -> Any:
    """(n,) weights with sum 1: the shares of the n // 2 + 1 rows (with ties) nearest to the most central one."""
    to_pivot = k.take(distances, most_central(k, distances))
    kept = k.where(to_pivot <= k.sort(to_pivot)[k.length(shares) // 2], shares, 0.0 * shares)
    return k.divide(kept, k.sum_rows(kept))


def median_by(k: Kernels, values: Any, shares: Any) -> Any:
    """The least of (n,) values such that the rows up to it hold half of the shares."""
    up_to = k.sum_rows(k.where(values[:, None] <= values[None, :], shares[:, None], 0.0 * shares[:, None]))
    return k.smallest(k.where(up_to >= 0.5 * (1.0 - 2.0**-40), values, k.full((), float("inf"))))


def distances_from_mean(k: Kernels, inner_products: Any, weights: Any) -> Any:
    """(n,): |row i - sum of weights[j] * row j|, for rows with these inner products; weights with sum 1."""
    towards = k.sum_rows(inner_products * weights[:, None])
    squares = (k.diagonal(inner_products) - 2.0 * towards) + k.sum_rows(towards * weights)
    return k.sqrt(k.maximum(squares, 0.0))


def length_of(k: Kernels, inner_products: Any, weights: Any) -> Any:
    """|sum of weights[i] * row i|."""
    square = k.sum_rows(k.sum_rows(inner_products * weights[:, None]) * weights)
    return k.sqrt(k.maximum(square, 0.0))


def far_scores(k: Kernels, distances: Any, middle: Any) -> Any:
    """(n,) float32: distances over middle. If that is 0: 0 at distance 0, and the largest float32 elsewhere."""
    alone = k.where(distances > 0.0, k.full((), FLOAT32_MAX), 0.0 * distances)
    return as_scores(k, k.where(middle > 0.0, k.divide(distances, middle), alone))
