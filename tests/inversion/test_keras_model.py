"""KerasModel is the Keras model as functions of its flat parameters, differentiable again."""

from __future__ import annotations

import numpy as np
import pytest
from inversion_helpers import digits_model, flat, softmax_loss

from covey_coordinator.inversion.keras_model import KerasModel
from covey_protocol.errors import ConfigError
from covey_protocol.messages import TrainingPlan


@pytest.fixture(scope="module")
def batch(digits) -> tuple[np.ndarray, np.ndarray]:
    return digits[0][:4], digits[1][:4].astype(np.int32)


def test_loss_and_gradient_are_keras_own(batch):
    import tensorflow as tf

    keras, (x, y) = digits_model(), batch
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(softmax_loss()(y, keras(x)))
    ours = KerasModel(keras)
    np.testing.assert_allclose(ours.loss(ours.parameters(), x, y), loss, rtol=1e-5)
    expected = flat(tape.gradient(loss, keras.trainable_variables))
    np.testing.assert_allclose(ours.gradient(ours.parameters(), x, y), expected, atol=1e-6)
    np.testing.assert_allclose(ours.outputs(ours.parameters(), x), tf.nn.softmax(keras(x)), atol=1e-6)


def test_weights_and_soft_labels_do_what_they_say(batch):
    model, (x, y) = KerasModel(digits_model()), batch
    start = model.parameters()
    first_two = model.gradient(start, x, y, np.array([1, 1, 0, 0], np.float32))
    np.testing.assert_allclose(first_two, model.gradient(start, x[:2], y[:2]), atol=1e-6)
    soft = np.eye(10, dtype=np.float32)[y]
    np.testing.assert_allclose(model.gradient(start, x, soft), model.gradient(start, x, y), atol=1e-6)
    double = KerasModel(digits_model(), dtype="float64")
    np.testing.assert_allclose(double.gradient(start, x, soft), model.gradient(start, x, y), atol=1e-6)


def test_in_float64_the_gradients_own_derivative_is_that_of_finite_differences(batch):
    import tensorflow as tf

    model = KerasModel(digits_model(), dtype=tf.float64)
    rng, y = np.random.default_rng(0), batch[1]
    x = tf.constant(rng.uniform(0.1, 0.9, batch[0].shape))  # pixels of exactly 0 sit on the ReLUs' kinks
    along, probe = rng.normal(size=x.shape), rng.normal(size=model.parameters().size)

    def seen(moved):
        return tf.reduce_sum(model.gradient(model.parameters(), moved, y) * probe)

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = seen(x)
    step = 1e-6
    differences = (seen(x + step * along) - seen(x - step * along)) / (2 * step)
    assert value.dtype == tf.float64
    np.testing.assert_allclose(np.sum(tape.gradient(value, x) * along), differences, rtol=1e-5)


def test_an_update_is_steps_of_gradient_descent_and_differentiable(batch):
    import tensorflow as tf

    model, (x, y) = KerasModel(digits_model()), batch
    x, start, plan = tf.constant(x), tf.constant(model.parameters()), TrainingPlan(epochs=1, learning_rate=0.1)
    with tf.GradientTape() as tape:
        tape.watch(x)
        update = model.update(start, [(x[:2], y[:2], None), (x[2:], y[2:], None)], plan)
    middle = start - 0.1 * model.gradient(start, x[:2], y[:2])
    expected = middle - 0.1 * model.gradient(middle, x[2:], y[2:]) - start
    np.testing.assert_allclose(update, expected, atol=1e-7)
    assert np.all(np.any(tape.gradient(update, x).numpy() != 0, axis=(1, 2, 3)))


def test_one_sigmoid_unit_takes_labels_of_0_and_1_and_soft_ones():
    import tensorflow as tf

    keras = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(1)])
    model = KerasModel(keras, "binary_crossentropy")
    x, y = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]], np.float32), np.array([1, 0], np.int32)
    expected = tf.keras.losses.BinaryCrossentropy(from_logits=True)(y[:, None], keras(x))
    np.testing.assert_allclose(model.loss(model.parameters(), x, y), expected, rtol=1e-5)
    np.testing.assert_allclose(model.loss(model.parameters(), x, np.eye(2, dtype=np.float32)[y]), expected, rtol=1e-5)


@pytest.mark.parametrize("layer", ["BatchNormalization", "Softmax"])
def test_what_only_a_bundle_can_say_is_refused(layer):
    import tensorflow as tf

    layers = tf.keras.layers
    last = layers.Dense(2, activation="softmax") if layer == "Softmax" else layers.Dense(2)
    middle = [layers.BatchNormalization()] if layer == "BatchNormalization" else []
    with pytest.raises(ConfigError):
        KerasModel(tf.keras.Sequential([tf.keras.Input((3,)), *middle, last]))
