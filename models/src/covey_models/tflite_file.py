"""A TFLite model file as plain values: subgraphs, tensors, operators, entry points. Nothing is run or loaded.

The bytes may be anybody's: every count is held against the file's size, and whatever cannot be read is a BundleError.
Only the generated schema of the installed TensorFlow is used, not TensorFlow itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from covey_models._tensorflow import flatbuffer_schema
from covey_protocol.errors import BundleError

Setting = Union[int, float, str, tuple[float, ...]]

MAX_RANK = 16  # TFLite's kernels take 8 at most
# bytes of one number; a type that is not here (string, resource, variant) holds no numbers
TYPE_BYTES = {
    "FLOAT32": 4, "INT32": 4, "UINT8": 1, "INT64": 8, "BOOL": 1, "INT16": 2, "INT8": 1, "FLOAT16": 2, "UINT16": 2,
    "UINT32": 4, "UINT64": 8, "FLOAT64": 8, "COMPLEX64": 8, "COMPLEX128": 16,
}  # fmt: skip
_UNREADABLE = (
    struct.error, IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError,
    RecursionError,
)  # fmt: skip  # what the generated readers raise over bytes that are no model


@dataclass(frozen=True)
class Tensor:
    """type: the schema's name, FLOAT32 or INT32. constant_bytes: size of its data in the file, 0 for what is computed.

    buffer: number of its data in the file; tensors may share one.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    buffer: int
    constant_bytes: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def bytes(self) -> int:
        return self.size * TYPE_BYTES.get(self.type, 0)


@dataclass(frozen=True)
class Operator:
    """inputs, outputs: numbers of tensors in the operator's subgraph, -1 for an input left out."""

    name: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def whole(self, setting: str, default: int) -> int:
        """A setting that is a whole number; the default where the file leaves it out."""
        value = self.settings.get(setting, default)
        return int(value) if isinstance(value, (int, float)) else default

    def number(self, setting: str, default: float) -> float:
        value = self.settings.get(setting, default)
        return float(value) if isinstance(value, (int, float)) else default


@dataclass(frozen=True)
class Subgraph:
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class EntryPoint:
    """inputs, outputs: name -> number of the tensor in its subgraph."""

    subgraph: Subgraph
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


@dataclass(frozen=True)
class TfliteModel:
    """operator_versions: name -> the highest version of it that the file asks for, used or not. schema: the file
    format's version. size: of the file in bytes."""

    subgraphs: tuple[Subgraph, ...]
    entry_points: Mapping[str, EntryPoint]
    operator_versions: Mapping[str, int]
    schema: int = 3
    size: int = 0


def read_tflite(data: bytes) -> TfliteModel:
    """The model in these bytes; BundleError where they are none."""
    schema = flatbuffer_schema()
    try:
        if not schema.Model.ModelBufferHasIdentifier(data, 0):
            raise BundleError("the model in the bundle is not a TFLite file", "export the bundle again")
        return _Reader(schema, data).model()
    except _UNREADABLE as exc:
        raise BundleError(f"the model in the bundle is damaged ({exc})", "export the bundle again") from exc


def read_buffers(data: bytes) -> list[npt.NDArray[np.uint8]]:
    """The bytes of every buffer of a model that `read_tflite` took, as views of the file."""
    model = flatbuffer_schema().Model.GetRootAs(data, 0)
    try:
        buffers = [model.Buffers(number) for number in range(model.BuffersLength())]
        return [np.empty(0, np.uint8) if one.DataIsNone() else one.DataAsNumpy() for one in buffers]
    except _UNREADABLE as exc:
        raise BundleError(f"the model in the bundle is damaged ({exc})", "export the bundle again") from exc


def operators(data: bytes) -> list[str]:
    """The ops a TFLite model uses, by name and sorted: ADD, BATCH_MATMUL, ...; "custom NAME" for what is no builtin."""
    return sorted({name for name, _ in _Reader(flatbuffer_schema(), data).codes()})


