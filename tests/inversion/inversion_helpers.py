"""Models and real one-step updates for the inversion tests. Everything is seeded; nothing is pre-trained."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_protocol.parameters import ParameterSpec


@dataclass
class Step:
    """One device's SGD step on one example."""

    model: Any
    specs: list[ParameterSpec]
    parameters: np.ndarray
    update: np.ndarray
    learning_rate: float
    truth: np.ndarray
    label: int


def flat(tensors: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tensor, np.float32).ravel() for tensor in tensors])


def one_step(model: Any, loss: Any, truth: np.ndarray, label: int, learning_rate: float = 0.1) -> Step:
    """Takes the step in float32 and sends trained minus received, as a device does; the model keeps its weights."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = tf.reduce_mean(loss(np.array([[label]]), model(truth[None])))
    gradients = tape.gradient(value, model.trainable_variables)
    specs = [ParameterSpec(v.name.split(":")[0], tuple(v.shape)) for v in model.trainable_variables]
    received = flat(model.trainable_variables)
    trained = received - np.float32(learning_rate) * flat(gradients)
    return Step(model, specs, received, trained - received, learning_rate, truth, label)


def digits_model(seed: int = 0) -> Any:
    import tensorflow as tf

    tf.keras.utils.set_random_seed(seed)
    layers = tf.keras.layers
    return tf.keras.Sequential(
        [
            tf.keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def softmax_loss() -> Any:
    import tensorflow as tf

    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_net(batch_size: int = 4, hidden: int = 16, dtype: str = "float64") -> Any:
    """Inputs of 4 x 4 numbers, one hidden layer of sigmoids (none for hidden = 0), 10 classes, as an attacked model."""
    import tensorflow as tf

    from covey_coordinator.inversion.keras_model import KerasModel

    tf.keras.utils.set_random_seed(0)
    layers = tf.keras.layers
    between = [layers.Dense(hidden, "sigmoid", name="hidden")] if hidden else []
    keras = tf.keras.Sequential([tf.keras.Input((4, 4, 1)), layers.Flatten(), *between, layers.Dense(10, name="last")])
    return KerasModel(keras, batch_size=batch_size, dtype=dtype)
