"""Rules that weigh what devices send by the update the coordinator makes itself, from a few data that it trusts.

They bear any share of hostile devices, also most of them: what such a device can do is bounded by what the trusted
update is. So they are as good as the trusted data are like the devices' own, and must be shown beside `trusted-only`,
which needs no devices at all. docs/trusted-data.md; docs/adr/0025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from covey_coordinator.aggregation.kernels import Kernels
from covey_coordinator.aggregation.rules import UPDATE, Batch, Facts, Judgement, Rule, require_devices
from covey_coordinator.aggregation.similarity import cosines_with
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError


@dataclass(frozen=True)
class FLTrust(Rule):
    """Mean of the updates, each scaled to the trusted update's length, weighted by its cosine with that, if above 0.

    relu, normalise: for studying what each is for, as in the paper's section VI-B; leave both on. Without relu
    devices of a negative cosine weigh negatively and the weights can sum to nearly 0; without normalise an update keeps
    its length. num_examples and num_byzantine change nothing. Where no device has a weight the aggregate is zero, and
    the model stands still for a round.
    score: 1 - cosine. Not accepted: weight 0.
    Source: Cao et al. 2021 (arXiv:2012.13995), Algorithm 2; section V-B has its bound. Cosines are right to about 1e-6.
    """

    num_byzantine: int = 0
    relu: bool = True
    normalise: bool = True
    name = "fltrust"
    needs_trusted = UPDATE
    facts = Facts(
        summary="mean of updates of the trusted update's length, weighted by their cosine with it where positive",
        needs="trusted data; n >= 1",
        breakdown="any share; who knows the trusted update can end below the trusted data alone",
        cost="n d",
        sums_only=False,
        source="Cao et al. 2021 (arXiv:2012.13995), Algorithm 2",
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=1, because="n >= 1")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        cosines, norms, length = cosines_with(k, batch.updates, batch.trusted)
        trust = k.maximum(cosines, 0.0) if self.relu else cosines
        shares = k.divide(trust, k.sum_rows(trust))
        weights = shares * k.divide(length, norms) if self.normalise else shares
        accepted = (trust > 0.0) | (trust < 0.0)
        measured = {"total_trust": k.single(k.sum_rows(trust)), "trusted_norm": k.single(length)}
        return Judgement(k.combination(batch.updates, weights), accepted, k.single(1.0 - cosines), measured)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"points away from the coordinator's own update: cosine {1.0 - score:.3f}"


@dataclass(frozen=True)
class TrustedAlignment(Rule):
    """Mean of the updates, each weighted by its inner product with the trusted update, if above 0.

    To first order this is how much a device's update lowers the loss on the trusted data, so short updates and such as
    point elsewhere count little. Before that, an update is shortened to length_ratio times the trusted update's length:
    without it a device would gain by the square of its update's length. num_examples and num_byzantine change nothing;
    where no device has a weight the aggregate is zero.
    score: 1 - the inner product in units of the trusted update's squared length. Not accepted: weight 0.
    Source: Ren et al. 2018 (arXiv:1803.09050), equations 8, 9 and 12, there of examples in a batch and not of devices;
    the bound on lengths is ours.
    """

    num_byzantine: int = 0
    length_ratio: float = 1.0
    name = "trusted-alignment"
    needs_trusted = UPDATE
    facts = Facts(
        summary="mean weighted by the inner product with the trusted update where positive, after cutting lengths",
        needs="trusted data; n >= 1",
        breakdown="any share; who knows the trusted update can end below the trusted data alone",
        cost="n d",
        sums_only=False,
        source="Ren et al. 2018 (arXiv:1803.09050), equations 8, 9, 12",
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.length_ratio) and self.length_ratio > 0):
            raise ConfigError(
                f"trusted-alignment: length_ratio = {self.length_ratio}", "set length_ratio to a positive number"
            )

    def check(self, n: int) -> None:
        require_devices(self, n, least=1, because="n >= 1")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        cosines, norms, length = cosines_with(k, batch.updates, batch.trusted)
        most = length * self.length_ratio
        cut = k.where(norms > most, k.divide(most, norms), k.full((), 1.0))
        gains = cosines * k.divide(norms * cut, length)  # inner product over the squared length
        weights = k.maximum(gains, 0.0)
        shares = k.divide(weights, k.sum_rows(weights)) * cut
        measured = {"total_gain": k.single(k.sum_rows(weights)), "trusted_norm": k.single(length)}
        return Judgement(k.combination(batch.updates, shares), weights > 0.0, k.single(1.0 - gains), measured)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"does not go with the coordinator's own update: {1.0 - score:.3g} of it along that"


@dataclass(frozen=True)
class TrustedOnly(Rule):
    """The coordinator's own update; what devices send is not used, and no device is accepted.

    The baseline that every rule for a corrupted majority has to beat: where it does as well, the devices add nothing.
    score: 1 - cosine with the trusted update.
    """

    num_byzantine: int = 0
    name = "trusted-only"
    needs_trusted = UPDATE
    facts = Facts(
        summary="the coordinator's own update alone: a baseline",
        needs="trusted data; n >= 1",
        breakdown="any share: no device is used",
        cost="n d",
        sums_only=True,
        source="the baseline of every method with trusted data",
    )

    def check(self, n: int) -> None:
        require_devices(self, n, least=1, because="n >= 1")

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        cosines, _, length = cosines_with(k, batch.updates, batch.trusted)
        accepted = k.full((k.count(batch.updates),), False)
        return Judgement(batch.trusted, accepted, k.single(1.0 - cosines), {"trusted_norm": k.single(length)})

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return f"trusted-only uses no device's update; cosine with the coordinator's own {1.0 - score:.3f}"
