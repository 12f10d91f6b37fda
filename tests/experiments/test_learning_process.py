"""Rounds of simulated devices: they send what real devices send, and what becomes of it is what live rounds do."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from simulation_helpers import BATCH, SIZES, digits, learning, softmax, test_digits

import covey_models
from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.worker import Worker
from covey_coordinator.attacks.registry import make_attack
from covey_coordinator.simulation.device_work import protected
from covey_coordinator.simulation.learning import CentralPrivacy, DeviceData, Privacy
from covey_coordinator.simulation.process import Simulation
from covey_edge.runtime import Model
from covey_edge.trainer import train
from covey_protocol import privacy
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import ConfigError, DataError, RuleError, StorageError, UsageError
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

ALL = tuple(range(len(SIZES)))


def update_of(simulation: Simulation, state: Any, number: int) -> Any:
    """What one device sends: with a mean of one device and FedAvg's server, the change of the model."""
    return simulation.parameters(simulation.next(state, [number])[0]) - simulation.parameters(state)


def test_a_simulated_device_sends_what_a_real_one_does(worker: Worker) -> None:
    """Momentum, dropout, FedProx, clipped gradients, a ragged last batch; tflite_runtime beside TensorFlow."""
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.InputLayer((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(12, activation="tanh", kernel_initializer=tf.keras.initializers.GlorotUniform(1)),
            layers.Dropout(0.3),
            layers.Dense(10, kernel_initializer=tf.keras.initializers.GlorotUniform(2)),
        ]
    )
    key = SealingKey.generate()
    data = covey_models.export(
        model,
        name="tanh",
        batch_size=BATCH,
        optimizer="momentum",
        clip=True,
        proximal=True,
        input_range=(0.0, 1.0),
        key=key,
    )
    plan = TrainingPlan(epochs=2, learning_rate=0.1, shuffle_seed=5, gradient_clip_norm=1.5, proximal_weight=0.1)
    devices = digits((21,))
    settings = learning(model=model, plan=plan, optimizer="momentum")
    with Simulation(settings, devices, worker=worker) as simulation:
        state = simulation.initial_state()
        received = simulation.parameters(state)
        simulated = update_of(simulation, state, 0)
        loss = simulation.next(state, [0])[1].loss

    device = Model(read_bundle(data, key.public))
    np.testing.assert_array_equal(device.parameters(), received)
    real_loss = train(device, (devices[0].x, devices[0].y.astype(np.int32)), plan, devices[0].device_id)
    sent = device.parameters() - received

    np.testing.assert_allclose(simulated, sent, atol=2e-6 * float(np.linalg.norm(sent)))
    assert loss == pytest.approx(real_loss, rel=1e-5)


@pytest.mark.parametrize("name", ["mean", "multi-krum", pytest.param("median", marks=pytest.mark.slow)])
def test_a_round_is_the_direct_engines_step_on_the_same_updates(worker: Worker, name: str) -> None:
    rule, devices = make_rule(name, 0 if name == "mean" else 1), digits()
    settings = learning(rule=rule, server_optimizer="adam", server_learning_rate=0.05)
    with Simulation(dataclasses.replace(settings, rule=make_rule("mean"), server_optimizer="sgd",
                                        server_learning_rate=1.0), devices, worker=worker) as alone:  # fmt: skip
        state = alone.initial_state()
        received = alone.parameters(state)
        updates = [update_of(alone, state, number) for number in ALL]
        specs = alone.parameter_specs
    with Simulation(settings, devices, worker=worker) as simulation:
        state, outcome = simulation.next(simulation.initial_state(), ALL)
        published = simulation.parameters(state)

    engine = make_engine("direct", rule, specs, "adam", 0.05)
    ids = [device.device_id for device in devices]
    step = engine.step(received, updates, [float(size) for size in SIZES], ids)
    engine.close()

    # a change of the model is an update to one rounding of its parameters, not the update itself
    np.testing.assert_allclose(published, step.parameters, atol=1e-6)
    accepted = {verdict.device_id: verdict.status == "accepted" for verdict in step.verdicts}
    assert {one: verdict.accepted for one, verdict in outcome.verdicts.items()} == accepted


def test_krum_turns_scaled_sign_flips_away_and_the_mean_does_not_bear_them(worker: Worker) -> None:
    attack, hostile = make_attack("sign-flip", scale=20.0), (1, 4)
    x, y = test_digits()
    accuracy = {}
    for name, f in (("mean", 0), ("krum", 2)):
        devices = digits((60,) * 8)
        settings = learning(rule=make_rule(name, f), attack=attack, hostile=hostile)
        with Simulation(settings, devices, worker=worker) as simulation:
            state = simulation.initial_state()
            for number in range(6):
                state, outcome = simulation.next(state, range(8), number)
            accuracy[name] = simulation.evaluate(state, x, y)["accuracy"]
            if name == "krum":
                assert not any(outcome.verdicts[devices[one].device_id].accepted for one in hostile)
    assert accuracy["krum"] > 0.6
    assert accuracy["mean"] < 0.3


