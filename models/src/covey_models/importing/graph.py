"""A TFLite file as pure TensorFlow functions: inputs and variables in, outputs and variables out.

    read = ReadBack(bundle.model)
    state = read.initial
    outputs, state = read.run("train", {"x": x, "y": y, ...}, state)

Everything is built of differentiable TensorFlow ops when `run` is called; inside a tf.function that happens once.
Floats are float32 as in the file, or all float64: then also constants, which keep their float32 values.

The file may be anybody's. `tflite_file` bounds its lists; here the size of every tensor and their sum are bounded
before anything is built, each output must have the shape that the file says, and whatever TensorFlow refuses is a
BundleError that names the operator. What it does not do: loops and branches (covey's export unrolls them), quantised
tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from covey_models._tensorflow import import_tensorflow
from covey_models.importing.batching import Fixed, Resized, for_count
from covey_models.importing.registry import IMPORTERS, Call, Tensor
from covey_models.tflite_file import EntryPoint, Operator, Subgraph, TfliteModel, read_buffers, read_tflite
from covey_protocol.errors import BundleError

tf = import_tensorflow()

MAX_NUMBERS = 2**28  # of one tensor: 1 GiB in float32
MAX_NUMBERS_TOGETHER = 2**30  # of all tensors of an entry point; a derivative keeps most of them
NAMING = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS", "CAST")  # what labels go through unchanged
STATEFUL = ("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE")
REMEDY = "export the model with covey, or add the operator to covey_models.importing"

State = Mapping[str, Tensor]
Outputs = dict[str, Tensor]


class ReadBack:
    """The entry points of a TFLite file. double: compute floats in float64.

    initial: variable -> its value in the file, as a NumPy array; what a variable is before anything was assigned.
    """

    def __init__(self, data: bytes, *, double: bool = False) -> None:
        self.file: TfliteModel = read_tflite(data)
        self.real = tf.float64 if double else tf.float32
        self._buffers = read_buffers(data)
        self.initial: dict[str, npt.NDArray[Any]] = {}
        for number in sorted(set(_initialisers(self.file))):
            self._initialise(number)

    def entry_point(self, name: str) -> EntryPoint:
        if name not in self.file.entry_points:
            raise BundleError(f"the model has no entry point {name!r}", "export it again")
        return self.file.entry_points[name]

    def run(
        self,
        name: str,
        inputs: Mapping[str, Union[Tensor, Soft]],
        state: State,
        wanted: Optional[Collection[str]] = None,
        sized: Optional[Resized] = None,
    ) -> tuple[Outputs, dict[str, Tensor]]:
        """Outputs by name and the variables afterwards. inputs: all that the entry point has, cast to its types.

        wanted: outputs to compute; where it is given, nothing else is built and the variables are not changed.
        sized: what `for_count` gave for the same outputs.
        """
        point = self.entry_point(name)
        graph = point.subgraph if sized is None else sized.graph
        _check_sizes(name, graph)
        if set(inputs) != set(point.inputs):
            raise BundleError(f"{name} of the model takes {', '.join(sorted(point.inputs)) or 'nothing'}")
        run = _Run(self, graph, dict(state), {} if sized is None else dict(sized.constants))
        for key, number in point.inputs.items():
            run.values[number] = self.given(f"{key} of {name}", graph, number, inputs[key])
        outputs = dict(point.outputs) if wanted is None else _ports(name, point.outputs, wanted)
        run.all(None if wanted is None or sized else _needed(graph, set(outputs.values())))
        return {key: run.value(number) for key, number in outputs.items()}, run.state

    def for_count(
        self, name: str, wanted: Collection[str], batched: Collection[str], batch_size: int, count: int
    ) -> Optional[Resized]:
        """The entry point for `count` examples, as far as `wanted` goes; None where its graph has but one batch size.

        batched: the inputs whose first axis are the examples.
        """
        point = self.entry_point(name)
        needed = _needed(point.subgraph, set(_ports(name, point.outputs, wanted).values()))
        examples = _ports(name, point.inputs, batched).values()
        known = partial(self._known, point.subgraph)
        try:
            resized = for_count(point.subgraph, examples, known, batch_size, count, needed)
        except (Fixed, IndexError, ValueError, ZeroDivisionError):  # all but the first: of operators that are damaged
            return None
        return resized if _fits(resized.graph) else None

    def makes_one_hot(self, name: str, key: str, wanted: Collection[str]) -> bool:
        """Whether these outputs see an input of labels one-hot only, so that `Soft` can take its place."""
        point = self.entry_point(name)
        labels = set(_ports(name, point.inputs, [key]).values())
        for place in sorted(_needed(point.subgraph, set(_ports(name, point.outputs, wanted).values()))):
            operator = point.subgraph.operators[place]
            if labels.isdisjoint(operator.inputs):
                continue
            if operator.name in NAMING:
                labels.update(operator.outputs)
            elif operator.name != "ONE_HOT" or operator.whole("Axis", -1) != -1:
                return False
        return labels.isdisjoint(point.outputs.values())

    def _known(self, graph: Subgraph, number: int) -> Optional[npt.NDArray[Any]]:
        return self.constant(graph, number) if graph.tensors[number].constant_bytes else None

    def constant(self, graph: Subgraph, number: int) -> npt.NDArray[Any]:
        """A tensor's numbers in the file, floats as `real`."""
        tensor = graph.tensors[number]
        kind = self.type(tensor.type)
        stored = np.float32 if tensor.type == "FLOAT32" else kind.as_numpy_dtype
        data = self._buffers[tensor.buffer]
        if data.size != tensor.size * np.dtype(stored).itemsize:
            raise BundleError(f"a constant of the model has {data.size} bytes for {tensor.size} numbers", REMEDY)
        values = np.frombuffer(data.tobytes(), stored).reshape(tensor.shape)
        return values.astype(kind.as_numpy_dtype)

    def type(self, name: str) -> Any:
        """TensorFlow's type for the schema's."""
        if name == "FLOAT32":
            return self.real
        if name == "COMPLEX64":
            return tf.complex128 if self.real == tf.float64 else tf.complex64
        if name not in _TYPES:
            raise BundleError(f"the model has a tensor of {name}, which cannot be read back", REMEDY)
        return _TYPES[name]

    def given(self, what: str, graph: Subgraph, number: int, value: Union[Tensor, Soft]) -> Union[Tensor, Soft]:
        tensor = graph.tensors[number]
        if isinstance(value, Soft):
            return value
        given = tf.cast(value, self.type(tensor.type))
        if tuple(given.shape) != tensor.shape:
            raise BundleError(f"{what} has shape {tuple(given.shape)}, the model takes {tensor.shape}")
        return given

    def _initialise(self, number: int) -> None:
        """Run a graph that CALL_ONCE names: it may assign constants and nothing else."""
        graph = self.file.subgraphs[number]
        names: dict[int, str] = {}
        for operator in graph.operators:
            if operator.name == "VAR_HANDLE" and operator.outputs:
                names[operator.outputs[0]] = str(operator.settings.get("SharedName", ""))
            elif operator.name == "ASSIGN_VARIABLE" and len(operator.inputs) == 2 and operator.inputs[0] in names:
                self.initial[names[operator.inputs[0]]] = self.constant(graph, operator.inputs[1])
            else:
                raise BundleError(f"the model starts its variables with a {operator.name}", REMEDY)


