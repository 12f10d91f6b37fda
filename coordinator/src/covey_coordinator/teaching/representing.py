"""What an experiment's teachers see of an example: the input of the model's last Dense layer, and a 1 beside it.

The model keeps its first weights, or is trained on trusted instances alone: nobody else's examples shape it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from covey_coordinator.teaching.settings import SimulatedTeaching
from covey_models.last_layer import representation
from covey_models.losses import loss_for
from covey_protocol.features import Fourier, Linear

Array = npt.NDArray[np.float64]
TOGETHER = 500  # examples
RATE = 1e-3  # Adam's


def representer(
    told: SimulatedTeaching, model: Any, loss: str, trusted: tuple[Any, Any], seed: int
) -> Callable[[npt.NDArray[Any]], Array]:
    """(n, ...) -> (n, F + 1). model: a Keras model, which is trained in place. seed: of Fourier features."""
    train(model, loss, trusted, told.representation_steps)
    below = representation(model)

    def seen(x: npt.NDArray[Any]) -> Array:
        parts = [below(x[start : start + TOGETHER], training=False).numpy() for start in range(0, len(x), TOGETHER)]
        return np.asarray(np.concatenate(parts), np.float64)

    if not told.fourier_features:
        return lambda x: Linear()(seen(x))
    features = Fourier(told.fourier_features, told.width or median_distance(seen(trusted[0])), seed)
    return lambda x: features(seen(x))


def train(model: Any, loss: str, trusted: tuple[Any, Any], steps: int) -> None:
    """Steps of Adam, each on all trusted instances."""
    if not steps:
        return
    optimizer, value = tf.keras.optimizers.Adam(RATE), loss_for(loss, tuple(model.output_shape[1:])).per_example
    x, y = (tf.constant(part) for part in trusted)

    def step() -> None:
        with tf.GradientTape() as tape:
            found = tf.reduce_mean(value(y, model(x, training=True)))
        optimizer.apply_gradients(zip(tape.gradient(found, model.trainable_variables), model.trainable_variables))

    traced = tf.function(step)
    for _ in range(steps):
        traced()


def median_distance(points: Array) -> float:
    """Between two points, the pairs of one point with itself left out; 1 where all are one point."""
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
    return float(np.sqrt(np.median(squares[np.triu_indices(len(points), 1)]))) if len(points) > 1 else 1.0
