"""A rule under attack: some devices' rows become the attack's before the rule sees them.

For simulations behind either door: `RuleFactory(Attacked(...))` is a TFF aggregator in which chosen clients are
corrupted. It stands after screening, so attacks that only screening can deal with are refused here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.rules import Batch, Judgement, Rule
from covey_coordinator.attacks.contract import Attack, Knowledge, rows_of
from covey_coordinator.attacks.mathematics import disguised
from covey_coordinator.records import Array
from covey_protocol.errors import ConfigError, RuleError


@dataclass(frozen=True)
class Attacked(Rule):
    """inner, after the rows of the devices at `hostile` were replaced by what attack crafts from the others' rows.

    hostile: places of devices (`Batch.places`). A device that is not in a round is not replaced; a data attack's
    rows are taken as they are. What honest devices send is not changed. The attack of round r draws from (seed, r).
    sampled: rounds are of some of the devices, and whoever draws them sees to it that one is honest.
    """

    attack: Attack
    hostile: tuple[int, ...]
    inner: Rule
    seed: int = 0
    sampled: bool = False

    def __post_init__(self) -> None:
        if not self.attack.sends_finite:
            raise ConfigError(
                f"{self.attack.name} sends numbers that are not finite, which no rule is given",
                "run it where updates are screened: covey grid",
            )
        if len(set(self.hostile)) != len(self.hostile):
            raise ConfigError("a corrupted device is named twice", "name each once")

    @property
    def name(self) -> str:
        return f"{self.inner.name} under {self.attack.name}"

    @property
    def num_byzantine(self) -> int:
        return self.inner.num_byzantine

    @property
    def needs_trusted(self) -> str:  # type: ignore[override]  # a constant of other rules' classes
        return self.inner.needs_trusted

    def with_num_byzantine(self, num_byzantine: int) -> Rule:
        return dataclasses.replace(self, inner=self.inner.with_num_byzantine(num_byzantine))

    @property
    def expects_copies(self) -> bool:  # type: ignore[override]  # a constant of other rules' classes
        return self.inner.expects_copies

    def check(self, n: int) -> None:
        self.inner.check(n)
        if not self.sampled and n <= len(self.hostile):
            raise RuleError(f"{n} devices, {len(self.hostile)} of them corrupted", "leave at least one honest device")

    def initial_state(self, d: int) -> Any:
        return {"inner": self.inner.initial_state(d), "round": np.int64(0)}

    def step(self, k: Kernels, batch: Batch) -> Judgement:
        d = int(batch.updates.matrix.shape[1])
        return self.advance(k, self.initial_state(d), batch)[1]

    def advance(self, k: Kernels, state: Any, batch: Batch) -> tuple[Any, Judgement]:
        order, num_honest = self._honest_first(k, batch.places)
        matrix, back = rows_of(batch.updates), k.argsort(order)
        honest = Updates(k.take(matrix, order[:num_honest]))
        own = k.take(matrix, order[num_honest:])

        def batch_with(rows: Any) -> Batch:
            return batch._replace(updates=Updates(k.take(k.concat([honest.matrix, rows]), back)))

        knowledge = Knowledge(
            own=own,
            num_byzantine=self.num_byzantine,
            seed=self.seed,
            round_number=state["round"],
            rule=self.inner,
            rule_state=state["inner"],
            batch_with=batch_with,
        )
        rows = self.attack.craft(k, honest, k.length(own), knowledge)
        inner, judgement = self.inner.advance(k, state["inner"], batch_with(disguised(k, rows)))
        return {"inner": inner, "round": state["round"] + 1}, judgement

    def _honest_first(self, k: Kernels, places: Any) -> tuple[Any, Any]:
        """(n,) int64 row numbers, honest devices first, and how many these are."""
        corrupted = places < places
        for place in self.hostile:  # not ==: inside TFF a tensor's == compares identities
            corrupted = corrupted | ((places >= place) & (places <= place))
        return k.argsort(k.whole(corrupted)), k.whole(k.length(places)) - k.number_true(corrupted)

    def explain(self, score: float, accepted_scores: Array, n: int) -> str:
        return self.inner.explain(score, accepted_scores, n)
