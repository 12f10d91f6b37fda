"""Krum and Multi-Krum: keep the updates that have the most company.

A rule that keeps a fixed number of updates always leaves some out, in honest rounds too; being left out is not proof
of malice, and the explanation says so by giving the score beside the median of the kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.distances import (
    distances_between,
    first_look,
    nearest_sums,
    not_,
    once,
    rounded_distances,
    to_others,
)
from covey_coordinator.aggregation.kernels import Kernels
from covey_coordinator.aggregation.kernels.mathematics import as_scores, mean_of_members
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices, times_median
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError, RuleError

CLEAR_GAP = 0.02  # between the scores of kept and not kept, as a share: ten times what rounding usually blurs
NEIGHBOURS = {"n-f-2": 2, "n-f-1": 1}


@dataclass(frozen=True)
class MultiKrum(Rule):
    """Plain mean of the num_selected updates with the least Krum scores; ties go to the smaller index.

    The score of an update is the sum of its squared distances to its n - f - 2 nearest others. num_examples is
    not used. Needs n > 2f + 2. num_selected: None means n - f, as in the paper's experiments; at most n - f.
    neighbours: "n-f-2" as in the paper, or "n-f-1" as some libraries do, which picks other updates in a quarter of
    random cases.
    Source: Blanchard et al. 2017 (arXiv:1703.02757), section 4 (Krum) and section 6 (Multi-Krum). A missing update is
    left out here, where the paper reads it as zero.
    """

    num_byzantine: int = 0
    num_selected: int | None = None
    neighbours: str = "n-f-2"
    name = "multi-krum"
    facts = Facts(
        summary="mean of the updates with the most company",
        needs="n > 2f + 2",
        breakdown="1/2",
        cost="n^2 d",
        sums_only=False,
        source="Blanchard et al. 2017 (arXiv:1703.02757), section 6",
    )

    def __post_init__(self) -> None:
        if self.num_selected is not None and self.num_selected < 1:
            raise ConfigError(f"{self.name}: num_selected = {self.num_selected}", "set num_selected to 1 or more")
        if self.neighbours not in NEIGHBOURS:
            raise ConfigError(
                f"{self.name}: neighbours = {self.neighbours!r}", f"set it to one of {', '.join(NEIGHBOURS)}"
            )

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 3, because="n > 2f + 2")
        if self.num_selected is not None and self.num_selected > n - self.num_byzantine:
            raise RuleError(
                f"multi-krum: num_selected = {self.num_selected} of {n} updates with f = {self.num_byzantine}",
                "set num_selected to n - f or less",
            )

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        """Rounded distances first, where a look at some columns finds that they may do; in full where they do not."""
        updates, n = batch.updates, k.count(batch.updates)
        selected = n - self.num_byzantine if self.num_selected is None else self.num_selected

        def least_of(scores: Any) -> Any:
            return k.members(k.argsort(scores)[:selected], n)

        def apart(scores: Any, least: Any, most: Any) -> Any:
            """Whether those with the least scores are so whatever the scores are between least and most."""
            chosen = least_of(scores)
            return k.largest(k.where(chosen, most, -1.0)) < k.smallest(k.where(chosen, float("inf"), least))

        def rounded(decided: Any, scores: Any) -> tuple[Any, Any]:
            least, most = (self.sums(k, distances) for distances in rounded_distances(k, updates, pivot))
            middle = 0.5 * (least + most)
            return apart(middle, least, most), middle

        def in_full(decided: Any, scores: Any) -> tuple[Any, Any]:
            return decided, self.sums(k, distances_between(k, updates, pivot))

        distances, pivot = first_look(k, updates)
        guess = self.sums(k, distances)
        promising = apart(guess, guess, guess * (1.0 + CLEAR_GAP))
        decided, scores = once(k, promising, rounded, (k.full((), False), guess))
        decided, scores = once(k, not_(k, decided), in_full, (decided, scores))
        accepted = least_of(scores)
        measured = {"rounded_distances": k.single(decided)}
        return Judgement(mean_of_members(k, updates, accepted), accepted, as_scores(k, scores), measured)

    def sums(self, k: Kernels, distances: Any) -> Any:
        """(n, n) squared distances -> (n,) float64: the sums of those to the nearest others."""
        neighbours = k.length(distances) - self.num_byzantine - NEIGHBOURS[self.neighbours]
        return nearest_sums(k, to_others(k, distances), neighbours)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        company = times_median(score, accepted_scores)
        return f"not among the {len(accepted_scores)} of {n} kept: Krum score {score:.1e} is {company}"


@dataclass(frozen=True)
class Krum(MultiKrum):
    """The single update with the least Krum score: Multi-Krum with one selected."""

    num_selected: int | None = 1
    name = "krum"
    facts = Facts(
        summary="the one update with the most company",
        needs="n > 2f + 2",
        breakdown="1/2",
        cost="n^2 d",
        sums_only=False,
        source="Blanchard et al. 2017 (arXiv:1703.02757), section 4",
    )
