"""The tables of lowerings: op type -> function that builds the same values out of other ops.

A new op is one function under `@lowers("OpType")` and one parity test. The function gets the original op (for its
attributes) and the new input tensors; it returns the op's outputs, one or several, as tensors of the same shapes.

LOWERINGS: ops that TFLite lacks or computes slowly or wrongly. LOOPS: control flow with a length known now, run while
tracing. RANDOM: ops that draw random numbers, computed from a seed that is an input. The last two build plain
TensorFlow again, so a reference can be made with them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from covey_models._tensorflow import graph_of
from covey_protocol.errors import BundleError

Tensor = Any  # TensorFlow 2.14 carries no types
Lowering = Callable[..., Any]
AnyLowering = TypeVar("AnyLowering", bound=Lowering)

Table = dict[str, Lowering]
LOWERINGS: Table = {}
LOOPS: Table = {}
RANDOM: Table = {}
REFUSALS: dict[str, tuple[str, str]] = {}


@dataclass(frozen=True)
class Node:
    """One op of the original graph.

    op: the tf.Operation. run: (graph, inputs) -> outputs rewrites a graph that the op refers to, in its place.
    shared: values that several lowerings of one trace share, such as a convolution's patches, which the forward and
    the backward pass both need.
    """

    op: Any
    run: Callable[[Any, Sequence[Any]], list[Any]]
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def attribute(self, name: str) -> Any:
        value = self.op.get_attr(name)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, name: str) -> bool:
        return any(attribute.name == name for attribute in self.op.op_def.attr)

    def graph(self, attribute: str) -> Any:
        """The graph of a function that the op names, such as a loop's body."""
        graph = graph_of(self.op, attribute)
        if graph is None:
            name = self.op.get_attr(attribute).name
            raise BundleError(f"the body of the nested function {name} is not to be found", "drop its @tf.function")
        return graph


def lowers(*op_types: str, table: Table = LOWERINGS) -> Callable[[AnyLowering], AnyLowering]:
    """Register the decorated function as the lowering of these op types."""

    def register(lowering: AnyLowering) -> AnyLowering:
        for op_type in op_types:
            if op_type in table:
                raise ValueError(f"{op_type} has two lowerings")
            table[op_type] = lowering
        return lowering

    return register


def refuse(*op_types: str, why: str, remedy: str) -> None:
    """Declare op types that would convert, or seem to, and must not: `why` and `remedy` go into the error."""
    for op_type in op_types:
        REFUSALS[op_type] = (why, remedy)
