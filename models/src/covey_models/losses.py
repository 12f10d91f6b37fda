"""The losses a bundle can be exported with: built-in ones by name, Keras' loss objects, or a user's own function.

Every loss works on a whole batch and returns one number per example (the mean, where an output has several places such
as pixels); weighting and averaging over examples is the step's part (`covey_models.steps`). The built-in cross
entropies take logits; where the model itself ends in softmax or sigmoid they reach behind it, which is the same loss
with less rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

from covey_models._tensorflow import import_tensorflow
from covey_models.names import no_such
from covey_protocol.errors import BundleError, ConfigError

tf = import_tensorflow()
Tensor = Any
Shape = tuple[int, ...]
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Labels:
    """What one label is. classes: how many classes it tells apart, None where it tells none apart."""

    dtype: str
    shape: Shape = ()
    classes: Optional[int] = None
    minimum: Optional[float] = None
    maximum: Optional[float] = None


@dataclass(frozen=True)
class Loss:
    """A loss and what belongs to it, for one shape of output.

    per_example: (labels (B, ...), outputs (B, ...)) -> (B,). correct: the same arguments -> (B,), 1.0 where the
    prediction is right (the share of right places, if there are several). prediction: outputs -> what `infer` returns.
    takes_logits: whether an output that looks like probabilities would be a mistake.
    """

    name: str
    per_example: LossFunction
    correct: LossFunction
    prediction: Callable[[Tensor], Tensor]
    labels: Labels
    takes_logits: bool = False


def mean_per_example(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return values if values.shape.rank == 1 else tf.reduce_mean(tf.reshape(values, [values.shape[0], -1]), 1)


def behind(op_type: str, outputs: Tensor) -> Tensor:
    """The logits, where the model's last op is a softmax or sigmoid; else the outputs, which are logits then."""
    return outputs.op.inputs[0] if outputs.op.type == op_type else outputs


# --- classes


def _sparse_cross_entropy(labels: Tensor, outputs: Tensor) -> Tensor:
    logits = behind("Softmax", outputs)
    return mean_per_example(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))


def _class_is_right(labels: Tensor, outputs: Tensor) -> Tensor:
    predicted = tf.argmax(behind("Softmax", outputs), -1, output_type=tf.int32)
    return mean_per_example(tf.cast(tf.equal(predicted, tf.cast(labels, tf.int32)), tf.float32))


def _cross_entropy(labels: Tensor, outputs: Tensor) -> Tensor:
    logits = behind("Softmax", outputs)
    return mean_per_example(tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits))


def _largest_is_right(labels: Tensor, outputs: Tensor) -> Tensor:
    return _class_is_right(tf.argmax(labels, -1, output_type=tf.int32), outputs)


def _softmax(outputs: Tensor) -> Tensor:
    return tf.nn.softmax(behind("Softmax", outputs))


def _class_loss(shape: Shape) -> Loss:
    classes = _classes(shape, "sparse_categorical_crossentropy")
    labels = Labels("int32", shape[:-1], classes, 0.0, float(classes - 1))
    name = "sparse_categorical_crossentropy"
    return Loss(name, _sparse_cross_entropy, _class_is_right, _softmax, labels, takes_logits=True)


def _one_hot_loss(shape: Shape) -> Loss:
    classes = _classes(shape, "categorical_crossentropy")
    labels = Labels("float32", shape, classes, 0.0, 1.0)
    return Loss("categorical_crossentropy", _cross_entropy, _largest_is_right, _softmax, labels, takes_logits=True)


def _classes(shape: Shape, name: str) -> int:
    if not shape or shape[-1] < 2:
        raise BundleError(f"the model's output has shape {shape}, {name} needs one number per class", _LAST_LAYER)
    return shape[-1]


_LAST_LAYER = "change the last layer or choose another loss"

# --- yes or no


def _binary_cross_entropy(labels: Tensor, outputs: Tensor) -> Tensor:
    logits = behind("Sigmoid", outputs)[:, 0]
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.cast(labels, tf.float32), logits=logits)


def _side_is_right(labels: Tensor, outputs: Tensor) -> Tensor:
    positive = tf.cast(behind("Sigmoid", outputs)[:, 0] > 0.0, tf.int32)
    return tf.cast(tf.equal(positive, labels), tf.float32)


def _two_probabilities(outputs: Tensor) -> Tensor:
    positive = tf.sigmoid(behind("Sigmoid", outputs))
    return tf.concat([1.0 - positive, positive], -1)


def _binary_cross_entropies(labels: Tensor, outputs: Tensor) -> Tensor:
    logits = behind("Sigmoid", outputs)
    return mean_per_example(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))


def _sides_are_right(labels: Tensor, outputs: Tensor) -> Tensor:
    positive = behind("Sigmoid", outputs) > 0.0
    return mean_per_example(tf.cast(tf.equal(positive, labels > 0.5), tf.float32))