_TYPES = {
    "INT8": tf.int8, "INT16": tf.int16, "INT32": tf.int32, "INT64": tf.int64, "UINT8": tf.uint8, "UINT16": tf.uint16,
    "UINT32": tf.uint32, "UINT64": tf.uint64, "BOOL": tf.bool, "FLOAT64": tf.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Soft:
    """Labels as shares of the classes, (examples, classes), in place of classes: what ONE_HOT of them would be."""

    shares: Tensor


@dataclass
class _Handle:
    """What VAR_HANDLE gives: a variable's name."""

    name: str


@dataclass
class _Run:
    """One pass over a graph. values: of the tensors computed so far; state: of the variables."""

    read: ReadBack
    graph: Subgraph
    state: dict[str, Tensor]
    values: dict[int, Any] = field(default_factory=dict)

    def all(self, needed: Optional[set[int]]) -> None:
        for place, operator in enumerate(self.graph.operators):
            if needed is None or place in needed:
                self._one(operator)

    def value(self, number: int) -> Any:
        if number < 0:
            return None
        if number not in self.values:
            if not self.graph.tensors[number].constant_bytes and self.graph.tensors[number].size:
                raise BundleError(f"the model reads a tensor {number} before it is computed", REMEDY)
            self.values[number] = self.read.constant(self.graph, number)
        return self.values[number]

    def _one(self, operator: Operator) -> None:
        if operator.name in STATEFUL:
            self._variable(operator)
            return
        if operator.name not in IMPORTERS:
            raise BundleError(f"the model has the operator {operator.name}, which cannot be read back", REMEDY)
        tensors = [self.graph.tensors[number] for number in operator.outputs]
        call = Call(
            operator,
            tuple(tensor.shape for tensor in tensors),
            tuple(self.read.type(tensor.type) for tensor in tensors),
            self.read.real,
        )
        for number, result in zip(operator.outputs, self._results(call, operator)):
            self.values[number] = result

    def _results(self, call: Call, operator: Operator) -> list[Tensor]:
        inputs = [self.value(number) for number in operator.inputs]
        try:
            if any(isinstance(value, Soft) for value in inputs):
                return [_of_soft(call, inputs)]
            results = IMPORTERS[call.name](call, *inputs)
        except BundleError:
            raise
        except Exception as exc:  # whatever TensorFlow raises over shapes, types and settings that do not fit
            said = " ".join(str(exc).split())[:200] or type(exc).__name__
            raise BundleError(f"a {call.name} of the model cannot be computed ({said})", REMEDY) from exc
        results = results if isinstance(results, list) else [results]
        found = [(tuple(result.shape), result.dtype) for result in results]
        if found != list(zip(call.shapes, call.types)):
            raise BundleError(f"a {call.name} of the model gives {found}, the file says {call.shapes}", REMEDY)
        return results

    def _variable(self, operator: Operator) -> None:
        if operator.name == "CALL_ONCE":
            return  # `ReadBack.initial` holds what it assigns
        if operator.name == "VAR_HANDLE" and operator.outputs:
            self.values[operator.outputs[0]] = _Handle(str(operator.settings.get("SharedName", "")))
            return
        handle = self.values.get(operator.inputs[0]) if operator.inputs else None
        if not isinstance(handle, _Handle) or len(operator.inputs + operator.outputs) != 2:
            raise BundleError(f"a {operator.name} of the model names no variable", REMEDY)
        if operator.name == "ASSIGN_VARIABLE":
            self.state[handle.name] = self.value(operator.inputs[1])
            return
        if handle.name not in self.state:
            raise BundleError(f"the model reads a variable {handle.name!r} that it never assigns", REMEDY)
        number = operator.outputs[0]
        self.values[number] = self.read.given(f"variable {handle.name!r}", self.graph, number, self.state[handle.name])


def _of_soft(call: Call, inputs: list[Any]) -> Union[Tensor, Soft]:
    labels = inputs[0]
    if call.name in NAMING and isinstance(labels, Soft):
        return labels
    if call.name == "ONE_HOT" and isinstance(labels, Soft):
        on, off = (tf.cast(value, call.real) for value in inputs[2:])
        return off + (on - off) * tf.reshape(tf.cast(labels.shares, call.real), call.shape)
    raise BundleError(f"a {call.name} of the model takes labels, which cannot be soft there", "give whole classes")


def _initialisers(file: TfliteModel) -> Iterator[int]:
    """The subgraphs that some CALL_ONCE runs."""
    for graph in file.subgraphs:
        for operator in graph.operators:
            if operator.name == "CALL_ONCE":
                number = operator.whole("InitSubgraphIndex", -1)
                if not 0 <= number < len(file.subgraphs):
                    raise BundleError(f"the model calls a subgraph {number} it does not have", "export it again")
                yield number


def _ports(name: str, ports: Mapping[str, int], wanted: Collection[str]) -> dict[str, int]:
    """The tensors of some inputs or outputs of an entry point."""
    for key in wanted:
        if key not in ports:
            raise BundleError(f"{name} of the model has no {key!r}, only {', '.join(ports)}", "export it again")
    return {key: ports[key] for key in wanted}


def _check_sizes(name: str, graph: Subgraph) -> None:
    if not _fits(graph):
        sizes = [tensor.size for tensor in graph.tensors]
        what = f"{name} of the model has tensors of {max(sizes)} numbers, {sum(sizes)} together"
        raise BundleError(what, "audit a smaller model")


def _fits(graph: Subgraph) -> bool:
    sizes = [tensor.size for tensor in graph.tensors]
    return max(sizes, default=0) <= MAX_NUMBERS and sum(sizes) <= MAX_NUMBERS_TOGETHER


def _needed(graph: Subgraph, outputs: set[int]) -> set[int]:
    """The operators that these tensors depend on. A variable that is read depends on all that was assigned before."""
    wanted, needed, names = set(outputs), set(), _handle_names(graph)
    read: set[str] = set()
    for place in range(len(graph.operators) - 1, -1, -1):
        operator = graph.operators[place]
        assigned = names.get(operator.inputs[0]) if operator.name == "ASSIGN_VARIABLE" and operator.inputs else None
        if wanted.isdisjoint(operator.outputs) and (assigned is None or assigned not in read):
            continue
        needed.add(place)
        wanted.update(operator.inputs)
        if operator.name == "READ_VARIABLE" and operator.inputs:
            read.add(names.get(operator.inputs[0], ""))
    return needed


def _handle_names(graph: Subgraph) -> dict[int, str]:
    return {
        operator.outputs[0]: str(operator.settings.get("SharedName", ""))
        for operator in graph.operators
        if operator.name == "VAR_HANDLE" and operator.outputs
    }
