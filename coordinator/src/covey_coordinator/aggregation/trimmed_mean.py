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

import tensorflow as tf

from covey_coordinator.aggregation import kernels
from covey_coordinator.aggregation.rules import Judgement, Rule, require_devices
from covey_coordinator.records import Array


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Coordinate-wise mean without the num_byzantine largest and smallest values. num_examples is not used.

    score: share of the device's coordinates that were trimmed (see the module). Needs n > 2f.
    Source: Yin et al. 2018 (arXiv:1803.01498), Definition 2, there with a fraction beta = f / n; we take the count.
    """

    num_byzantine: int = 0
    name = "trimmed-mean"

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")

    def step(self, updates: Any, num_examples: Any) -> Judgement:
        f = tf.constant(self.num_byzantine)

        def mean_of_kept(ordered: Any) -> Any:
            return kernels.mean_rows(ordered[f : tf.shape(ordered)[0] - f])

        aggregate, outside = column_by_column(updates, mean_of_kept, cut=f)
        return Judgement(aggregate, *outvoted(updates, outside, cut=f))

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

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")

    def step(self, updates: Any, num_examples: Any) -> Judgement:
        n = tf.shape(updates)[0]
        cut = tf.constant(self.num_byzantine) if self.num_byzantine else n // 4

        def middle(ordered: Any) -> Any:
            return kernels.mean_rows(ordered[(n - 1) // 2 : n // 2 + 1])

        aggregate, outside = column_by_column(updates, middle, cut)
        accepted, scores = outvoted(updates, outside, cut)
        return Judgement(aggregate, accepted if self.num_byzantine else tf.ones_like(accepted), scores)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return explain_outvoted(score, self.num_byzantine, n)


def column_by_column(updates: Any, combine: Any, cut: Any) -> tuple[Any, Any]:
    """Sort each column, give the ordered block (n, b) to combine, and count what lies outside.

    Returns combine's values (d,) and for each row how many of its coordinates lie strictly outside the values of rank
    cut to n - 1 - cut in their columns, (n,) int64.
    """
    n = tf.shape(updates)[0]

    def per_block(block: Any, outside: Any) -> tuple[Any, Any]:
        ordered = tf.sort(block, axis=0)
        beyond = tf.logical_or(block < ordered[cut], block > ordered[n - 1 - cut])
        value = kernels.without_negative_zero(combine(ordered))
        return value, outside + tf.math.count_nonzero(beyond, axis=1, dtype=tf.int64)

    return kernels.over_columns(updates, kernels.block_columns(updates), per_block, tf.zeros([n], tf.int64))


def outvoted(updates: Any, outside: Any, cut: Any) -> tuple[Any, Any]:
    """Counts of outside coordinates -> accepted (n,) bool and scores (n,) float32, the shares.

    The bar share <= chance + 3/4 (1 - chance) with chance = 2 cut / n, in whole numbers.
    """
    n, d = tf.cast(tf.shape(updates)[0], tf.int64), tf.cast(tf.shape(updates)[1], tf.int64)
    accepted = 4 * n * outside <= d * (3 * n + 2 * tf.cast(cut, tf.int64))
    return accepted, tf.cast(tf.cast(outside, tf.float64) * (1.0 / tf.cast(d, tf.float64)), tf.float32)


def explain_outvoted(score: float, cut: int, n: int) -> str:
    """The reason of an outvoted device."""
    return (
        f"outvoted: {score:.0%} of its coordinates lie among the {cut} largest or smallest of {n} devices "
        f"({2 * cut / n:.0%} would be chance)"
    )
