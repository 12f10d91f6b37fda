"""The performer: nothing is said about an update that is not in the outbox, and all else goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from covey_edge.files import Disk
from covey_edge.outbox import Outbox
from covey_edge.performer import Performer
from covey_protocol import device
from covey_protocol.errors import StorageError
from covey_protocol.messages import Answer, BlobRef, Failure, Invitation, TrainingPlan

BLOB = BlobRef(bytes(32), 40, 16)


class FullDisk(Disk):
    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        raise StorageError(f"cannot write {path} (No space left on device)") from OSError(28, "No space left on device")


class Surroundings:
    def __init__(self) -> None:
        self.said: list[Any] = []
        self.performer: Performer

    def say(self, message: Any) -> None:
        self.said.append(message)

    def conditions(self, invitation: Invitation) -> device.ConditionsChecked:
        return device.ConditionsChecked(invitation.round_id, True)

    def fetch(self, blobs: tuple[BlobRef, ...]) -> None:
        pass

    def train(self, invitation: Invitation) -> None:
        pass

    def stop_working(self) -> None:
        pass


def test_a_full_disk_costs_the_update_and_not_the_next_round(tmp_path: Path) -> None:
    first = Invitation("run.1", 1, 0, 60_000, BLOB, BLOB, TrainingPlan(1, 0.1), max_staleness=1)
    following = Invitation("run.2", 2, 0, 60_000, BLOB, BLOB, TrainingPlan(1, 0.1), max_staleness=1, earlier=("run.1",))
    around = Surroundings()
    performer = Performer(device.DeviceMachine("a"), Outbox(tmp_path, FullDisk()), around, lambda: 0.0)
    for event in (
        device.Invited(first),
        device.BlobReady(BLOB.sha256),
        device.Invited(following),
        device.Trained("run.1", bytes(40), 5),
    ):
        performer.handle(event)
    answer, failure, next_answer = around.said
    assert (answer, next_answer) == (Answer("run.1", True), Answer("run.2", True))
    assert isinstance(failure, Failure)
    assert "No space left" in failure.reason
    assert str(tmp_path) not in failure.reason  # a place on this device is nobody else's business
