"""The coordinator's own update in the worlds of `world`: it takes its time, fails at times, and dies with every crash.

The rule must get the one of its own round and model, also after a restart in the middle of the round; devices are
answered while it is waited for, and an evaluation waits for none.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from covey_coordinator.aggregation.rules import Trusted
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.serve import EvaluationSettings, Task
from covey_protocol.errors import RuleError
from covey_protocol.messages import TrainingPlan
from simulation.mutations import Patch, wrapped
from simulation.world import CONFIG, LedgerEngine, Outcome, World, breaks

SEEDS, MANY = 15, 20_000
CRASHED = (79, 95)  # the coordinator crashes between a rule and the end of its round: one world in thirty


def update_for(round_id: str, parameters: Any, plan: TrainingPlan) -> Any:
    """Of the round, its model and its plan, as `trusted_training` promises."""
    return parameters + np.float32(sum(round_id.encode()) + plan.shuffle_seed % 1009)


class OwnTraining:
    """As `trusted_training.TrustedTraining`, on the world's clock."""

    def __init__(self, world: TrustedWorld) -> None:
        self._world = world
        self._ready_at: float | None = None
        self._made: Any = None

    def begin(self, round_id: str, parameters: Any, plan: TrainingPlan) -> None:
        rng = self._world.rng
        self._ready_at = self._world.now + rng.choice([0.0, 1.0, 3.0, 5.0])
        fails = self._world.troubled and rng.random() < 0.25
        self._made = None if fails else update_for(round_id, parameters, plan)

    def is_ready(self) -> bool:
        ready = self._ready_at is None or self._world.now >= self._ready_at
        self._world.seen["the rule waits"] += not ready
        return ready

    def given(self) -> Trusted:
        self._world.require(self.is_ready(), "the loop stands still until the coordinator's own update is made")
        self._world.require(self._ready_at is not None, "a rule runs and no update of the coordinator's was begun")
        if self._made is None:
            self._world.seen["it failed"] += 1
            raise RuleError("[trusted]: the training process died")
        return Trusted(self._made)

    def stop(self) -> None:
        self._ready_at = None


class TrustedEngine(LedgerEngine):
    def aggregate(self, parameters: Any, screened: Any) -> Outcome:
        world = self._world
        round_id = world._one("SELECT id FROM rounds WHERE phase = 'aggregating'")
        world.require(round_id is not None, "aggregates before the decision is durable")
        plan = world.store.invitation(round_id[0]).plan
        right = update_for(round_id[0], parameters, plan)
        own = screened.trusted.update
        world.require(own is not None and np.array_equal(own, right), "the own update is of another round or model")
        return super().aggregate(parameters, screened)


class TrustedWorld(World):
    planned: ClassVar = {"run": msgspec.structs.replace(CONFIG, evaluation=EvaluationSettings(every=2))}

    def own_training(self) -> OwnTraining:
        return OwnTraining(self)

    def task(self, coordinator: Coordinator, config: Any) -> Task:
        made = super().task(coordinator, config)
        self.store = coordinator.store
        made._engine = TrustedEngine(self, config.run)
        return made


def run(seed: int) -> World:
    world = TrustedWorld(seed)
    try:
        return world.run()
    except BaseException as exc:
        raise AssertionError(f"{exc!r}\n{world.story()}\nseed {seed}") from exc


def test_the_promise_holds_while_the_rule_waits_for_the_coordinators_own_update() -> None:
    seen: Counter[str] = sum((run(seed).seen for seed in (*range(1, SEEDS), *CRASHED)), run(0).seen)
    assert seen["the rule waits"] > SEEDS
    assert seen["it failed"] > 3
    assert seen["aggregated again after a crash"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_and_in_many_more_worlds() -> None:
    for seed in range(SEEDS, MANY):
        run(seed)


# --- planted bugs


def a_restart_forgets_it(patch: Patch) -> None:
    def begin(original: Any, self: Coordinator, state: Any) -> None:
        if state.opened_at == state.kept_time_at:  # not of a round that is taken up
            original(self, state)

    wrapped(patch, Coordinator, "_begin_own", begin)


def the_loop_waits(patch: Patch) -> None:
    def run_rule(original: Any, self: Coordinator, state: Any) -> None:
        if state.due and state.finished is None:
            device_ids, state.due = state.due, ()
            self._handle(state, self._aggregate(state, device_ids))

    wrapped(patch, Coordinator, "_run_rule_if_ready", run_rule)


def of_the_first_model(patch: Patch) -> None:
    def begin(original: Any, self: Coordinator, state: Any) -> None:
        invitation = state.machine.invitation
        if not invitation.plan.evaluate:
            self.own.begin(invitation.round_id, np.zeros_like(state.parameters), invitation.plan)

    wrapped(patch, Coordinator, "_begin_own", begin)


def kept_from_the_round_before(patch: Patch) -> None:
    patch.setattr(OwnTraining, "stop", lambda self: None)

    def begin(original: Any, self: Coordinator, state: Any) -> None:
        if self.own._ready_at is None:
            original(self, state)

    wrapped(patch, Coordinator, "_begin_own", begin)


BUGS = {
    "a restart does not make it again": a_restart_forgets_it,
    "the rule does not wait for it, or holds up the loop": the_loop_waits,
    "it is made of the model before the first round": of_the_first_model,
    "the one of the round before is taken": kept_from_the_round_before,
}


@pytest.mark.parametrize("what", BUGS)
def test_the_simulation_finds_that(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[what](monkeypatch)
    assert any(breaks(TrustedWorld, seed) for seed in range(SEEDS))
