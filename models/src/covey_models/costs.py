"""What a TFLite subgraph costs: floating-point operations by a stated rule, and bytes of its tensors by their lives.

Both read the file alone. docs/bundle.md states the rules and how far off the memory estimate was measured to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from covey_models.tflite_file import Operator, Subgraph, TfliteModel, called_subgraphs

ALIGNMENT = 64  # bytes; TFLite's arena puts every tensor at a multiple of it
# these move, name or choose numbers and compute none
MOVES = frozenset(
    [
        "ASSIGN_VARIABLE",
        "BATCH_TO_SPACE_ND",
        "BITCAST",
        "BROADCAST_ARGS",
        "BROADCAST_TO",
        "CALL_ONCE",
        "CAST",
        "CONCATENATION",
        "DENSIFY",
        "DEPTH_TO_SPACE",
        "DYNAMIC_UPDATE_SLICE",
        "EXPAND_DIMS",
        "FILL",
        "GATHER",
        "GATHER_ND",
        "IF",
        "MIRROR_PAD",
        "ONE_HOT",
        "PACK",
        "PAD",
        "PADV2",
        "RANGE",
        "RANK",
        "READ_VARIABLE",
        "RESHAPE",
        "RESIZE_NEAREST_NEIGHBOR",
        "REVERSE_SEQUENCE",
        "REVERSE_V2",
        "SCATTER_ND",
        "SELECT",
        "SELECT_V2",
        "SHAPE",
        "SLICE",
        "SPACE_TO_BATCH_ND",
        "SPACE_TO_DEPTH",
        "SPARSE_TO_DENSE",
        "SPLIT",
        "SPLIT_V",
        "SQUEEZE",
        "STRIDED_SLICE",
        "TILE",
        "TRANSPOSE",
        "UNPACK",
        "VAR_HANDLE",
        "WHERE",
        "WHILE",
        "ZEROS_LIKE",
    ]
)
# these read every input number once, whatever little they give
REDUCTIONS = frozenset(
    [
        "ARG_MAX",
        "ARG_MIN",
        "MEAN",
        "REDUCE_ALL",
        "REDUCE_ANY",
        "REDUCE_MAX",
        "REDUCE_MIN",
        "REDUCE_PROD",
        "SEGMENT_SUM",
        "SUM",
        "UNSORTED_SEGMENT_MAX",
        "UNSORTED_SEGMENT_MIN",
        "UNSORTED_SEGMENT_PROD",
        "UNSORTED_SEGMENT_SUM",
    ]
)
SHARING = frozenset(("EXPAND_DIMS", "RESHAPE", "SQUEEZE"))  # TFLite may lay their output over their input


@dataclass(frozen=True)
class Flops:
    """products: of matrix products and convolutions. others: of everything else. One multiply-add counts 2."""

    products: int
    others: int

    @property
    def total(self) -> int:
        return self.products + self.others

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.others + other.others)


def flops(model: TfliteModel, graph: Subgraph) -> Flops:
    """Of one run of `graph` and of the subgraphs it calls, each of those once for every operator that calls it.

    A loop's length is not in the file, so its body counts as one turn. What CALL_ONCE calls is not counted.
    """
    return _flops(model, graph, {})


def _flops(model: TfliteModel, graph: Subgraph, known: dict[int, Flops]) -> Flops:
    """known: by a subgraph's identity; 0 while it is being counted, for a file may call in a circle."""
    total = known[id(graph)] = Flops(0, 0)
    for operator in graph.operators:
        products = _PRODUCTS.get(operator.name)
        if products is not None:
            total += Flops(products(operator, graph), 0)
        elif operator.name not in MOVES:
            total += Flops(0, _others(operator, graph))
    for name, called in called_subgraphs(model, graph):
        if name != "CALL_ONCE":
            total += known[id(called)] if id(called) in known else _flops(model, called, known)
    known[id(graph)] = total
    return total


def _others(operator: Operator, graph: Subgraph) -> int:
    if operator.name in REDUCTIONS:
        return _size(operator.inputs, 0, graph)
    window = math.prod(operator.whole(key, 1) for key in ("FilterHeight", "FilterWidth"))
    return window * sum(graph.tensors[number].size for number in operator.outputs)


def _size(numbers: tuple[int, ...], place: int, graph: Subgraph) -> int:
    return math.prod(_shape(numbers, place, graph))


def _shape(numbers: tuple[int, ...], place: int, graph: Subgraph) -> tuple[int, ...]:
    present = place < len(numbers) and numbers[place] >= 0
    return graph.tensors[numbers[place]].shape if present else ()


