"""The attacks on what a real TFLite runtime sends: float32 updates of one step and of several."""

from __future__ import annotations

import numpy as np
import pytest

from covey_coordinator.inversion.bundle_model import BundleModel
from covey_coordinator.inversion.contract import Seen
from covey_coordinator.inversion.deep_leakage import DeepLeakage
from covey_coordinator.inversion.dense import dense_layers, recover_input
from covey_coordinator.inversion.grading import grade
from covey_coordinator.inversion.labels import LabelRecovery
from covey_coordinator.inversion.local_steps import LocalSteps
from covey_coordinator.inversion.matching import EVERY_NUMBER
from covey_coordinator.inversion.metrics import mse, psnr
from covey_edge.runtime import Model
from covey_edge.trainer import train
from covey_models import build, export
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.messages import TrainingPlan

RANGE = (0.0, 1.0)


def bundle_of(batch_size: int) -> Bundle:
    return read_bundle(
        export(build("mlp", (8, 8, 1), 10, seed=0), name="digits", batch_size=batch_size, input_range=RANGE)
    )


@pytest.fixture(scope="module")
def single() -> Bundle:
    return bundle_of(1)


def device_update(bundle: Bundle, x: np.ndarray, y: np.ndarray, plan: TrainingPlan) -> Seen:
    """What the runtime's own training changes, float32."""
    device = Model(bundle)
    received = device.parameters()
    train(device, (x, y.astype(np.int32)), plan, "device-7")
    return Seen(received, device.parameters() - received, plan, len(x), device_id="device-7")


def analytic_psnr(bundle: Bundle, gradient: np.ndarray, truth: np.ndarray) -> float:
    found = recover_input(*dense_layers(bundle.manifest.parameters)[0].gradients(gradient))
    assert found is not None
    return psnr(mse(truth.ravel().astype(np.float64), found.values), RANGE)


def test_one_step_on_one_example_gives_the_example_away_to_the_last_digit(digits, single):
    import tensorflow as tf

    x, y = digits[0][:1], digits[1][:1]
    seen = device_update(single, x, y, TrainingPlan(epochs=1, learning_rate=0.1))
    assert analytic_psnr(single, -seen.update / 0.1, x) > 60
    double = BundleModel(single, tf.float64).gradient(seen.parameters, x, y.astype(np.int32))
    assert analytic_psnr(single, np.asarray(double), x) > 100


def test_and_its_label(digits, single):
    model, plan = BundleModel(single), TrainingPlan(epochs=1, learning_rate=0.1)
    for row in range(25):
        seen = device_update(single, digits[0][[row]], digits[1][[row]], plan)
        assert list(LabelRecovery().run(model, seen, seed=0).labels) == [digits[1][row]]


def test_a_devices_four_steps_unrolled_give_all_examples_away(digits):
    """Two passes over three examples in batches of two: four steps, two of them half empty. True labels given."""
    bundle, plan = bundle_of(2), TrainingPlan(epochs=2, learning_rate=0.05, shuffle_seed=3)
    x, y = digits[0][10:13], digits[1][10:13]
    seen, model = device_update(bundle, x, y, plan), BundleModel(bundle)
    unrolled = LocalSteps(optimizer="l-bfgs", iterations=100, restarts=1, labels=y, distance=EVERY_NUMBER)
    assert grade(unrolled.run(model, seen, seed=0), x, y, RANGE).psnr_db.min() > 80


@pytest.mark.slow
def test_taken_for_one_step_they_do_not(digits):
    bundle, plan = bundle_of(2), TrainingPlan(epochs=2, learning_rate=0.05, shuffle_seed=3)
    x, y = digits[0][10:13], digits[1][10:13]
    seen, model = device_update(bundle, x, y, plan), BundleModel(bundle)
    assert grade(DeepLeakage(100, labels=y).run(model, seen, seed=0), x, y, RANGE).psnr_db.max() < 40
