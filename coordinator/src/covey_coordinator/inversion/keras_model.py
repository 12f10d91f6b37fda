"""A Keras model as the attacked model, for tests, benchmarks and reproductions that have no bundle.

The layers are called with slices of the flat parameter vector in place of their variables, so that loss, gradient and
whole updates can be differentiated any number of times, in float64 too. It does not do what only a bundle can say:
clipping and FedProx in the local step, moving statistics, Dropout. Those need the bundle's own graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import OfBundle
from covey_protocol.bundle import FORMAT_VERSION, Manifest, TensorSpec
from covey_protocol.errors import ConfigError, UsageError
from covey_protocol.messages import TrainingPlan
from covey_protocol.parameters import ParameterSpec, offsets, total_size

LOSSES = ("sparse_categorical_crossentropy", "categorical_crossentropy", "binary_crossentropy", "mean_squared_error")
TINY = 1e-12  # as in covey_models.steps: an average over no examples is 0


class KerasModel(OfBundle):
    """keras_model: built, of layers without moving statistics and randomness, ending in logits; its weights are only
    the start that `parameters()` gives. loss: one of LOSSES, as covey_models.losses defines them.

    input_range: what values a device's inputs may take. batch_size: of the device's steps. dtype: of all computing.
    Not safe while another thread traces the same Keras model.
    """

    def __init__(
        self,
        keras_model: Any,
        loss: str = "sparse_categorical_crossentropy",
        *,
        input_range: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 1,
        dtype: Any = None,
    ) -> None:
        import tensorflow as tf

        if loss not in LOSSES:
            raise ConfigError(f"no loss {loss!r} for a Keras model", f"choose from {', '.join(LOSSES)}")
        self._keras = _in_dtype(keras_model, tf.as_dtype(dtype or tf.float32))
        self._start = _flat(keras_model.trainable_weights)
        self._owners = _owners(self._keras)
        super().__init__(_manifest(keras_model, loss, input_range, batch_size), tf.as_dtype(dtype or tf.float32))
        self._places = offsets(self.specs)

    def parameters(self) -> npt.NDArray[np.float32]:
        """(d,): the Keras model's own weights when this was made."""
        return self._start.copy()

    def loss(self, parameters: Any, x: Any, y: Any, weights: Any = None) -> Any:
        import tensorflow as tf

        values = self._losses(self._logits(parameters, x), y)
        if weights is None:
            return tf.reduce_mean(values)
        weights = tf.cast(weights, self._dtype)
        return tf.reduce_sum(weights * values) / tf.maximum(tf.reduce_sum(weights), TINY)

    def gradient(self, parameters: Any, x: Any, y: Any, weights: Any = None) -> Any:
        import tensorflow as tf

        parameters = tf.convert_to_tensor(parameters, self._dtype)
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            loss = self.loss(parameters, x, y, weights)
        return tape.gradient(loss, parameters, unconnected_gradients="zero")

    def outputs(self, parameters: Any, x: Any) -> Any:
        import tensorflow as tf

        logits = self._logits(parameters, x)
        if self._manifest.loss.endswith("categorical_crossentropy"):
            return tf.nn.softmax(logits)
        if self._manifest.loss != "binary_crossentropy":
            return logits
        positive = tf.sigmoid(logits)
        return tf.concat([1.0 - positive, positive], -1) if positive.shape[-1] == 1 else positive

    def update(self, parameters: Any, batches: Sequence[tuple[Any, Any, Any]], plan: TrainingPlan) -> Any:
        import tensorflow as tf

        if plan.gradient_clip_norm or plan.proximal_weight:
            raise ConfigError("a Keras model's steps are plain SGD", "attack the bundle for clipping and FedProx")
        start = current = tf.convert_to_tensor(parameters, self._dtype)
        for x, y, weights in batches:
            current = current - plan.learning_rate * self.gradient(current, x, y, weights)
        return current - start

    def _logits(self, parameters: Any, x: Any) -> Any:
        import tensorflow as tf

        flat = tf.convert_to_tensor(parameters, self._dtype)
        parts = [tf.reshape(flat[self._places[spec.name]], spec.shape) for spec in self.specs]
        with _replaced(self._owners, parts):
            return self._keras(tf.convert_to_tensor(x, self._dtype), training=True)

    def _losses(self, logits: Any, y: Any) -> Any:
        """(n,). Written out of differentiable ops: TensorFlow's fused cross entropies lack higher derivatives."""
        import tensorflow as tf

        y = tf.convert_to_tensor(y)
        if self._manifest.loss.endswith("categorical_crossentropy"):
            soft = y if y.dtype.is_floating and y.shape.rank == 2 else tf.one_hot(y, logits.shape[-1])
            return -tf.reduce_sum(tf.cast(soft, self._dtype) * tf.nn.log_softmax(logits), -1)
        if self._manifest.loss == "mean_squared_error":
            return _mean((logits - tf.reshape(tf.cast(y, self._dtype), tf.shape(logits))) ** 2)
        if logits.shape[-1] == 1 and y.shape.rank == 2 and y.shape[-1] == 2:  # soft: the share of class 1
            y = y[:, 1]
        y = tf.reshape(tf.cast(y, self._dtype), tf.shape(logits))
        return _mean(tf.nn.softplus(logits) - y * logits)


