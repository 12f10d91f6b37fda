"""Minimum diameter averaging: the mean of the n - f updates that lie closest together.

Which subset has the least diameter is decided exactly: a subset has a diameter of at most t if leaving out f updates
resolves all *conflicts*, pairs farther apart than t. The least t is found by bisection over the distances, and each
question, a vertex cover of at most f, by branching: of the update with the most conflicts, either it goes, or all it is
in conflict with go. That is exponential in f alone, not in n, and fast where hostile updates are far away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.distances import distances_between, not_
from covey_coordinator.aggregation.kernels import Kernels
from covey_coordinator.aggregation.kernels.mathematics import as_scores, mean_of_members
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices
from covey_coordinator.records import Array
from covey_protocol.errors import RuleError

MOST_BYZANTINE = 12  # the branching looks at up to 2^f cases per question; at 12 that is seconds inside TFF


@dataclass(frozen=True)
class MinimumDiameter(Rule):
    """MDA: plain mean of the n - f updates with the least greatest distance between two of them.

    Where several subsets have the least diameter, the branching decides among them, and of more than n - f updates that
    fit, those with the least sums of squared distances stay, ties to the smaller index. num_examples is not used.
    score: greatest distance to one of the kept, over their diameter; 0 if that is 0. Needs n > 2f and f <= 12.
    Source: Rousseeuw 1985 (minimum volume estimators); El Mhamdi et al. 2018 (arXiv:1802.07927), there "Brute".
    """

    num_byzantine: int = 0
    name = "mda"
    facts = Facts(
        summary="mean of the n - f updates that lie closest together",
        needs="n > 2f, f <= 12",
        breakdown="1/2",
        cost="n^2 d + 2^f n^2 log n",
        sums_only=False,
        source="El Mhamdi et al. 2018 (arXiv:1802.07927)",
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=2 * self.num_byzantine + 1, because="n > 2f")
        if self.num_byzantine > MOST_BYZANTINE:
            raise RuleError(
                f"mda with num_byzantine = {self.num_byzantine}: its cost doubles with each",
                f"set num_byzantine to {MOST_BYZANTINE} or less, or choose multi-krum or bulyan",
            )

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        n = k.count(batch.updates)
        distances = distances_between(k, batch.updates)
        left_out = self._least(k, distances)
        fits = k.where(left_out, k.full((), 0.0), 1.0)
        sums = k.sum_rows(distances * fits[:, None])
        order = k.argsort(k.where(left_out, float("inf"), sums))
        accepted = k.members(order[: n - self.num_byzantine], n)
        greatest = k.largest(k.where(accepted[None, :], distances, 0.0))
        diameter = k.largest(k.where(accepted, greatest, 0.0))
        scores = as_scores(k, k.sqrt(k.divide(greatest, diameter)))
        measured = {"diameter": k.single(k.sqrt(diameter))}
        return Judgement(mean_of_members(k, batch.updates, accepted), accepted, scores, measured)

    def _least(self, k: Kernels, distances: Any) -> Any:
        """(n,) bool: at most f updates without which the diameter is least."""
        n = k.length(distances)
        candidates = k.sort(k.reshape(distances, (n * n,)))

        def question(place: Any) -> tuple[Any, Any]:
            return covered(k, distances > k.take(candidates, place), self.num_byzantine)

        def halve(low: Any, high: Any, left_out: Any) -> Any:
            middle = (low + high) // 2
            possible, found = question(middle)
            low, high = k.where(possible, low, middle), k.where(possible, middle, high)
            return low, high, k.where(possible, found, left_out)

        start = k.whole(-1), k.whole(n) * k.whole(n) - 1, k.full((n,), False)
        return k.while_loop(lambda low, high, left_out: high - low > 1, halve, start)[2]

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"not among the {len(accepted_scores)} of {n} closest together: {score:.3g} diameters from one of them"


def covered(k: Kernels, conflicts: Any, most: int) -> tuple[Any, Any]:
    """Whether at most `most` vertices touch all edges, and such vertices: a scalar bool, (n,) bool.

    conflicts: (n, n) bool, symmetric, the graph's edges. Depth first, with the sets still to look at on a stack.
    """
    n = k.length(conflicts)
    edges = k.where(conflicts, k.full((), 1.0), 0.0)
    height = most + 2  # each level leaves one set behind

    def look(stack: Any, size: Any, found: Any, cover: Any) -> Any:
        gone = k.take(stack, size - 1)
        remaining = edges * (1.0 - gone)[:, None] * (1.0 - gone)[None, :]
        degrees = k.sum_rows(remaining)
        worst = k.argmin(0.0 - degrees)
        greatest = k.largest(degrees)
        budget = most - k.sum_rows(gone)
        hopeless = k.sum_rows(degrees) > 2.0 * budget * greatest
        solved = (budget >= 0.0) & (greatest <= 0.0)
        goes_on = (budget > 0.0) & not_(k, hopeless) & (greatest > 0.0)
        without_it = k.maximum(gone, k.where(k.equal(k.arange(n), worst), k.full((), 1.0), 0.0))
        without_others = k.maximum(gone, k.take(remaining, worst))
        places = k.concat([k.reshape(size - 1, (1,)), k.reshape(k.minimum(size, height - 1), (1,))])
        rows = k.reshape(k.concat([without_others, without_it]), (2, n))
        pushed = k.where(goes_on, k.replaced(stack, places, rows), stack)
        size = k.where(goes_on, size + 1, size - 1)
        return pushed, size, found | solved, k.where(solved, gone > 0.0, cover)

    def goes_on(stack: Any, size: Any, found: Any, cover: Any) -> Any:
        return (size > 0) & not_(k, found)

    start = k.full((height, n), 0.0), k.whole(1), k.full((), False), k.full((n,), False)
    _, _, found, cover = k.while_loop(goes_on, look, start)
    return found, cover
