"""The directed deviation attacks on Krum and on the trimmed mean (Fang et al. 2020), with full knowledge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.distances import distances_between, nearest_sums, to_others
from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean, uniforms
from covey_coordinator.attacks.contract import Attack, AttackFacts, Knowledge, rows_of
from covey_coordinator.attacks.mathematics import repeated, seed_of
from covey_coordinator.attacks.plain import require_finite

MAX_HALVINGS = 60


def changing_directions(k: Kernels, honest: Updates) -> Any:
    """(d,) float64: 1.0 where the honest mean grows, else -1.0 (the paper's s; a change of zero counts as -1)."""
    return 2.0 * k.real(column_mean(k, honest) > 0.0) - 1.0


@dataclass(frozen=True)
class FangKrum(Attack):
    """-lam * s, s the signs of the honest mean, with the largest lam found at which Krum selects it.

    lam starts at the paper's upper bound, sqrt(min_i S_i / ((n - 2m - 1) d)) + max_i |x_i| / sqrt(d), S_i the sum of
    squared distances of honest row i to its n - m - 2 nearest honest others, and is halved until Krum with f = m would
    select an attacker or lam is below `threshold`. The global model is the zero of updates, so D(w_i, w_Re) = |x_i|.
    Deviations: all m attackers send the same (the paper lets the other m - 1 differ by a small epsilon); n - 2m - 1 and
    n - m - 2 count as at least 1. Source: Fang et al. 2020 (arXiv:1911.11815), the attack on Krum and theorem 1.
    """

    threshold: float = 1e-5
    name = "fang-krum"
    facts = AttackFacts(
        "the most directed deviation that Krum selects",
        "all honest updates; built against Krum",
        "Fang et al. 2020 (arXiv:1911.11815), the attack on Krum",
    )

    def __post_init__(self) -> None:
        require_finite(self.name, "threshold", self.threshold, least=0.0)

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        signs = k.single(changing_directions(k, honest))
        joined = k.gram(Updates(k.concat([rows_of(honest), signs[None, :]])))
        squares, along = k.diagonal(joined)[:-1], joined[-1][:-1]
        d = k.real(k.dimension(honest))
        between = distances_between(k, honest)
        n = k.count(honest) + num_hostile

        def goes_on(halvings: Any, lam: Any, selected: Any) -> Any:
            return (halvings < MAX_HALVINGS) & (lam >= self.threshold) & (selected < 1)

        def halve(halvings: Any, lam: Any, selected: Any) -> tuple[Any, Any, Any]:
            lam = lam * 0.5
            away = k.maximum(squares + 2.0 * lam * along + lam * lam * d, 0.0)
            return halvings + 1, lam, selected_by_krum(k, between, away, n, num_hostile)

        start = 2.0 * self.bound(k, between, squares, d, n, num_hostile)
        _, lam, _ = k.while_loop(goes_on, halve, (0, start, k.whole(0)))
        return repeated(k, k.single(-lam * k.real(signs)), num_hostile)

    def bound(self, k: Kernels, between: Any, squares: Any, d: Any, n: Any, m: Any) -> Any:
        h = k.length(squares)
        neighbours = at_least_one(k, n - m - 2)
        nearest = k.sort(to_others(k, between))
        chosen = k.where((k.arange(h) < neighbours)[None, :] & (nearest < float("inf")), nearest, 0.0 * between)
        least = k.smallest(k.sum_rows(k.transpose(chosen)))
        spread = k.sqrt(k.divide(least, k.real(at_least_one(k, n - 2 * m - 1)) * d))
        return spread + k.divide(k.sqrt(k.largest(squares)), k.sqrt(d))


def at_least_one(k: Kernels, count: Any) -> Any:
    return k.maximum(k.whole(count), k.whole(1))


def selected_by_krum(k: Kernels, between: Any, away: Any, n: Any, num_hostile: Any) -> Any:
    """int64, 1 if Krum with f = num_hostile prefers equal attackers at squared distances away (h,) to every honest row.

    An attacker must be strictly better: whose index is smaller is not his choice.
    """
    neighbours = k.maximum(k.whole(n - num_hostile - 2), k.whole(1))
    hostile = k.transpose(repeated(k, away, num_hostile))
    upper = k.concat([k.transpose(to_others(k, between)), k.transpose(hostile)])
    honest_scores = nearest_sums(k, k.transpose(upper), neighbours)
    lower = k.concat([hostile, to_others(k, k.full((num_hostile, num_hostile), 0.0))])
    hostile_scores = nearest_sums(k, k.transpose(lower), neighbours)
    nobody = k.full((1,), float("inf"))  # where no corrupted device is in the round
    return k.whole(k.smallest(k.concat([hostile_scores, nobody])) < k.smallest(honest_scores))


@dataclass(frozen=True)
class FangTrim(Attack):
    """Values beyond the largest (smallest) honest one, in each column where the honest mean falls (grows).

    Falling column: uniform in [max, b max] if max > 0, else [max, max / b]; growing: [min / b, min] if min > 0, else
    [b min, min]. Deviation: the paper draws around the local models' values, we around the updates'; either lies
    beyond all honest ones, so trimming takes the same ones away.
    Source: Fang et al. 2020 (arXiv:1911.11815), the attack on the trimmed mean, with b = 2.
    """

    b: float = 2.0
    name = "fang-trim"
    facts = AttackFacts(
        "beyond every honest value, against the direction",
        "all honest updates; built against the trimmed mean and the median",
        "Fang et al. 2020 (arXiv:1911.11815), the attack on the trimmed mean",
    )

    def __post_init__(self) -> None:
        require_finite(self.name, "b", self.b, least=1.0)

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        low = self._extreme(k, honest, -1.0)
        high = self._extreme(k, honest, 1.0)
        falling = changing_directions(k, honest) < 0.0
        edge = k.where(falling, high, low)
        outward = k.where(falling, edge > 0.0, edge <= 0.0)  # away from zero, so times b; else towards it
        far = k.where(outward, edge * self.b, edge * (1.0 / self.b))
        d = k.dimension(honest)
        drawn = uniforms(k, seed_of(k, knowledge.seed, knowledge.round_number), num_hostile * d)
        return k.single(edge[None, :] + k.reshape(drawn, (num_hostile, d)) * (far - edge)[None, :])

    def _extreme(self, k: Kernels, honest: Updates, sign: float) -> Any:
        """(d,) float64: the largest (sign 1) or smallest (sign -1) value of each column."""

        def per_block(block: Any, carry: Any) -> tuple[Any, Any]:
            return k.single(sign * k.largest(k.transpose(sign * k.real(block)))), carry

        return k.real(k.over_columns(honest, per_block)[0])
