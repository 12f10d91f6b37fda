"""Rounds with one real agent: sealed garbage does not end it, and a plan's clipping and FedProx reach its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from brokers import RunningBroker

from covey_coordinator.coordinator import Coordinator, RoundResult
from covey_coordinator.demo.devices import Shard, make_device
from covey_coordinator.demo.processes import AgentProcesses
from covey_coordinator.fleet import Fleet
from covey_coordinator.store import RunStore
from covey_edge.mqtt import parse_broker
from covey_protocol.bundle import read_bundle, write_bundle
from covey_protocol.errors import TrainingError
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.broker, pytest.mark.fleet]

PLAN = TrainingPlan(epochs=2, learning_rate=0.1, shuffle_seed=1)
Round = Callable[[bytes, TrainingPlan], tuple[RoundResult, np.ndarray]]


@pytest.fixture
def run_round(tmp_path: Path, coordinator_key: SealingKey, mosquitto: RunningBroker) -> Iterator[Round]:
    """(bundle, plan) -> the round's result and the device's update, empty if none came."""
    random = np.random.default_rng(0)
    shard = Shard(random.random((40, 8, 8, 1), np.float32), random.integers(0, 10, 40, np.int32))
    device = make_device(
        "pi", tmp_path / "pi", "home", {"url": mosquitto.url}, coordinator_key.public, shard,
        privacy={"screen_models": "off"},  # the parameters below are no model's
    )  # fmt: skip
    agents = AgentProcesses({"pi": device.config}, tmp_path / "logs")
    fleet = Fleet(parse_broker(mosquitto.url), "home", coordinator_key, {"pi": device.public})
    store, numbers = RunStore(tmp_path / "run"), iter(range(1, 100))
    coordinator = Coordinator(fleet, store)

    def once(bundle: bytes, plan: TrainingPlan) -> tuple[RoundResult, np.ndarray]:
        manifest = read_bundle(bundle).manifest
        result = coordinator.run_round(
            run_id="r",
            number=next(numbers),
            bundle=bundle,
            parameters=np.linspace(-0.2, 0.2, manifest.dimension, dtype=np.float32),
            plan=plan,
            device_ids=["pi"],
            quorum=1,
            engine=None,
        )
        offer = result.offers.get("pi")
        return result, store.read_update(offer.round_id, "pi") if offer else np.zeros(0, np.float32)

    try:
        fleet.connect()
        coordinator.wait_for(1, 60)
        yield once
    finally:
        agents.stop()
        fleet.close()


def test_the_agent_outlives_models_that_kill_its_child(
    run_round: Round, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    good = read_bundle(digits_bundle)
    for model in (good.model[: len(good.model) // 2], np.random.default_rng(0).bytes(3000)):
        bad, _ = run_round(write_bundle(good.manifest, model, coordinator_key), PLAN)
        assert bad.outcome == "abandoned"
        (verdict,) = bad.verdicts
        assert "the training process died (SIG" in verdict.reason or "cannot be loaded" in verdict.reason
    assert run_round(digits_bundle, PLAN)[0].outcome == "published"


def test_what_a_plan_asks_for_is_what_the_device_does(
    run_round: Round, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    import covey_models
    from covey_models import zoo

    model = zoo.build("small-cnn", (8, 8, 1), 10, seed=0)
    bundle = covey_models.export(
        model, name="digits", input_range=(0.0, 1.0), clip=True, proximal=True, key=coordinator_key
    )
    plans = {
        "plain": PLAN,
        "clipped": TrainingPlan(2, 0.1, shuffle_seed=1, gradient_clip_norm=0.01),
        "FedProx": TrainingPlan(2, 0.1, shuffle_seed=1, proximal_weight=5.0),
    }
    norms = {}
    for name, plan in plans.items():
        result, update = run_round(bundle, plan)
        assert result.outcome == "published"
        norms[name] = float(np.linalg.norm(update))
    steps = 2 * 3  # epochs of 40 examples in batches of 16
    assert norms["clipped"] <= 0.1 * 0.01 * steps * 1.0001
    assert norms["clipped"] < norms["FedProx"] < 0.9 * norms["plain"]
    with pytest.raises(TrainingError, match="--proximal"):  # before anything is sent
        run_round(digits_bundle, plans["FedProx"])
