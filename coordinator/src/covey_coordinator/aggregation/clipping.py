"""Pre-steps that bound what one update can weigh: they look at norms only and multiply rows.

Norms are Euclidean, over all numbers of an update, from `Kernels.square_norms`: right to about 2^-23. TFF's own
`clipping_factory` and `zeroing_factory` do the same on each client; the steps here run in both doors and name devices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Kernels
from covey_coordinator.aggregation.kernels.mathematics import exp
from covey_coordinator.aggregation.presteps import (
    Prepared,
    PreStep,
    one_to_one,
    require_honest_majority,
    weighed_rows,
)
from covey_coordinator.aggregation.rules import Batch, Facts, Rule
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError


def norms_of(k: Kernels, batch: Batch) -> Any:
    """(n,) float64: Euclidean norms of the rows."""
    return k.sqrt(k.square_norms(batch.updates))


def clipped(k: Kernels, batch: Batch, norms: Any, clip_norm: Any, prefix: str) -> Prepared:
    """Rows with a norm above clip_norm, float64 scalar, shortened to it."""
    above = norms > clip_norm
    prepared = one_to_one(k, weighed_rows(k, batch, k.where(above, k.divide(clip_norm, norms), k.full((), 1.0))))
    found = {
        f"{prefix}_clipped": k.single(k.number_true(above)),
        f"{prefix}_norm": k.single(k.minimum(clip_norm, FLOAT32_MAX)),
    }
    return prepared._replace(measurements=found)


def require_positive(step: PreStep, **values: float) -> None:
    """ConfigError for a setting that is not a positive finite number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{step.name}: {name} = {value}", f"set {name} to a positive number")


@dataclass(frozen=True)
class Clipping(PreStep):
    """Rows longer than clip_norm are shortened to it. All devices are kept; num_examples stay.

    Source: Sun et al. 2019 (arXiv:1911.07963), norm thresholding.
    """

    clip_norm: float = 1.0
    name = "clipping"
    facts = Facts(
        summary="rows longer than clip_norm are shortened to it",
        needs="clip_norm > 0",
        breakdown="that of the rule; a hostile row moves a plain mean by at most 2 clip_norm / n",
        cost="n d",
        sums_only=True,
        source="Sun et al. 2019 (arXiv:1911.07963), norm thresholding",
    )

    def __post_init__(self) -> None:
        require_positive(self, clip_norm=self.clip_norm)

    def prepare(self, k: Kernels, state: Any, batch: Batch, num_byzantine: int) -> tuple[Any, Prepared]:
        return state, clipped(k, batch, norms_of(k, batch), k.full((), self.clip_norm), "clipping")


@dataclass(frozen=True)
class AdaptiveRobustClipping(PreStep):
    """The floor(2 (f / n) (n - f)) longest rows are shortened to the longest of the others. num_examples stay.

    Unlike a fixed clip_norm it keeps the guarantee of the rule behind it. With f = 0 it does nothing.
    Source: Allouah et al. 2025 (arXiv:2405.14432).
    """

    name = "arc"
    facts = Facts(
        summary="adaptive robust clipping: the floor(2 (f/n) (n - f)) longest rows are shortened to the next",
        needs="n > 2f",
        breakdown="that of the rule",
        cost="n d",
        sums_only=False,
        source="Allouah et al. 2025 (arXiv:2405.14432)",
    )

    def check(self, n: int, num_byzantine: int) -> None:
        require_honest_majority(self, n, num_byzantine)

    def prepare(self, k: Kernels, state: Any, batch: Batch, num_byzantine: int) -> tuple[Any, Prepared]:
        n, norms = k.count(batch.updates), norms_of(k, batch)
        longest = (2 * num_byzantine * (n - num_byzantine)) // n  # whole numbers: the floor is exact
        return state, clipped(k, batch, norms, k.sort(norms)[n - 1 - longest], "arc")


