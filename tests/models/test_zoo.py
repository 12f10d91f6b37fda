"""The zoo: the same arguments give the same model, and the models learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from export_helpers import opened

from covey_models import build, default_for, export, load, split
from covey_models.zoo import ZOO
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import ConfigError

SHAPES: dict[str, tuple[int, ...]] = {
    "small-cnn": (8, 8, 1),
    "mlp": (30,),
    "softmax": (30,),
    "emnist-cnn": (28, 28, 1),
    "ds-cnn": (49, 10, 1),
    "activity-cnn": (128, 9),
    "transformer": (16, 8),
}


def names(model: Any) -> list[str]:
    return [model.name, *(layer.name for layer in model.layers), *(variable.name for variable in model.variables)]


@pytest.mark.parametrize("name", ZOO)
def test_the_seed_decides_the_weights_and_nothing_else_does(name: str, tf: Any) -> None:
    first = build(name, SHAPES[name], 3, seed=1)
    tf.random.set_seed(99)
    tf.keras.layers.Dense(3)  # a layer that would count up global names
    again, other = build(name, SHAPES[name], 3, seed=1), build(name, SHAPES[name], 3, seed=2)
    assert names(first) == names(again)
    for a, b in zip(first.get_weights(), again.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.get_weights()[0], other.get_weights()[0])


@pytest.mark.parametrize("name", ZOO)
def test_no_two_layers_start_from_the_same_numbers(name: str) -> None:
    model = build(name, SHAPES[name], 10, seed=0)
    starts = [weight.ravel()[:20] for weight in model.get_weights() if len(np.unique(weight)) > 1]
    assert len({tuple(np.round(start / np.abs(start).max(), 4)) for start in starts}) == len(starts)


@pytest.mark.parametrize(("shape", "most"), [
    ((8, 8, 1), 4_000), ((28, 28, 1), 10_000), ((32, 32, 3), 15_000), ((224, 224, 3), 20_000)
])  # fmt: skip
def test_the_cnn_stays_small_whatever_the_image(shape: tuple[int, ...], most: int) -> None:
    model = build("small-cnn", shape, 10, seed=0)
    assert model.count_params() <= most
    assert model.output_shape == (None, 10)


def test_images_get_the_cnn_and_vectors_the_mlp() -> None:
    assert (default_for((28, 28, 1)), default_for((30,))) == ("small-cnn", "mlp")


def test_unknown_models_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet'.*small-cnn, mlp, softmax"):
        build("resnet", (8, 8, 1), 10)
    with pytest.raises(ConfigError, match="takes images"):
        build("small-cnn", (30,), 10)


@pytest.mark.parametrize(("data", "rate", "least"), [("digits", 0.2, 0.9), ("breast-cancer", 0.1, 0.93)])
def test_the_default_model_learns_its_data_on_the_device_runtime(data: str, rate: float, least: float) -> None:
    train, test = split(load(data), 0.25, seed=0)
    model = build(default_for(train.input_shape), train.input_shape, train.num_classes, seed=0)
    device = opened(read_bundle(export(model, name=data, batch_size=16, input_range=train.input_range)))
    ones = np.ones(16, np.float32)
    for epoch in range(5):
        order = np.random.default_rng(epoch).permutation(len(train))
        for start in range(0, len(order) - 15, 16):
            batch = train.take(order[start : start + 16])
            device["train"](x=batch.x, y=batch.y, example_weight=ones, learning_rate=np.float32(rate))
    right = sum(
        float(device["evaluate"](x=test.x[i : i + 16], y=test.y[i : i + 16], example_weight=ones)["correct"])
        for i in range(0, len(test) - 15, 16)
    )
    assert right / (len(test) // 16 * 16) > least
