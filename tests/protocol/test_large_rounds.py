"""The round's table does not look at all devices for every message."""

from __future__ import annotations

import random
from typing import Any

import pytest

from covey_protocol.blobs import blob_ref
from covey_protocol.messages import Answer, Invitation, TrainingPlan
from covey_protocol.round import Answered, Opened, Phase, RoundMachine, RoundSettings

N = 1000
NAMES = [f"device-{number:04d}" for number in range(N)]
BLOB = blob_ref(bytes(16))
INVITATION = Invitation("run.1.a", 1, 0, 60_000, BLOB, BLOB, TrainingPlan(1, 0.1), tuple(NAMES))


@pytest.mark.parametrize("order", ["of names", "the other way round", "by chance"])
@pytest.mark.parametrize("accept", [True, False])
def test_a_round_looks_at_each_device_a_few_times(order: str, accept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    really = RoundMachine._still_waited_for

    def counting(self: RoundMachine, *arguments: Any) -> bool:
        nonlocal looks
        looks += 1
        return really(self, *arguments)

    monkeypatch.setattr(RoundMachine, "_still_waited_for", counting)
    names = list(NAMES) if order == "of names" else NAMES[::-1]
    if order == "by chance":
        random.Random(0).shuffle(names)
    machine = RoundMachine(INVITATION, NAMES, RoundSettings.of(INVITATION, 1, 20.0, 3.0))
    machine.handle(Opened(), 0.0)
    phases = []
    for name in names:
        machine.handle(Answered(name, Answer("run.1.a", accept)), 1.0)
        phases.append(machine.phase)
    assert set(phases[:-1]) == {Phase.INVITING}
    assert phases[-1] is (Phase.COLLECTING if accept else Phase.ABANDONED)
    assert looks < 20 * N  # where each message looked at all it would be N * N
