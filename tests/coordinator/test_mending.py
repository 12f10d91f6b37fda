"""A checkpoint that is damaged later: its model is computed again from the stored updates, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Trusted
from covey_coordinator.aggregation.screening import Arrivals
from covey_coordinator.records import ACCEPTED, REJECTED, DeviceVerdict
from covey_coordinator.serve import _resume
from covey_coordinator.store import Checkpoint, RunStore
from covey_protocol.blobs import blob_ref
from covey_protocol.messages import Invitation, Offer, TrainingPlan
from covey_protocol.parameters import ParameterSpec
from covey_protocol.round import Phase, Progress, RoundSettings

D = 8
IDS = ("a", "b", "c")
START = np.zeros(D, np.float32)


def engine() -> Any:
    return make_engine("direct", make_rule("mean", 0), (ParameterSpec("dense", (D,)),), "adam", 0.1)


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunStore, list[np.ndarray]]:
    """Three published rounds with Adam, and their models."""
    store, made, parameters, models = RunStore(tmp_path / "run"), engine(), START, []
    for number in (1, 2, 3):
        rng = np.random.default_rng(number)
        blob = blob_ref(parameters.tobytes())
        invitation = Invitation(f"run.{number}.a", number, 1000 * number, 1000, blob, blob, TrainingPlan(1, 0.1), IDS)
        store.open_round("run", invitation, RoundSettings(2, 1.0, 1.0, 4 * D), 1000 * number)
        updates = rng.normal(size=(len(IDS), D)).astype("<f4")
        for name, update in zip(IDS, updates):
            store.store_update(name, Offer(invitation.round_id, blob_ref(update.tobytes()), 5), update.tobytes())
        parameters = made.step(parameters, updates, [5.0] * 3, IDS).parameters
        models.append(parameters)
        verdicts = [DeviceVerdict(name, ACCEPTED) for name in IDS]
        checkpoint = Checkpoint(number, parameters, made.saved_state())
        store.conclude(invitation.round_id, Phase.PUBLISHED, "", verdicts, checkpoint)
    return store, models


def spoil(store: RunStore, *numbers: int) -> None:
    for number in numbers:
        (store.checkpoints("run") / f"round-{number:05d}.f32").write_bytes(b"damaged")


LOST: dict[str, tuple[int, ...]] = {"the newest model": (3,), "the last two": (2, 3), "all": (1, 2, 3)}


@pytest.mark.parametrize("what", LOST)
def test_what_was_lost_is_computed_again(what: str, run: tuple[RunStore, list[np.ndarray]]) -> None:
    store, models = run
    spoil(store, *LOST[what])
    said: list[str] = []
    made = engine()
    parameters, done = _resume(store, made, "run", START, said.append)
    assert done == 3
    assert parameters.tobytes() == models[2].tobytes()
    assert made.saved_state() == (store.checkpoints("run") / "round-00003.state").read_bytes()
    assert f"the model of round {LOST[what][0]} was damaged; it is computed again from the stored updates" in said
    found = store.newest_checkpoint("run", D)  # and it is mended
    assert found is not None
    assert (found.number, found.parameters.tobytes()) == (3, models[2].tobytes())


def test_where_an_update_is_gone_too_the_run_goes_on_before_that_round_and_says_so(
    run: tuple[RunStore, list[np.ndarray]],
) -> None:
    store, models = run
    spoil(store, 2, 3)
    gone = store.kept_updates("run.3.a")["b"][0].update.sha256.hex()
    (store.folder / "updates" / f"{gone}.f32").unlink()
    said: list[str] = []
    made = engine()
    parameters, done = _resume(store, made, "run", START, said.append)
    assert (done, parameters.tobytes()) == (2, models[1].tobytes())
    assert made.saved_state() == (store.checkpoints("run") / "round-00002.state").read_bytes()
    assert "the model of round 3 is damaged and cannot be computed again: its updates are lost" in said


def test_a_sound_run_is_not_computed_again(
    run: tuple[RunStore, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, models = run
    refuse: Callable[..., Any] = lambda *_: pytest.fail("computed again")  # noqa: E731
    monkeypatch.setattr(RunStore, "kept_updates", refuse)
    parameters, done = _resume(store, engine(), "run", START, lambda line: None)
    assert (done, parameters.tobytes()) == (3, models[2].tobytes())


def test_a_round_with_a_refused_device_is_computed_again_with_one_byzantine_device_fewer(
    tmp_path: Path,
) -> None:
    store = RunStore(tmp_path / "run")
    made = make_engine("direct", make_rule("trimmed-mean", 1), (ParameterSpec("dense", (D,)),))
    blob, ids = blob_ref(START.tobytes()), (*IDS, "d")
    invitation = Invitation("run.1.a", 1, 1000, 1000, blob, blob, TrainingPlan(1, 0.1), ids)
    store.open_round("run", invitation, RoundSettings(3, 1.0, 1.0, 4 * D), 1000)
    updates = np.random.default_rng(4).normal(size=(3, D)).astype("<f4")
    arrivals = Arrivals(ids, D)
    for name, update in zip(IDS, updates):
        store.store_update(name, Offer("run.1.a", blob_ref(update.tobytes()), 5), update.tobytes())
        arrivals.add(name, update, 5.0)
    store.record("run.1.a", "d", Progress.REFUSED, "an update of the wrong size")
    outcome = made.aggregate(START, arrivals.screened(IDS, refused_on_arrival=1))
    np.testing.assert_allclose(outcome.parameters, updates.mean(axis=0), rtol=1e-6)  # with f = 1 it were the median
    checkpoint = Checkpoint(1, outcome.parameters, made.saved_state())
    store.conclude("run.1.a", Phase.PUBLISHED, "", list(outcome.verdicts), checkpoint)
    spoil(store, 1)
    again = make_engine("direct", make_rule("trimmed-mean", 1), (ParameterSpec("dense", (D,)),))
    parameters, done = _resume(store, again, "run", START, lambda line: None)
    assert (done, parameters.tobytes()) == (1, outcome.parameters.tobytes())


def test_a_round_in_which_a_device_was_revoked_after_it_delivered_is_computed_again_without_it(tmp_path: Path) -> None:
    store, made, ids = RunStore(tmp_path / "run"), engine(), (*IDS, "stolen")
    blob = blob_ref(START.tobytes())
    invitation = Invitation("run.1.a", 1, 1000, 1000, blob, blob, TrainingPlan(1, 0.1), ids)
    store.open_round("run", invitation, RoundSettings(2, 1.0, 1.0, 4 * D), 1000)
    updates = np.random.default_rng(5).normal(size=(len(ids), D)).astype("<f4")
    for name, update in zip(ids, updates):
        store.store_update(name, Offer("run.1.a", blob_ref(update.tobytes()), 5), update.tobytes())
    store.record("run.1.a", "stolen", Progress.REVOKED, "revoked")
    parameters = made.step(START, updates[:3], [5.0] * 3, IDS).parameters
    verdicts = [*(DeviceVerdict(name, ACCEPTED) for name in IDS), DeviceVerdict("stolen", REJECTED, "revoked")]
    store.conclude("run.1.a", Phase.PUBLISHED, "", verdicts, Checkpoint(1, parameters, made.saved_state()))
    spoil(store, 1)
    again, done = _resume(store, engine(), "run", START, lambda line: None)
    assert (done, again.tobytes()) == (1, parameters.tobytes())


class OwnTraining:
    """As `trusted_training.TrustedTraining`: an update that follows from the round, its model and its plan."""

    def __init__(self) -> None:
        self.round: Any = None

    def begin(self, round_id: str, parameters: Any, plan: TrainingPlan) -> None:
        self.round = round_id, parameters

    def is_ready(self) -> bool:
        return True

    def given(self) -> Trusted:
        round_id, parameters = self.round
        noise = np.random.default_rng(list(round_id.encode())).normal(size=D)
        return Trusted((parameters + noise).astype(np.float32))

    def stop(self) -> None:
        self.round = None


def test_a_model_of_a_rule_with_trusted_data_is_computed_again_with_the_trusted_update_of_its_round(
    tmp_path: Path,
) -> None:
    store, own, parameters = RunStore(tmp_path / "run"), OwnTraining(), START
    made, again = (make_engine("direct", make_rule("fltrust"), (ParameterSpec("dense", (D,)),)) for _ in range(2))
    for number in (1, 2):
        blob = blob_ref(parameters.tobytes())
        invitation = Invitation(f"run.{number}.a", number, 1000 * number, 1000, blob, blob, TrainingPlan(1, 0.1), IDS)
        store.open_round("run", invitation, RoundSettings(2, 1.0, 1.0, 4 * D), 1000 * number)
        updates = np.random.default_rng(number).normal(size=(len(IDS), D)).astype("<f4")
        for name, update in zip(IDS, updates):
            store.store_update(name, Offer(invitation.round_id, blob_ref(update.tobytes()), 5), update.tobytes())
        own.begin(invitation.round_id, parameters, invitation.plan)
        outcome = made.step(parameters, updates, [5.0] * 3, IDS, own.given())
        parameters = outcome.parameters
        checkpoint = Checkpoint(number, parameters, made.saved_state())
        store.conclude(invitation.round_id, Phase.PUBLISHED, "", outcome.verdicts, checkpoint)
    spoil(store, 1, 2)
    found, done = _resume(store, again, "run", START, lambda line: None, own)
    assert (done, found.tobytes()) == (2, parameters.tobytes())
    assert own.round is None
