"""The simulated fleet: its training is Keras's, and attacks and rules do in it what they are known for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from covey_coordinator.attacks.registry import make_attack
from covey_coordinator.grid.settings import Cell, GridSettings, plan_of
from covey_coordinator.grid.simulation import Fleet, corrupted_devices, flat, simulated, world_of
from covey_models import zoo
from covey_models.population import populate

SMALL = GridSettings(
    rules=("mean", "trimmed-mean"), fractions=(0.0, 0.25), seeds=1, devices=8, rounds=6, learning_rate=0.3
)


def cell_of(rule: str, attack: str, seed: int = 0) -> dict[str, Any]:
    plan = plan_of(SMALL)
    return simulated(plan, Cell(rule, attack, 0.25, 2, seed))


@pytest.mark.parametrize("model", ["mlp", "softmax"])
def test_local_training_is_what_keras_does(model: str) -> None:
    world = world_of("breast-cancer", model, 4, 1.0, 3)
    batches = np.random.default_rng(0).integers(0, len(world.train), (5, 4, 6))
    x, y = flat(world.train.x), world.train.y
    trained = world.network.trained(world.initial, x, y, batches, 0.2)
    for device in range(4):
        keras = zoo.build(model, world.train.input_shape, 2, 3)
        optimizer = tf.keras.optimizers.SGD(0.2)
        for step in range(5):
            rows = batches[step, device]
            with tf.GradientTape() as tape:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y[rows], keras(x[rows]))
                loss = tf.reduce_mean(losses)
            optimizer.apply_gradients(zip(tape.gradient(loss, keras.trainable_weights), keras.trainable_weights))
        expected = np.concatenate([np.ravel(weight) for weight in keras.get_weights()])
        np.testing.assert_allclose(trained[device], expected, atol=2e-6)
        expected_classes = np.argmax(keras(flat(world.test.x)), axis=1)
        np.testing.assert_array_equal(world.network.predicted(trained[device], flat(world.test.x)), expected_classes)


def test_corrupted_devices_of_a_smaller_fraction_are_among_those_of_a_larger() -> None:
    chosen = [set(corrupted_devices(20, number, 5).tolist()) for number in (0, 2, 4, 8)]
    assert [len(one) for one in chosen] == [0, 2, 4, 8]
    assert all(fewer <= more for fewer, more in zip(chosen, chosen[1:]))
    assert chosen[3] != set(corrupted_devices(20, 8, 6).tolist())


def test_a_population_corrupts_the_devices_that_the_grid_corrupts() -> None:
    flips = {"kind": "shift-labels", "fraction": 0.25}
    for seed in range(5):
        population = populate(world_of("digits", "softmax", 8, 1.0, 0).train, devices=8, corruptions=[flips], seed=seed)
        found = [number for number, device in enumerate(population.devices) if device.faults]
        assert found == corrupted_devices(8, 2, seed).tolist()


def test_momentum_averages_updates_over_rounds() -> None:
    world = world_of("breast-cancer", "softmax", 4, 1.0, 0)
    settings = GridSettings(data="breast-cancer", model="softmax", devices=4)
    none = np.array([], np.int64)
    plain = Fleet(world, settings, make_attack("none"), none, 0)
    with_momentum = Fleet(
        world,
        GridSettings(data="breast-cancer", model="softmax", devices=4, momentum=0.9),
        make_attack("none"),
        none,
        0,
    )
    first, second = (plain.updates(world.initial, number) for number in (0, 1))
    np.testing.assert_allclose(with_momentum.updates(world.initial, 0), 0.1 * first, atol=1e-7)
    np.testing.assert_allclose(with_momentum.updates(world.initial, 1), 0.09 * first + 0.1 * second, atol=1e-7)


def test_the_same_cell_gives_the_same_result_and_another_seed_another() -> None:
    first, again, other = cell_of("mean", "none"), cell_of("mean", "none"), cell_of("mean", "none", seed=1)
    assert first["curve"] == again["curve"]
    assert first["curve"] != other["curve"]
    assert first["curve"][-1] > first["curve"][0] + 0.1


def test_noise_ruins_the_mean_and_not_the_trimmed_mean() -> None:
    clean = cell_of("mean", "none")["accuracy"]
    assert clean > 0.75
    assert cell_of("mean", "gaussian")["accuracy"] < clean - 0.3
    trimmed = cell_of("trimmed-mean", "gaussian")
    assert trimmed["accuracy"] > clean - 0.12
    assert trimmed["told"] == 2


def test_nan_and_zeros_are_caught_by_screening_even_for_the_mean() -> None:
    results = [cell_of("mean", name) for name in ("nan", "zero")]
    assert results[0]["curve"] == results[1]["curve"]  # either way exactly the honest devices are left
    assert results[0]["accuracy"] > 0.75
    assert results[0]["rounds_refused"] == 0


def test_the_backdoor_owns_the_mean_and_its_success_is_measured() -> None:
    on_mean, on_trimmed = cell_of("mean", "scaling-backdoor"), cell_of("trimmed-mean", "scaling-backdoor")
    assert on_mean["backdoor_success"] > 0.8
    assert on_trimmed["backdoor_success"] < on_mean["backdoor_success"] - 0.3
    assert cell_of("mean", "none")["backdoor_success"] is None


def test_devices_that_are_refused_count_as_corrupted_ones_and_starve_no_round() -> None:
    settings = GridSettings(
        rules=("multi-krum",), fractions=(0.25,), devices=8, rounds=3
    )  # 6 left, and 7 would be needed for f = 2
    result = simulated(plan_of(settings), Cell("multi-krum", "nan", 0.25, 2, 0))
    assert (result["rounds_refused"], result["told"]) == (0, 2)
    assert len(set(result["curve"])) == 3


def test_rounds_that_the_rule_refuses_are_counted_and_the_model_stands_still() -> None:
    told_less = {"rule": "multi-krum", "num_byzantine": 1, "num_selected": 7}
    settings = GridSettings(rules=(told_less,), fractions=(0.25,), devices=8, rounds=3)  # 6 left, not 7 to select
    plan = plan_of(settings)
    result = simulated(plan, Cell(next(iter(plan.rules)), "nan", 0.25, 2, 0))
    assert result["rounds_refused"] == 3
    assert "num_selected = 7 of 6 updates" in result["last_refusal"]
    assert len(set(result["curve"])) == 1
