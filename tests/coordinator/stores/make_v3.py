"""How v3.sqlite was made, with the covey before evaluation rounds. Kept for reading, as make_v1.py."""

from pathlib import Path

import numpy as np

from covey_coordinator.records import ACCEPTED, MISSING, DeviceVerdict
from covey_coordinator.store import Checkpoint, RunStore
from covey_protocol.blobs import blob_ref
from covey_protocol.messages import Invitation, Offer, TrainingPlan
from covey_protocol.round import Phase, Progress, RoundSettings


def invitation(number: int) -> Invitation:
    blob = blob_ref(bytes(16))
    plan = TrainingPlan(1, 0.5)
    return Invitation(f"old.{number}.abc", number, 1_700_000_000_000 + number, 60_000, blob, blob, plan, ("a", "b"))


def main(folder: Path) -> None:
    store = RunStore(folder)
    store.started("old", 5, 1_700_000_000_000)
    settings = RoundSettings(1, 20.0, 3.0, 16)
    for number in (1, 2):
        opened = invitation(number)
        store.open_round("old", opened, settings, opened.issued_at_ms)
        store.record(opened.round_id, "b", Progress.DECLINED, "declined: on battery")
        update = np.full(4, number, "<f4").tobytes()
        store.store_update("a", Offer(opened.round_id, blob_ref(update), 7), update)
        if number == 1:
            verdicts = [DeviceVerdict("a", ACCEPTED, "", 0.25), DeviceVerdict("b", MISSING, "declined: on battery")]
            store.conclude(
                opened.round_id, Phase.PUBLISHED, "", verdicts, Checkpoint(1, np.ones(4, np.float32), b"state")
            )
    store.keep_time("old.2.abc", 12_000)
    store._database.execute("PRAGMA journal_mode = DELETE")  # one file
    store.close()


if __name__ == "__main__":
    main(Path("v3"))
