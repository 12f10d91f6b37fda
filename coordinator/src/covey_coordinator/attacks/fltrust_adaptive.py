"""The attack built against FLTrust: hostile updates climb, without gradients, against the direction of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean
from covey_coordinator.aggregation.similarity import cosines_with
from covey_coordinator.attacks.contract import Attack, AttackFacts, Knowledge
from covey_coordinator.attacks.fang import FangTrim, changing_directions
from covey_coordinator.attacks.mathematics import repeated, seed_of
from covey_coordinator.attacks.plain import require_finite
from covey_protocol.errors import ConfigError

STARTS = ("trim", "plane")
ANGLES = 64  # tried between the trusted update's direction and a right angle to it


class _Round(NamedTuple):
    """What the attackers know of one round, all of it fixed: s (d,) float32, the signs of the honest mean; g (d,)
    float32, the trusted update; along, total: sums over honest devices of trust times s'e, and of trust; length: |g|.
    """

    s: Any
    g: Any
    along: Any
    total: Any
    length: Any


@dataclass(frozen=True)
class FLTrustAdaptive(Attack):
    """Unit vectors e_i with the largest -s'g', g' what FLTrust makes of them and the honest, s the honest mean's signs.

    From its start, `rounds` times over the attackers, each takes `steps` steps along a random direction u:
    e_i += rate (h(e_i + smoothing u) - h(e_i)) / smoothing u, then back to length 1. h = -s'g' is exact: FLTrust's
    aggregate sees of e_i only e_i'g and e_i's, g the trusted update, whose length all updates are sent with.
    start: "trim", the trim attack's updates, as in the paper: where these point away from g they weigh nothing, h is
    flat and no step is taken. "plane", ours and stronger: the e in the plane of g and s with the largest h, the same
    for all attackers; none outside that plane is better. Where the rule in use has no trusted update the honest mean
    stands for it: the attack is built against FLTrust and nothing else.
    Deviations: u has entries +-sigma in place of normal ones, of the same variance and much faster; s is of the honest
    mean, as in our other attacks of this family, not of the aggregate before the attack.
    Source: Cao et al. 2021 (arXiv:2012.13995), section V-C and Algorithm 3, with V = Q = 10, eta = 0.01, gamma = 0.005,
    sigma^2 = 0.5.
    """

    rounds: int = 10
    steps: int = 10
    rate: float = 0.01
    smoothing: float = 0.005
    variance: float = 0.5
    start: str = "trim"
    name = "fltrust-adaptive"
    facts = AttackFacts(
        "climbs against the model's direction on FLTrust's own formula",
        "all honest updates and the trusted update; built against FLTrust",
        "Cao et al. 2021 (arXiv:2012.13995), Algorithm 3",
    )

    def __post_init__(self) -> None:
        for setting, number in (("rounds", self.rounds), ("steps", self.steps)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{self.name}: {setting} = {number!r}", "set it to a whole number of at least 1")
        for setting, value in (("rate", self.rate), ("smoothing", self.smoothing), ("variance", self.variance)):
            require_finite(self.name, setting, value, least=0.0)
        if self.start not in STARTS:
            raise ConfigError(f"{self.name}: start = {self.start!r}", f"choose {' or '.join(STARTS)}")
        if self.smoothing == 0.0:
            raise ConfigError(f"{self.name}: smoothing = 0", "set it above 0; the paper's is 0.005")

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        known = _known(k, honest, knowledge)
        if self.start == "trim":
            first = FangTrim().craft(k, honest, num_hostile, knowledge)
        else:
            first = repeated(k, _in_the_plane(k, known, num_hostile), num_hostile)
        cosines, norms, _ = cosines_with(k, Updates(first), known.g)
        along = _along(k, Updates(first), known.s)
        rows = k.single(k.real(first) * k.divide(1.0, norms)[:, None])
        seed = seed_of(k, knowledge.seed, knowledge.round_number)
        m = k.whole(num_hostile)
        count = m * (self.rounds * self.steps)

        def goes_on(number: Any, *_: Any) -> Any:
            return number < count

        def step(number: Any, rows: Any, cosines: Any, along: Any) -> tuple[Any, ...]:
            turn = number // self.steps
            one = turn - (turn // m) * m
            row, cosine, towards = self._moved(k, known, seed + number, one, rows, cosines, along)
            place = k.reshape(one, (1,))
            return (
                number + 1,
                k.replaced(rows, place, row[None, :]),
                k.replaced(cosines, place, k.reshape(cosine, (1,))),
                k.replaced(along, place, k.reshape(towards, (1,))),
            )

        _, rows, _, _ = k.while_loop(goes_on, step, (k.whole(0), rows, cosines, along))
        return k.single(k.real(rows) * known.length)

    def _moved(
        self, k: Kernels, known: _Round, seed: Any, one: Any, rows: Any, cosines: Any, along: Any
    ) -> tuple[Any, Any, Any]:
        """Attacker `one` after a step: its row (d,), cosine with g, and s'e."""
        e = k.take(rows, one)
        d = k.length(known.s)
        u = k.single(self.variance**0.5 * (2.0 * k.real(k.random_bits(seed, d) > 0) - 1.0))
        inner = k.gram(Updates(k.concat([e[None, :], u[None, :], known.s[None, :], known.g[None, :]])))
        others = k.where(k.arange(k.length(cosines)) < one, 1.0, 0.0 * cosines)
        others = others + k.where(k.arange(k.length(cosines)) > one, 1.0, 0.0 * cosines)
        trust = k.maximum(cosines, 0.0) * others
        rest, total = known.along + k.sum_rows(trust * along), known.total + k.sum_rows(trust)

        def at(factor: Any) -> tuple[Any, Any, Any]:
            """Length, cosine with g and s'e of e + factor u, the latter two after it is brought to length 1."""
            norm = k.sqrt(inner[0, 0] + 2.0 * factor * inner[0, 1] + factor * factor * inner[1, 1])
            cosine = k.divide(inner[0, 3] + factor * inner[1, 3], norm * known.length)
            return norm, cosine, k.divide(inner[0, 2] + factor * inner[1, 2], norm)

        def gain(cosine: Any, towards: Any) -> Any:
            own = k.maximum(cosine, 0.0)
            return -known.length * k.divide(rest + own * towards, total + own)

        climb = gain(*at(k.full((), self.smoothing))[1:]) - gain(*at(k.full((), 0.0))[1:])
        factor = (self.rate / self.smoothing) * climb
        norm, cosine, towards = at(factor)
        row = k.single((k.real(e) + factor * k.real(u)) * k.divide(1.0, norm))
        return row, cosine, towards


