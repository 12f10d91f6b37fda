"""A bundle read back computes what the bundle computes on a device's runtime, and can be differentiated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from covey_coordinator.inversion.bundle_model import BundleModel, batches_of
from covey_coordinator.inversion.metrics import mse, psnr
from covey_edge.runtime import Model
from covey_edge.trainer import train
from covey_models import build, export
from covey_models._tensorflow import import_tensorflow
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.errors import TrainingError, UsageError
from covey_protocol.messages import TrainingPlan

tf = import_tensorflow()
layers = tf.keras.layers

BATCH, COUNT = 4, 11
Examples = tuple[np.ndarray, np.ndarray]


def bundle_of(parts: list[Any], shape: tuple[int, ...], **options: Any) -> Bundle:
    tf.keras.utils.set_random_seed(4)
    model = tf.keras.Sequential([layers.InputLayer(shape), *parts])
    return read_bundle(export(model, name="small", batch_size=BATCH, **options))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = build("small-cnn", (8, 8, 1), 10, seed=3)
    return read_bundle(export(model, name="digits", batch_size=BATCH, optimizer="adam", clip=True, proximal=True))


@pytest.fixture(scope="module")
def drawing_bundle() -> Bundle:
    """Dense layers with Dropout between them, plain SGD."""
    return bundle_of([layers.Dense(16, "relu"), layers.Dropout(0.5), layers.Dense(3)], (12,), input_range=(0.0, 1.0))


def examples_of(bundle: Bundle, count: int = COUNT, seed: int = 0) -> Examples:
    random, manifest = np.random.default_rng(seed), bundle.manifest
    x, y = drawn(manifest.input, count, random), drawn(manifest.label, count, random)
    # a device's gradient of a cross entropy is that of labels which add up to 1
    return x, (y / y.sum(-1, keepdims=True) if manifest.loss == "categorical_crossentropy" else y)


def drawn(spec: Any, count: int, random: np.random.Generator) -> np.ndarray:
    if spec.dtype == "float32":
        return random.random((count, *spec.shape)).astype(np.float32)
    return random.integers(0, int(spec.maximum) + 1, (count, *spec.shape)).astype(spec.dtype)


def close(found: Any, wanted: Any, tolerance: float = 2e-6) -> None:
    """Relative to the largest number."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize(("count", "dtype"), [(1, "float32"), (BATCH, "float32"), (COUNT, "float64")])
def test_the_gradient_is_the_devices(bundle: Bundle, count: int, dtype: str) -> None:
    device, (x, y) = Model(bundle), examples_of(bundle, count)
    model = BundleModel(bundle, dtype)
    found = model.gradient(device.parameters(), x, y)
    assert found.dtype.name == dtype
    close(found, device.gradient(x, y))
    close(model.own_gradient(device.parameters(), x, y), device.gradient(x, y))


def test_the_loss_and_the_outputs_are_the_devices(bundle: Bundle) -> None:
    device, (x, y) = Model(bundle), examples_of(bundle)
    model = BundleModel(bundle)
    loss, accuracy = device.evaluate(x, y)
    outputs = model.outputs(device.parameters(), x).numpy()
    assert float(model.loss(device.parameters(), x, y)) == pytest.approx(loss, 1e-6)
    assert (outputs.argmax(1) == y).mean() == pytest.approx(accuracy)
    assert -np.log(outputs[range(COUNT), y]).mean() == pytest.approx(loss, 1e-5)


def test_an_update_is_the_devices_own_with_optimizer_clipping_and_fedprox(bundle: Bundle) -> None:
    plan = TrainingPlan(2, 0.01, shuffle_seed=7, gradient_clip_norm=0.5, proximal_weight=0.1, max_examples=10)
    check_update(bundle, plan)


def check_update(bundle: Bundle, plan: TrainingPlan, tolerance: float = 1e-5) -> None:
    device, (x, y) = Model(bundle), examples_of(bundle)
    received, used = device.parameters(), plan.max_examples or COUNT
    train(device, (x[:used], y[:used]), plan, "device-1")
    batches = batches_of(x, y, plan, "device-1", bundle.manifest)
    found = BundleModel(bundle).update(received, batches, plan, device_id="device-1")
    close(found, device.parameters() - received, tolerance)


