"""For machine teaching: a model of which only the last Dense layer is trained, and what that layer sees.

The bundle's parameters are then the layer's kernel (F, C) and bias (C,); all layers before it are constants of the
file, and the entry point `represent` gives the F numbers that it makes of an example (docs/machine-teaching.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from covey_models._tensorflow import import_tensorflow, layers_of
from covey_protocol.errors import BundleError

tf = import_tensorflow()

REPRESENT = "represent"
AFTER_IT = (tf.keras.layers.Activation, tf.keras.layers.Softmax)  # what may follow the layer: they hold no weights


def last_dense(model: Any) -> Any:
    """The Dense layer with a bias, on vectors, that the model ends in. BundleError for a model that ends otherwise."""
    layers = list(getattr(model, "layers", ()))
    while len(layers) > 1 and isinstance(layers[-1], AFTER_IT):
        layers.pop()
    last = layers[-1] if layers else None
    if not isinstance(last, tf.keras.layers.Dense) or not last.use_bias or len(last.input.shape) != 2:
        raise BundleError(
            f"the model {model.name!r} does not end in a Dense layer with a bias on one vector per example",
            "end it in one (an activation may follow), in a Sequential or functional model",
        )
    return last


def representation(model: Any) -> Any:
    """The model up to the input of its last Dense layer, on the same variables: (n, ...) -> (n, F)."""
    return tf.keras.Model(model.inputs, last_dense(model).input)


@contextmanager
def only_last_trained(model: Any) -> Iterator[None]:
    """In the with block no layer but the last Dense one is trainable; BatchNorm uses the statistics that it has."""
    last, layers = last_dense(model), layers_of(model)
    before = [layer.trainable for layer in layers]
    try:
        for layer in layers:
            layer.trainable = layer is last
        yield
    finally:
        for layer, trainable in zip(layers[::-1], before[::-1]):  # a layer sets those inside it: outer ones first
            layer.trainable = trainable
