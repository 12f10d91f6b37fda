"""Bundles for machine teaching: the last Dense layer alone is trained, and `represent` gives what it sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from export_helpers import opened, parameters
from numpy.testing import assert_allclose, assert_array_equal

from covey_models import export
from covey_models._tensorflow import import_tensorflow
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import BundleError

tf = import_tensorflow()
layers = tf.keras.layers
X = np.random.default_rng(3).random((6, 8, 8, 2)).astype(np.float32)


def deep(*after: Any) -> Any:
    tf.keras.utils.set_random_seed(5)
    inside = tf.keras.Sequential([layers.Dense(7, activation="relu"), layers.Dropout(0.3)])
    model = tf.keras.Sequential(
        [
            layers.InputLayer((8, 8, 2)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            inside,
            layers.Dense(3),
            *after,
        ]
    )
    model.layers[1].moving_mean.assign([0.1, 0.2, 0.3, 0.4])
    return model


@pytest.fixture(scope="module")
def exported() -> tuple[Any, bytes]:
    model = deep(layers.Softmax())
    model.layers[0].trainable = False
    data = export(model, name="deep", batch_size=6, input_range=(0.0, 1.0), teach=True)
    return model, data


def test_the_parameters_are_the_last_layers_and_represent_gives_what_it_sees(exported: Any) -> None:
    model, data = exported
    bundle = read_bundle(data)
    assert [spec.shape for spec in bundle.manifest.parameters] == [(7, 3), (3,)]
    assert all(spec.trainable for spec in bundle.manifest.parameters)
    device = opened(bundle)
    features = device["represent"](x=X)["features"]
    until = tf.keras.Model(model.inputs, model.layers[-2].input)
    assert_allclose(features, until(X, training=False), atol=1e-6)
    kernel, bias = parameters(device)[:21].reshape(7, 3), parameters(device)[21:]
    logits = features @ kernel + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert_allclose(device["infer"](x=X)["output"], expected, atol=1e-5)


def test_training_moves_the_last_layer_and_no_representation(exported: Any) -> None:
    device = opened(read_bundle(exported[1]))
    before, features = parameters(device), device["represent"](x=X)["features"].copy()
    step = {"example_weight": np.ones(6, np.float32), "learning_rate": np.float32(0.5), "seed": np.int32(1)}
    device["train"](x=X, y=np.arange(6, dtype=np.int32) % 3, **step)
    assert np.abs(parameters(device) - before).max() > 1e-3
    assert_array_equal(device["represent"](x=X)["features"], features)


def test_the_users_model_is_left_as_it_was(exported: Any) -> None:
    trainable = [layer.trainable for layer in exported[0].layers]
    assert trainable == [False, True, True, True, True, True]
    assert [layer.trainable for layer in exported[0].layers[3].layers] == [True, True]


def test_a_model_that_ends_in_something_else_is_refused() -> None:
    other = tf.keras.Sequential([layers.InputLayer((8, 8, 2)), layers.Conv2D(3, 8), layers.Flatten()])
    with pytest.raises(BundleError, match="does not end in a Dense layer"):
        export(other, name="other", batch_size=6, input_range=(0.0, 1.0), teach=True)
    without = tf.keras.Sequential([layers.InputLayer((5,)), layers.Dense(3, use_bias=False)])
    with pytest.raises(BundleError, match="with a bias"):
        export(without, name="other", batch_size=6, teach=True)


def test_without_it_a_bundle_is_what_it_was() -> None:
    plain = tf.keras.Sequential([layers.InputLayer((5,)), layers.Dense(3)])
    assert "represent" not in read_bundle(export(plain, name="plain", batch_size=6)).manifest.signatures
