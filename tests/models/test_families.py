"""Whole families of nets, exported as they are: the proof is the judge (see test_proof for how it judges)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from export_helpers import opened

from covey_models import export, zoo
from covey_models._tensorflow import import_tensorflow
from covey_models.convert import operators
from covey_protocol.bundle import Bundle, read_bundle

tf = import_tensorflow()
layers = tf.keras.layers

BATCH = 8


@dataclass(frozen=True)
class Family:
    build: Callable[[], Any]
    bounds: tuple[float, float] = (0.0, 1.0)
    judgement: str = "float32"  # how it is judged here; nets whose ReLUs flip are judged by float64


def application(name: str, side: int, bounds: tuple[float, float] = (0.0, 1.0), **settings: Any) -> Family:
    def build() -> Any:
        make = getattr(tf.keras.applications, name)
        return make(input_shape=(side, side, 3), weights=None, classes=5, classifier_activation=None, **settings)

    return Family(build, bounds, "float64")


def u_net() -> Any:
    """Per-pixel classes: contracting, expanding by bilinear upsampling, and a bridge."""
    inputs = layers.Input((16, 16, 1))
    wide = layers.Conv2D(6, 3, padding="same", activation="relu")(inputs)
    deep = layers.Conv2D(12, 3, padding="same", activation="relu")(layers.MaxPool2D(2)(wide))
    joined = layers.Concatenate()([wide, layers.UpSampling2D(2, interpolation="bilinear")(deep)])
    return tf.keras.Model(inputs, layers.Conv2D(3, 1)(layers.Conv2D(6, 3, padding="same", activation="relu")(joined)))


def mlp_mixer() -> Any:
    inputs = layers.Input((9, 8))
    x = layers.LayerNormalization()(inputs)
    mixed = layers.Permute((2, 1))(layers.Dense(9, "gelu")(layers.Permute((2, 1))(x)))
    x = layers.Add()([inputs, mixed])
    x = layers.Add()([x, layers.Dense(8)(layers.Dense(16, "gelu")(layers.LayerNormalization()(x)))])
    return tf.keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


SMALL: dict[str, Family] = {
    "activity recognition": Family(lambda: zoo.build("activity-cnn", (32, 6), 5)),
    "EMNIST CNN of TFF, on small images": Family(lambda: zoo.build("emnist-cnn", (10, 10, 1), 5)),
    "U-Net": Family(u_net),
    "MLP-Mixer": Family(mlp_mixer),
}
LARGE: dict[str, Family] = {
    "a small transformer": Family(lambda: zoo.build("transformer", (12, 6), 5)),
    "EMNIST CNN of TFF": Family(lambda: zoo.build("emnist-cnn", (28, 28, 1), 10)),
    "keyword spotting": Family(lambda: zoo.build("ds-cnn", (49, 10, 1), 12), judgement="float64"),
    "MobileNetV2": application("MobileNetV2", 32, alpha=0.35),
    "MobileNetV2, 96x96": application("MobileNetV2", 96, alpha=0.35),
    "MobileNetV3Small": application("MobileNetV3Small", 32, (0.0, 255.0)),
    "EfficientNetB0": application("EfficientNetB0", 32, (0.0, 255.0)),
    "ResNet50": application("ResNet50", 32),
}


def exported(family: Family) -> Bundle:
    tf.keras.utils.set_random_seed(0)
    return read_bundle(export(family.build(), name="family", batch_size=BATCH, input_range=family.bounds))


@pytest.mark.parametrize("name", SMALL)
def test_small_families_agree_with_tensorflow(name: str) -> None:
    bundle = exported(SMALL[name])
    assert bundle.manifest.proof is not None
    assert bundle.manifest.proof.judgement == "float32"
    assert bundle.manifest.proof.max_abs_error < 2e-6
    assert not [op for op in operators(bundle.model) if op.startswith("custom")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LARGE)
def test_large_families_are_proved_and_learn(name: str) -> None:
    family = LARGE[name]
    bundle = exported(family)
    proof = bundle.manifest.proof
    assert proof is not None
    assert proof.judgement in (family.judgement, "float32")
    assert proof.max_abs_error <= proof.tolerance
    device = opened(bundle)
    random = np.random.default_rng(0)
    x = random.uniform(*family.bounds, (BATCH, *bundle.manifest.input.shape)).astype(np.float32)
    y = random.integers(0, 5, BATCH).astype(np.int32)
    seed = {"seed": np.array(1, np.int32)} if "seed" in bundle.manifest.train_inputs else {}
    step = {"x": x, "y": y, "example_weight": np.ones(BATCH, np.float32), "learning_rate": np.float32(0.01), **seed}
    losses = [float(device["train"](**step)["loss"]) for _ in range(12)]
    assert min(losses[-3:]) < 0.9 * losses[0], losses