def test_the_process_is_tffs_own_and_goes_on_bit_for_bit_from_what_was_saved(worker: Worker) -> None:
    settings = learning(
        rule=make_rule("centred-clipping", 1), server_optimizer="yogi", server_learning_rate=0.01,
        attack=make_attack("gaussian", sigma=0.01), hostile=(2,), seed=9,
    )  # fmt: skip
    with Simulation(settings, digits(), worker=worker) as simulation:
        assert isinstance(simulation.process, tff.learning.templates.LearningProcess)
        state, _ = simulation.next(simulation.initial_state(), ALL, 1)
        saved = simulation.saved(state)
        state, _ = simulation.next(state, ALL[:5], 2)
        expected = simulation.parameters(state)
    with Simulation(settings, digits(), worker=worker) as again:
        state, _ = again.next(again.loaded(saved), ALL[:5], 2)
        np.testing.assert_array_equal(again.parameters(state), expected)
    with Simulation(learning(), digits(), worker=worker) as other, pytest.raises(StorageError, match="other settings"):
        other.loaded(saved)


def test_examples_sent_with_the_round_give_the_same_bits_as_files(worker: Worker) -> None:
    published = []
    for send_data in (False, True):
        with Simulation(learning(), digits(), worker=worker, send_data=send_data) as simulation:
            state, _ = simulation.next(simulation.initial_state(), ALL)
            published.append(simulation.parameters(state))
    np.testing.assert_array_equal(*published)


def test_fedsgd_is_one_step_along_the_mean_gradient_of_all_examples(worker: Worker) -> None:
    devices, model = digits(), softmax()
    with Simulation(learning(algorithm="fedsgd", model=model), devices, worker=worker) as simulation:
        before = simulation.initial_state()
        after, outcome = simulation.next(before, ALL)
        moved = simulation.parameters(after) - simulation.parameters(before)
    x, y = (np.concatenate([getattr(device, part) for device in devices]) for part in "xy")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True))
    gradient = np.concatenate([np.ravel(part) for part in tape.gradient(loss, model.trainable_variables)])
    np.testing.assert_allclose(moved, -0.1 * gradient, atol=1e-6)
    assert outcome.loss == pytest.approx(float(loss), rel=1e-5)


