"""The optimizers a training step can be exported with: Keras' own, with the learning rate as an input of the step.

Keras' update code is traced like the rest of the step and rewritten with it; there is no second implementation here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.names import no_such
from covey_protocol.errors import BundleError, ConfigError

tf = import_tensorflow()
Tensor = Any
Gradients = list[tuple[Any, Tensor]]  # (variable, gradient)

BUILT_IN: dict[str, Callable[[], Any]] = {
    "momentum": lambda: tf.keras.optimizers.SGD(momentum=0.9),
    "nesterov": lambda: tf.keras.optimizers.SGD(momentum=0.9, nesterov=True),
    "adam": tf.keras.optimizers.Adam,
    "adamw": tf.keras.optimizers.AdamW,
    "rmsprop": tf.keras.optimizers.RMSprop,
    "adagrad": tf.keras.optimizers.Adagrad,
}
NAMES = ("sgd", *BUILT_IN)


class SGD:
    """Plain gradient descent, w - learning_rate * g: no state, nothing to reset."""

    name = "sgd"
    state: tuple[Any, ...] = ()

    def apply(self, gradients: Gradients, learning_rate: Tensor) -> None:
        for variable, gradient in gradients:
            variable.assign_sub(learning_rate * gradient)

    def reset(self) -> None:
        """Nothing is kept between steps."""


@dataclass
class KerasOptimizer:
    """A Keras optimizer built for some variables. state: its variables but the learning rate; they never travel."""

    name: str
    keras: Any
    state: tuple[Any, ...] = ()
    initial: tuple[Any, ...] = field(default=(), repr=False)

    def apply(self, gradients: Gradients, learning_rate: Tensor) -> None:
        self.keras.learning_rate.assign(learning_rate)
        self.keras.apply_gradients([(gradient, variable) for variable, gradient in gradients])

    def reset(self) -> None:
        for variable, value in zip(self.state, self.initial):
            variable.assign(value)


Optimizer = Union[SGD, KerasOptimizer]


def optimizer_for(optimizer: Any, variables: list[Any]) -> Optimizer:
    """The optimizer for these trainable variables, from its name or from a Keras optimizer, which is left untouched.

    Raises ConfigError for an unknown name, BundleError for an optimizer whose learning rate cannot be an input.
    """
    if optimizer == "sgd":
        return SGD()
    keras = _keras_optimizer(optimizer)
    name = optimizer if isinstance(optimizer, str) else str(keras.get_config()["name"]).lower()
    if isinstance(keras, tf.keras.optimizers.legacy.Optimizer):
        # has no public way to make its variables but a step; this one moves nothing and is not counted
        keras.apply_gradients([(tf.zeros_like(variable), variable) for variable in variables])
        keras.iterations.assign(0)
        own = list(keras.weights)
    else:
        keras.build(variables)
        own = [variable for variable in keras.variables if variable is not keras.learning_rate]
    return KerasOptimizer(name, keras, tuple(own), tuple(variable.numpy() for variable in own))


def _keras_optimizer(optimizer: Any) -> Any:
    if isinstance(optimizer, str):
        if optimizer not in BUILT_IN:
            raise no_such("optimizer", optimizer, NAMES)
        return BUILT_IN[optimizer]()
    if not isinstance(optimizer, (tf.keras.optimizers.Optimizer, tf.keras.optimizers.legacy.Optimizer)):
        raise ConfigError(f"{optimizer!r} is no optimizer", f"give a Keras optimizer or one of {', '.join(NAMES)}")
    config = optimizer.get_config()
    if not np.isscalar(config.get("learning_rate")):
        raise BundleError(
            f"the optimizer {config['name']!r} has a learning rate schedule",
            "give a fixed rate: the plan of a round sets the learning rate on the device",
        )
    return type(optimizer).from_config(config)
