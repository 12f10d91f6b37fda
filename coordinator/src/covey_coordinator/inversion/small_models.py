"""The nets that papers on gradient inversion attack, for benchmarks and reproductions; they end in logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def sigmoid_lenet(shape: tuple[int, ...], classes: int, seed: int) -> Any:
    """Three convolutions of 12 filters of 5x5 (strides 2, 2, 1) with sigmoids and a dense layer.

    All weights uniform in (-0.5, 0.5). Source: Zhu et al. 2019 (arXiv:1906.08935) and its code.
    """
    import tensorflow as tf

    layers = tf.keras.layers

    def drawn(number: int) -> dict[str, Any]:
        def one(more: int) -> Any:
            return tf.keras.initializers.RandomUniform(-0.5, 0.5, seed=100 * seed + 2 * number + more)

        return {"kernel_initializer": one(0), "bias_initializer": one(1)}

    convolutions = [
        layers.Conv2D(12, 5, stride, "same", activation="sigmoid", name=f"conv_{number}", **drawn(number))
        for number, stride in enumerate((2, 2, 1))
    ]
    last = layers.Dense(classes, name="logits", **drawn(3))
    return tf.keras.Sequential([tf.keras.Input(shape), *convolutions, layers.Flatten(), last])


def relu_mlp(shape: tuple[int, ...], classes: int, seed: int, hidden: int = 64) -> Any:
    """One hidden layer of ReLUs, Keras' own start with this seed."""
    import tensorflow as tf

    layers = tf.keras.layers
    start = [tf.keras.initializers.GlorotUniform(seed=100 * seed + number) for number in range(2)]
    return tf.keras.Sequential(
        [
            tf.keras.Input(shape),
            layers.Flatten(),
            layers.Dense(hidden, activation="relu", kernel_initializer=start[0], name="hidden"),
            layers.Dense(classes, kernel_initializer=start[1], name="logits"),
        ]
    )


def train(keras_model: Any, x: npt.NDArray[Any], y: npt.NDArray[Any], *, epochs: int, seed: int) -> float:
    """Trains in place by SGD (rate 0.02, momentum 0.9, batches of 32) and gives its accuracy on x, y afterwards."""
    import tensorflow as tf

    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    keras_model.compile(tf.keras.optimizers.SGD(0.02, 0.9), loss, metrics=["accuracy"])
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        keras_model.fit(x[order], y[order], batch_size=32, shuffle=False, verbose=0)
    return float(keras_model.evaluate(x, y, batch_size=256, verbose=0)[1])