def _batch_matmul(operator: Operator, graph: Subgraph) -> int:
    """2 M N K for each matrix of the batch."""
    shape = _shape(operator.inputs, 0, graph)
    inner = (*shape, 1, 1)[-4 if operator.settings.get("AdjX") else -3] if len(shape) >= 2 else 1
    return 2 * _size(operator.outputs, 0, graph) * inner


def _fully_connected(operator: Operator, graph: Subgraph) -> int:
    """2 M N K; the weights are (N, K)."""
    return 2 * _size(operator.outputs, 0, graph) * (*_shape(operator.inputs, 1, graph), 1)[1]


def _convolution(operator: Operator, graph: Subgraph) -> int:
    """2 per output number, row, column and input channel of the filter (output channels, rows, columns, channels)."""
    return 2 * _size(operator.outputs, 0, graph) * math.prod(_shape(operator.inputs, 1, graph)[1:])


def _depthwise_convolution(operator: Operator, graph: Subgraph) -> int:
    """2 per output number, row and column of the filter (1, rows, columns, channels)."""
    return 2 * _size(operator.outputs, 0, graph) * math.prod(_shape(operator.inputs, 1, graph)[1:3])


def _transposed_convolution(operator: Operator, graph: Subgraph) -> int:
    """2 per input number, row, column and output channel of the filter (output channels, rows, columns, channels)."""
    return 2 * _size(operator.inputs, 2, graph) * math.prod(_shape(operator.inputs, 1, graph)[:3])


def _convolution_3d(operator: Operator, graph: Subgraph) -> int:
    """2 per output number and place of the filter (depth, rows, columns, channels, output channels)."""
    return 2 * _size(operator.outputs, 0, graph) * math.prod(_shape(operator.inputs, 1, graph)[:4])


_PRODUCTS: dict[str, Callable[[Operator, Subgraph], int]] = {
    "BATCH_MATMUL": _batch_matmul,
    "FULLY_CONNECTED": _fully_connected,
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise_convolution,
    "TRANSPOSE_CONV": _transposed_convolution,
    "CONV_3D": _convolution_3d,
}


def arena_bytes(graph: Subgraph) -> int:
    """The most bytes of computed tensors alive at once, each rounded up to 64; inputs and outputs live throughout.

    BATCH_MATMUL keeps transposed copies of both its inputs while it runs. Other kernels' scratch space, gaps between
    tensors and what XNNPACK packs come on top.
    """
    owner = _owners(graph)
    last = len(graph.operators)
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    for number in (*graph.inputs, *graph.outputs):
        born[number], dies[number] = 0, last
    for place, operator in enumerate(graph.operators):
        for number in (*operator.inputs, *operator.outputs):
            root = owner.get(number, number)
            born.setdefault(root, place)
            dies[root] = max(place, dies.get(root, 0))
    change = [0] * (last + 2)
    for number, start in born.items():
        if number >= 0 and not graph.tensors[number].constant_bytes:
            size = _aligned(graph.tensors[number].bytes)
            change[start] += size
            change[dies[number] + 1] -= size
    for place, operator in enumerate(graph.operators):
        if operator.name == "BATCH_MATMUL":
            scratch = sum(_aligned(graph.tensors[number].bytes) for number in operator.inputs if number >= 0)
            change[place] += scratch
            change[place + 1] -= scratch
    alive = peak = 0
    for one in change:
        alive += one
        peak = max(peak, alive)
    return peak


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _owners(graph: Subgraph) -> dict[int, int]:
    """Output -> the tensor whose memory it takes, for reshapes of a computed tensor that is no input or output."""
    fixed = {*graph.inputs, *graph.outputs}
    owner: dict[int, int] = {}
    for operator in graph.operators:
        if operator.name in SHARING and operator.inputs and operator.outputs:
            source, result = operator.inputs[0], operator.outputs[0]
            computed = source >= 0 and not graph.tensors[source].constant_bytes
            if computed and source not in fixed and result not in fixed:
                owner[result] = owner.get(source, source)
    return owner


def variable_bytes(model: TfliteModel) -> dict[str, int]:
    """Each variable of the model -> its bytes, from what is written to it or read from it."""
    found: dict[str, int] = {}
    for graph in model.subgraphs:
        handles = {
            operator.outputs[0]: str(operator.settings["SharedName"])
            for operator in graph.operators
            if operator.name == "VAR_HANDLE" and operator.outputs and "SharedName" in operator.settings
        }
        for operator in graph.operators:
            value = None
            if operator.name == "ASSIGN_VARIABLE" and len(operator.inputs) == 2:
                value = operator.inputs[1]
            elif operator.name == "READ_VARIABLE" and operator.outputs:
                value = operator.outputs[0]
            if value is not None and value >= 0 and operator.inputs and operator.inputs[0] in handles:
                name = handles[operator.inputs[0]]
                found[name] = max(found.get(name, 0), graph.tensors[value].bytes)
    return found
