"""The table of imported operators: TFLite builtin -> function that computes it in TensorFlow.

A new operator is one function under `@imports("NAME")`. It gets the call (settings, shapes and types of the outputs)
and the inputs, a NumPy array where the file holds a constant, None where an input is left out, else a tensor; it
returns the output, or a list of outputs. Every float operator must be differentiable twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from covey_models._tensorflow import import_tensorflow
from covey_models.tflite_file import Operator
from covey_protocol.errors import BundleError

tf = import_tensorflow()

Tensor = Any  # TensorFlow 2.14 carries no types
Shape = tuple[int, ...]
Importer = Callable[..., Any]
AnyImporter = TypeVar("AnyImporter", bound=Importer)

IMPORTERS: dict[str, Importer] = {}


@dataclass(frozen=True)
class Call:
    """One operator as it stands in the file. real: what FLOAT32 is computed in, tf.float32 or tf.float64."""

    operator: Operator
    shapes: tuple[Shape, ...]
    types: tuple[Any, ...]
    real: Any

    @property
    def name(self) -> str:
        return self.operator.name

    @property
    def shape(self) -> Shape:
        """Of the first output."""
        return self.shapes[0]

    @property
    def type(self) -> Any:
        """Of the first output."""
        return self.types[0]

    def whole(self, setting: str, default: int = 0) -> int:
        return self.operator.whole(setting, default)

    def number(self, setting: str, default: float) -> float:
        return self.operator.number(setting, default)


def imports(*names: str) -> Callable[[AnyImporter], AnyImporter]:
    """Register the decorated function for these operators."""

    def register(function: AnyImporter) -> AnyImporter:
        for name in names:
            if name in IMPORTERS:
                raise ValueError(f"{name} is imported twice")
            IMPORTERS[name] = function
        return function

    return register


def static(call: Call, value: Tensor, what: str) -> npt.NDArray[Any]:
    """The value of an input that must be known before anything runs: axes, paddings, sizes."""
    known = value if isinstance(value, np.ndarray) else tf.get_static_value(value)
    if known is None:
        raise BundleError(f"{what} of a {call.name} in the model depend on its data", "export the model with covey")
    return np.asarray(known)


def axes_of(call: Call, value: Tensor) -> list[int]:
    return [int(axis) for axis in static(call, value, "the axes").reshape(-1)]


def activated(call: Call, x: Tensor) -> Tensor:
    """x after the activation that the file has fused into the operator (schema's ActivationFunctionType)."""
    kind = call.whole("FusedActivationFunction")
    if kind not in ACTIVATIONS:
        raise BundleError(f"a {call.name} in the model has an activation {kind}", "export the model with covey")
    return ACTIVATIONS[kind](x)


def between_ones(x: Tensor) -> Tensor:
    return tf.clip_by_value(x, -1.0, 1.0)


ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    0: lambda x: x,
    1: tf.nn.relu,
    2: between_ones,
    3: tf.nn.relu6,
    4: tf.tanh,
}
