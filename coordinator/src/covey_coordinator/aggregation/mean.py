"""The mean, weighted by capped numbers of examples. It resists no hostile device: one can move it anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from covey_coordinator.aggregation import kernels
from covey_coordinator.aggregation.rules import Judgement, Rule, require_devices, times_median
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

    def step(self, updates: Any, num_examples: Any) -> Judgement:
        examples = tf.cast(num_examples, tf.float64)
        weights = tf.minimum(examples, kernels.median_of(examples) * self.cap_ratio)
        share = (1.0 / kernels.sum_rows(weights[:, None]))[0]

        def mean_of(block: Any, carry: Any) -> tuple[Any, Any]:
            total = kernels.sum_rows(tf.cast(block, tf.float64) * weights[:, None])
            return tf.cast(total * share, tf.float32), carry

        aggregate, _ = kernels.over_columns(updates, kernels.block_columns(updates), mean_of, ())
        accepted = tf.ones_like(num_examples, tf.bool)
        return Judgement(aggregate, accepted, relative_distances(updates, aggregate))

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"distance from the mean is {times_median(score, accepted_scores)}"


def relative_distances(updates: Any, aggregate: Any) -> Any:
    """(n,) float32: distance of each row from the aggregate over the median of these distances; 0 if that is 0."""
    distances = tf.sqrt(kernels.square_norms(updates, aggregate))
    median = kernels.median_of(distances)
    return kernels.as_scores(tf.math.divide_no_nan(distances, median))