@dataclass(frozen=True)
class _Quantile(PreStep):
    """A step with a threshold from a running estimate of a quantile of the norms.

    A round uses the estimate that earlier rounds left, then multiplies it by exp(-learning_rate * (share of norms not
    above it - target_quantile)). State: the estimate, float64.
    Source of the estimate: Andrew et al. 2021 (arXiv:1905.03871), the geometric update, without noise, hence without
    a promise of privacy. TFF computes it in float32. A hostile share above 1 - target_quantile can drive it up.
    """

    initial_estimate: float = 1.0
    target_quantile: float = 0.8
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        require_positive(self, initial_estimate=self.initial_estimate, learning_rate=self.learning_rate)
        if not 0 <= self.target_quantile <= 1:
            raise ConfigError(f"{self.name}: target_quantile = {self.target_quantile}", "set it to 0 to 1")
        if self.learning_rate > MAX_LEARNING_RATE:
            raise ConfigError(
                f"{self.name}: learning_rate = {self.learning_rate}", f"set it to {MAX_LEARNING_RATE:g} at most"
            )

    def initial_state(self, d: int) -> Any:
        return np.float64(self.initial_estimate)

    def prepare(self, k: Kernels, state: Any, batch: Batch, num_byzantine: int) -> tuple[Any, Prepared]:
        norms = norms_of(k, batch)
        below = k.divide(k.real(k.number_true(norms <= state)), k.real(k.count(batch.updates)))
        estimate = state * exp(k, (self.target_quantile - below) * self.learning_rate)
        estimate = k.minimum(k.maximum(estimate, LEAST_ESTIMATE), LARGEST_ESTIMATE)
        return estimate, self.bounded(k, batch, norms, state)

    @abstractmethod
    def bounded(self, k: Kernels, batch: Batch, norms: Any, estimate: Any) -> Prepared:
        """What this round's estimate, float64 scalar, does to the rows."""


MAX_LEARNING_RATE = 100.0  # a factor of e^100 in one round is already nonsense; keeps exp within its range
LEAST_ESTIMATE = 1e-150  # an estimate at 0 could never grow again
LARGEST_ESTIMATE = 1e150


@dataclass(frozen=True)
class NormClipping(_Quantile):
    """Rows longer than a running estimate of the target_quantile of norms are shortened to it. num_examples stay.

    Source: Andrew et al. 2021 (arXiv:1905.03871), without noise. The defaults are those of TFF's robust_aggregator.
    """

    name = "norm-clipping"
    facts = Facts(
        summary="rows are shortened to a running quantile of the norms",
        needs="f / n < 1 - target_quantile, else hostile devices choose the norm",
        breakdown="that of the rule",
        cost="n d",
        sums_only=True,
        source="Andrew et al. 2021 (arXiv:1905.03871)",
    )

    def bounded(self, k: Kernels, batch: Batch, norms: Any, estimate: Any) -> Prepared:
        return clipped(k, batch, norms, estimate, "norm_clipping")


@dataclass(frozen=True)
class Zeroing(_Quantile):
    """Rows longer than a threshold become zero, and their devices are not accepted. num_examples stay.

    threshold: fixed, or None for multiplier * estimate + increment, with the estimate of the target_quantile of norms.
    A zero row still counts in the rule behind it, with its num_examples, and pulls a mean to zero, as in TFF.
    Source: TFF's zeroing_factory and the defaults of its robust_aggregator, which reads the largest coordinate where
    this reads the Euclidean norm.
    """

    threshold: float | None = None
    initial_estimate: float = 10.0
    target_quantile: float = 0.98
    learning_rate: float = math.log(10.0)
    multiplier: float = 2.0
    increment: float = 1.0
    name = "zeroing"
    facts = Facts(
        summary="rows longer than a threshold (fixed, or from a running quantile of the norms) become zero",
        needs="f / n < 1 - target_quantile, else hostile devices choose the threshold; nothing if it is fixed",
        breakdown="that of the rule",
        cost="n d",
        sums_only=True,
        source="TFF's zeroing_factory; Andrew et al. 2021 (arXiv:1905.03871)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, multiplier=self.multiplier)
        if self.threshold is not None:
            require_positive(self, threshold=self.threshold)
        if not (math.isfinite(self.increment) and self.increment >= 0):
            raise ConfigError(f"zeroing: increment = {self.increment}", "set increment to 0 or more")

    def bounded(self, k: Kernels, batch: Batch, norms: Any, estimate: Any) -> Prepared:
        threshold = estimate * self.multiplier + self.increment
        if self.threshold is not None:
            threshold = k.full((), self.threshold)
        kept = norms <= threshold
        prepared = one_to_one(k, weighed_rows(k, batch, k.where(kept, k.full((), 1.0), k.full((), 0.0))))
        zeroed = k.number_true(norms > threshold)
        found = {"zeroing_zeroed": k.single(zeroed), "zeroing_norm": k.single(k.minimum(threshold, FLOAT32_MAX))}
        return prepared._replace(kept=kept, measurements=found)

    def explain(self, inner: Rule, score: float, accepted_scores: Array, n: int) -> str:
        if score >= FLOAT32_MAX:
            return "zeroed: its norm is above the threshold of the step zeroing"
        return super().explain(inner, score, accepted_scores, n)
