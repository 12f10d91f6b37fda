"""Rules that look along the direction in which updates differ most: DnC and CAF.

The direction is the top eigenvector of an (n, n) matrix of inner products, found by power iteration: the d numbers of
the updates are read once per matrix, and libraries' eigenvalue routines differ in their last bits. Where the two
largest eigenvalues are nearly equal, the iteration ends at a vector of nearly the largest spread, not at a certain one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.distances import distances_between
from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import as_scores, column_mean, mean_of_members, uniforms
from covey_coordinator.aggregation.presteps import MAX_SEED
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices, times_median
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError, RuleError

POWER_STEPS = 300  # at most; a ratio of 0.9 between the two largest eigenvalues needs about 260
POWER_MOVE = 1e-12  # largest change of a component at which the vector counts as found
HARDLY = 0.25  # a weight below this share of a full one counts as not accepted


@dataclass(frozen=True)
class DivideAndConquer(Rule):
    """DnC: without the filter_ratio * f updates that stick out most along the direction of greatest spread.

    `repeats` times: take `num_columns` coordinates at random, subtract their mean over the devices, project on the top
    right singular vector v, and leave out the floor(filter_ratio * f) devices with the largest squared projections;
    ties stay with the smaller index. The aggregate is the plain mean of those never left out. num_examples is not
    used. score: largest squared projection over the repeats. The coordinates are drawn anew each round from `seed` and
    the round's number; whoever knows the seed can hide in the others.
    Source: Shejwalkar and Houmansadr 2021 (NDSS), Algorithm 2. There the coordinates are any subset; here one is drawn
    from each of num_columns equal stretches. The singular vector comes from the Gram matrix of the devices.
    Needs n > 2f, and more devices than all repeats can leave out.
    """

    num_byzantine: int = 0
    num_columns: int = 10_000
    repeats: int = 1
    filter_ratio: float = 1.0
    seed: int = 0
    name = "dnc"
    facts = Facts(
        summary="mean without those that stick out most along the direction of greatest spread",
        needs="n > 2f and n > repeats * filter_ratio * f",
        breakdown="1/2",
        cost="n^2 num_columns + n d",
        sums_only=False,
        source="Shejwalkar and Houmansadr 2021 (NDSS), Algorithm 2",
    )

    def __post_init__(self) -> None:
        for setting in ("num_columns", "repeats"):
            if getattr(self, setting) < 1:
                raise ConfigError(f"dnc: {setting} = {getattr(self, setting)}", f"set {setting} to 1 or more")
        if not (math.isfinite(self.filter_ratio) and self.filter_ratio > 0):
            raise ConfigError(f"dnc: filter_ratio = {self.filter_ratio}", "set filter_ratio to a positive number")
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"dnc: seed = {self.seed}", "set seed to 0 or more, below 2^62")

    @property
    def removed(self) -> int:
        """How many each repeat leaves out."""
        return math.floor(self.filter_ratio * self.num_byzantine)

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")
        if n <= self.repeats * self.removed:
            raise RuleError(
                f"dnc: {self.repeats} repeats may leave out {self.repeats * self.removed} of {n} updates",
                "lower repeats or filter_ratio, or wait for more updates",
            )

    def initial_state(self, d: int) -> Any:
        return np.int64(0)

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        return self.advance(k, k.whole(0), batch)[1]

    def advance(self, k: Kernels, state: Any, batch: Batch) -> tuple[Any, Judgement]:
        n = k.count(batch.updates)
        accepted, scores, spread = k.full((n,), True), k.full((n,), 0.0), k.full((), 0.0)
        for repeat in range(self.repeats):
            seed = k.random_bits(self.seed, 1)[0] + state * self.repeats + repeat
            squares, eigenvalue = self._squared_projections(k, batch.updates, seed)
            accepted = accepted & k.members(k.argsort(squares)[: n - self.removed], n)
            scores, spread = k.maximum(scores, squares), k.maximum(spread, eigenvalue)
        judgement = Judgement(
            mean_of_members(k, batch.updates, accepted), accepted, as_scores(k, scores), {"spread": k.single(spread)}
        )
        return state + 1, judgement

    def _squared_projections(self, k: Kernels, updates: Updates, seed: Any) -> tuple[Any, Any]:
        """(n,) float64 and the largest eigenvalue: squares of the centred rows' projections, on drawn columns."""
        chosen = Updates(k.columns(updates, stratified_columns(k, seed, k.dimension(updates), self.num_columns)))
        gram = k.gram(chosen, column_mean(k, chosen))
        vector, eigenvalue = top_eigenvector(k, gram)
        projections = times(k, gram, vector)
        return k.divide(projections * projections, eigenvalue), eigenvalue

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        company = times_median(score, accepted_scores)
        return f"not among the {len(accepted_scores)} of {n} kept: it sticks out by {score:.1e}, {company}"


