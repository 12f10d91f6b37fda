"""What an operator orders, in the worlds of `world`: the promise holds, and no order is forgotten by a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from covey_coordinator.orders import Order, Orders
from covey_coordinator.store import RunStore
from simulation.world import World

SEEDS = 150
PAUSE_S = 60.0


class TimedOrders(Orders):
    """An order that stands from one moment of a world on, for so many seconds."""

    def __init__(self, world: World, word: str, at_s: float, for_s: float = float("inf")) -> None:
        super().__init__(Path("no folder"))
        self._world, self._word, self._from_s, self._until_s = world, word, at_s, at_s + for_s

    def _read(self, word: str) -> Order | None:
        stands = self._from_s <= self._world.now < self._until_s
        return Order(0, "wrong data") if word == self._word and stands else None


class AbortedWorld(World):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.orders = TimedOrders(self, "aborted", self.rng.uniform(0.0, 40.0))
        self.rounds = 0
        self.reasons: list[str] = []

    def is_over(self) -> bool:
        return self.orders.aborted() is not None and self.seen["ends: RunError"] > 0

    def check_end(self) -> None:
        super().check_end()
        rounds = self._all("SELECT phase, reason FROM rounds")
        self.require({phase for phase, _ in rounds} <= {"published", "abandoned"}, "a round is left open")
        self.reasons = [reason for _, reason in rounds]


def test_an_aborted_run_ends_with_every_acknowledged_update_judged() -> None:
    aborted, heard = 0, 0
    for seed in range(SEEDS):
        world = AbortedWorld(seed)
        world.run()
        aborted += world.reasons.count("aborted by the operator: wrong data")
        heard += world.seen["hears: Verdict the round was abandoned"]
    assert aborted > SEEDS / 4  # the order often found a round under way
    assert heard > SEEDS / 10  # and updates in it


@pytest.mark.parametrize("seed", range(20))
def test_no_round_is_opened_in_a_pause(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(seed)
    start = world.rng.uniform(5.0, 30.0)
    world.orders = TimedOrders(world, "paused", start, PAUSE_S)
    opened: list[float] = []
    really = RunStore.open_round

    def open_round(*arguments: Any) -> None:
        opened.append(world.now)
        really(*arguments)

    monkeypatch.setattr(RunStore, "open_round", open_round)
    world.run()
    assert len(opened) >= world.rounds
    assert [now for now in opened if start < now < start + PAUSE_S] == []
