"""Krum and Multi-Krum: keep the updates that have the most company.

A rule that keeps a fixed number of updates always leaves some out, in honest rounds too; being left out is not proof
of malice, and the explanation says so by giving the score beside the median of the kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from covey_coordinator.aggregation import kernels
from covey_coordinator.aggregation.rules import Judgement, Rule, require_devices, times_median
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError, RuleError

MAX_PASSES = 3  # Gram matrices at most; a second is needed only under attack or at tiny spread
PRECISE_SHARE = 2.0**-7  # a squared distance above this share of the squared norms has 13 good bits or more


@dataclass(frozen=True)
class MultiKrum(Rule):
    """Plain mean of the num_selected updates with the least Krum scores; ties go to the smaller index.

    The score of an update is the sum of its squared distances to its n - f - 2 nearest others (libraries that sum
    n - f - 1 pick other updates in a quarter of random cases). num_examples is not used. Needs n > 2f + 2.
    num_selected: None means n - f, as in the paper's experiments; at most n - f.
    Source: Blanchard et al. 2017 (arXiv:1703.02757), section 4 (Krum) and section 6 (Multi-Krum). A missing update is
    left out here, where the paper reads it as zero.
    """

    num_byzantine: int = 0
    num_selected: int | None = None
    name = "multi-krum"

    def __post_init__(self) -> None:
        if self.num_selected is not None and self.num_selected < 1:
            raise ConfigError(f"multi-krum: num_selected = {self.num_selected}", "set num_selected to 1 or more")

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 3, because="n > 2f + 2")
        if self.num_selected is not None and self.num_selected > n - self.num_byzantine:
            raise RuleError(
                f"multi-krum: num_selected = {self.num_selected} of {n} updates with f = {self.num_byzantine}",
                "set num_selected to n - f or less",
            )

    def step(self, updates: Any, num_examples: Any) -> Judgement:
        n = tf.shape(updates)[0]
        selected = n - self.num_byzantine if self.num_selected is None else tf.constant(self.num_selected)
        scores = krum_scores(updates, self.num_byzantine)
        best = tf.sort(tf.argsort(scores, stable=True)[:selected])
        accepted = tf.scatter_nd(best[:, None], tf.ones_like(best), [n]) > 0
        return Judgement(kernels.column_mean(updates, best), accepted, scores)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        company = times_median(score, accepted_scores)
        return f"not among the {len(accepted_scores)} of {n} kept: Krum score {score:.1e} is {company}"


@dataclass(frozen=True)
class Krum(MultiKrum):
    """The single update with the least Krum score: Multi-Krum with one selected."""

    num_selected: int | None = 1
    name = "krum"


def krum_scores(updates: Any, num_byzantine: int) -> Any:
    """(n, d) float32 -> (n,) float32: sum of squared distances to the n - f - 2 nearest others.

    Distances come from a Gram matrix of *centred* rows; uncentred float32 ones are 74% wrong when updates differ by a
    thousandth of their size, and name the wrong devices. The mean is centre enough for honest rows, but one hostile
    row can carry it far away and so blur the distances between the others. Where the distances are small against the
    centred norms, they are computed again around the row with the least score, which no minority can place.
    """
    neighbours = tf.shape(updates)[0] - num_byzantine - 2

    def around(centre: Any) -> tuple[Any, Any]:
        inner_products = kernels.gram(updates, centre)
        distances = distances_to_others(inner_products)
        return nearest_sums(distances, neighbours), is_precise(inner_products, distances)

    def again(passes: Any, pivot: Any, scores: Any, precise: Any) -> tuple[Any, Any, Any, Any]:
        del precise
        best = tf.argmin(scores, output_type=tf.int32)
        new_scores, precise = around(updates[best])
        return passes + 1, best, new_scores, tf.logical_or(precise, tf.equal(best, pivot))

    def goes_on(passes: Any, pivot: Any, scores: Any, precise: Any) -> Any:
        return tf.logical_and(passes < MAX_PASSES, tf.logical_not(precise))

    scores, precise = around(kernels.column_mean(updates))
    _, _, scores, _ = tf.while_loop(goes_on, again, (1, -1, scores, precise))
    return kernels.as_scores(scores)


def distances_to_others(inner_products: Any) -> Any:
    """(n, n) Gram matrix -> (n, n) squared distances between rows, infinite from a row to itself."""
    distances = kernels.square_distances(inner_products)
    itself = tf.fill([tf.shape(distances)[0]], tf.constant(float("inf"), tf.float64))
    return tf.linalg.set_diag(distances, itself)


def nearest_sums(distances: Any, neighbours: Any) -> Any:
    """(n, n) squared distances to others -> (n,) sums of the smallest `neighbours` in each row."""
    nearest = tf.sort(distances, axis=1)[:, :neighbours]
    return kernels.sum_rows(tf.transpose(nearest))


def is_precise(inner_products: Any, distances: Any) -> Any:
    """Scalar bool: no squared distance between two rows drowns in the rounding of their squared norms."""
    squares = tf.linalg.diag_part(inner_products)
    return tf.reduce_all(distances >= PRECISE_SHARE * (squares[:, None] + squares[None, :]))