def _probabilities(outputs: Tensor) -> Tensor:
    return tf.sigmoid(behind("Sigmoid", outputs))


def _yes_or_no_loss(shape: Shape) -> Loss:
    name = "binary_crossentropy"
    if shape == (1,):
        labels = Labels("int32", (), 2, 0.0, 1.0)
        return Loss(name, _binary_cross_entropy, _side_is_right, _two_probabilities, labels, takes_logits=True)
    labels = Labels("float32", shape, None, 0.0, 1.0)
    return Loss(name, _binary_cross_entropies, _sides_are_right, _probabilities, labels, takes_logits=True)


# --- numbers


def _never_right(labels: Tensor, outputs: Tensor) -> Tensor:
    return tf.zeros([outputs.shape[0]])


def _regression(name: str, of_difference: Callable[[Tensor], Tensor], shape: Shape) -> Loss:
    """A function of outputs - labels; labels () for an output of one number, else shaped like the output."""

    def per_example(labels: Tensor, outputs: Tensor) -> Tensor:
        return mean_per_example(of_difference(outputs[:, 0] - labels if shape == (1,) else outputs - labels))

    return Loss(name, per_example, _never_right, tf.identity, Labels("float32", () if shape == (1,) else shape))


def _squared(difference: Tensor) -> Tensor:
    return difference * difference


def _huber(difference: Tensor) -> Tensor:
    """Quadratic up to 1, linear beyond (Huber 1964, delta = 1)."""
    size = tf.abs(difference)
    within = tf.minimum(size, 1.0)
    return within * (size - 0.5 * within)


BUILT_IN: dict[str, Callable[[Shape], Loss]] = {
    "sparse_categorical_crossentropy": _class_loss,
    "categorical_crossentropy": _one_hot_loss,
    "binary_crossentropy": _yes_or_no_loss,
    "mean_squared_error": lambda shape: _regression("mean_squared_error", _squared, shape),
    "mean_absolute_error": lambda shape: _regression("mean_absolute_error", tf.abs, shape),
    "huber": lambda shape: _regression("huber", _huber, shape),
}

# --- a user's own


def _own_loss(function: Any, shape: Shape, labels: Labels) -> Loss:
    """A Keras loss object or a function (labels, outputs) -> one number per example (or per place of an example)."""
    name = str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))
    compute: LossFunction = function.call if isinstance(function, tf.keras.losses.Loss) else function

    def per_example(values: Tensor, outputs: Tensor) -> Tensor:
        losses = tf.convert_to_tensor(compute(values, outputs))
        if losses.shape.rank == 0 or losses.shape[0] != outputs.shape[0]:
            what = f"the loss {name!r} gives shape {tuple(losses.shape)} for a batch of {outputs.shape[0]}"
            raise BundleError(what, "return one number per example; averaging over the batch is the step's part")
        return mean_per_example(losses)

    is_class = labels.classes is not None and shape[-1:] == (labels.classes,) and labels.shape == shape[:-1]
    return Loss(name, per_example, _class_is_right if is_class else _never_right, tf.identity, labels)


def _labels_of(function: Any, shape: Shape, dtype: Optional[str], label_shape: Optional[Shape]) -> Labels:
    sparse = isinstance(function, tf.keras.losses.SparseCategoricalCrossentropy)
    dtype = dtype or ("int32" if sparse else "float32")
    if label_shape is None:
        label_shape = shape[:-1] if sparse else shape
    return Labels(dtype, label_shape)


def loss_for(
    loss: Union[str, Any],
    output_shape: Shape,
    *,
    label_dtype: Optional[str] = None,
    label_shape: Optional[Shape] = None,
    num_classes: Optional[int] = None,
) -> Loss:
    """The loss for outputs of one shape (without the batch axis).

    The labels of built-in losses are fixed; label_dtype and label_shape are for a user's own. Raises ConfigError for an
    unknown name, BundleError for an output that does not fit.
    """
    if label_dtype not in (None, "int32", "float32"):
        raise ConfigError(f"labels cannot be {label_dtype}", "choose int32 or float32")
    if isinstance(loss, str):
        if loss not in BUILT_IN:
            raise no_such("loss", loss, BUILT_IN)
        found = BUILT_IN[loss](output_shape)
        if label_dtype not in (None, found.labels.dtype) or label_shape not in (None, found.labels.shape):
            what = f"{loss} takes {found.labels.dtype} labels of shape {found.labels.shape}"
            raise ConfigError(what, "leave label_dtype and label_shape out")
        return found
    if not callable(loss):
        raise ConfigError(f"{loss!r} is no loss", "give a name, a Keras loss or a function (labels, outputs)")
    labels = _labels_of(loss, output_shape, label_dtype, label_shape)
    if num_classes is not None and labels.dtype == "int32":
        labels = Labels(labels.dtype, labels.shape, num_classes, 0.0, float(num_classes - 1))
    return _own_loss(loss, output_shape, labels)
