"""The attack that knows the rule: it tries factors on the rule itself and keeps what moves the aggregate most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean
from covey_coordinator.attacks.contract import Attack, AttackFacts, Knowledge
from covey_coordinator.attacks.mathematics import (
    DIRECTIONS,
    check_direction,
    direction_of,
    disguised,
    repeated,
)
from covey_protocol.errors import ConfigError, UsageError

FIRST_FACTOR = 0.125
BOTH = ("mean", "std")


@dataclass(frozen=True)
class Adaptive(Attack):
    """mu + factor * p with the factor, of those tried, at which the rule's aggregate is farthest from mu.

    The rule in use is run on the whole batch, from its current state, with the same kernels: first with doubled factors
    1/8, 1/4, ... (`doublings` of them), then `refinements` times a step up and a step down from the best, the step
    starting at half of it and halved each time. The distance need not be unimodal: this is not always the optimum.
    direction: of p, "mean" (-mu), "std", "unit", "sign", or "both" (mean and std, the better one).
    Source: maximising |mu - aggregate| on a known rule is the tailored attack of Shejwalkar and Houmansadr 2021 (NDSS);
    a line search on the rule is what the "optimal" attacks of the ByzFL library do. The schedule of factors is ours.
    """

    direction: str = "both"
    doublings: int = 12
    refinements: int = 3
    name = "adaptive"
    facts = AttackFacts(
        "searches on the rule itself",
        "all honest updates, the rule, its settings and its state",
        "Shejwalkar and Houmansadr 2021 (NDSS), the attack tailored to a known rule",
    )

    def __post_init__(self) -> None:
        check_direction(self.name, self.direction, (*DIRECTIONS, "both"))
        for setting, value, least in (("doublings", self.doublings, 1), ("refinements", self.refinements, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"adaptive: {setting} = {value!r}", f"set it to a whole number of at least {least}")

    def craft(self, k: Kernels, honest: Updates, num_hostile: Any, knowledge: Knowledge) -> Any:
        mu = column_mean(k, honest)
        chosen, best = mu, k.full((), -1.0)
        for direction in BOTH if self.direction == "both" else (self.direction,):
            row, distance = self._search(k, mu, direction_of(k, honest, direction), num_hostile, knowledge)
            chosen = k.where(distance > best, row, chosen)
            best = k.maximum(distance, best)
        return repeated(k, chosen, num_hostile)

    def _search(self, k: Kernels, mu: Any, push: Any, num_hostile: Any, knowledge: Knowledge) -> tuple[Any, Any]:
        """The best row (d,) along push, and how far the aggregate is from mu with it, squared."""

        def at(factor: Any) -> Any:
            return k.single(k.real(mu) + factor * k.real(push))

        def distance(factor: Any) -> Any:
            aggregate = aggregate_with(k, disguised(k, repeated(k, at(factor), num_hostile)), knowledge)
            return k.square_norms(Updates(aggregate[None, :]), mu)[0]

        def better(tried: Any, factor: Any, found: Any) -> tuple[Any, Any]:
            value = distance(tried)
            return k.where(value > found, tried, factor), k.maximum(value, found)

        def double(number: Any, tried: Any, factor: Any, found: Any) -> tuple[Any, ...]:
            return (number + 1, tried * 2.0, *better(tried, factor, found))

        def refine(number: Any, step: Any, factor: Any, found: Any) -> tuple[Any, ...]:
            middle = factor
            up = better(middle + step, factor, found)
            return (number + 1, step * 0.5, *better(middle - step, *up))

        def until(count: int) -> Any:
            return lambda number, *_: number < count

        start = (0, k.full((), FIRST_FACTOR), k.full((), 0.0), k.full((), -1.0))
        _, _, factor, found = k.while_loop(until(self.doublings), double, start)
        _, _, factor, found = k.while_loop(until(self.refinements), refine, (0, factor * 0.5, factor, found))
        return at(factor), found


def aggregate_with(k: Kernels, rows: Any, knowledge: Knowledge) -> Any:
    """(d,) float32: what the rule in use would make of this round with these corrupted rows."""
    if knowledge.rule is None or knowledge.batch_with is None:
        raise UsageError("an adaptive attack needs the rule in use and the batch it sees")
    _, judgement = knowledge.rule.advance(k, knowledge.rule_state, knowledge.batch_with(rows))
    return judgement.aggregate
