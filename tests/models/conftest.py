"""Exports shared by the tests of covey_models: converting takes about a second each, so each is made once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from export_helpers import BATCH

from covey_models import export, zoo
from covey_models._tensorflow import import_tensorflow
from covey_protocol.bundle import Bundle, read_bundle


@pytest.fixture(scope="session")
def tf() -> Any:
    return import_tensorflow()


@pytest.fixture(scope="session")
def digits_model() -> Any:
    return zoo.build("small-cnn", (8, 8, 1), 10, seed=3)


@pytest.fixture(scope="session")
def digits_bytes(digits_model: Any) -> bytes:
    return export(digits_model, name="digits", batch_size=BATCH, input_range=(0.0, 1.0))


@pytest.fixture(scope="session")
def digits_bundle(digits_bytes: bytes) -> Bundle:
    return read_bundle(digits_bytes)


@pytest.fixture(scope="session")
def batch_norm_model(tf: Any) -> Any:
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.InputLayer((6, 6, 2)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Activation("swish"),
            layers.Flatten(),
            layers.Dense(3, name="logits"),
        ]
    )
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.standard_normal(variable.shape) * 0.3)
    return model


@pytest.fixture(scope="session")
def batch_norm_bundle(batch_norm_model: Any) -> Bundle:
    return read_bundle(export(batch_norm_model, name="norm", batch_size=BATCH))