@dataclass(frozen=True)
class CovarianceFilter(Rule):
    """CAF: lower the weights of what sticks out until 2f of n weights are gone; the mean where the spread was least.

    Weights c_i = 1. While their sum is above n - 2f: weighted mean mu and covariance, its top eigenvector v and
    eigenvalue; remember mu if the eigenvalue is the least so far; t_i = <v, u_i - mu>^2, c_i *= 1 - t_i / max t. The
    aggregate is the remembered mu. It needs no bound on the honest updates' covariance. With f = 0, and for identical
    updates, the mean. num_examples is not used. A weight below a quarter counts as not accepted.
    score: 1 - c_i at the remembered mean.
    Source: Allouah et al. 2025 (arXiv:2505.01874), covariance-bound agnostic filter. Means and covariances are taken
    in the space of n weights, from the distances between the updates. Needs n > 2f.
    """

    num_byzantine: int = 0
    name = "caf"
    facts = Facts(
        summary="mean of the weights under which the updates spread least",
        needs="n > 2f",
        breakdown="1/2",
        cost="n^2 d + n^3",
        sums_only=False,
        source="Allouah et al. 2025 (arXiv:2505.01874)",
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        n = k.count(batch.updates)
        distances = distances_between(k, batch.updates)
        enough = k.real(n - 2 * self.num_byzantine)

        def goes_on(weights: Any, best: Any, least: Any, steps: Any, spread: Any) -> Any:
            return (k.sum_rows(weights) > enough) & (steps < k.whole(n)) & spread

        def lower(weights: Any, best: Any, least: Any, steps: Any, spread: Any) -> Any:
            squares, eigenvalue = weighted_projections(k, distances, weights)
            squares = k.where(weights > 0.0, squares, 0.0)  # or one that is gone already would shield the others
            better = eigenvalue < least
            best, least = k.where(better, weights, best), k.minimum(eigenvalue, least)
            largest = k.largest(squares)
            lowered = weights * (1.0 - k.divide(squares, largest))
            return lowered, best, least, steps + 1, largest > 0.0

        ones, infinity = k.full((n,), 1.0), k.full((), float("inf"))
        start = (ones, ones, infinity, k.whole(0), k.full((), True))
        _, best, least, steps, _ = k.while_loop(goes_on, lower, start)
        aggregate = k.combination(batch.updates, k.divide(best, k.sum_rows(best)))
        measured = {"spread": k.single(k.where(least < infinity, least, 0.0)), "steps": k.single(steps)}
        return Judgement(aggregate, best >= HARDLY, as_scores(k, 1.0 - best), measured)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"its weight was lowered to {1.0 - score:.0%}: it sticks out along the direction of greatest spread"


def weighted_projections(k: Kernels, distances: Any, weights: Any) -> tuple[Any, Any]:
    """t_i and the eigenvalue of CAF, from (n, n) squared distances and (n,) weights.

    With p = c / sum c, H_ij = <u_i - mu, u_j - mu> = ((D p)_i + (D p)_j - D_ij - p' D p) / 2, and w the top eigenvector
    of P^1/2 H P^1/2 with eigenvalue l, the direction is v = sum p_i^1/2 w_i (u_i - mu) / l^1/2.
    """
    shares = k.divide(weights, k.sum_rows(weights))
    means = times(k, distances, shares)
    products = (means[:, None] + means[None, :] - distances - k.sum_rows(means * shares)) * 0.5
    roots = k.sqrt(shares)
    vector, eigenvalue = top_eigenvector(k, products * roots[:, None] * roots[None, :])
    projections = times(k, products, roots * vector)
    return k.divide(projections * projections, eigenvalue), eigenvalue


def stratified_columns(k: Kernels, seed: Any, d: Any, most: int) -> Any:
    """min(d, most) int64 column indices: one drawn from each of as many equal stretches; all if d <= most."""
    size = k.minimum(k.whole(d), most)
    width = k.divide(d, size)
    drawn = k.whole(k.floor((k.real(k.arange(size)) + uniforms(k, seed, size)) * width))
    return k.minimum(drawn, k.whole(d) - 1)


def times(k: Kernels, symmetric: Any, vector: Any) -> Any:
    """(n, n) symmetric, (n,) -> (n,): their product, summed by halving."""
    return k.sum_rows(symmetric * vector[:, None])


def top_eigenvector(k: Kernels, symmetric: Any) -> tuple[Any, Any]:
    """(n, n) symmetric, no negative eigenvalues -> (n,) of length 1 and its eigenvalue, by power iteration.

    The start is drawn, always alike. A matrix of zeros gives zeros.
    """
    n = k.length(symmetric)

    def stepped(steps: Any, vector: Any, eigenvalue: Any, moved: Any) -> Any:
        image = times(k, symmetric, vector)
        length = k.sqrt(k.sum_rows(image * image))
        following = k.divide(image, length)
        change = k.largest(k.maximum(following - vector, vector - following))
        return steps + 1, following, length, change

    def goes_on(steps: Any, vector: Any, eigenvalue: Any, moved: Any) -> Any:
        return (steps < POWER_STEPS) & (moved > POWER_MOVE)

    drawn = uniforms(k, 0, n) - 0.5
    start = k.divide(drawn, k.sqrt(k.sum_rows(drawn * drawn)))
    _, vector, eigenvalue, _ = k.while_loop(goes_on, stepped, (k.whole(0), start, k.full((), 0.0), k.full((), 1.0)))
    return vector, eigenvalue
