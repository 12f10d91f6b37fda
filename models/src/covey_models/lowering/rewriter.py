"""Re-trace a ConcreteFunction node by node, with every op TFLite lacks replaced by its lowering.

The user's model, loss and optimizer are traced as they are, forward and backward; the rewriting happens on the graph.
It relies on public API, except for finding the body of a nested function. Converting is `covey_models.convert`'s part.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering.registry import LOWERINGS, REFUSALS, Node, Tensor
from covey_protocol.errors import BundleError

tf = import_tensorflow()

CALLS = ("PartitionedCall", "StatefulPartitionedCall")
DROPPED = ("Placeholder", "NoOp", "Assert")


@dataclass(frozen=True)
class Lowered:
    """A rewritten function.

    function: a ConcreteFunction with the same named inputs and outputs. kept: op type -> names of the ops that were
    left as they are; if the converter then refuses a type, this says which layer it came from.
    """

    function: Any
    kept: dict[str, list[str]]


def lower(concrete: Any, layers: Collection[str] = ()) -> Lowered:
    """Rewrite a tf.ConcreteFunction whose inputs all have static shapes and names.

    layers: the names of the model's layers, for error messages. Raises BundleError for an op that cannot be lowered.
    """
    rewriter = _Rewriter(layers)
    positional, keyword = concrete.structured_input_signature
    specs = [*positional, *keyword.values()]

    def rewritten(*arguments: Tensor) -> Any:
        outputs = rewriter.graph(concrete.graph, [*arguments, *concrete.captured_inputs])
        return tf.nest.pack_sequence_as(concrete.structured_outputs, outputs, expand_composites=True)

    names = [inspect.Parameter(spec.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for spec in specs]
    rewritten.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]  # how tf.function names inputs
    function = tf.function(rewritten, input_signature=specs, autograph=False).get_concrete_function()
    return Lowered(function, rewriter.kept)


def layer_of(op_name: str, layers: Collection[str]) -> str:
    """The innermost layer whose scope an op was made in; "" where it is none (the loss, the training step)."""
    for scope in reversed(op_name.split("/")):
        for name in (scope, re.sub(r"_\d+$", "", scope)):  # a layer that is called again gets a counted scope
            if name in layers:
                return name
    return ""


def describe(op_type: str, op_name: str, layers: Collection[str]) -> str:
    layer = layer_of(op_name, layers)
    return f"the op {op_type} of " + (f"the layer {layer!r}" if layer else f"the training step ({op_name})")


@dataclass
class _Rewriter:
    layers: Collection[str]
    kept: dict[str, list[str]] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def graph(self, graph: Any, arguments: Sequence[Tensor], scope: str = "") -> list[Tensor]:
        """Rewrite one FuncGraph on new arguments and return its new outputs."""
        new = {old.ref(): argument for old, argument in zip(graph.inputs, arguments)}
        for op in graph.get_operations():
            if op.type in DROPPED:
                continue
            outputs = self.op(op, [new[tensor.ref()] for tensor in op.inputs], scope)
            for old, output in zip(op.outputs, outputs):
                if output.dtype != tf.resource and not output.shape.is_fully_defined():
                    output.set_shape(old.shape)
                new[old.ref()] = output
        return [new[tensor.ref()] for tensor in graph.outputs]

    def op(self, op: Any, inputs: list[Tensor], scope: str) -> list[Tensor]:
        name = f"{scope}{op.name}"
        if op.type in REFUSALS:
            why, remedy = REFUSALS[op.type]
            raise BundleError(f"{describe(op.type, name, self.layers)} cannot run on a device: {why}", remedy)
        if op.type in CALLS:
            return self.graph(_body(op), inputs, f"{name}/")
        folded = _folded(op, inputs)
        if folded is not None:
            return [tf.constant(value) for value in folded]
        if op.type in LOWERINGS:
            return self.lowered(op, inputs, name)
        self.kept.setdefault(op.type, []).append(name)
        return _again(op, inputs, name)

    def lowered(self, op: Any, inputs: list[Tensor], name: str) -> list[Tensor]:
        try:
            with tf.name_scope(_scope(name)):
                outputs = LOWERINGS[op.type](Node(op, self.shared), *inputs)
        except BundleError as exc:
            raise BundleError(f"{describe(op.type, name, self.layers)}: {exc.what}", exc.remedy) from exc
        except (
            TypeError,
            ValueError,
            AttributeError,
        ) as exc:  # a lowering met a shape or an attribute it does not know
            what = f"{describe(op.type, name, self.layers)} cannot be lowered to TFLite builtins ({exc})"
            raise BundleError(what, "give every layer a static input shape, or replace this layer") from exc
        return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _body(call: Any) -> Any:
    """The graph of the function that a call op calls."""
    name = call.get_attr("f").name
    function = call.graph._get_function(name)
    body = getattr(function, "graph", None)
    if body is None:
        raise BundleError(f"the body of the nested function {name} is not to be found", "inline it: drop @tf.function")
    return body


def _folded(op: Any, inputs: Sequence[Tensor]) -> Optional[list[Any]]:
    """The outputs of integer arithmetic on constants, computed now, or None. Shapes are static, so theirs is."""
    if op.type in ("Shape", "ShapeN", "Size", "Rank"):
        return _folded_shape(op, inputs)
    numbers = all(output.dtype.is_integer or output.dtype.is_bool for output in op.outputs)
    if op.type == "Const" or not (op.outputs and op.inputs and numbers) or op.op_def.is_stateful:
        return None
    values = [tf.get_static_value(tensor) if tensor.dtype != tf.resource else None for tensor in inputs]
    if any(value is None for value in values):
        return None
    with tf.Graph().as_default() as graph:
        constants = [tf.constant(value, tensor.dtype) for value, tensor in zip(values, inputs)]
        outputs = _again(op, constants, op.name)
        with tf.compat.v1.Session(graph=graph) as session:
            return list(session.run(outputs))


def _folded_shape(op: Any, inputs: Sequence[Tensor]) -> Optional[list[Any]]:
    if not all(tensor.shape.is_fully_defined() for tensor in inputs):
        return None
    dtype = op.outputs[0].dtype.as_numpy_dtype
    shapes = [np.asarray(tensor.shape.as_list(), dtype) for tensor in inputs]
    if op.type == "Size":
        return [np.prod(shapes[0], dtype=dtype)]
    if op.type == "Rank":
        return [np.asarray(len(shapes[0]), dtype)]
    return list(shapes)


def _again(op: Any, inputs: Sequence[Tensor], name: str) -> list[Tensor]:
    """The same op with the same attributes on new inputs, in the graph that is being traced."""
    if op.type == "Const":
        return [tf.constant(tf.make_ndarray(op.get_attr("value")), op.outputs[0].dtype)]
    attributes = {key: value for key, value in op.node_def.attr.items() if not key.startswith("_")}
    dtypes = [output.dtype for output in op.outputs]
    graph = tf.compat.v1.get_default_graph()
    return list(graph.create_op(op.type, list(inputs), dtypes, name=_scope(name), attrs=attributes).outputs)


def _scope(name: str) -> str:
    """A name that TensorFlow takes as a scope: user code can make others."""
    cleaned = re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", name).strip("/")
    return cleaned if re.match(r"[A-Za-z0-9.]", cleaned) else f"op{cleaned}"