def test_evaluations_are_keras_own(worker: Worker) -> None:
    devices, model = digits(), softmax()
    model.compile(loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    with Simulation(learning(model=model), devices, worker=worker) as simulation:
        state = simulation.initial_state()
        x, y = test_digits()
        x, y = np.concatenate([x] * 7), np.concatenate([y] * 7)  # more than one piece
        central = simulation.evaluate(state, x, y)
        of_devices = simulation.evaluate_devices(state, [3, 1])
    for found, (data_x, data_y) in (
        (central, (x, y)),
        (of_devices["device-003"], (devices[3].x, devices[3].y)),
        (of_devices["device-001"], (devices[1].x, devices[1].y)),
    ):
        loss, accuracy = model.evaluate(data_x, data_y, verbose=0)
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert list(of_devices) == ["device-003", "device-001"]
    assert of_devices["device-003"]["num_examples"] == SIZES[3]


def test_a_device_that_diverges_is_left_out_and_the_others_make_the_model(worker: Worker) -> None:
    devices = digits()
    wild = devices[2]._replace(x=np.full_like(devices[2].x, np.float32(1e30)))
    with Simulation(learning(), [*devices[:2], wild, *devices[3:]], worker=worker) as simulation:
        state, outcome = simulation.next(simulation.initial_state(), ALL)
        found = simulation.parameters(state)
    others = [number for number in ALL if number != 2]
    with Simulation(learning(), devices, worker=worker) as simulation:
        state, expected = simulation.next(simulation.initial_state(), others)
        np.testing.assert_allclose(found, simulation.parameters(state), atol=1e-6)
    assert not outcome.verdicts["device-002"].accepted
    assert outcome.loss == pytest.approx(expected.loss, rel=1e-6)


def test_central_noise_is_repeatable_and_as_large_as_asked(worker: Worker) -> None:
    def moved(noise_multiplier: float, seed: int) -> tuple[Any, float]:
        central = CentralPrivacy(0.5, noise_multiplier, devices_per_round=len(SIZES), rounds=3)
        with Simulation(learning(privacy=central, seed=seed), digits(), worker=worker) as simulation:
            before = simulation.initial_state()
            after, outcome = simulation.next(before, ALL)
            return simulation.parameters(after) - simulation.parameters(before), outcome.measurements["epsilon"]

    clean, infinite = moved(0.0, 1)
    noised, epsilon = moved(2.0, 1)
    again, _ = moved(2.0, 1)
    other, _ = moved(2.0, 2)
    np.testing.assert_array_equal(noised, again)
    assert not np.array_equal(noised, other)
    noise = (noised - clean) * len(SIZES)
    assert np.std(noise) == pytest.approx(2.0 * 0.5, rel=0.1)  # 650 numbers: 2.8 % is one standard deviation
    assert abs(np.mean(noise)) < 4 * 1.0 / np.sqrt(noise.size)
    assert np.linalg.norm(clean) <= 0.5 + 1e-6
    assert 0 < epsilon < infinite == np.inf


def test_a_devices_own_clip_and_noise_are_those_of_the_agent() -> None:
    update = np.random.default_rng(1).standard_normal(2000).astype(np.float32)
    clipped = protected(tf.constant(update), Privacy(3.0), tf.constant(1, tf.int64)).numpy()
    np.testing.assert_allclose(clipped, privacy.clip(update, 3.0), rtol=2e-7)
    short = update * np.float32(1e-3)
    np.testing.assert_array_equal(protected(tf.constant(short), Privacy(3.0), tf.constant(1, tf.int64)), short)
    noised = [protected(tf.constant(update), Privacy(3.0, 0.5), tf.constant(s, tf.int64)).numpy() for s in (1, 1, 2)]
    np.testing.assert_array_equal(noised[0], noised[1])
    assert not np.array_equal(noised[0], noised[2])
    noise = noised[0] - clipped
    assert np.std(noise) == pytest.approx(1.5, rel=0.08)
    assert abs(np.mean(noise)) < 4 * 1.5 / np.sqrt(noise.size)


def test_each_device_draws_noise_of_its_own_in_every_round(worker: Worker) -> None:
    same = digits((20,)) + [one._replace(device_id="device-001") for one in digits((20,))]
    settings = learning(privacy=Privacy(0.1, 1.0), plan=TrainingPlan(epochs=1, learning_rate=1e-6))
    with Simulation(settings, same, worker=worker) as simulation:
        state = simulation.initial_state()
        noises = [update_of(simulation, state, number) for number in (0, 1)]
        later = simulation.next(state, [0], 7)[0]
        noises.append(simulation.parameters(later) - simulation.parameters(state))
    for one, other in ((0, 1), (0, 2)):
        assert abs(np.corrcoef(noises[one], noises[other])[0, 1]) < 0.2


CASES = {
    "no example": (lambda d: [d[0]._replace(x=d[0].x[:0], y=d[0].y[:0])], DataError, "at least one example"),
    "another shape": (lambda d: [d[0]._replace(x=d[0].x.reshape(-1, 64))], DataError, "the model takes"),
    "labels missing": (lambda d: [d[0]._replace(y=d[0].y[:-1])], DataError, "one each"),
    "a class the model has not": (lambda d: [d[0]._replace(y=d[0].y + 1)], DataError, "as many classes"),
}


@pytest.mark.parametrize("what", CASES)
def test_devices_that_do_not_fit_the_model_are_named(worker: Worker, what: str) -> None:
    change, error, told = CASES[what]
    with pytest.raises(error, match=told) as raised:
        Simulation(learning(), change(digits()), worker=worker)
    assert "device-000" in str(raised.value)


def test_cohorts_that_cannot_be_are_refused_and_the_state_stays_good(worker: Worker) -> None:
    settings = learning(rule=make_rule("krum", 1), attack=make_attack("alie"), hostile=(0, 1, 2, 3, 4))
    with Simulation(settings, digits(), worker=worker) as simulation:
        state = simulation.initial_state()
        for cohort, error in (([0, 0], UsageError), ([99], UsageError), ([5, 1, 2], RuleError), (ALL[:5], RuleError)):
            with pytest.raises(error):
                simulation.next(state, cohort)
        simulation.next(state, ALL)
    with pytest.raises(ConfigError, match="fedavg"):
        learning(algorithm="fedavgg")


def test_nothing_stays_behind() -> None:
    simulation = Simulation(learning(), digits())
    worker, shards = simulation._worker, simulation._shards
    folder = Path(shards._folder.name)  # type: ignore[attr-defined]
    pid = worker.pid
    assert pid is not None
    assert folder.is_dir()
    simulation.close()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_device_may_have_any_label_type(worker: Worker) -> None:
    devices = [DeviceData(one.device_id, one.x.astype(np.float64), one.y.astype(np.int64)) for one in digits()]
    with Simulation(learning(), devices, worker=worker) as wide, Simulation(learning(), digits(), worker=worker) as own:
        found = [one.parameters(one.next(one.initial_state(), ALL)[0]) for one in (wide, own)]
    np.testing.assert_array_equal(*found)
