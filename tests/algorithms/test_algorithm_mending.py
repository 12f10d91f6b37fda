"""A damaged checkpoint of a gradient exchange: g is computed again to the same bits, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.algorithms.making import make_algorithm_engine
from covey_coordinator.algorithms.settings import Algorithm
from covey_coordinator.coordinator import arrivals_of, refuses_copies
from covey_coordinator.records import ACCEPTED, DeviceVerdict
from covey_coordinator.serve import _resume
from covey_coordinator.store import Checkpoint, RunStore
from covey_protocol.blobs import blob_ref
from covey_protocol.messages import Invitation, Offer, TrainingPlan
from covey_protocol.parameters import ParameterSpec
from covey_protocol.round import Phase, RoundSettings

D = 8
IDS = ("a", "b", "c")
START = np.zeros(D, np.float32)
ALGORITHM = Algorithm("fsvrg")


def engine() -> Any:
    specs = (ParameterSpec("dense", (D,)),)
    return make_algorithm_engine(ALGORITHM, "direct", make_rule("mean"), specs, rate=0.1, devices=3)


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunStore, Any]:
    """Exchanges of features, gradients, updates and gradients, and the engine after them."""
    store, made, parameters = RunStore(tmp_path / "run"), engine(), START
    for number in (1, 2, 3, 4):
        plan = ALGORITHM.plan(TrainingPlan(1, 0.1), made.work)
        blob = blob_ref(parameters.tobytes())
        invitation = Invitation(f"run.{number}.a", number, 1000 * number, 1000, blob, blob, plan, IDS)
        store.open_round("run", invitation, RoundSettings(2, 1.0, 1.0, 4 * D), 1000 * number)
        arrivals = arrivals_of(IDS, plan, D)
        for place, name in enumerate(IDS):
            row = np.random.default_rng([number, place]).uniform(0.1, 0.9, D).astype("<f4")
            store.store_update(name, Offer(invitation.round_id, blob_ref(row.tobytes()), 5), row.tobytes())
            arrivals.add(name, row, 5)
        parameters = made.aggregate(
            parameters, arrivals.screened(IDS, refuse_copies=refuses_copies(plan, made))
        ).parameters
        verdicts = [DeviceVerdict(name, ACCEPTED) for name in IDS]
        checkpoint = Checkpoint(number, parameters, made.saved_state())
        store.conclude(invitation.round_id, Phase.PUBLISHED, "", verdicts, checkpoint)
    return store, made


def spoil(store: RunStore, first: int) -> None:
    for number in range(first, 5):
        (store.checkpoints("run") / f"round-{number:05d}.state").write_bytes(b"damaged")


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_what_was_lost_is_computed_again(first: int, run: tuple[RunStore, Any]) -> None:
    store, made = run
    spoil(store, first)
    again = engine()
    _, done = _resume(store, again, "run", START, lambda line: None)
    assert done == 4
    assert again.saved_state() == made.saved_state()


def test_with_an_update_less_it_would_be_another_gradient_for_the_same_model(run: tuple[RunStore, Any]) -> None:
    store, _ = run
    spoil(store, 4)
    (sha256,) = store._one("SELECT sha256 FROM devices WHERE round = 'run.4.a' AND id = 'b'")
    (store.folder / "updates" / f"{sha256}.f32").unlink()
    said: list[str] = []
    again = engine()
    _, done = _resume(store, again, "run", START, said.append)
    assert done == 3
    assert again.work == "gradient"
    assert "the model of round 4 is damaged and cannot be computed again: its updates are lost" in said
