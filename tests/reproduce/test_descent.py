"""Descent with one gradient per round: Keras's gradients, live rules and attacks, the papers' partitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.krum import Krum
from covey_coordinator.aggregation.rules import Batch
from covey_coordinator.grid.training import Network
from covey_coordinator.reproduce import descent
from covey_coordinator.reproduce.alie import PlainDistanceKrum
from covey_protocol.errors import ConfigError

SMALL: dict[str, Any] = {
    "data": "mnist",
    "hidden": (16,),
    "devices": 10,
    "hostile": 0,
    "rule": {"rule": "mean"},
    "attack": {"attack": "none"},
    "batch": 16,
    "rounds": 60,
    "learning_rate": 0.05,
    "server": "sgdm",
    "standardised": True,
    "measured": 20,
}


def outcome(folder: Path, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return descent.run(descent.settings_of(**{**SMALL, **changes}), seed, folder)


def test_gradients_of_two_hidden_layers_are_keras_gradients() -> None:
    random = np.random.default_rng(1)
    specs, initial = descent.dense_layers((6, 5, 4, 3), 7)
    x, y = random.normal(size=(3, 9, 6)).astype(np.float32), random.integers(0, 3, (3, 9))
    found = Network(specs).gradients(initial, x, y)
    for device in range(3):
        tensors = [tf.Variable(tensor) for tensor in Network(specs).tensors(initial)]
        with tf.GradientTape() as tape:
            value: Any = x[device]
            for layer in range(0, 6, 2):
                value = value @ tensors[layer] + tensors[layer + 1]
                value = tf.nn.relu(value) if layer < 4 else value
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y[device], value))
        expected = np.concatenate([np.ravel(part) for part in tape.gradient(loss, tensors)])
        np.testing.assert_allclose(found[device], expected, atol=1e-6)


def test_noise_ruins_the_mean_and_krum_does_not_notice(data_folder: Path) -> None:
    noise = {"attack": {"attack": "gaussian"}, "hostile": 3}
    clean, mean = outcome(data_folder), outcome(data_folder, **noise)
    krum = outcome(data_folder, **noise, rule={"rule": "krum", "num_byzantine": 3})
    assert clean["last"] > 0.8
    assert mean["last"] < 0.5
    assert krum["last"] > 0.7
    assert [place for place, _ in clean["curve"]] == [0, 20, 40, 60]
    assert clean["best"] == max(accuracy for _, accuracy in clean["curve"])


def test_trusted_examples_are_no_devices_and_carry_a_rule_through_a_hostile_majority(data_folder: Path) -> None:
    """Seven of ten reverse their gradients: FLTrust learns from a hundred examples of the coordinator's own."""
    hostile = {"attack": {"attack": "sign-flip"}, "hostile": 7, "trusted": 100}
    mean = outcome(data_folder, **hostile)
    fltrust = outcome(data_folder, **hostile, rule={"rule": "fltrust"})
    assert mean["last"] < 0.3
    assert fltrust["last"] > 0.6
    world = descent.world_of("mnist", (16,), 10, "iid", 0.5, True, 0, data_folder, 100)
    assert world.trusted is not None
    assert len(world.trusted.y) == 100
    assert sum(len(rows) for rows in world.shards) == len(world.train.y) == 1400
    own = {image.tobytes() for image in world.trusted.x}
    assert own.isdisjoint(image.tobytes() for image in world.train.x)


def test_the_same_seed_gives_the_same_curve_and_another_another(data_folder: Path) -> None:
    first, again, other = (outcome(data_folder, seed, rounds=20) for seed in (0, 0, 1))
    assert first["curve"] == again["curve"]
    assert first["curve"] != other["curve"]


def test_adam_at_the_server_learns_too(data_folder: Path) -> None:
    assert outcome(data_folder, server="adam", learning_rate=0.01)["last"] > 0.7


def test_rounds_that_are_refused_are_counted_and_the_model_stands_still(data_folder: Path) -> None:
    found = outcome(data_folder, rule={"rule": "krum", "num_byzantine": 4}, rounds=5, measured=1)
    assert found["rounds_refused"] == 5
    assert "krum needs n > 2f + 2" in found["last_refusal"]
    assert len({accuracy for _, accuracy in found["curve"]}) == 1


def test_a_backdoors_success_is_measured(data_folder: Path) -> None:
    backdoor = {"attack": {"attack": "scaling-backdoor"}, "hostile": 2}
    assert outcome(data_folder, **backdoor)["backdoor"] > 0.5
    assert outcome(data_folder, rounds=1)["backdoor"] is None


def test_another_librarys_rule_takes_the_engines_place(data_folder: Path) -> None:
    settings, seen = descent.settings_of(**{**SMALL, "rounds": 20, "server": "sgd"}), []
    ours = descent.run(settings, 0, data_folder, watch=lambda number, updates: seen.append((number, updates.shape)))
    theirs = descent.run(settings, 0, data_folder, aggregate=lambda updates: updates.mean(axis=0))
    assert [number for number, _ in seen] == list(range(20))
    assert len({shape for _, shape in seen}) == 1
    assert theirs["last"] == pytest.approx(ours["last"], abs=0.02)  # the same mean up to rounding


def test_spambase_is_learned(data_folder: Path) -> None:
    assert outcome(data_folder, data="spambase", hidden=(10, 5), standardised=False)["last"] > 0.9


def test_biased_shares_give_each_group_its_class_and_use_every_example_once() -> None:
    y = np.random.default_rng(0).integers(0, 5, 20_000)
    parts = descent.biased_shares(y, 12, 0.6, 3)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(y)))
    for device, part in enumerate(parts):
        counts = np.bincount(y[part], minlength=5) / len(part)
        assert counts[device % 5] == pytest.approx(0.6, abs=0.05)
    with pytest.raises(ConfigError, match="as many devices as classes"):
        descent.biased_shares(y, 4, 0.6, 3)


@pytest.mark.parametrize(("similarity", "classes"), [(0.0, 3), (1.0, 10)])
def test_similar_shares_go_from_few_classes_to_all(similarity: float, classes: int) -> None:
    y = np.random.default_rng(0).integers(0, 10, 5_000)
    parts = descent.similar_shares(y, 10, similarity, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(y)))
    seen = [len(np.unique(y[part])) for part in parts]
    assert max(seen) <= classes if similarity == 0.0 else min(seen) == classes


def test_plain_distances_make_krum_choose_equal_attackers_where_squared_ones_do_not() -> None:
    """51 devices of which 12 send mean - 1.5 sigma, as in the paper; distances in 2,000 columns are nearly sharp."""
    random = np.random.default_rng(0)
    honest = random.normal(size=(39, 2000)).astype(np.float32)
    hostile = np.repeat((honest.mean(0) - 1.5 * honest.std(0))[None], 12, axis=0)
    rows = np.concatenate([hostile, honest]).astype(np.float32)
    batch = Batch(Updates(rows), np.ones(51, np.float32), np.arange(51))
    chosen = [
        int(np.argmax(rule.step(NumpyKernels(), batch).accepted))
        for rule in (Krum(num_byzantine=12), PlainDistanceKrum(num_byzantine=12))
    ]
    assert chosen[0] >= 12
    assert chosen[1] < 12
