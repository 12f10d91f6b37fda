"""FoolsGold: devices that push the same way again and again share one vote.

It needs no bound on the number of hostile devices, as long as they act alike (sybils of one attacker) and honest ones
do not. It is no defence against one hostile device, or against ones that coordinate to differ, and it takes votes from
honest devices whose data are alike. Put a rule for those beside it, for example `before = ["norm-clipping"]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.kernels import FLOAT32_MAX, Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import log
from covey_coordinator.aggregation.rules import Batch, Facts, Judgement, Rule, require_devices
from covey_coordinator.aggregation.similarity import cosines_between
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError

LARGEST_WEIGHT = 0.99  # in place of 1, whose logit is infinite; the authors' program has the same
LEAST_WEIGHT = 1e-12  # in place of 0; its logit is far below 0, so the weight becomes 0
RESOLUTION = 2.0**-18  # of cosines; devices less distinct than this are equal, or rounding would give them votes
MAX_HISTORY = 1 << 16


@dataclass(frozen=True)
class FoolsGold(Rule):
    """Mean weighted by how little a device's summed updates resemble any other device's.

    history_devices: for how many devices the sums over all rounds are kept, (history_devices, d) float32; a device
    whose place (the number the engine gave it when it first came) is not below it fails the round. 0 looks at this
    round's updates only, which the paper shows to be weaker. kappa: steepness of the logit.
    score: cosine of the most similar other device's sum, after pardoning. Not accepted: weight 0. If all devices are
    alike, all weights are 0 and so is the aggregate. num_examples and num_byzantine change nothing.
    Source: Fung et al. 2020 (arXiv:1808.04866), Algorithm 1. Deviations: all coordinates count, where the paper can
    weigh those that matter to the output ("indicative features"); weights are divided by their sum, where the paper
    adds weighted updates; similarities below 0 count as 0, as in the authors' program; devices that differ by less
    than cosines can tell are equal.
    """

    num_byzantine: int = 0
    history_devices: int = 0
    kappa: float = 1.0
    name = "foolsgold"
    remembers_devices = True
    facts = Facts(
        summary="mean weighted against devices that push the same way round after round (sybils)",
        needs="hostile devices act alike, honest ones do not",
        breakdown="none is proven: any number of sybils, but not one hostile device alone",
        cost="n^2 d",
        sums_only=False,
        source="Fung et al. 2020 (arXiv:1808.04866), Algorithm 1",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.history_devices <= MAX_HISTORY:
            raise ConfigError(
                f"foolsgold: history_devices = {self.history_devices}", f"set it to 0 to {MAX_HISTORY}; 0 is off"
            )
        if not (np.isfinite(self.kappa) and self.kappa > 0):
            raise ConfigError(f"foolsgold: kappa = {self.kappa}", "set kappa to a positive number")

    def check(self, n: int) -> None:
        require_devices(self, n, least=max(2, self.num_byzantine + 1), because="n >= 2 and n > f")

    def initial_state(self, d: int) -> Any:
        return np.zeros((self.history_devices, d), np.float32) if self.history_devices else ()

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        return self.judge(k, batch.updates, batch.updates)

    def advance(self, k: Kernels, state: Any, batch: Batch) -> tuple[Any, Judgement]:
        if not self.history_devices:
            return state, self.step(k, batch)
        places = k.required(
            batch.places,
            k.all(batch.places < self.history_devices),
            f"foolsgold remembers {self.history_devices} devices, and more have come",
            "set history_devices to the number of devices of the fleet",
        )
        rows = k.columns(batch.updates, k.arange(k.dimension(batch.updates)))
        sums = k.minimum(k.maximum(k.take(state, places) + rows, -FLOAT32_MAX), FLOAT32_MAX)
        return k.replaced(state, places, sums), self.judge(k, Updates(sums), batch.updates)

    def judge(self, k: Kernels, sums: Updates, updates: Updates) -> Judgement:
        """The mean of the updates, weighted by the likeness of the sums."""
        cosines, _ = cosines_between(k, sums)
        likeness = k.largest(pardoned(k, k.with_diagonal(cosines, 0.0)))
        weights = self.weights(k, likeness)
        shares = k.divide(weights, k.sum_rows(weights))
        measured = {"total_weight": k.single(k.sum_rows(weights))}
        return Judgement(k.combination(updates, shares), weights > 0.0, k.single(likeness), measured)

    def weights(self, k: Kernels, likeness: Any) -> Any:
        """(n,) likeness -> (n,) weights of 0 to 1."""
        distinct = k.minimum(k.where(1.0 - likeness > RESOLUTION, 1.0 - likeness, 0.0 * likeness), 1.0)
        share = k.divide(distinct, k.largest(distinct))
        share = k.maximum(k.minimum(share, LARGEST_WEIGHT), LEAST_WEIGHT)
        logit = (log(k, k.divide(share, 1.0 - share)) + 0.5) * self.kappa
        return k.minimum(k.maximum(logit, 0.0), 1.0)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        median = f" (median of the accepted {float(np.median(accepted_scores)):.2f})" if len(accepted_scores) else ""
        return f"pushes the same way as another device: cosine {score:.2f}{median}"


def pardoned(k: Kernels, cosines: Any) -> Any:
    """(n, n) cosines with 0 on the diagonal: an honest device's likeness to sybils is reduced.

    Where device j is more like somebody than i is, i's cosine with j is multiplied by the ratio of the two.
    """
    most = k.largest(cosines)
    ratio = k.divide(most[:, None], most[None, :])
    return k.where(most[None, :] > most[:, None], cosines * ratio, cosines)
