"""Reference models: they end in logits, have fixed layer names, and start from weights of their seed."""

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
    _refuse_shape("small-cnn", input_shape, 3, "images (height, width, channels)")
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


def emnist_cnn(input_shape: Sequence[int], num_classes: int, initialisers: Initialisers) -> Layers:
    """The convolutional net with dropout of TensorFlow Federated's EMNIST baselines (Reddi et al. 2021, table 4)."""
    _refuse_shape("emnist-cnn", input_shape, 3, "images (height, width, channels)")
    layers = tf.keras.layers
    return [
        layers.Conv2D(32, 3, activation="relu", kernel_initializer=next(initialisers), name="conv_1"),
        layers.Conv2D(64, 3, activation="relu", kernel_initializer=next(initialisers), name="conv_2"),
        layers.MaxPool2D(2, name="pool"),
        layers.Dropout(0.25, name="dropout_1"),
        layers.Flatten(name="flatten"),
        layers.Dense(128, activation="relu", kernel_initializer=next(initialisers), name="dense"),
        layers.Dropout(0.5, name="dropout_2"),
        _logits(num_classes, next(initialisers)),
    ]


def ds_cnn(input_shape: Sequence[int], num_classes: int, initialisers: Initialisers) -> Layers:
    """Keyword spotting on spectrograms (time, coefficients, 1): DS-CNN-S of Zhang et al. 2017 (arXiv:1711.07128)."""
    _refuse_shape("ds-cnn", input_shape, 3, "spectrograms (time, coefficients, 1)")
    layers = tf.keras.layers
    first = layers.Conv2D(
        64, (10, 4), 2, "same", use_bias=False, kernel_initializer=next(initialisers), name="conv"
    )  # fmt: skip
    parts = [first, *_normalised("conv")]
    for block in range(1, 5):
        depthwise = layers.DepthwiseConv2D(
            3, 1, "same", use_bias=False, depthwise_initializer=next(initialisers), name=f"depthwise_{block}"
        )
        pointwise = layers.Conv2D(
            64, 1, use_bias=False, kernel_initializer=next(initialisers), name=f"pointwise_{block}"
        )
        parts += [depthwise, *_normalised(f"depthwise_{block}"), pointwise, *_normalised(f"pointwise_{block}")]
    return [*parts, layers.GlobalAveragePooling2D(name="average"), _logits(num_classes, next(initialisers))]


def _normalised(name: str) -> Layers:
    return [tf.keras.layers.BatchNormalization(name=f"{name}_norm"), tf.keras.layers.ReLU(name=f"{name}_relu")]


def activity_cnn(input_shape: Sequence[int], num_classes: int, initialisers: Initialisers) -> Layers:
    """Activity recognition on windows of sensor readings (time, sensors): two 1-D convolutions, dropout, one hidden."""
    _refuse_shape("activity-cnn", input_shape, 2, "windows (time, sensors)")
    layers = tf.keras.layers
    return [
        layers.Conv1D(64, 3, activation="relu", kernel_initializer=next(initialisers), name="conv_1"),
        layers.Conv1D(64, 3, activation="relu", kernel_initializer=next(initialisers), name="conv_2"),
        layers.Dropout(0.5, name="dropout"),
        layers.MaxPooling1D(2, name="pool"),
        layers.Flatten(name="flatten"),
        layers.Dense(100, activation="relu", kernel_initializer=next(initialisers), name="dense"),
        _logits(num_classes, next(initialisers)),
    ]


def transformer(input_shape: Sequence[int], num_classes: int, initialisers: Initialisers) -> Layers:
    """Two encoder blocks of width 32 with four heads on sequences (time, features); normalised before each sublayer."""
    _refuse_shape("transformer", input_shape, 2, "sequences (time, features)")
    layers = tf.keras.layers
    embedded = layers.Dense(32, kernel_initializer=next(initialisers), name="embedding")
    blocks = [EncoderBlock(4, 64, next(initialisers), name=f"block_{number}") for number in (1, 2)]
    position = PositionEmbedding(next(initialisers), name="position")
    pooled = [layers.LayerNormalization(name="norm"), layers.GlobalAveragePooling1D(name="average")]
    return [embedded, position, *blocks, *pooled, _logits(num_classes, next(initialisers))]


class PositionEmbedding(tf.keras.layers.Layer):  # type: ignore[misc,name-defined]
    """Adds a learned vector per place of a sequence."""

    def __init__(self, initialiser: Any, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._initialiser = initialiser

    def build(self, shape: Any) -> None:
        self._places = self.add_weight("places", shape[1:], initializer=self._initialiser)

    def call(self, x: Any) -> Any:
        return x + self._places


class EncoderBlock(tf.keras.layers.Layer):  # type: ignore[misc,name-defined]
    """x + attention(norm(x)), then x + dense(dense(norm(x)))."""

    def __init__(self, heads: int, hidden: int, initialiser: Any, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._heads, self._hidden, self._initialiser = heads, hidden, initialiser

    def build(self, shape: Any) -> None:
        layers, width = tf.keras.layers, shape[-1]
        start = Successive(_seeds(self._initialiser.seed))
        self._attention = layers.MultiHeadAttention(self._heads, width // self._heads, kernel_initializer=start)
        self._norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self._dense = [
            layers.Dense(self._hidden, "gelu", kernel_initializer=start),
            layers.Dense(width, kernel_initializer=start),
        ]
        super().build(shape)

    def call(self, x: Any) -> Any:
        normed = self._norms[0](x)
        x = x + self._attention(normed, normed)
        return x + self._dense[1](self._dense[0](self._norms[1](x)))


class Successive(tf.keras.initializers.Initializer):  # type: ignore[misc,name-defined]
    """Glorot-uniform, from the next seed for every tensor: for layers that give all theirs one initialiser."""

    def __init__(self, seeds: Iterator[int]) -> None:
        self._seeds = seeds

    def __call__(self, shape: Any, dtype: Any = None, **keywords: Any) -> Any:
        return tf.keras.initializers.GlorotUniform(seed=next(self._seeds))(shape, dtype)

    def get_config(self) -> dict[str, Any]:
        return {"seeds": self._seeds}


def _refuse_shape(name: str, input_shape: Sequence[int], rank: int, wanted: str) -> None:
    if len(input_shape) != rank:
        raise ConfigError(f"{name} takes {wanted}, not {tuple(input_shape)}", "choose another model")


ZOO: dict[str, Callable[[Sequence[int], int, Initialisers], Layers]] = {
    "small-cnn": small_cnn,
    "mlp": mlp,
    "softmax": softmax,
    "emnist-cnn": emnist_cnn,
    "ds-cnn": ds_cnn,
    "activity-cnn": activity_cnn,
    "transformer": transformer,
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
    return (tf.keras.initializers.GlorotUniform(seed=child) for child in _seeds(seed))


def _seeds(seed: int) -> Iterator[int]:
    return (int(child.generate_state(1)[0] >> 1) for child in np.random.SeedSequence(seed).spawn(1000))
