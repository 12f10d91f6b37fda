"""The table of lowerings: TensorFlow op type -> the function that builds it from TFLite builtins.

A lowering is called while the rewriter traces the new graph: it gets the old op as a `Node` and the new input tensors,
and returns the new output tensor (or a sequence of them, one per output of the old op). A new lowering is one decorated
function in the module of its theme and one parity test.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Tensor = Any  # TensorFlow 2.14 carries no types
Lowering = Callable[..., Any]
AnyLowering = TypeVar("AnyLowering", bound=Lowering)

LOWERINGS: dict[str, Lowering] = {}
REFUSALS: dict[str, tuple[str, str]] = {}


@dataclass(frozen=True)
class Node:
    """One op of the original graph.

    op: the tf.Operation. shared: values that several lowerings of one trace share, such as a convolution's patches,
    which the forward and the backward pass both need.
    """

    op: Any
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def attribute(self, name: str) -> Any:
        value = self.op.get_attr(name)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, name: str) -> bool:
        return any(attribute.name == name for attribute in self.op.op_def.attr)


def lowers(*op_types: str) -> Callable[[AnyLowering], AnyLowering]:
    """Register the decorated function as the lowering of these op types."""

    def register(lowering: AnyLowering) -> AnyLowering:
        for op_type in op_types:
            if op_type in LOWERINGS:
                raise ValueError(f"{op_type} has two lowerings")
            LOWERINGS[op_type] = lowering
        return lowering

    return register


def refuse(*op_types: str, why: str, remedy: str) -> None:
    """Declare op types that would convert, or seem to, and must not: `why` and `remedy` go into the error."""
    for op_type in op_types:
        REFUSALS[op_type] = (why, remedy)
