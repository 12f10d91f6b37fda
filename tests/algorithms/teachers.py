"""Data of teachers of whom most are wrong, and bundles for them, for the tests of machine teaching on devices."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

import covey_models
from covey_protocol.messages import TeachingPlan
from covey_protocol.seals import SealingKey
from covey_protocol.teaching import Problem

FEATURES = 6
CONSTANTS = {"lambda_w": 0.5, "lambda_t": 4.0, "lambda_a": 0.02, "lambda_z": 30.0, "lambda_y": 20.0}
CONSTANTS.update(rho=8.0, curvature=3.0)


class Data(NamedTuple):
    """x (n, F) float32, y (n,)."""

    x: Any
    y: Any


def truth() -> Any:
    return np.random.default_rng(0).normal(size=FEATURES)


def numbers(seed: int, n: int, shift: float = 0.0) -> Data:
    """Targets of a linear model; shift: what is added to them."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, FEATURES)).astype(np.float32)
    y = x @ truth() + 0.3 + 0.05 * rng.normal(size=n) + shift * rng.uniform(0.5, 1.5, n)
    return Data(x, y.astype(np.float32))


def classes(seed: int, n: int, flipped: float = 0.0) -> Data:
    """Labels 0 and 1. flipped: the share of them that is the other one; the first ones are."""
    plain = numbers(seed, n)
    y = (plain.y > 0.3).astype(np.int32)
    y[: round(flipped * n)] ^= 1
    return Data(plain.x, y)


def linear(key: SealingKey | None, loss: str) -> bytes:
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.InputLayer((FEATURES,)),
            layers.Dense(1, "sigmoid" if loss == "binary_crossentropy" else None, kernel_initializer="zeros"),
        ]
    )
    return covey_models.export(model, name="linear", loss=loss, batch_size=8, key=key, teach=True)


def deep_model() -> Any:
    """Three classes; what the last layer sees is made by layers that are not zero."""
    tf.keras.utils.set_random_seed(7)
    layers = tf.keras.layers
    hidden = layers.Dense(5, "relu", bias_initializer="ones")
    return tf.keras.Sequential([layers.InputLayer((FEATURES,)), hidden, layers.Dense(3, kernel_initializer="zeros")])


def with_intercept(data: Data) -> tuple[Any, Any]:
    """For the reference, as ridge (float targets) or logistic (0 and 1 become -1 and 1)."""
    x = np.hstack([data.x.astype(np.float64), np.ones((len(data.x), 1))])
    labels = data.y.dtype.kind == "i"
    return x, (2.0 * data.y - 1.0 if labels else data.y.astype(np.float64))


def problem(loss: str) -> Problem:
    return Problem("logistic" if loss == "binary_crossentropy" else "ridge")


def plan_of(teachers: int) -> TeachingPlan:
    return TeachingPlan(**CONSTANTS, teachers=teachers)


def write(path: Path, data: Data) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x=data.x, y=data.y)
    path.write_bytes(buffer.getvalue())