class _Reader:
    """The generated accessors, with every count bounded."""

    def __init__(self, schema: Any, data: bytes) -> None:
        self._schema = schema
        self._limit = len(data)  # no list in a file has more entries than the file has bytes
        self._model = schema.Model.GetRootAs(data, 0)
        self._types = names_of(schema.TensorType)
        self._operator_names = names_of(schema.BuiltinOperator)

    def model(self) -> TfliteModel:
        codes = self.codes()
        graphs = tuple(
            self._subgraph(self._model.Subgraphs(i), codes) for i in self._upto(self._model.SubgraphsLength())
        )
        entry_points = dict(
            self._entry_point(self._model.SignatureDefs(i), graphs)
            for i in self._upto(self._model.SignatureDefsLength())
        )
        versions: dict[str, int] = {}
        for name, version in codes:
            versions[name] = max(version, versions.get(name, 0))
        return TfliteModel(graphs, entry_points, versions, int(self._model.Version()), self._limit)

    def codes(self) -> list[tuple[str, int]]:
        """(name, version) of every operator code, used or not."""
        return [self._code(self._model.OperatorCodes(i)) for i in self._upto(self._model.OperatorCodesLength())]

    def _upto(self, count: int) -> range:
        if not 0 <= count <= self._limit:
            raise ValueError(f"a list of {count} entries in {self._limit} bytes")
        return range(count)

    def _code(self, code: Any) -> tuple[str, int]:
        custom = code.CustomCode()
        if custom is not None:
            return f"custom {_text(custom)}", int(code.Version())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        return self._operator_names.get(number, f"unknown {number}"), int(code.Version())

    def _subgraph(self, graph: Any, codes: list[tuple[str, int]]) -> Subgraph:
        tensors = tuple(self._tensor(graph.Tensors(i)) for i in self._upto(graph.TensorsLength()))
        operators = tuple(
            self._operator(graph.Operators(i), codes, len(tensors)) for i in self._upto(graph.OperatorsLength())
        )
        inputs = self._numbers(graph.Inputs, graph.InputsLength(), len(tensors))
        return Subgraph(tensors, operators, inputs, self._numbers(graph.Outputs, graph.OutputsLength(), len(tensors)))

    def _tensor(self, tensor: Any) -> Tensor:
        rank = tensor.ShapeLength()
        if rank > MAX_RANK:
            raise ValueError(f"a tensor of {rank} axes")
        shape = tuple(int(tensor.Shape(axis)) for axis in range(rank))
        if any(length < 0 for length in shape):
            raise ValueError(f"a tensor of shape {shape}")
        number = int(tensor.Buffer())
        if number >= self._model.BuffersLength():
            raise ValueError(f"a tensor with buffer {number} of {self._model.BuffersLength()}")
        constant = int(self._model.Buffers(number).DataLength())
        self._upto(constant)
        name = _text(tensor.Name() or b"")
        return Tensor(name, self._types.get(tensor.Type(), "UNKNOWN"), shape, number, constant)

    def _operator(self, operator: Any, codes: list[tuple[str, int]], tensors: int) -> Operator:
        number = operator.OpcodeIndex()
        if number >= len(codes):
            raise ValueError(f"operator code {number} of {len(codes)}")
        name, version = codes[number]
        return Operator(
            name,
            version,
            self._numbers(operator.Inputs, operator.InputsLength(), tensors),
            self._numbers(operator.Outputs, operator.OutputsLength(), tensors),
            self._settings(name, operator.BuiltinOptions()),
        )

    def _numbers(self, get: Any, count: int, tensors: int) -> tuple[int, ...]:
        numbers = tuple(int(get(i)) for i in self._upto(count))
        if any(not -1 <= number < tensors for number in numbers):
            raise ValueError(f"a tensor's number that is not among {tensors}")
        return numbers

    def _settings(self, name: str, table: Optional[Any]) -> dict[str, Setting]:
        """The options that decide what an operator computes, of the operators that `_SETTINGS` names."""
        wanted = _SETTINGS.get(name)
        if wanted is None or table is None:
            return {}
        kind, fields = wanted
        options = getattr(self._schema, kind)()
        options.Init(table.Bytes, table.Pos)
        return {field: _setting(options, field) for field in fields}

    def _entry_point(self, signature: Any, graphs: tuple[Subgraph, ...]) -> tuple[str, EntryPoint]:
        graph = graphs[signature.SubgraphIndex()]
        ports = []
        for get, length in (
            (signature.Inputs, signature.InputsLength()),
            (signature.Outputs, signature.OutputsLength()),
        ):
            maps = [get(i) for i in self._upto(length)]
            ports.append({_text(one.Name()): int(one.TensorIndex()) for one in maps})
        for number in (*ports[0].values(), *ports[1].values()):
            if not 0 <= number < len(graph.tensors):
                raise ValueError(f"an entry point's tensor {number} of {len(graph.tensors)}")
        return _text(signature.SignatureKey()), EntryPoint(graph, *ports)