@pytest.mark.slow
def test_an_update_can_be_differentiated_in_the_inputs(bundle: Bundle) -> None:
    plan, model = TrainingPlan(1, 0.01, shuffle_seed=7), BundleModel(bundle, tf.float64)
    (x, y), random = examples_of(bundle, 2 * BATCH), np.random.default_rng(5)
    parameters, towards = Model(bundle).parameters(), random.standard_normal(x.shape)
    along = random.standard_normal(bundle.manifest.dimension)

    def measured(x: Any) -> Any:
        batches = [(x[place : place + BATCH], y[place : place + BATCH], np.ones(BATCH)) for place in (0, BATCH)]
        return tf.reduce_sum(model.update(parameters, batches, plan) * along)

    x = tf.constant(x, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = measured(x)
    slope, step = float(tf.reduce_sum(tape.gradient(value, x) * towards)), 1e-7
    assert slope == pytest.approx(float(measured(x + step * towards) - measured(x - step * towards)) / 2 / step, 1e-4)


def test_soft_labels_are_the_mean_of_the_classes_losses(bundle: Bundle) -> None:
    model, (x, _) = BundleModel(bundle, tf.float64), examples_of(bundle, 2)
    parameters, shares = Model(bundle).parameters(), np.random.default_rng(1).dirichlet(np.ones(10), 2)
    losses = [[float(model.loss(parameters, x[i : i + 1], [c])) for c in range(10)] for i in range(2)]
    weights = np.array([1.0, 3.0])
    wanted = (weights[:, None] * shares * losses).sum() / weights.sum()
    assert float(model.loss(parameters, x, shares, weights)) == pytest.approx(wanted, 1e-9)
    assert np.abs(model.own_gradient(parameters, x, shares) - model.gradient(parameters, x, shares)).max() < 1e-9


def test_what_the_model_draws_is_what_the_device_draws(drawing_bundle: Bundle) -> None:
    device, (x, y) = Model(drawing_bundle), examples_of(drawing_bundle)
    model = BundleModel(drawing_bundle, seed=9)
    for count in (3, COUNT):
        close(model.gradient(device.parameters(), x[:count], y[:count]), device.gradient(x[:count], y[:count], seed=9))
    other = BundleModel(drawing_bundle, seed=10).gradient(device.parameters(), x, y)
    assert np.abs(other - model.gradient(device.parameters(), x, y)).max() > 1e-3
    check_update(drawing_bundle, TrainingPlan(2, 0.1, shuffle_seed=3))


def test_one_step_in_float64_gives_the_example_away_to_100_db_and_a_devices_to_60(drawing_bundle: Bundle) -> None:
    plan, (x, y) = TrainingPlan(1, 0.1, shuffle_seed=3), examples_of(drawing_bundle, 1)
    device = Model(drawing_bundle)
    received = device.parameters()
    exact = BundleModel(drawing_bundle, tf.float64).update(
        received, batches_of(x, y, plan, "device-1", drawing_bundle.manifest), plan, device_id="device-1"
    )
    train(device, (x, y), plan, "device-1")
    for update, least in ((exact.numpy(), 100.0), (device.parameters() - received, 60.0)):
        kernel, bias = update[: 12 * 16].reshape(12, 16), update[12 * 16 : 13 * 16]
        unit = np.abs(bias).argmax()
        assert psnr(mse(x[0], kernel[:, unit] / bias[unit]), (0.0, 1.0)) > least


def test_what_cannot_be_played_is_refused(drawing_bundle: Bundle) -> None:
    model, parameters = BundleModel(drawing_bundle), Model(drawing_bundle).parameters()
    with pytest.raises(TrainingError, match="--clip"):
        model.update(parameters, [], TrainingPlan(1, 0.1, gradient_clip_norm=1.0))
    with pytest.raises(UsageError, match="not local training"):
        model.update(parameters, [], TrainingPlan(1, 0.1, evaluate=("loss",)))
    with pytest.raises(UsageError, match="float16"):
        BundleModel(drawing_bundle, "float16")


KINDS: dict[str, Any] = {
    "batch norm": lambda: bundle_of(
        [layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU(), layers.Flatten(), layers.Dense(3)], (6, 6, 2)
    ),
    "batch norm whose statistics stay": lambda: bundle_of(
        [layers.Dense(8), layers.BatchNormalization(), layers.Activation("swish"), layers.Dense(3)],
        (5,),
        moving_statistics="local",
        optimizer="momentum",
    ),
    "an LSTM": lambda: bundle_of([layers.LSTM(6), layers.Dense(3)], (7, 4), optimizer="rmsprop"),
    "an embedding": lambda: bundle_of(
        [layers.Embedding(20, 4), layers.Conv1D(5, 3), layers.GlobalMaxPooling1D(), layers.Dense(3)],
        (9,),
        input_range=(0, 19),
    ),
    "weight decay and constants": lambda: bundle_of(
        [layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(3, kernel_regularizer="l2")], (4, 4, 1)
    ),
    "yes or no": lambda: bundle_of([layers.Dense(6, "tanh"), layers.Dense(1)], (5,), loss="binary_crossentropy"),
    "a number": lambda: bundle_of([layers.Dense(6, "gelu"), layers.Dense(1)], (5,), loss="mean_squared_error"),
    "one-hot labels": lambda: bundle_of(
        [layers.Dense(6, "softplus"), layers.Dense(3, "softmax")], (5,), loss="categorical_crossentropy"
    ),
    "a class per place": lambda: bundle_of(
        [layers.Conv2D(4, 3, padding="same", activation="relu"), layers.MaxPool2D(2), layers.UpSampling2D(2),
         layers.Conv2D(3, 1)], (4, 4, 1)
    ),
    "last layer only": lambda: bundle_of([layers.Dense(8, "relu"), layers.Dense(3)], (5,), teach=True),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bundle_is_played_as_on_a_device(kind: str) -> None:
    bundle = KINDS[kind]()
    device, model = Model(bundle), BundleModel(bundle)
    for count in (1, BATCH, COUNT):
        x, y = examples_of(bundle, count)
        wanted = device.gradient(x, y)
        close(model.gradient(device.parameters(), x, y), wanted, 1e-5)
        close(model.own_gradient(device.parameters(), x, y), wanted, 1e-5)
    check_update(bundle, TrainingPlan(2, 0.05, shuffle_seed=7), 1e-4)
