"""Small reference models: they end in logits, have fixed layer names, and start from weights of their seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_protocol.errors import ConfigError

tf = import_tensorflow()

LARGEST_FLATTENED_SIDE = 8  # convolutions halve an image until it is this small, so that the dense layer stays modest

Initialisers = Iterator[Any]
Layers = list[Any]


def small_cnn(input_shape: Sequence[int], num_classes: int, initialisers: Initialisers) -> Layers:
    """Strided convolutions, no pooling: 8 filters, then 16 at half the size, until a side is at most 8."""
    if len(input_shape) != 3:
        raise ConfigError(f"small-cnn takes images (height, width, channels), not {tuple(input_shape)}", "use mlp")
    side = max(input_shape[:2])
    stride = 1 if side <= 2 * LARGEST_FLATTENED_SIDE else 2
    layers = [_convolution("conv_1", 8, stride, next(initialisers))]
    side = -(-side // stride)
    while len(layers) < 2 or side > LARGEST_FLATTENED_SIDE:
        layers.append(_convolution(f"conv_{len(layers) + 1}", 16, 2, next(initialisers)))
        side = -(-side // 2)
    return [*layers, tf.keras.layers.Flatten(name="flatten"), _logits(num_classes, next(initialisers))]


def _convolution(name: str, filters: int, stride: int, initialiser: Any) -> Any:
    return tf.keras.layers.Conv2D(
        filters, 3, stride, "same", activation="relu", kernel_initializer=initialiser, name=name
    )


def _logits(num_classes: int, initialiser: Any) -> Any:
    return tf.keras.layers.Dense(num_classes, kernel_initializer=initialiser, name="logits")


def mlp(input_shape: Sequence[int], num_classes: int, initialisers: Initialisers) -> Layers:
    """One hidden layer of 32 ReLUs."""
    hidden = tf.keras.layers.Dense(32, activation="relu", kernel_initializer=next(initialisers), name="dense")
    return [*_flattened(input_shape), hidden, _logits(num_classes, next(initialisers))]


def softmax(input_shape: Sequence[int], num_classes: int, initialisers: Initialisers) -> Layers:
    """Softmax (multinomial logistic) regression."""
    return [*_flattened(input_shape), _logits(num_classes, next(initialisers))]


def _flattened(input_shape: Sequence[int]) -> Layers:
    return [] if len(input_shape) == 1 else [tf.keras.layers.Flatten(name="flatten")]


ZOO: dict[str, Callable[[Sequence[int], int, Initialisers], Layers]] = {
    "small-cnn": small_cnn,
    "mlp": mlp,
    "softmax": softmax,
}


def default_for(input_shape: Sequence[int]) -> str:
    """The name of the model for this kind of input: a convolutional one for images, else the mlp."""
    return "small-cnn" if len(input_shape) == 3 else "mlp"


def build(name: str, input_shape: Sequence[int], num_classes: int, seed: int = 0) -> Any:
    """A built Keras model. The same arguments give the same weights and names, whatever was built before."""
    if name not in ZOO:
        raise ConfigError(f"there is no model {name!r}", f"choose one of {', '.join(ZOO)}")
    layers = ZOO[name](tuple(input_shape), num_classes, _initialisers(seed))
    inputs = tf.keras.layers.InputLayer(tuple(input_shape), name="input")
    return tf.keras.Sequential([inputs, *layers], name=name.replace("-", "_"))


def _initialisers(seed: int) -> Initialisers:
    """Glorot-uniform initialisers, each with its own seed: one seed for all would correlate the layers."""
    for child in np.random.SeedSequence(seed).spawn(1000):
        yield tf.keras.initializers.GlorotUniform(seed=int(child.generate_state(1)[0] >> 1))