_SETTINGS = {
    "ADD": ("AddOptions", ("FusedActivationFunction",)),
    "SUB": ("SubOptions", ("FusedActivationFunction",)),
    "MUL": ("MulOptions", ("FusedActivationFunction",)),
    "DIV": ("DivOptions", ("FusedActivationFunction",)),
    "BATCH_MATMUL": ("BatchMatMulOptions", ("AdjX", "AdjY")),
    "FULLY_CONNECTED": ("FullyConnectedOptions", ("FusedActivationFunction", "WeightsFormat", "KeepNumDims")),
    "CONV_2D": ("Conv2DOptions", ("Padding", "StrideH", "StrideW", "DilationHFactor", "DilationWFactor",
                                  "FusedActivationFunction")),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", ("Padding", "StrideH", "StrideW", "DilationHFactor",
                                                     "DilationWFactor", "FusedActivationFunction")),
    "AVERAGE_POOL_2D": ("Pool2DOptions", ("Padding", "StrideH", "StrideW", "FilterHeight", "FilterWidth",
                                          "FusedActivationFunction")),
    "MAX_POOL_2D": ("Pool2DOptions", ("Padding", "StrideH", "StrideW", "FilterHeight", "FilterWidth",
                                      "FusedActivationFunction")),
    "L2_POOL_2D": ("Pool2DOptions", ("FilterHeight", "FilterWidth")),
    "SOFTMAX": ("SoftmaxOptions", ("Beta",)),
    "LOCAL_RESPONSE_NORMALIZATION": ("LocalResponseNormalizationOptions", ("Radius", "Bias", "Alpha", "Beta")),
    "BUCKETIZE": ("BucketizeOptions", ("Boundaries",)),
    "REVERSE_SEQUENCE": ("ReverseSequenceOptions", ("SeqDim", "BatchDim")),
    "LEAKY_RELU": ("LeakyReluOptions", ("Alpha",)),
    "CONCATENATION": ("ConcatenationOptions", ("Axis", "FusedActivationFunction")),
    "GATHER": ("GatherOptions", ("Axis", "BatchDims")),
    "PACK": ("PackOptions", ("Axis",)),
    "UNPACK": ("UnpackOptions", ("Axis",)),
    "ONE_HOT": ("OneHotOptions", ("Axis",)),
    "CUMSUM": ("CumsumOptions", ("Exclusive", "Reverse")),
    "MIRROR_PAD": ("MirrorPadOptions", ("Mode",)),
    "STRIDED_SLICE": ("StridedSliceOptions", ("BeginMask", "EndMask", "EllipsisMask", "NewAxisMask",
                                              "ShrinkAxisMask")),
    "SPACE_TO_DEPTH": ("SpaceToDepthOptions", ("BlockSize",)),
    "DEPTH_TO_SPACE": ("DepthToSpaceOptions", ("BlockSize",)),
    "RESIZE_BILINEAR": ("ResizeBilinearOptions", ("AlignCorners", "HalfPixelCenters")),
    "RESIZE_NEAREST_NEIGHBOR": ("ResizeNearestNeighborOptions", ("AlignCorners", "HalfPixelCenters")),
    "VAR_HANDLE": ("VarHandleOptions", ("SharedName",)),
    "CALL_ONCE": ("CallOnceOptions", ("InitSubgraphIndex",)),
    "WHILE": ("WhileOptions", ("CondSubgraphIndex", "BodySubgraphIndex")),
    "IF": ("IfOptions", ("ThenSubgraphIndex", "ElseSubgraphIndex")),
}  # fmt: skip


LISTS = ("Boundaries",)


def _setting(options: Any, field: str) -> Setting:
    if field in LISTS:
        return tuple(float(value) for value in getattr(options, f"{field}AsNumpy")())
    value = getattr(options, field)()
    if field == "SharedName":
        return _text(value or b"")
    return float(value) if isinstance(value, float) else int(value)


def called_subgraphs(model: TfliteModel, graph: Subgraph) -> Iterator[tuple[str, Subgraph]]:
    """(operator, subgraph) for each subgraph that operators of `graph` call."""
    for operator in graph.operators:
        for key in operator.settings:
            if key.endswith("SubgraphIndex"):
                number = operator.whole(key, -1)
                if not 0 <= number < len(model.subgraphs):
                    raise BundleError(f"the model calls a subgraph {number} it does not have", "export it again")
                yield operator.name, model.subgraphs[number]


def places(model: TfliteModel, name: str, version: int) -> Iterator[str]:
    """Where the model has the operator: the entry point, and the parameters of the nearest layer before it."""
    for entry, point in model.entry_points.items():
        for graph in _all_of(model, point.subgraph):
            for operator in graph.operators:
                if (operator.name, operator.version) == (name, version):
                    yield f"{entry}, {_layer(graph, operator)}"


def _all_of(model: TfliteModel, graph: Subgraph) -> list[Subgraph]:
    found: list[Subgraph] = []
    left = [graph]
    while left:
        one = left.pop()
        if all(one is not other for other in found):
            found.append(one)
            left += [called for _, called in called_subgraphs(model, one)]
    return found


def _layer(graph: Subgraph, operator: Operator) -> str:
    """Bundles have no names of tensors; but variables are named as the parameters are."""
    makers = {number: one for one in graph.operators for number in one.outputs}
    seen: set[int] = set()
    left = list(operator.inputs)
    while left:
        number = left.pop(0)
        maker = makers.get(number)
        if number in seen or maker is None:
            continue
        seen.add(number)
        if maker.name == "VAR_HANDLE":
            return f"after {maker.settings.get('SharedName') or 'a variable'}"
        left += maker.inputs
    shape = graph.tensors[operator.outputs[0]].shape if operator.outputs else ()
    return f"where a tensor of shape {list(shape)} is made, before any parameter"


def names_of(enumeration: Any) -> dict[int, str]:
    """Number -> name of an enumeration of the schema."""
    return {number: name for name, number in vars(enumeration).items() if not name.startswith("_")}


def _text(value: bytes) -> str:
    """A name in a file, kept short and printable: it may be anybody's."""
    text = value[:200].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)
