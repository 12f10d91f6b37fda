"""Devices that often take no part, and a coordinator that loses its power once: nobody waits for who excused itself."""

from __future__ import annotations

import dataclasses

import pytest

from covey_protocol import device
from covey_protocol.messages import Invitation
from simulation.world import Crash, SimulatedDevice, World, breaks

SEEDS = 100


class ExcusedWorld(World):
    """Nothing is lost here but what comes while the coordinator is off."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        nothing = {field.name: 0.0 for field in dataclasses.fields(self.trouble)}
        self.trouble = dataclasses.replace(self.trouble, **nothing)
        self.calm()
        self.off_at = self.rng.uniform(0.5, 8.0)

    def check_time(self) -> None:
        super().check_time()
        if self.off_at < self.now:
            self.off_at = float("inf")
            self.log("coordinator", "power cut")
            raise Crash


@pytest.fixture(autouse=True)
def often_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def conditions(self: SimulatedDevice, invitation: Invitation) -> device.ConditionsChecked:
        willing = self.world.rng.random() > 0.3
        return device.ConditionsChecked(invitation.round_id, willing, "" if willing else "busy")

    monkeypatch.setattr(SimulatedDevice, "conditions", conditions)


def test_an_excuse_that_was_lost_is_heard_after_the_next_start() -> None:
    again = 0
    for seed in range(SEEDS):
        world = ExcusedWorld(seed)
        world.run()
        again += world.seen["excuses itself again"]
    assert again > SEEDS / 10


def test_it_is_missed_where_devices_excuse_themselves_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original = device.DeviceMachine._answer_again
    monkeypatch.setattr(
        device.DeviceMachine,
        "_answer_again",
        lambda self: original(self) if self.state is not device.State.IDLE else [],
    )
    assert any(breaks(ExcusedWorld, seed) for seed in range(SEEDS))
