"""Centred clipping: the mean of what each update adds to the last aggregate, cut to a length. It remembers that one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.geometric_median import FAR, far_scores
from covey_coordinator.aggregation.kernels import Kernels
from covey_coordinator.aggregation.kernels.mathematics import median_of
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices, times_median
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError


@dataclass(frozen=True)
class CentredClipping(Rule):
    """v <- v + mean of (u_i - v) min(1, clip_radius / |u_i - v|), `iterations` times, from the last round's aggregate.

    f hostile devices move v by at most f/n * clip_radius per iteration, whatever they send. clip_radius is a length in
    the units of the updates, and there is no good one for all models: `clipped_share` says how many are cut.
    The first v is zero: no change of the model, a point that no device can choose, and as in the paper's own runs. The
    rule then needs about |mean| / (clip_radius * iterations) rounds to arrive if honest updates are longer than
    clip_radius; a robust start would be quicker by these rounds and no better after. So a shift of all updates does
    not shift the first aggregates by as much.
    score: |u_i - v| over the median of these, v before the last iteration. Not accepted: cut, and a score above 10, so
    that it entered with less than a tenth of the factor of a cut device at the median distance. num_examples is not
    used. Needs n > 2f; the paper's theorem holds for about f/n < 1/10 and assumes that devices send momenta.
    Source: Karimireddy, He, Jaggi 2021 (arXiv:2012.10333), Algorithm 2 and equation 8.
    """

    num_byzantine: int = 0
    clip_radius: float = 10.0
    iterations: int = 1
    name = "centred-clipping"
    facts = Facts(
        summary="the last aggregate, moved by the mean of clipped differences from it",
        needs="n > 2f",
        breakdown="1/2 for a bounded error; 1/10 in the theorem",
        cost="iterations * n d",
        sums_only=True,
        source="Karimireddy, He, Jaggi 2021 (arXiv:2012.10333), Algorithm 2",
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip_radius) and self.clip_radius > 0.0):
            raise ConfigError(f"{self.name}: clip_radius = {self.clip_radius}", "set clip_radius to a positive number")
        if self.iterations < 1:
            raise ConfigError(f"{self.name}: iterations = {self.iterations}", "set iterations to 1 or more")

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")

    def initial_state(self, d: int) -> Any:
        return np.zeros(d, np.float32)

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        """One round from the initial state."""
        return self.advance(k, k.single(k.full((k.dimension(batch.updates),), 0.0)), batch)[1]

    def advance(self, k: Kernels, state: Any, batch: Batch) -> tuple[Any, Judgement]:
        n = k.count(batch.updates)
        radius = k.full((), self.clip_radius)

        def again(iteration: Any, centre: Any, distances: Any) -> Any:
            distances = k.sqrt(k.square_norms(batch.updates, centre))
            factors = k.where(distances > radius, k.divide(radius, distances), k.full((), 1.0))
            moved = k.combination(batch.updates, k.divide(factors, k.real(n)), centre)
            return iteration + 1, moved, distances

        start = (k.whole(0), state, k.full((n,), 0.0))
        _, centre, distances = k.while_loop(lambda iteration, *_: iteration < self.iterations, again, start)
        scores = far_scores(k, distances, median_of(k, distances))
        cut = distances > radius
        measured = {"clipped_share": k.single(k.divide(k.number_true(cut), n))}
        uncut = k.where(cut, k.full((), False), k.full((), True))
        return centre, Judgement(centre, uncut | (scores <= FAR), scores, measured)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"clipped: its distance from the last aggregate is {times_median(score, accepted_scores)}"
