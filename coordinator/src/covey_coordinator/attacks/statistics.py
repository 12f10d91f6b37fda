"""Attacks that hide in the statistics of the honest updates: ipm, alie, mimic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean
from covey_coordinator.attacks.contract import Attack, AttackFacts, Knowledge
from covey_coordinator.attacks.mathematics import column_std, normal_quantile, repeated
from covey_coordinator.attacks.plain import require_finite

POWER_STEPS = 64  # of the power iteration for mimic's direction
LEAST_Z = 0.5  # a share of half gives z = 0: no push at all


@dataclass(frozen=True)
class InnerProductManipulation(Attack):
    """-epsilon * mu: the aggregate's inner product with the true direction shall not be positive.

    epsilon below 1 hides near zero among small updates (0.1 against Krum and the median in the paper); a mean is turned
    round only from epsilon > h / m on, for h honest and m corrupted devices.
    Source: Xie et al. 2019 (arXiv:1903.03936), "Fall of Empires".
    """

    epsilon: float = 0.1
    name = "ipm"
    facts = AttackFacts("a small step backwards", "all honest updates", "Xie et al. 2019 (arXiv:1903.03936)")

    def __post_init__(self) -> None:
        require_finite(self.name, "epsilon", self.epsilon)

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        return repeated(k, k.single(-self.epsilon * k.real(column_mean(k, honest))), num_hostile)


@dataclass(frozen=True)
class ALittleIsEnough(Attack):
    """mu - z * sigma per column: as far from the mean as enough honest devices are further away.

    z: None computes the paper's z_max = Phi^-1((n - m - s) / (n - m)) with s = floor(n/2 + 1) - m, for n devices of
    which m are corrupted: the s honest devices beyond z join the corrupted ones to a majority. Defined here, where the
    paper is silent: s < 1 (the corrupted have a majority) counts as 1, and a share below 1/2 gives z = 0 instead of a
    negative one, so that few attackers among many send the mean.
    sigma divides by the number of honest devices. Either sign serves; we push down.
    Source: Baruch et al. 2019 (arXiv:1902.06156), the attack that prevents convergence.
    """

    z: float | None = None
    name = "alie"
    facts = AttackFacts(
        "just inside the honest spread",
        "all honest updates",
        "Baruch et al. 2019 (arXiv:1902.06156), the attack that prevents convergence",
    )

    def __post_init__(self) -> None:
        if self.z is not None:
            require_finite(self.name, "z", self.z)

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        z = z_max(k, k.count(honest), num_hostile) if self.z is None else self.z
        row = k.single(k.real(column_mean(k, honest)) - z * k.real(column_std(k, honest)))
        return repeated(k, row, num_hostile)


def z_max(k: Kernels, num_honest: Any, num_hostile: Any) -> Any:
    """float64 scalar; see `ALittleIsEnough`."""
    h, m = k.whole(num_honest), k.whole(num_hostile)
    supporters = k.maximum((h + m) // 2 + 1 - m, k.whole(1))
    share = k.maximum(k.divide(h - supporters, h), LEAST_Z)
    return normal_quantile(k, share)


@dataclass(frozen=True)
class Mimic(Attack):
    """Every corrupted device copies one honest device, which then counts m + 1 times: bias where data differ.

    The device is the one with the largest |<z, x_i - mu>|, z the direction of greatest variance of the honest updates.
    Deviation: the paper estimates z and mu over the first rounds and then keeps one device; here both are of the
    current round (power iteration on the Gram matrix of the centred updates, from the longest one).
    Source: Karimireddy et al. 2022 (arXiv:2006.09365).
    """

    name = "mimic"
    facts = AttackFacts(
        "a copy of the most unusual honest device",
        "all honest updates",
        "Karimireddy et al. 2022 (arXiv:2006.09365)",
    )

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        return repeated(k, k.row(honest, most_unusual(k, honest)), num_hostile)


def most_unusual(k: Kernels, honest: Updates) -> Any:
    """Index of the row with the largest projection on the direction of greatest variance, the first of equals."""
    inner_products = k.gram(honest, column_mean(k, honest))
    columns = k.transpose(inner_products)
    longest = k.argmin(-k.diagonal(inner_products))

    def projected(vector: Any) -> Any:
        """G a, scaled to 1: z = sum of a_i (x_i - mu) has the projections G a on the rows."""
        product = k.sum_rows(columns * vector[:, None])
        return k.divide(product, k.largest(k.maximum(product, -product)))

    def step(number: Any, vector: Any) -> tuple[Any, Any]:
        return number + 1, projected(vector)

    start = k.real(k.members(k.reshape(k.whole(longest), (1,)), k.count(honest)))
    _, vector = k.while_loop(lambda number, vector: number < POWER_STEPS, step, (0, start))
    return k.argmin(-k.maximum(vector, -vector))
