"""The optimisation attacks find inputs from gradients, keep their promises to callers, and unroll local steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from covey_coordinator.inversion import matching
from covey_coordinator.inversion.contract import Seen
from covey_coordinator.inversion.deep_leakage import DeepLeakage, WholeBatch
from covey_coordinator.inversion.grading import grade
from covey_coordinator.inversion.inverting_gradients import InvertingGradients
from covey_coordinator.inversion.keras_model import KerasModel
from covey_coordinator.inversion.local_steps import LocalSteps, schedule
from covey_coordinator.inversion.matching import Distance, rows_of_steps
from covey_coordinator.inversion.small_models import relu_mlp, sigmoid_lenet
from covey_protocol.errors import ConfigError, UsageError
from covey_protocol.messages import TrainingPlan

RANGE = (0.0, 1.0)
ONE_STEP = TrainingPlan(epochs=1, learning_rate=0.1)


def one_step(model: KerasModel, x: np.ndarray, y: np.ndarray) -> Seen:
    gradient = np.asarray(model.gradient(model.parameters(), x, y.astype(np.int32)))
    return Seen(model.parameters(), -ONE_STEP.learning_rate * gradient, ONE_STEP, len(x))


def psnr_of(finding: Any, x: np.ndarray, y: np.ndarray) -> float:
    return grade(finding, x, y, RANGE).mean_psnr_db


@pytest.fixture(scope="module")
def mlp() -> KerasModel:
    return KerasModel(relu_mlp((8, 8, 1), 10, 0), batch_size=2)


def test_deep_leakage_finds_picture_and_label_exactly_on_a_fresh_lenet(digits):
    import tensorflow as tf

    x, y = digits[0][:1], digits[1][:1]
    model = KerasModel(sigmoid_lenet((8, 8, 1), 10, 0), dtype=tf.float64)
    found = DeepLeakage(400).run(model, one_step(model, x, y), seed=0)
    assert psnr_of(found, x, y) > 80
    assert list(found.labels) == list(y)
    assert found.iterations < 400  # it knows that it is there


def test_updates_share_a_graph_into_which_nothing_of_the_first_is_built(digits, mlp):
    """Another update from other parameters has the score that its own objective gives at what was found."""
    gradient_of = np.asarray(mlp.gradient(mlp.parameters(), digits[0][:1], digits[1][:1].astype(np.int32)))
    first = Seen(mlp.parameters(), -ONE_STEP.learning_rate * gradient_of, ONE_STEP, 1)
    moved = np.asarray(mlp.parameters() - np.float32(5) * gradient_of, np.float32)
    gradient = np.asarray(mlp.gradient(moved, digits[0][5:6], digits[1][5:6].astype(np.int32)))
    other = Seen(moved, -ONE_STEP.learning_rate * gradient, ONE_STEP, 1)
    attacks = {
        matching._descent: InvertingGradients(20, 1, settings=matching.Descent(fade=1.0)),
        matching._joint: DeepLeakage(20, labels="read"),
    }
    for cache, attack in attacks.items():
        cache.cache_clear()
        attack.run(mlp, first, seed=0)
        found = attack.run(mlp, other, seed=0)
        assert cache.cache_info().misses == 1
        assert cache.cache_info().hits >= 1
        problem = matching.problem_of(mlp, other, 1, WholeBatch(mlp), attack.distance)
        score = problem.graph.objective(problem.known, found.inputs.astype(np.float32), found.labels.astype(np.int32))
        assert found.score == pytest.approx(float(score), rel=1e-4)


def test_inverting_gradients_finds_a_picture_and_clipping_does_not_matter(digits, mlp):
    x, y = digits[0][:1], digits[1][:1]
    seen, attack = one_step(mlp, x, y), InvertingGradients(300, 1)
    found = attack.run(mlp, seen, seed=0)
    assert psnr_of(found, x, y) > 30
    assert list(found.labels) == list(y)
    norm = 0.05 * float(np.linalg.norm(seen.update))
    clipped = dataclasses.replace(seen, update=np.float32(0.05) * seen.update, clip_norm=norm)
    assert psnr_of(attack.run(mlp, clipped, seed=0), x, y) > 30


def test_smoothness_fades_as_far_as_the_noise_lets_it(digits, mlp):
    x, y = digits[0][:1], digits[1][:1]
    clean = one_step(mlp, x, y)
    problem = matching.problem_of(mlp, clean, 1, WholeBatch(mlp), matching.DIRECTION)
    begun, length = matching.Descent(), float(np.linalg.norm(clean.update))

    def last(noise_std: float) -> float:
        told = matching.faded(begun, problem, dataclasses.replace(clean, noise_std=noise_std))
        return told.smoothing * told.fade

    assert last(0.0) == last(1e-9 * length) == matching.LAST_SMOOTHING
    at = 0.01 * length
    probable = 0.01**2 * x[0].size / matching.NEIGHBOURS / matching.DIRECTION.total_variation
    assert last(at) == pytest.approx(probable)
    assert last(10 * at) == pytest.approx(100 * probable)
    assert 100 * probable > 1  # it rises there


@pytest.mark.slow
def test_a_little_noise_that_is_known_leaves_a_picture_a_little_less_exact(digits, mlp):
    x, y = digits[0][:1], digits[1][:1]
    clean, rng = one_step(mlp, x, y), np.random.default_rng(0)
    size = float(np.linalg.norm(clean.update)) / np.sqrt(len(clean.update))
    found = []
    for share in (0.001, 0.01, 0.1):
        noise = share * size * rng.standard_normal(len(clean.update))
        sent = dataclasses.replace(clean, update=np.asarray(clean.update + noise, np.float32), noise_std=share * size)
        found.append(psnr_of(InvertingGradients(600, 1, labels=y).run(mlp, sent, seed=0), x, y))
    assert found == sorted(found, reverse=True)
    assert found[0] > 40
    assert found[1] > 30


@pytest.mark.slow
def test_a_clipped_update_is_stretched_for_distances_that_see_its_length(digits):
    x, y = digits[0][3:4], digits[1][3:4]
    model = KerasModel(sigmoid_lenet((8, 8, 1), 10, 0))
    seen = one_step(model, x, y)
    short = dataclasses.replace(seen, update=np.float32(0.01) * seen.update)
    clipped = dataclasses.replace(short, clip_norm=float(np.linalg.norm(short.update)))
    attack = DeepLeakage(150)
    assert psnr_of(attack.run(model, clipped, seed=0), x, y) > 40
    assert psnr_of(attack.run(model, short, seed=0), x, y) < 20  # taken at its word, it is another gradient


@pytest.mark.parametrize(
    "attack",
    [
        InvertingGradients(10, 2),
        pytest.param(DeepLeakage(20), marks=pytest.mark.slow),
        pytest.param(LocalSteps(iterations=10), marks=pytest.mark.slow),
    ],
)
def test_seeds_decide_everything_and_stop_and_progress_are_honoured(digits, mlp, attack):
    x, y = digits[0][:2], digits[1][:2]
    seen, told = one_step(mlp, x, y), []
    first = attack.run(mlp, seen, seed=1, progress=lambda done, total: told.append((done, total)))
    np.testing.assert_array_equal(first.inputs, attack.run(mlp, seen, seed=1).inputs)
    assert told == sorted(told)
    assert told[-1] == (20, 20)
    ended = attack.run(mlp, seen, seed=1, stop=lambda: True)
    assert np.abs(ended.inputs - attack.run(mlp, seen, seed=2, stop=lambda: True).inputs).max() > 1e-3
    assert ended.iterations == 0
    assert ended.inputs.shape == x.shape
    assert ended.inputs.min() >= 0 <= 1 >= ended.inputs.max()


@pytest.mark.slow
def test_more_starts_are_never_worse_by_the_attacks_own_measure(digits, mlp):
    seen = one_step(mlp, digits[0][:2], digits[1][:2])
    alone = InvertingGradients(30, 1).run(mlp, seen, seed=3)
    several = InvertingGradients(30, 2).run(mlp, seen, seed=3)
    assert several.score <= alone.score


@pytest.mark.slow
def test_distances_mix(digits, mlp):
    x, y = digits[0][:1], digits[1][:1]
    mixed = Distance(cosine=1.0, euclidean=0.1, l1=0.01, total_variation=0.01)
    found = InvertingGradients(300, 1, distance=mixed).run(mlp, one_step(mlp, x, y), seed=0)
    assert psnr_of(found, x, y) > 25


def test_an_update_that_cannot_be_attacked_is_refused(digits, mlp):
    seen = one_step(mlp, digits[0][:1], digits[1][:1])
    for update, match in ((np.zeros_like(seen.update), "nothing"), (seen.update[1:], "shape")):
        with pytest.raises(UsageError, match=match):
            InvertingGradients(10).run(mlp, dataclasses.replace(seen, update=update), seed=0)
    with pytest.raises(UsageError, match="nothing"):
        Distance(total_variation=1.0)
    long = dataclasses.replace(seen, plan=TrainingPlan(epochs=201, learning_rate=0.1))
    with pytest.raises(ConfigError, match="201 local steps"):
        LocalSteps().run(mlp, long, seed=0)
    with pytest.raises(ConfigError, match="known"):
        LocalSteps(order="guessed")


# --- several local steps


def local_training(model: KerasModel, x: np.ndarray, y: np.ndarray, plan: TrainingPlan) -> Seen:
    told = Seen(model.parameters(), model.parameters(), plan, len(x), device_id="device-7")
    size = model.manifest.batch_size
    batches = [
        (x[rows], y[rows].astype(np.int32), np.ones(len(rows), np.float32)) for rows in rows_of_steps(told, size)
    ]
    update = np.asarray(model.update(model.parameters(), batches, plan))
    return dataclasses.replace(told, update=update)


def test_the_order_is_the_devices_own_and_the_unknown_one_is_not(digits):
    seen = Seen(np.zeros(1), np.zeros(1), TrainingPlan(2, 0.1, shuffle_seed=5), 5, device_id="device-7")
    known = schedule(seen, 2)
    assert [len(rows) for rows in known] == [2, 2, 1, 2, 2, 1]
    assert sorted(np.concatenate(known[:3])) == sorted(np.concatenate(known[3:])) == list(range(5))
    assert [list(rows) for rows in schedule(seen, 2, "unknown")] == [[0, 1], [2, 3], [4]] * 2


@pytest.mark.slow
def test_unrolling_the_steps_finds_what_one_step_for_all_cannot(digits):
    """Three examples, two passes in batches of two: four steps, of which the second of a pass is half empty."""
    import tensorflow as tf

    x, y = digits[0][10:13], digits[1][10:13]
    model = KerasModel(sigmoid_lenet((8, 8, 1), 10, 1), batch_size=2, dtype=tf.float64)
    seen = local_training(model, x, y, TrainingPlan(2, 0.5, shuffle_seed=3))
    assert len(rows_of_steps(seen, 2)) == 4
    exact = Distance(euclidean=1.0)
    unrolled = LocalSteps(optimizer="l-bfgs", iterations=300, restarts=1, labels=y, distance=exact)
    simple = DeepLeakage(300, labels=y)
    assert psnr_of(unrolled.run(model, seen, seed=0), x, y) > psnr_of(simple.run(model, seen, seed=0), x, y) + 10
