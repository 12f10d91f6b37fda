"""Membership inference: on scores with known answers, and on nets that know their examples by heart."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.inversion import membership as inference
from covey_coordinator.inversion.keras_model import KerasModel
from covey_protocol.errors import UsageError

MEMBERS = 100


def normal(seed: int, size: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, size)


def test_scores_that_tell_all_members_are_a_perfect_attack() -> None:
    found = inference.threshold(np.array([3.0, 2.0]), np.array([1.0, 0.0, 0.5]))
    assert (found.auc, found.tpr_at_0_1_percent_fpr, found.advantage) == (1.0, 1.0, 1.0)
    assert (found.members, found.nonmembers) == (2, 3)


def test_equal_scores_tell_nothing() -> None:
    found = inference.threshold(np.ones(50), np.ones(70))
    assert (found.auc, found.tpr_at_0_1_percent_fpr, found.advantage) == (0.5, 0.0, 0.0)


def test_the_error_of_the_auc_is_that_of_scores_without_a_leak() -> None:
    found = [inference.threshold(normal(seed, 200), normal(1000 + seed, 300)) for seed in range(300)]
    spread = np.std([one.auc for one in found])
    assert spread == pytest.approx(found[0].auc_error, rel=0.15)  # standard error of a deviation of 300: 4%


def test_the_rate_at_few_false_alarms_needs_enough_nonmembers_or_a_note() -> None:
    inside = np.concatenate([np.full(30, 9.0), np.zeros(70)])
    outside = np.concatenate([[10.0], np.linspace(-1, 1, 999)])
    found = inference.threshold(inside, outside)  # one of 1,000 may be above
    assert (found.tpr_at_0_1_percent_fpr, found.resolution, found.notes) == (0.3, 0.001, ())
    few = inference.threshold(inside, outside[:500])
    assert few.tpr_at_0_1_percent_fpr == 0.0
    assert "With 500 nonmembers the smallest false-positive rate above 0 is 0.002" in few.notes[0]


def test_advantage_is_the_largest_difference_of_the_rates() -> None:
    assert inference.advantage(np.array([4.0, 3.0, 1.0]), np.array([2.0, 0.0])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([]), np.ones((2, 2))])
def test_scores_that_are_none_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(UsageError):
        inference.threshold(bad, np.ones(3))


def test_shadow_models_find_members_that_one_threshold_cannot() -> None:
    """Examples differ far more from each other than membership makes a difference: LiRA's case."""
    random = np.random.default_rng(0)
    hardness = random.normal(0, 10, 2000)
    shadow_member = np.tile(np.array([[True], [False]]), (8, 2000)) ^ (random.random(2000) < 0.5)
    shadow = hardness + 2.0 * shadow_member + random.normal(0, 0.5, shadow_member.shape)
    is_member = random.random(2000) < 0.5
    target = hardness + 2.0 * is_member + random.normal(0, 0.5, 2000)
    plain = inference.threshold(target[is_member], target[~is_member])
    found = inference.likelihood_ratio(target, is_member, shadow, shadow_member)
    assert plain.auc < 0.6
    assert found.auc > 0.99
    assert inference.best([plain, found]) is found


def test_an_example_that_every_shadow_model_has_seen_is_refused() -> None:
    member = np.array([[True, True], [True, False]])
    with pytest.raises(UsageError, match="in all models"):
        inference.likelihood_ratio(np.ones(2), np.array([True, False]), np.ones((2, 2)), member)
    with pytest.raises(UsageError, match="inside, or outside, of two"):
        inference.likelihood_ratio(np.ones(2), np.array([True, False]), np.ones((2, 2)), np.eye(2, dtype=bool))


