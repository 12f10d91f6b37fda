"""Devices whose conditions come and go: they decline for now, join later, pause, give up in the middle, and lose power.

The promise must hold in all of it; and where nothing else is wrong, who says yes in time delivers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from covey_protocol import device
from covey_protocol.messages import Answer, Invitation
from covey_protocol.round import SAID_NO, Progress, RoundMachine
from simulation.mutations import row
from simulation.world import HONEST, SimulatedDevice, World, breaks

EVERYDAY, MANY = 25, 2_000
LOOK_S = 1.0


class Weather:
    """Whether a device's conditions hold: for a while they do, then for a while not. Its own random numbers."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self._rng = world, random.Random(f"weather {world.seed} {name}")
        self._good, self._until = self._rng.random() < 0.6, 0.0

    def holds(self) -> bool:
        while self._world.now >= self._until:
            self._good = not self._good
            self._until += self._rng.uniform(1.0, 9.0 if self._good else 6.0)
        return self._good


class Outside(SimulatedDevice):
    """Looks at its conditions every second while it works or may join; pauses, or gives up, as its owner wants."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.weather = Weather(world, name)
        self.pauses = len(name + str(world.seed)) % 2 == 0
        self.joined: set[str] = set()

    def conditions(self, invitation: Invitation) -> device.ConditionsChecked:
        holds = self.weather.holds()
        return device.ConditionsChecked(invitation.round_id, holds, "" if holds else "not charging", for_now=not holds)

    def tick(self) -> None:
        machine = self.performer.machine
        if machine.postponed is not None and self.weather.holds():
            round_id = machine.postponed.round_id
            self.run(lambda: self.performer.handle(device.Reconsidered()))
            if self.on and machine.round_id == round_id:
                self.joined.add(round_id)
                self.world.seen["joins later"] += 1
        elif machine.state is device.State.TRAINING and not self.pauses and not self.weather.holds():
            self.world.seen["gives up"] += 1
            failed = device.TrainingFailed(machine.round_id, "not charging")
            self.run(lambda: self.performer.handle(failed))
        if self.on:
            super().tick()

    def train(self, invitation: Invitation) -> None:
        """A paused training takes longer; its round's time does not stop."""
        work = self.work

        def begin() -> None:
            if work != self.work:
                return
            if self.pauses and not self.weather.holds():
                self.world.seen["is paused"] += 1
                self.later(LOOK_S, begin)
            else:
                SimulatedDevice.train(self, invitation)

        begin()


class Changing(World):
    """calm: nothing is wrong but the weather."""

    calm_from_start = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.devices = {name: Outside(self, name) for name in HONEST}
        if self.calm_from_start:
            self.calm()
            self.trouble = type(self.trouble)(**{**dict.fromkeys(vars(self.trouble), 0.0), "delay_s": 0.05})


class Calm(Changing):
    calm_from_start = True

    def check_end(self) -> None:
        super().check_end()
        for one in self.devices.values():
            for round_id in getattr(one, "joined", ()):
                self._check_joined(one.name, round_id)

    def _check_joined(self, name: str, round_id: str) -> None:
        """It delivered, or said that it does not, or the round was over before it could."""
        query = "SELECT progress, why FROM devices WHERE round = ? AND id = ?"
        progress, why = self._one(query, round_id, name)
        self.seen[f"joined: {progress}"] += 1
        kept_out = progress in (Progress.DECLINED.value, Progress.POSTPONED.value, Progress.REFUSED.value)
        heard = any(self.heard_yes(name, round_id))
        self.require(not (kept_out and heard), f"{name} joined {round_id} and was kept out", progress, why)

    def heard_yes(self, name: str, round_id: str) -> list[bool]:
        """Of the yeses that came to the coordinator while the round was open: at least a second before its end."""
        closes = [now for now, who, what, (message, *_) in self.trace_of("publishes") if message.round_id == round_id]
        end = max(closes, default=0.0)
        return [
            now < end - 1.0
            for now, who, what, (message, *_) in self.trace_of("says")
            if who == name and isinstance(message, Answer) and message.accept and message.round_id == round_id
        ]

    def trace_of(self, what: str) -> list[Any]:
        return [line for line in self.trace if line[2] == what]


def run(kind: type[World], seeds: Iterable[int]) -> tuple[Counter[str], int]:
    """What was seen, and how many updates were acknowledged."""
    seen: Counter[str] = Counter()
    acknowledged = 0
    for seed in seeds:
        world = kind(seed)
        try:
            world.run()
        except AssertionError as exc:
            raise AssertionError(f"{exc!r}\n{world.story()}") from exc
        seen += world.seen
        acknowledged += len(world.acknowledged)
    return seen, acknowledged


def check_promise(seeds: range) -> None:
    seen, acknowledged = run(Changing, seeds)
    assert [what for what in ("joins later", "gives up", "is paused") if seen[what] < len(seeds) / 10] == []
    assert acknowledged > 3 * len(seeds)


def test_no_change_of_conditions_loses_or_doubles_what_was_acknowledged() -> None:
    check_promise(range(EVERYDAY))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nor_do_many_more() -> None:
    check_promise(range(EVERYDAY, MANY))
    run(Calm, range(EVERYDAY, MANY))


def test_who_joins_in_time_delivers() -> None:
    seen, _ = run(Calm, range(EVERYDAY))
    assert seen["joined: stored"] > EVERYDAY / 4


def test_the_simulation_finds_a_coordinator_that_does_not_let_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from covey_protocol import round as rounds

    def answered(original: Any, machine: RoundMachine, event: Any, now: float) -> Any:
        peer = machine._devices.get(event.device_id)
        return [] if peer is not None and peer.progress in SAID_NO else original(machine, event, now)

    row(monkeypatch, rounds.TABLE, "_answered", answered)
    row(monkeypatch, rounds.TABLE, "_offered", answered)
    assert any(breaks(Calm, seed) for seed in range(EVERYDAY))