def _mean(values: Any) -> Any:
    """(n, ...) -> (n,)"""
    import tensorflow as tf

    return tf.reduce_mean(tf.reshape(values, [tf.shape(values)[0], -1]), 1)


def _flat(variables: Sequence[Any]) -> npt.NDArray[np.float32]:
    return np.concatenate([np.asarray(variable, np.float32).ravel() for variable in variables])


def _manifest(keras_model: Any, loss: str, input_range: tuple[float, float], batch_size: int) -> Manifest:
    trained = keras_model.trainable_weights
    if len(keras_model.weights) != len(trained):
        raise ConfigError("this Keras model has weights that are not trained", "export it and attack the bundle")
    specs = tuple(ParameterSpec(variable.name.split(":")[0], tuple(variable.shape)) for variable in trained)
    if len({spec.name for spec in specs}) < len(specs):
        raise ConfigError("two of the model's weights share a name", "give its layers distinct names")
    outputs = int(keras_model.output_shape[-1])
    classes = None if loss == "mean_squared_error" else max(outputs, 2)
    sparse = loss == "sparse_categorical_crossentropy" or (loss == "binary_crossentropy" and outputs == 1)
    return Manifest(
        format=FORMAT_VERSION,
        name=keras_model.name,
        model_sha256="",
        model_bytes=4 * total_size(specs),
        batch_size=batch_size,
        input=TensorSpec(tuple(keras_model.input_shape[1:]), "float32", *map(float, input_range)),
        label=TensorSpec(() if sparse else (outputs,), "int32" if sparse else "float32"),
        parameters=specs,
        signatures=(),
        loss=loss,
        optimizer="sgd",
        num_classes=classes,
    )


def _in_dtype(keras_model: Any, dtype: Any) -> Any:
    """A copy of the model's layers that computes in this dtype; its own weights are never used."""
    import tensorflow as tf

    last = getattr(keras_model.layers[-1], "activation", None)
    if last is not None and last not in (tf.keras.activations.linear, tf.keras.activations.get(None)):
        raise ConfigError("this Keras model does not end in logits", "leave the last layer's activation out")

    def cast(config: Any) -> Any:
        if isinstance(config, dict):
            return {key: dtype.name if value == "float32" else cast(value) for key, value in config.items()}
        return [cast(value) for value in config] if isinstance(config, (list, tuple)) else config

    return type(keras_model).from_config(cast(keras_model.get_config()))


def _owners(keras_model: Any) -> list[tuple[Any, str]]:
    """Where every trained variable hangs: (layer, attribute), in the model's order."""
    found = {
        id(value): (layer, name)
        for layer in keras_model.submodules
        for name, value in vars(layer).items()
        if hasattr(value, "assign") and not name.startswith("_self_")
    }
    try:
        return [found[id(variable)] for variable in keras_model.trainable_weights]
    except KeyError as exc:
        raise UsageError("a layer keeps its weights where KerasModel does not look", "attack the bundle") from exc


@contextmanager
def _replaced(owners: Sequence[tuple[Any, str]], tensors: Sequence[Any]) -> Iterator[None]:
    """The layers' weights are these tensors for a while."""
    before = [vars(layer)[name] for layer, name in owners]
    try:
        for (layer, name), tensor in zip(owners, tensors):
            vars(layer)[name] = tensor
        yield
    finally:
        for (layer, name), variable in zip(owners, before):
            vars(layer)[name] = variable
