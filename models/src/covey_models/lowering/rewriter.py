"""Re-trace a ConcreteFunction node by node, with the ops of a table replaced by what their functions build.

The user's model, loss and optimizer are traced as they are, forward and backward; the rewriting happens on the graph.
`lower` makes the form for TFLite, `seeded` plain TensorFlow that draws its random numbers from an input, and
`covey_models.references` other precisions. Converting is `covey_models.convert`'s part.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from covey_models._tensorflow import import_tensorflow, variable_shape
from covey_models.lowering.random import SEED
from covey_models.lowering.registry import LOOPS, LOWERINGS, RANDOM, REFUSALS, Lowering, Node, Tensor
from covey_protocol.errors import BundleError

tf = import_tensorflow()

CALLS = ("PartitionedCall", "StatefulPartitionedCall")
DROPPED = ("Placeholder", "NoOp", "Assert")
INTEGER_ARITHMETIC: dict[str, Any] = {
    "Add": np.add, "AddV2": np.add, "Sub": np.subtract, "Mul": np.multiply, "FloorDiv": np.floor_divide,
    "Less": np.less, "LessEqual": np.less_equal, "Greater": np.greater, "GreaterEqual": np.greater_equal,
    "Equal": np.equal, "NotEqual": np.not_equal, "LogicalAnd": np.logical_and, "LogicalNot": np.logical_not,
    "Minimum": np.minimum, "Maximum": np.maximum,
}  # fmt: skip

Copy = Callable[[Any, Sequence[Tensor], str], list[Tensor]]


@dataclass(frozen=True)
class Lowered:
    """A rewritten function.

    function: a ConcreteFunction with the same named inputs and outputs. kept: op type -> names of the ops that were
    left as they are; if the converter then refuses a type, this says which layer it came from.
    """

    function: Any
    kept: dict[str, list[str]]


def lower(concrete: Any, layers: Collection[str] = (), constants: Mapping[int, Any] = {}) -> Lowered:  # read only
    """Rewrite a tf.ConcreteFunction whose inputs all have static shapes and names into what TFLite can run.

    layers: the names of the model's layers, for error messages. constants: id of a variable's handle -> the value to
    put in its place. Raises BundleError for an op that cannot be lowered.
    """
    return rewrite(concrete, {**LOOPS, **LOWERINGS}, layers, constants=constants, refusals=REFUSALS)


def seeded(concrete: Any, layers: Collection[str] = ()) -> Any:
    """The same function in plain TensorFlow, with all random numbers drawn from its input `seed` (int32, ())."""
    return rewrite(concrete, {**LOOPS, **RANDOM}, layers).function


def is_random(concrete: Any) -> bool:
    """Whether any op of the function, or of a function it calls, draws random numbers."""
    return any(op.type in RANDOM for op in all_ops(concrete.graph))


def all_ops(graph: Any) -> list[Any]:
    """The ops of a graph and of all graphs its ops refer to."""
    ops = []
    for op in graph.get_operations():
        ops.append(op)
        for name, value in op.node_def.attr.items():
            if value.func.name and (body := Node(op, _never_run).graph(name)) is not None:
                ops += all_ops(body)
    return ops


def _never_run(graph: Any, inputs: Sequence[Any]) -> list[Any]:
    raise NotImplementedError


def rewrite(
    concrete: Any,
    table: Mapping[str, Lowering],
    layers: Collection[str] = (),
    *,
    constants: Mapping[int, Any] = {},  # read only
    refusals: Mapping[str, tuple[str, str]] = {},  # read only
    copy: Optional[Copy] = None,
    captured: Optional[Callable[[Any], Any]] = None,
    argument: Optional[Callable[[Any], Any]] = None,
) -> Lowered:
    """The function with every op of `table` replaced.

    copy: makes an op again that the table does not hold (op, new inputs, name) -> outputs. captured: maps each captured
    tensor, such as a variable's handle, to the one to use. argument: the same for the function's inputs.
    """
    rewriter = _Rewriter(table, refusals, layers, copy or again)
    positional, keyword = concrete.structured_input_signature
    specs = [*positional, *keyword.values()]
    outside = [captured(tensor) if captured else tensor for tensor in concrete.captured_inputs]
    inside = [constants.get(id(tensor), new) for tensor, new in zip(concrete.captured_inputs, outside)]

    def rewritten(*arguments: Tensor) -> Any:
        arguments = tuple(argument(value) for value in arguments) if argument else arguments
        rewriter.begin({spec.name: argument for spec, argument in zip(specs, arguments)})
        outputs = rewriter.graph(concrete.graph, [*arguments, *inside])
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
    table: Mapping[str, Lowering]
    refusals: Mapping[str, tuple[str, str]]
    layers: Collection[str]
    copy: Copy
    kept: dict[str, list[str]] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def begin(self, inputs: Mapping[str, Tensor]) -> None:
        self.shared.clear()
        if SEED in inputs:
            self.shared[SEED] = inputs[SEED]

    def graph(self, graph: Any, arguments: Sequence[Any], scope: str = "") -> list[Any]:
        """Rewrite one FuncGraph on new arguments and return its new outputs."""
        new = {old.ref(): argument for old, argument in zip(graph.inputs, arguments)}
        for op in _in_order(graph):
            if op.type in DROPPED:
                continue
            outputs = self.op(op, [new[tensor.ref()] for tensor in op.inputs], scope)
            for old, output in zip(op.outputs, outputs):
                if _is_value(output) and not output.shape.is_fully_defined():
                    output.set_shape(old.shape)
                new[old.ref()] = output
        return [new[tensor.ref()] for tensor in graph.outputs]

    def op(self, op: Any, inputs: list[Any], scope: str) -> list[Any]:
        name = f"{scope}{op.name}"
        if op.type in CALLS:
            return self.graph(self.node(op, name).graph("f"), inputs, f"{name}/")
        folded = _folded(op, inputs)
        if folded is not None:
            return [tf.constant(value) for value in folded]
        if op.type in self.refusals:
            why, remedy = self.refusals[op.type]
            raise BundleError(f"{describe(op.type, name, self.layers)} cannot run on a device: {why}", remedy)
        if inputs and isinstance(inputs[0], np.ndarray):
            return [self.frozen(op, inputs)]
        if op.type in self.table:
            return self.lowered(op, inputs, name)
        self.kept.setdefault(op.type, []).append(name)
        return self.copy(op, inputs, name)

    def node(self, op: Any, name: str) -> Node:
        return Node(op, lambda graph, inputs: self.graph(graph, inputs, f"{name}/"), self.shared)

    def frozen(self, op: Any, inputs: list[Any]) -> Tensor:
        """What reads a frozen variable: one constant, however often it is read."""
        key = ("constant", id(inputs[0]))
        if key not in self.shared:
            self.shared[key] = tf.constant(inputs[0])
        if op.type == "ReadVariableOp":
            return self.shared[key]
        if op.type == "ResourceGather":
            return tf.gather(self.shared[key], inputs[1], batch_dims=op.get_attr("batch_dims"))
        raise BundleError(f"the op {op.type} of a variable that is not trained cannot be lowered", "read it as a whole")

    def lowered(self, op: Any, inputs: list[Any], name: str) -> list[Any]:
        try:
            with tf.name_scope(scope_of(name)):
                outputs = self.table[op.type](self.node(op, name), *inputs)
        except BundleError as exc:
            if exc.what.startswith("the op "):  # raised inside a loop's body, and named there
                raise
            raise BundleError(f"{describe(op.type, name, self.layers)}: {exc.what}", exc.remedy) from exc
        except (
            TypeError,
            ValueError,
            AttributeError,
        ) as exc:  # a lowering met a shape or an attribute it does not know
            what = f"{describe(op.type, name, self.layers)} cannot be lowered to TFLite builtins ({exc})"
            raise BundleError(what, "give every layer a static input shape, or replace this layer") from exc
        return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _in_order(graph: Any) -> list[Any]:
    """The ops, each after those whose outputs it reads: a loop is given more inputs when its gradient is made."""
    done: set[Any] = set()
    ordered = []
    for last in graph.get_operations():
        waiting = [last]
        while waiting:
            op = waiting[-1]
            first = [tensor.op for tensor in op.inputs if tensor.op not in done]
            if first:
                waiting += first
                continue
            waiting.pop()
            if op not in done:
                done.add(op)
                ordered.append(op)
    return ordered


def _is_value(output: Any) -> bool:
    return bool(tf.is_tensor(output) and output.dtype != tf.resource)


def _folded(op: Any, inputs: Sequence[Any]) -> Optional[list[Any]]:
    """The outputs of integer arithmetic on constants, computed now, or None. Shapes are static, so theirs is."""
    if op.type in ("Shape", "ShapeN", "Size", "Rank", "VariableShape"):
        return _folded_shape(op, inputs)
    numbers = all(output.dtype.is_integer or output.dtype.is_bool for output in op.outputs)
    if op.type == "Const" or not (op.outputs and op.inputs and numbers) or op.op_def.is_stateful:
        return None
    values = [tf.get_static_value(tensor) if _is_value(tensor) else None for tensor in inputs]
    if any(value is None for value in values):
        return None
    if op.type in INTEGER_ARITHMETIC:
        return [np.asarray(INTEGER_ARITHMETIC[op.type](*values), op.outputs[0].dtype.as_numpy_dtype)]
    with tf.Graph().as_default() as graph:
        constants = [tf.constant(value, tensor.dtype) for value, tensor in zip(values, inputs)]
        outputs = again(op, constants, op.name)
        with tf.compat.v1.Session(graph=graph) as session:
            return list(session.run(outputs))


def _folded_shape(op: Any, inputs: Sequence[Any]) -> Optional[list[Any]]:
    dtype = op.outputs[0].dtype.as_numpy_dtype
    if op.type == "VariableShape":
        shape = inputs[0].shape if isinstance(inputs[0], np.ndarray) else variable_shape(inputs[0])
        return [np.asarray(shape, dtype)]
    if not all(_is_value(tensor) and tensor.shape.is_fully_defined() for tensor in inputs):
        return None
    shapes = [np.asarray(tensor.shape.as_list(), dtype) for tensor in inputs]
    if op.type == "Size":
        return [np.prod(shapes[0], dtype=dtype)]
    if op.type == "Rank":
        return [np.asarray(len(shapes[0]), dtype)]
    return list(shapes)


def again(op: Any, inputs: Sequence[Tensor], name: str) -> list[Tensor]:
    """The same op with the same attributes on new inputs, in the graph that is being traced."""
    if op.type == "Const":
        return [tf.constant(tf.make_ndarray(op.get_attr("value")), op.outputs[0].dtype)]
    attributes = {key: value for key, value in op.node_def.attr.items() if not key.startswith("_")}
    dtypes = [output.dtype for output in op.outputs]
    graph = tf.compat.v1.get_default_graph()
    return list(graph.create_op(op.type, list(inputs), dtypes, name=scope_of(name), attrs=attributes).outputs)


def scope_of(name: str) -> str:
    """A name that TensorFlow takes as a scope: user code can make others."""
    cleaned = re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", name).strip("/")
    return cleaned if re.match(r"[A-Za-z0-9.]", cleaned) else f"op{cleaned}"
