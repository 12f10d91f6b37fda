"""CoMT in TFF: the reference's numbers, from a computation in which the server sees sums alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from instances import fleet
from numpy.testing import assert_allclose, assert_array_equal

from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.simulation.sweep import cells_of
from covey_coordinator.simulation.world import model_of, world_of
from covey_coordinator.teaching.process import TeachingProcess
from covey_coordinator.teaching.reference import assembled, comt
from covey_coordinator.teaching.representing import representer
from covey_coordinator.teaching.server import begun, moved
from covey_coordinator.teaching.settings import SimulatedTeaching
from covey_coordinator.teaching.simulation import TaughtWorld
from covey_coordinator.teaching.tuning import balanced
from covey_models.user_code import UserCode
from covey_protocol.errors import ConfigError
from covey_protocol.features import Linear, one_vs_rest
from covey_protocol.teaching import Problem, Settings


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as running:
        yield running


def columns(sets: Any) -> Any:
    """Two columns of each y: as it is, and something else."""
    return [(x, np.column_stack([y, y * np.where(x[:, 0] > 0, 1.0, -1.0)])) for x, y in sets]


@pytest.mark.parametrize("kind", ["ridge", pytest.param("logistic", marks=pytest.mark.slow)])
def test_a_round_in_tff_is_the_references_to_1e_9(kind: str, worker: Worker) -> None:
    """Three teachers, of whom one holds trusted instances, and a holder without others; with crafting and selection."""
    teachers, trusted = (columns(part) for part in fleet(kind, seed=30, trusted=(3, 0, 0, 4)))
    crafting = {"lambda_y": 3.0} if kind == "ridge" else {}
    told = Settings(
        lambda_w=2.0, lambda_t=3.0, lambda_a=0.2, lambda_z=5.0, rho=4.0, curvature=6.0, rounds=4, **crafting
    )
    expected = comt(teachers, trusted, Problem(kind), told)
    with TeachingProcess(teachers, trusted, Problem(kind), told, worker) as process:
        intrinsics = re.findall(r"federated_\w+", str(process.computation.to_building_block()))
        local = {"federated_map", "federated_apply", "federated_zip_at_clients", "federated_zip_at_server"}
        assert set(intrinsics) - local == {"federated_broadcast", "federated_sum"}  # what crosses: down, and sums up
        state = process.initial_state()
        for residuals in expected.history:
            state, found = process.next(state)
            assert_allclose(found, residuals, rtol=1e-9)
    assert_allclose(state.standing.theta, expected.theta, rtol=1e-9)
    for kept, alpha in zip(state.kept, expected.alphas):
        assert_allclose(kept.alpha, alpha, rtol=1e-9, atol=1e-12)


EXPERIMENT: dict[str, Any] = {
    "name": "taught",
    "rounds": 3,
    "devices": 4,
    "trusted": {"size": 60},
    "corruption": [{"kind": "shift-labels", "fraction": 0.75}],
    "model": {"name": "softmax"},
    "training": {"algorithm": "comt"},
    "teaching": {"lambda_w": 30.0, "lambda_t": 30.0},
}


def test_it_is_one_more_algorithm_of_an_experiment(worker: Worker) -> None:
    """A cell's rounds are the reference's, on three of four devices with wrong labels; a saved one goes on alike."""
    (cell,) = cells_of(EXPERIMENT)
    world = world_of(cell)
    assert world.trusted is not None
    with TaughtWorld(world, worker) as taught:
        states = [taught.initial_state()]
        for _ in range(3):
            state, outcome = taught.next(states[-1], range(4))
            states.append(state)
        again, _ = taught.next(taught.loaded(taught.saved(states[2])), range(4))
        found = taught.evaluate(states[3], world.test.x, world.test.y)
        own = taught.evaluate_devices(states[3], [0, 1, 2, 3])
    assert_array_equal(again.standing.theta, states[3].standing.theta)
    sets = [(Linear()(one.x), one_vs_rest(one.y, 10)) for one in (*world.devices, world.trusted)]
    nothing = [(x[:0], y[:0]) for x, y in sets[:4]]
    told = Settings(lambda_w=30.0, lambda_t=30.0, rounds=3)
    problem, trusted = Problem("logistic"), [*nothing, sets[4]]
    expected = comt(sets[:4], trusted, problem, balanced(problem, sets[:4], trusted, told))
    assert_allclose(states[3].standing.theta, expected.theta, rtol=1e-6, atol=1e-9)
    assert outcome.measurements["primal_residual"] == pytest.approx(expected.history[-1].primal, rel=1e-6)
    right = (world.test.x.reshape(-1, 64) @ expected.theta[:-1] + expected.theta[-1]).argmax(axis=1) == world.test.y
    assert found["accuracy"] == right.mean() > 0.6  # after 3 rounds; the wrong digit would be told else
    clean = [one["accuracy"] for one, device in zip(own.values(), world.devices) if not device.faults]
    faulty = [one["accuracy"] for one, device in zip(own.values(), world.devices) if device.faults]
    assert min(clean) > 0.6 > 0.3 > max(faulty)


REFUSED = {
    "no [teaching]": ({"teaching": None}, "without"),
    "[teaching] of another algorithm": ({"training": {"algorithm": "fedavg"}}, "with"),
    "no trusted data": ({"trusted": {"size": 0}}, "without trusted data"),
    "a sample": ({"sample": 2}, "sample"),
    "a rule": ({"aggregation": {"rule": "median"}}, "aggregation"),
    "an attack": ({"attack": {"attack": "sign-flip", "fraction": 0.3}}, "attack"),
    "epochs": ({"training": {"algorithm": "comt", "epochs": 2}}, "training"),
    "a crafted target without bound": ({"teaching": {"lambda_y": 0.4}}, "lambda_y"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_experiment_that_sums_cannot_serve_is_refused(what: str) -> None:
    changes, told = REFUSED[what]
    with pytest.raises(ConfigError, match=told):
        cells_of({key: value for key, value in {**EXPERIMENT, **changes}.items() if value is not None})


def test_a_representation_can_be_trained_on_trusted_data_alone_and_made_of_fourier_features() -> None:
    (cell,) = cells_of({**EXPERIMENT, "model": {"name": "mlp"}})
    world = world_of(cell)
    assert world.trusted is not None
    held, loss = (world.trusted.x, world.trusted.y), "sparse_categorical_crossentropy"

    def seen(**changes: Any) -> Any:
        return representer(SimulatedTeaching(**changes), model_of(world, UserCode()), loss, held, 0)(world.test.x)

    first, trained = seen(), seen(representation_steps=8)
    assert first.shape == trained.shape == (len(world.test.x), 33)  # the mlp's 32 ReLUs, and a 1
    assert_array_equal(trained, seen(representation_steps=8))
    assert np.abs(trained - first).max() > 1e-3
    assert seen(fourier_features=7).shape == (len(world.test.x), 8)


def test_a_message_that_is_masked_teaches_as_well() -> None:
    """What secure aggregation asks: numbers that add up. The server gets whole numbers modulo 2^64 that tell nothing
    by themselves, and goes on with their sum alone."""
    teachers, trusted = fleet("ridge", seed=31)
    told = Settings(lambda_w=2.0, lambda_t=3.0, rho=4.0, curvature=6.0, rounds=8)
    expected = comt(teachers, trusted, Problem(), told)
    rest, random, scale = assembled(teachers, trusted, Problem(), told), np.random.default_rng(0), 2.0**40

    def masked_sum(messages: list[Any]) -> Any:
        whole = [np.round(message * scale).astype(np.int64).view(np.uint64) for message in messages]
        masks = random.integers(0, 2**64, (len(messages), 4), np.uint64)
        masks[-1] = -masks[:-1].sum(axis=0, dtype=np.uint64)  # as pairwise masks do, these cancel
        sent = [one + mask for one, mask in zip(whole, masks)]
        assert min(np.abs(one.view(np.int64) / scale - message).max() for one, message in zip(sent, messages)) > 1e4
        return np.sum(sent, axis=0, dtype=np.uint64).view(np.int64) / scale

    state = begun((4,))
    for _ in range(8):
        answers = masked_sum([one.answer(state.theta, state.u, state.tau - one.share) for one in rest])
        corrections = masked_sum([one.correct(state.theta) for one in rest if one.trusts])
        state, _ = moved(state, told, answers, 3, corrections, 2)
    assert_allclose(state.theta, expected.theta, atol=1e-9)
