"""Min-Max and Min-Sum: as far from the honest mean as the honest updates are from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from covey_coordinator.aggregation.distances import distances_between
from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean
from covey_coordinator.attacks.contract import Attack, AttackFacts, Knowledge, rows_of
from covey_coordinator.attacks.mathematics import check_direction, direction_of, repeated

MARGIN = 1.0 - 2.0**-16  # of gamma: rounding to float32 and in the distances must not break the inequality


class Reach(NamedTuple):
    """Along mu + gamma p: squared distance to row i = away[i] + 2 gamma along[i] + gamma^2 square.

    away, along: (h,) float64. square: |p|^2. between: (h, h) squared distances of the honest rows.
    """

    away: Any
    along: Any
    square: Any
    between: Any


def reach_of(k: Kernels, honest: Updates, mu: Any, push: Any) -> Reach:
    centred = k.single(k.real(rows_of(honest)) - k.real(mu)[None, :])
    inner_products = k.gram(Updates(k.concat([centred, push[None, :]])))
    squares = k.diagonal(inner_products)
    return Reach(squares[:-1], -inner_products[-1][:-1], squares[-1], distances_between(k, honest))


def farthest(k: Kernels, constant: Any, linear: Any, square: Any) -> Any:
    """The largest gamma >= 0 with constant + 2 gamma linear + gamma^2 square <= 0; 0 where there is none.

    Written without the difference of two large numbers where linear > 0.
    """
    constant = k.minimum(constant, 0.0)
    root = k.sqrt(linear * linear - square * constant)
    large = k.divide(root - linear, square)
    return k.where(linear > 0.0, k.divide(-constant, root + linear), large)


@dataclass(frozen=True)
class MinMax(Attack):
    """mu + gamma p with the largest gamma such that max_i |mu + gamma p - x_i| <= max_ij |x_i - x_j|.

    direction: of p, "unit", "std" (the paper's best), "sign", or "mean". Deviations: the paper finds gamma by a halving
    search until its step is below tau; each honest row gives a quadratic in gamma, so the limit of that search is
    solved for instead. gamma is then lowered by 2^-16 of itself, so that rounding cannot break the inequality.
    Source: Shejwalkar and Houmansadr 2021 (NDSS), "Manipulating the Byzantine", the Min-Max attack.
    """

    direction: str = "std"
    name = "min-max"
    facts = AttackFacts(
        "no farther from anyone than the honest are",
        "all honest updates",
        "Shejwalkar and Houmansadr 2021 (NDSS), Min-Max",
    )

    def __post_init__(self) -> None:
        check_direction(self.name, self.direction)

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        mu, push = column_mean(k, honest), direction_of(k, honest, self.direction)
        gamma = self.gamma(k, reach_of(k, honest, mu, push)) * MARGIN
        return repeated(k, k.single(k.real(mu) + gamma * k.real(push)), num_hostile)

    def gamma(self, k: Kernels, reach: Reach) -> Any:
        widest = k.largest(k.largest(reach.between))
        return k.smallest(farthest(k, reach.away - widest, reach.along, reach.square))


@dataclass(frozen=True)
class MinSum(MinMax):
    """mu + gamma p with the largest gamma such that sum_i |mu + gamma p - x_i|^2 <= max_i sum_j |x_i - x_j|^2.

    Otherwise as Min-Max. Source: Shejwalkar and Houmansadr 2021 (NDSS), the Min-Sum attack.
    """

    name = "min-sum"
    facts = AttackFacts(
        "in sum no farther away than the honest are",
        "all honest updates",
        "Shejwalkar and Houmansadr 2021 (NDSS), Min-Sum",
    )

    def gamma(self, k: Kernels, reach: Reach) -> Any:
        widest = k.largest(k.sum_rows(reach.between))
        count = k.real(k.length(reach.away))
        return farthest(k, k.sum_rows(reach.away) - widest, k.sum_rows(reach.along), reach.square * count)
