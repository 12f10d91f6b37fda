"""Digits and one-step updates on a fresh and on a trained model."""

from __future__ import annotations

import numpy as np
import pytest
from inversion_helpers import Step, digits_model, one_step, small_net, softmax_loss


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    return (pictures / 16).reshape(-1, 8, 8, 1).astype(np.float32), labels


@pytest.fixture(scope="session")
def fresh_digit_step(digits) -> Step:
    pictures, labels = digits
    return one_step(digits_model(), softmax_loss(), pictures[17], int(labels[17]))


@pytest.fixture(scope="session")
def trained_digit_step(digits) -> Step:
    """The same after 100 steps of training on 32 examples each, about 80% accurate."""
    import tensorflow as tf

    pictures, labels = digits
    model, loss = digits_model(1), softmax_loss()
    optimizer = tf.keras.optimizers.SGD(0.1)

    @tf.function
    def train(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x))
        optimizer.apply_gradients(zip(tape.gradient(value, model.trainable_variables), model.trainable_variables))

    for start in range(100):
        batch = slice(start * 8, start * 8 + 32)
        train(tf.constant(pictures[batch]), tf.constant(labels[batch]))
    return one_step(model, loss, pictures[1500], int(labels[1500]))


@pytest.fixture(scope="session")
def pictures(digits) -> tuple[np.ndarray, np.ndarray]:
    """Digits of 4 x 4 pixels, so that every test takes a second."""
    return digits[0].reshape(-1, 4, 2, 4, 2, 1).mean((2, 4)), digits[1]


@pytest.fixture(scope="session")
def net():
    """One for all tests of the resolution and the defences, which share its traced graphs."""
    return small_net()
