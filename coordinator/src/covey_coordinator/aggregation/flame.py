"""FLAME: keep the majority that points one way, bound its sizes by the median, add noise.

The clustering is HDBSCAN's with min_cluster_size = n // 2 + 1 and min_samples = 1, which needs none of HDBSCAN's
machinery. Its mutual reachability distance is then the distance itself, since no point is nearer to another than to its
nearest. Two clusters of more than half the points cannot exist, so in the condensed tree every split only sheds points
from the one cluster, until a split leaves no side of the size; the points that have stayed until then are the cluster.
Read from below: it is the *first component of single linkage that reaches n // 2 + 1 points*, with all that join at the
same distance. The tests compare with scikit-learn's HDBSCAN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.kernels import Kernels
from covey_coordinator.aggregation.kernels.mathematics import as_scores, median_of
from covey_coordinator.aggregation.kernels.normal import normals
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices
from covey_coordinator.aggregation.similarity import cosine_distances
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError

MAX_SEED = 1 << 62  # an int64 with room for the round's number


@dataclass(frozen=True)
class Flame(Rule):
    """Plain mean of the largest cluster of directions, each update shortened to the median norm, plus noise.

    noise: lambda of the paper; the standard deviation of the Gaussian noise per coordinate is noise times the median
    norm. 0 is off; the paper's experiments take 0.001 for pictures. It blurs what is left of a backdoor and is drawn
    from `seed` and the round's number, which the coordinator knows: it gives no differential privacy to devices.
    score: the cosine distance at which the device joins the cluster by single linkage. num_examples are not used.
    Source: Nguyen et al. 2022 (arXiv:2101.02281), Algorithm 1. Deviation: directions are those of the updates, where
    the paper takes the devices' whole models, whose cosines are all near 1 late in training.
    """

    num_byzantine: int = 0
    noise: float = 0.0
    seed: int = 0
    name = "flame"
    facts = Facts(
        summary="mean of the majority that points one way, cut to the median norm, plus optional noise",
        needs="n > 2f",
        breakdown="1/2 is meant; none is proven",
        cost="n^2 d + n^3",
        sums_only=False,
        source="Nguyen et al. 2022 (arXiv:2101.02281), Algorithm 1",
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ConfigError(f"flame: noise = {self.noise}", "set noise to 0 or more")
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"flame: seed = {self.seed}", "set seed to 0 or more, below 2^62")

    def check(self, n: int) -> None:
        require_devices(self, n, least=max(2, 2 * self.num_byzantine + 1), because="n > 2f")

    def initial_state(self, d: int) -> Any:
        return np.int64(0)

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        return self.advance(k, k.whole(0), batch)[1]

    def advance(self, k: Kernels, state: Any, batch: Batch) -> tuple[Any, Judgement]:
        n = k.count(batch.updates)
        distances, norms = cosine_distances(k, batch.updates)
        members, joins = majority_cluster(k, distances, n // 2 + 1)
        median = median_of(k, norms)
        shortened = k.where(norms > median, k.divide(median, norms), k.full((), 1.0))
        shares = k.where(members, shortened * k.divide(1.0, k.real(k.number_true(members))), k.full((), 0.0))
        aggregate = k.combination(batch.updates, shares)
        if self.noise:
            drawn = normals(k, k.random_bits(self.seed, 1)[0] + state, k.dimension(batch.updates))
            aggregate = k.single(k.real(aggregate) + drawn * (median * self.noise))
        found = {"flame_median_norm": k.single(median), "flame_cluster": k.single(k.number_true(members))}
        return state + 1, Judgement(aggregate, members, as_scores(k, joins), found)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        last = float(np.max(accepted_scores))
        return (
            f"points another way than the majority: it joins the {len(accepted_scores)} of {n} only at cosine distance "
            f"{score:.2g}, they are together at {last:.2g}"
        )


def majority_cluster(k: Kernels, distances: Any, size: Any) -> tuple[Any, Any]:
    """(n, n) distances, size > n / 2 -> who is in the first component of single linkage that reaches the size.

    Returns (n,) bool and (n,) float64, the distance at which each joins that component: the smallest largest step of a
    path to its first member.
    """

    def through(index: Any, steps: Any) -> tuple[Any, Any]:
        row = k.take(steps, index)
        return index + 1, k.minimum(steps, k.maximum(row[:, None], row[None, :]))

    n = k.length(distances)
    _, steps = k.while_loop(lambda index, steps: index < n, through, (0, distances))
    reached = k.sort(steps)[:, size - 1]
    first = k.argmin(reached)
    joins = k.take(steps, first)
    return joins <= k.take(reached, first), joins
