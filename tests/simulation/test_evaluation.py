"""Evaluation rounds and several tasks in the worlds of `world`: the promise holds for both, and what they add to it.

An evaluation's numbers are durable with its round's end, it makes no model, and no model has two. Of several tasks one
round is open at a time, each task's model counts its own updates, and devices are answered from the right store.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from covey_coordinator import serve
from covey_coordinator.coordinator import Coordinator
from covey_coordinator.orders import Orders
from covey_coordinator.serve import EvaluationSettings, Task
from covey_coordinator.store import Checkpoint, RunStore
from covey_protocol.round import Phase
from simulation.mutations import Patch, wrapped
from simulation.test_orders import TimedOrders
from simulation.world import CONFIG, World, breaks

SEEDS, MANY = 80, 20_000
EVALUATION = EvaluationSettings(every=1)
replace = msgspec.structs.replace


class EvaluationWorld(World):
    planned: ClassVar = {"run": replace(CONFIG, evaluation=EVALUATION)}


class TasksWorld(World):
    """x is evaluated, y is not."""

    planned: ClassVar = {
        "sim-x": replace(CONFIG, run="sim-x", task="x", evaluation=EvaluationSettings(every=2)),
        "sim-y": replace(CONFIG, run="sim-y", task="y"),
    }


class AbortedTaskWorld(TasksWorld):
    """The operator aborts x; y must come to its end all the same."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.orders = TimedOrders(self, "aborted", self.rng.uniform(0.0, 30.0))

    def rounds_of(self, run: str) -> int:
        return 0 if run == "sim-x" else self.rounds

    def orders_of(self, run: str) -> Orders:
        return self.orders if run == "sim-x" else Orders(Path("no folder"))

    def is_over(self) -> bool:
        if self.orders.aborted() is None or not self.seen["ends: RunError"]:
            return False
        return bool(self._all("SELECT count(*) FROM checkpoints", run="sim-y")[0][0] >= self.rounds)


WORLDS = {"evaluations": EvaluationWorld, "two tasks": TasksWorld, "an aborted task beside another": AbortedTaskWorld}


def run(kind: type[World], seed: int) -> World:
    world = kind(seed)
    try:
        return world.run()
    except BaseException as exc:
        raise AssertionError(f"{exc!r}\n{world.story()}\nseed {seed} of {kind.__name__}") from exc


class Told:
    """What the databases of finished worlds say, kept before they close."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rounds: list[tuple[str, str, str]] = []

        def check_end(original: Any, world: World) -> None:
            original(world)
            self.rounds += world._all("SELECT run, kind, phase FROM rounds")

        wrapped(patch, World, "check_end", check_end)


@pytest.mark.parametrize("what", WORLDS)
def test_the_promise_holds_with(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told, seen = Told(monkeypatch), Counter[str]()
    for seed in range(SEEDS):
        seen += run(WORLDS[what], seed).seen
    assert [place for place in ("before commit", "after commit", "send") if not seen[f"power cut: {place}"]] == []
    counted = Counter(told.rounds)
    if what == "evaluations":
        assert counted["run", "evaluation", "published"] > SEEDS
        assert counted["run", "evaluation", "abandoned"] > 0
    elif what == "two tasks":
        assert counted["sim-x", "evaluation", "published"] > SEEDS / 2
        assert counted["sim-x", "training", "published"] >= 2 * SEEDS
        assert counted["sim-y", "training", "published"] >= 2 * SEEDS
    else:
        assert counted["sim-x", "training", "published"] + counted["sim-x", "training", "abandoned"] > SEEDS / 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", WORLDS)
def test_and_in_many_more_worlds(what: str) -> None:
    for seed in range(SEEDS, MANY):
        run(WORLDS[what], seed)


def test_a_world_of_tasks_tells_the_same_story_again() -> None:
    assert run(TasksWorld, 1).story(10**6) == run(TasksWorld, 1).story(10**6)


# --- planted bugs


def evaluations_after_the_end(patch: Patch) -> None:
    def conclude(original: Any, self: RunStore, *arguments: Any) -> None:
        *rest, metrics, leakage = arguments
        original(self, *rest, (), leakage)
        round_id = rest[0]
        with self._transaction() as database:
            for one in metrics:
                row = ("run", 1, one.name, round_id, one.mean, one.median, one.spread, one.devices, one.held_out)
                database.execute("INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    wrapped(patch, RunStore, "conclude", conclude)


def evaluations_make_a_model(patch: Patch) -> None:
    def conclude(original: Any, self: RunStore, *arguments: Any) -> None:
        round_id, phase, reason, verdicts, checkpoint, metrics, leakage = arguments
        if metrics and phase is Phase.PUBLISHED:
            newest = self.newest_checkpoint("run", 180)
            checkpoint = Checkpoint(newest.number + 1, newest.parameters, newest.state)
        original(self, round_id, phase, reason, verdicts, checkpoint, metrics, leakage)

    wrapped(patch, RunStore, "conclude", conclude)


BUGS: dict[str, tuple[type[World], Any]] = {
    "metrics are made durable after their round's end": (EvaluationWorld, evaluations_after_the_end),
    "an evaluation makes a model": (EvaluationWorld, evaluations_make_a_model),
    "a restart forgets that a model was evaluated": (
        EvaluationWorld,
        lambda patch: patch.setattr(RunStore, "evaluated", lambda *_: False),
    ),
    "an evaluation round is forgotten by a restart": (
        EvaluationWorld,
        lambda patch: wrapped(
            patch,
            RunStore,
            "unfinished",
            lambda original, self, run: (
                None if (found := original(self, run)) and found.invitation.plan.evaluate else found
            ),
        ),
    ),
    "devices are answered from the store of the task under way": (
        TasksWorld,
        lambda patch: patch.setattr(Coordinator, "_store_of", lambda self, round_id: self.store),
    ),
    "the round under way is not taken up before another task's": (
        TasksWorld,
        lambda patch: patch.setattr(Task, "resume", lambda self: None),
    ),
    "tasks share an engine": (TasksWorld, lambda patch: shared_engine(patch)),
    "a task that fails ends the others": (
        AbortedTaskWorld,
        lambda patch: patch.setattr(serve, "TASK_ERRORS", ()),
    ),
}


def shared_engine(patch: Patch) -> None:
    def task(original: Any, self: World, coordinator: Coordinator, config: Any) -> Task:
        made = original(self, coordinator, config)
        made._engine = self.__dict__.setdefault("one_engine", made._engine)
        return made

    wrapped(patch, World, "task", task)


@pytest.mark.parametrize("what", BUGS)
def test_the_simulation_finds_that(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, plant = BUGS[what]
    plant(monkeypatch)
    assert any(breaks(kind, seed) for seed in range(SEEDS))
