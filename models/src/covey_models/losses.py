"""The losses a bundle can be exported with. Models end in logits (or in the predicted value, for a regression).

Every function works on a whole batch and returns one number per example; weighting and averaging is the step's part
(`covey_models.steps`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from covey_models._tensorflow import import_tensorflow
from covey_protocol.errors import ConfigError

tf = import_tensorflow()
Tensor = Any


@dataclass(frozen=True)
class Loss:
    """A loss and what belongs to it.

    per_example: (labels (B,), outputs (B, C)) -> (B,). correct: the same arguments -> 1.0 where the prediction is
    right. prediction: outputs -> what `infer` returns. label_dtype: "int32" for classes, "float32" for a regression.
    outputs: how many numbers the model must end in, None for one per class. classes: how many classes there are, where
    the loss fixes that.
    """

    name: str
    per_example: Callable[[Tensor, Tensor], Tensor]
    correct: Callable[[Tensor, Tensor], Tensor]
    prediction: Callable[[Tensor], Tensor]
    label_dtype: str = "int32"
    outputs: Optional[int] = None
    classes: Optional[int] = None


def _sparse_cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def _class_is_right(labels: Tensor, logits: Tensor) -> Tensor:
    return tf.cast(tf.equal(tf.argmax(logits, -1, output_type=tf.int32), labels), tf.float32)


def _binary_cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.cast(labels, tf.float32), logits=logits[:, 0])


def _side_is_right(labels: Tensor, logits: Tensor) -> Tensor:
    return tf.cast(tf.equal(tf.cast(logits[:, 0] > 0.0, tf.int32), labels), tf.float32)


def _two_probabilities(logits: Tensor) -> Tensor:
    positive = tf.sigmoid(logits)
    return tf.concat([1.0 - positive, positive], -1)


def _squared_error(labels: Tensor, values: Tensor) -> Tensor:
    difference = values[:, 0] - labels
    return difference * difference


def _never_right(labels: Tensor, values: Tensor) -> Tensor:
    return labels * 0.0


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("sparse_categorical_crossentropy", _sparse_cross_entropy, _class_is_right, tf.nn.softmax),
        Loss("binary_crossentropy", _binary_cross_entropy, _side_is_right, _two_probabilities, outputs=1, classes=2),
        Loss("mean_squared_error", _squared_error, _never_right, tf.identity, label_dtype="float32", outputs=1),
    )
}


def loss_named(name: str) -> Loss:
    if name not in LOSSES:
        raise ConfigError(f"there is no loss {name!r}", f"choose one of {', '.join(LOSSES)}")
    return LOSSES[name]
