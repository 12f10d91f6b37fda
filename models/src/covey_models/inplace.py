"""A guard against tflite_runtime 2.14 overwriting tensors that are still needed.

Its memory planner lets elementwise ops write their result over their input when nothing else reads that input. It
counts the readers of a tensor, but not those of other reshapes of the same numbers: with a = reshape(t) and
b = reshape(t), the product a * c may overwrite t, and b reads it later. (LiteRT 2.x counts right.) The guard gives such
an input a second reader: a SHAPE op, which computes nothing, right behind the op that must not write in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from covey_models._tensorflow import flatbuffer_schema

ALIASES = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")  # ops whose output is their input in another shape
ELEMENTWISE = frozenset(
    [
        "ABS",
        "ADD",
        "ADD_N",
        "ATAN2",
        "CEIL",
        "COS",
        "DIV",
        "ELU",
        "EXP",
        "FLOOR",
        "GELU",
        "HARD_SWISH",
        "L2_NORMALIZATION",
        "LEAKY_RELU",
        "LOG",
        "LOGISTIC",
        "LOG_SOFTMAX",
        "MAXIMUM",
        "MINIMUM",
        "MUL",
        "NEG",
        "POW",
        "PRELU",
        "RELU",
        "RELU6",
        "RELU_0_TO_1",
        "RELU_N1_TO_1",
        "ROUND",
        "RSQRT",
        "SELECT",
        "SELECT_V2",
        "SIGN",
        "SIN",
        "SOFTMAX",
        "SQRT",
        "SQUARE",
        "SQUARED_DIFFERENCE",
        "SUB",
        "TANH",
        "CAST",
    ]
)  # what may write in place, in some version or other: one too many costs a read of a shape


def guard_shared_inputs(model: Any) -> int:
    """Add the second readers to a parsed model (the schema's ModelT), in place. Returns how many were needed."""
    schema = flatbuffer_schema()
    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    kinds = [names[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    guards = 0
    for graph in model.subgraphs:
        at_risk = _at_risk(graph, [kinds[operator.opcodeIndex] for operator in graph.operators])
        if at_risk and "SHAPE" not in kinds:
            kinds.append("SHAPE")
            model.operatorCodes.append(_shape_code(schema))
        for position, tensor in reversed(at_risk):
            graph.operators.insert(position + 1, _shape_of(schema, graph, tensor, kinds.index("SHAPE")))
        guards += len(at_risk)
    return guards


def _at_risk(graph: Any, kinds: list[str]) -> list[tuple[int, int]]:
    """(operator, input tensor) of every elementwise op that might overwrite numbers another reshape still shows."""
    last_read, readers = _reads(graph)
    shown: dict[int, int] = {}  # tensor -> the tensor it is a reshape of
    family: dict[int, list[int]] = {}
    found = []
    for position, (operator, kind) in enumerate(zip(graph.operators, kinds)):
        if kind in ALIASES:
            origin = shown.get(operator.inputs[0], operator.inputs[0])
            shown[operator.outputs[0]] = origin
            family.setdefault(origin, [origin]).append(operator.outputs[0])
        if kind not in ELEMENTWISE:
            continue
        for tensor in dict.fromkeys(operator.inputs):
            relatives = family.get(shown.get(tensor, tensor), [])
            needed = any(last_read.get(other, -1) > position for other in relatives if other != tensor)
            if needed and readers[tensor] == 1 and _size(graph, tensor) == _size(graph, operator.outputs[0]):
                found.append((position, tensor))
    return found


def _reads(graph: Any) -> tuple[dict[int, int], dict[int, int]]:
    """Of every tensor that is read: by which operator last (outputs of the graph: after all), and by how many."""
    last = {int(tensor): len(graph.operators) for tensor in graph.outputs}
    readers: dict[int, int] = {}
    for position, operator in enumerate(graph.operators):
        for tensor in _ints(operator.inputs):
            last[tensor] = max(last.get(tensor, -1), position)
            readers[tensor] = readers.get(tensor, 0) + 1
    return last, readers


def _ints(values: Any) -> Iterable[int]:
    return () if values is None else [int(value) for value in values]


def _size(graph: Any, tensor: int) -> int:
    return math.prod(_ints(graph.tensors[tensor].shape))


def _shape_code(schema: Any) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.SHAPE
    code.version = 1
    return code


def _shape_of(schema: Any, graph: Any, tensor: int, opcode: int) -> Any:
    """An operator that reads nothing of a tensor but its shape, into a new tensor nobody reads."""
    output = schema.TensorT()
    output.shape, output.type, output.buffer = (
        [len(list(_ints(graph.tensors[tensor].shape)))],
        schema.TensorType.INT32,
        0,
    )
    graph.tensors.append(output)
    operator = schema.OperatorT()
    operator.opcodeIndex = opcode
    operator.inputs, operator.outputs = [tensor], [len(graph.tensors) - 1]
    operator.builtinOptionsType = schema.BuiltinOptions.ShapeOptions
    operator.builtinOptions = schema.ShapeOptionsT()
    operator.builtinOptions.outType = schema.TensorType.INT32
    return operator