def _in_the_plane(k: Kernels, known: _Round, num_hostile: Any) -> Any:
    """(d,) float32, length 1: cos(angle) g/|g| - sin(angle) times what of s is at right angles to g, brought to 1."""
    inner = k.gram(Updates(k.concat([known.s[None, :], known.g[None, :]])))
    ahead = k.divide(inner[0, 1], known.length)  # of s along g / |g|
    aside = k.sqrt(k.maximum(inner[0, 0] - ahead * ahead, 0.0))
    angles = [math.pi / 2 * number / ANGLES for number in range(ANGLES)]
    cosines, sines = (k.real([turn(angle) for angle in angles]) for turn in (math.cos, math.sin))
    m = k.real(k.whole(num_hostile))
    harm = -k.divide(known.along + m * cosines * (cosines * ahead - sines * aside), known.total + m * cosines)
    best = k.argmin(-harm)
    cosine, sine = cosines[best], sines[best]
    along_g = k.divide(cosine, known.length) + k.divide(sine * ahead, aside * known.length)
    return k.single(along_g * k.real(known.g) - k.divide(sine, aside) * k.real(known.s))


def _known(k: Kernels, honest: Updates, knowledge: Knowledge) -> _Round:
    batch = knowledge.batch_with(knowledge.own) if knowledge.batch_with is not None else None
    g = column_mean(k, honest) if batch is None or batch.trusted is None else batch.trusted
    s = k.single(changing_directions(k, honest))
    cosines, _, length = cosines_with(k, honest, g)
    trust = k.maximum(cosines, 0.0)
    return _Round(s, g, k.sum_rows(trust * _along(k, honest, s)), k.sum_rows(trust), length)


def _along(k: Kernels, rows: Updates, s: Any) -> Any:
    """(n,) float64: s'e of the rows brought to length 1."""
    cosines, _, length = cosines_with(k, rows, s)
    return cosines * length