@pytest.fixture(scope="module")
def learned_by_heart(digits: Any) -> tuple[Any, np.ndarray, Any, Any]:
    """(float64 model, its parameters, members, others): 100 digits, of which 20 with wrong labels, until they sit."""
    import tensorflow as tf

    x, y = (np.asarray(one) for one in digits)
    y = y.astype(np.int32)
    y[:20] = (y[:20] + 5) % 10
    tf.keras.utils.set_random_seed(0)
    layers = tf.keras.layers
    net = tf.keras.Sequential(
        [tf.keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(10)]
    )
    optimizer = tf.keras.optimizers.Adam(0.01)
    optimizer.build(net.trainable_variables)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            value = loss(y[:MEMBERS], net(x[:MEMBERS]))
        optimizer.apply_gradients(zip(tape.gradient(value, net.trainable_variables), net.trainable_variables))

    for _ in range(150):
        step()
    model = KerasModel(net, dtype=tf.float64)
    return model, model.parameters(), (x[:MEMBERS], y[:MEMBERS]), (x[MEMBERS:1200], y[MEMBERS:1200])


def test_a_model_that_knows_its_examples_by_heart_gives_them_away(learned_by_heart: Any) -> None:
    model, parameters, members, nonmembers = learned_by_heart
    for attack in ("threshold", "regression"):
        found = inference.membership(model, parameters, members, nonmembers, attack=attack)
        assert found.auc > 0.8, attack
        assert found.attack == attack
        assert found == inference.membership(model, parameters, members, nonmembers, attack=attack)


def test_a_model_that_was_not_trained_on_them_does_not(learned_by_heart: Any) -> None:
    model, parameters, members, nonmembers = learned_by_heart
    untrained = np.random.default_rng(3).normal(0, 0.1, parameters.shape)
    found = inference.membership(model, untrained, members, nonmembers)
    assert abs(found.auc - 0.5) < 3 * found.auc_error


def test_an_unknown_attack_is_refused_with_the_known_ones(learned_by_heart: Any) -> None:
    with pytest.raises(UsageError, match="take threshold or regression"):
        inference.membership(*learned_by_heart, attack="lira")


def test_losses_of_a_model_without_classes_are_those_of_each_example() -> None:
    import tensorflow as tf

    net = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(1)])
    model = KerasModel(net, "mean_squared_error", dtype=tf.float64)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(5, 3)), random.normal(size=5)
    kernel, bias = model.parameters()[:3].astype(np.float64), float(model.parameters()[3])
    expected = (x @ kernel + bias - y) ** 2
    np.testing.assert_allclose(-inference.scores(model, model.parameters(), x, y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # theirs: 0 / 0 where a threshold accuses nobody
def test_the_attacks_agree_with_tensorflow_privacys(monkeypatch: pytest.MonkeyPatch, learned_by_heart: Any) -> None:
    """COVEY_TENSORFLOW_PRIVACY: a folder that tensorflow-privacy 0.8.12 and what it needs beside ours were installed
    into (pip install --no-deps --target); 0.9.0 comes without its attacks."""
    folder = os.environ.get("COVEY_TENSORFLOW_PRIVACY")
    if not folder:
        pytest.skip("COVEY_TENSORFLOW_PRIVACY names no folder with tensorflow-privacy 0.8.12")
    import joblib
    import sklearn.utils
    import tensorflow_privacy.privacy as privacy

    monkeypatch.setattr(sklearn.utils, "parallel_backend", joblib.parallel_backend, raising=False)  # where it was then
    monkeypatch.setattr(sys, "path", [*sys.path, folder])  # last: everything else is this environment's
    monkeypatch.setattr(privacy, "__path__", [*privacy.__path__, str(Path(folder) / "tensorflow_privacy" / "privacy")])
    base = "tensorflow_privacy.privacy.privacy_tests.membership_inference_attack"
    structures = importlib.import_module(f"{base}.data_structures")
    theirs = importlib.import_module(f"{base}.membership_inference_attack")
    model, parameters, members, nonmembers = learned_by_heart
    ours = inference.membership(model, parameters, members, nonmembers)
    losses = [-inference.scores(model, parameters, *one) for one in (members, nonmembers)]
    attacked = structures.AttackInputData(loss_train=losses[0], loss_test=losses[1])
    kinds = [structures.AttackType.THRESHOLD_ATTACK]
    result = theirs.run_attacks(attacked, attack_types=kinds).single_attack_results[0]
    assert result.get_auc() == pytest.approx(ours.auc, abs=1e-9)
    assert result.get_attacker_advantage() == pytest.approx(ours.advantage, abs=1e-9)
    assert base in sys.modules
