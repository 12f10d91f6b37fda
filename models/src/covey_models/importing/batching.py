"""An entry point for another number of examples than it was exported for.

A bundle's graphs have a fixed batch. `for_count` follows the batch axis from the inputs through every operator and
gives the same graph with other shapes, where that computes the same: every example alone, until sums over the batch.
It refuses, and the caller pads, where examples are mixed on the way (BatchNorm in training) and where the batch is cut,
joined or gathered.
A constant that holds 1 / B it does not see; `covey_coordinator.inversion.bundle_model` compares numbers.

A batch axis may hold more: in (B * 36, 8) the examples are the outermost part of axis 0, in (32, 4 * B) the inner one
of axis 1. What is drawn for a whole batch (Dropout) is drawn for B and cut to the first `count`, as padding has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import numpy.typing as npt

from covey_models.importing.registry import Shape
from covey_models.tflite_file import Operator, Subgraph, Tensor

Constant = Callable[[int], Optional[npt.NDArray[Any]]]  # a tensor's numbers where the file holds them


class Fixed(Exception):
    """The graph cannot be had for another number of examples; says why. Never leaves this package."""


@dataclass(frozen=True)
class Resized:
    """The graph with other shapes. constants: tensors of whole batches that were cut, in place of the file's."""

    graph: Subgraph
    constants: Mapping[int, npt.NDArray[Any]] = field(default_factory=dict)


def for_count(
    graph: Subgraph, batched: Iterable[int], constant: Constant, batch_size: int, count: int, needed: set[int]
) -> Resized:
    """The graph for `count` examples in place of batch_size >= 2; Fixed where there is none.

    batched: the inputs whose first axis are the examples. needed: which operators count, by place; others are left out.
    """
    if batch_size < 2:
        raise Fixed("a batch of one cannot be told from an axis of one")
    walk = _Walk(graph, constant, batch_size, count, {number: Place(0) for number in batched})
    for place in sorted(needed):
        walk.through(graph.operators[place])
    tensors = tuple(
        walk.resized(tensor, walk.places[number].axis) if number in walk.places else tensor
        for number, tensor in enumerate(graph.tensors)
    )
    resized = replace(graph, tensors=(*tensors, *walk.tensors), operators=tuple(walk.operators))
    return Resized(resized, walk.constants)


class Place(NamedTuple):
    """Where the batch is: in this axis, inside `outer` blocks of it."""

    axis: int
    outer: int = 1


@dataclass
class _Walk:
    """places: tensor -> where its batch is. summed: tensors that depend on the batch and have none. plain: those read
    where no batch is. operators, tensors: the new graph's operators, and its tensors beyond the old one's.
    """

    graph: Subgraph
    constant: Constant
    batch_size: int
    count: int
    places: dict[int, Place]
    summed: set[int] = field(default_factory=set)
    plain: set[int] = field(default_factory=set)
    constants: dict[int, npt.NDArray[Any]] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def through(self, operator: Operator) -> None:
        inputs = [number for number in operator.inputs if number >= 0]
        found = {self.places[number].outer for number in inputs if number in self.places}
        if not found:
            if any(number in self.summed for number in inputs):
                self.summed.update(operator.outputs)
            self.plain.update(inputs)
            self.operators.append(operator)
            return
        if len(found) > 1 or any(number in self.summed for number in inputs):
            raise Fixed(f"a {operator.name} mixes the examples of a batch")
        if operator.name not in _RULES:
            raise Fixed(f"a {operator.name} may mix the examples of a batch")
        cut: dict[int, int] = {}
        place = _RULES[operator.name](self, operator, cut)
        if isinstance(place, int):
            place = Place(place, found.pop())
        for number in operator.outputs:
            if place is None:
                self.summed.add(number)
            else:
                self._mark(operator, number, place)
        if operator.name == "STRIDED_SLICE":
            operator = _with_whole_axis(operator, self.axis(operator.inputs[0]))
        self.operators.append(replace(operator, inputs=tuple(cut.get(number, number) for number in operator.inputs)))

    def axis(self, number: int) -> int:
        return self.places[number].axis

    def shape(self, number: int) -> Shape:
        return self.graph.tensors[number].shape

    def resized(self, tensor: Tensor, axis: int) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = shape[axis] // self.batch_size * self.count
        return replace(tensor, shape=tuple(shape))

    def first(self, operator: Operator) -> int:
        """The batch axis of the first input, which alone has one."""
        return self.only(operator, 0)

    def only(self, operator: Operator, place: int) -> int:
        """The batch axis of one input, which alone has one."""
        if any((number in self.places) != (other == place) for other, number in enumerate(operator.inputs)):
            raise Fixed(f"a {operator.name} takes the batch in another place")
        return self.axis(operator.inputs[place])

    def known(self, operator: Operator, place: int) -> list[int]:
        """A constant input as a flat list of whole numbers."""
        value = self.constant(operator.inputs[place])
        if value is None:
            raise Fixed(f"a {operator.name} depends on data")
        return [int(one) for one in value.reshape(-1)]

    def together(self, operator: Operator, rank: int, cut: dict[int, int]) -> int:
        """The batch axis among `rank` axes of inputs that are broadcast. cut: gets inputs that are to be replaced."""
        numbers = operator.inputs
        found = {self.axis(number) + rank - len(self.shape(number)) for number in numbers if number in self.places}
        if len(found) != 1:
            raise Fixed(f"the inputs of a {operator.name} have the batch in different axes")
        axis = found.pop()
        place = next(self.places[number] for number in numbers if number in self.places)
        for number in numbers:
            own = axis - rank + len(self.shape(number))
            if number not in self.places and own >= 0 and self.shape(number)[own] != 1:
                self._cut(operator, number, Place(own, place.outer), cut)
        return axis

    def _cut(self, operator: Operator, number: int, place: Place, cut: dict[int, int]) -> None:
        """Of a tensor of a whole batch that depends on no example the part of the first `count`."""
        size = self.shape(number)[place.axis]
        if place.outer > 1 or size % self.batch_size:
            raise Fixed(f"a {operator.name} takes something that has one value per place of the batch")
        value = self.constant(number)
        if value is None and self.count <= self.batch_size:
            cut[number] = self._first_of(number, place.axis)
            return
        if value is None or number in self.plain:
            raise Fixed(f"a {operator.name} takes something that is drawn for {self.batch_size} examples")
        examples = np.moveaxis(value, place.axis, 0).reshape(self.batch_size, size // self.batch_size, -1)
        if not (examples == examples[:1]).all():
            raise Fixed(f"a {operator.name} takes a constant that tells examples apart")
        one = np.take(value, range(size // self.batch_size), place.axis)
        self.constants[number] = np.concatenate([one] * self.count, place.axis)
        self.places[number] = place

    def _first_of(self, number: int, axis: int) -> int:
        """A new tensor: the first `count` examples of one that was computed."""
        old, new = self.graph.tensors[number], len(self.graph.tensors) + len(self.tensors)
        self.tensors += [self.resized(old, axis), Tensor("", "INT32", (len(old.shape),), 0, 0)]
        self.constants[new + 1] = np.zeros(len(old.shape), np.int32)
        self.operators.append(Operator("SLICE", 1, (number, new + 1, new + 1), (new,)))
        return new

    def _mark(self, operator: Operator, number: int, place: Place) -> None:
        shape, blocks = self.shape(number), place.outer * self.batch_size
        if not 0 <= place.axis < len(shape) or not shape[place.axis] or shape[place.axis] % blocks:
            raise Fixed(f"a {operator.name} leaves {shape} of a batch of {self.batch_size}")
        self.places[number] = place


def _with_whole_axis(operator: Operator, axis: int) -> Operator:
    """A STRIDED_SLICE that takes all of the axis, without saying how long it is."""
    masks = {name: operator.whole(name, 0) | 1 << axis for name in ("BeginMask", "EndMask")}
    return replace(operator, settings={**operator.settings, **masks})


# -> the outputs' batch axis, None where it is summed away; the last argument gets the inputs that are to be replaced
Rule = Callable[[_Walk, Operator, dict[int, int]], Union[int, Place, None]]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@_rule(
    "ABS", "ADD", "ADD_N", "ATAN2", "BITWISE_XOR", "BUCKETIZE", "CAST", "CEIL", "COS", "DIV", "ELU", "EQUAL",
    "EXP", "FLOOR", "FLOOR_DIV", "FLOOR_MOD", "GREATER", "GREATER_EQUAL", "HARD_SWISH", "LEAKY_RELU", "LESS",
    "LESS_EQUAL", "LOG", "LOGICAL_AND", "LOGICAL_NOT", "LOGICAL_OR", "LOGISTIC", "MAXIMUM", "MINIMUM", "MUL", "NEG",
    "NOT_EQUAL", "POW", "RELU", "RELU6", "RELU_N1_TO_1", "RIGHT_SHIFT", "ROUND", "RSQRT", "SELECT_V2", "SIGN",
    "SIN", "SQRT", "SQUARE", "SQUARED_DIFFERENCE", "SUB", "TANH", "ZEROS_LIKE",
)  # fmt: skip
def _by_number(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    return walk.together(operator, len(walk.shape(operator.outputs[0])), cut)


@_rule("SELECT")
def _select(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    if len({walk.shape(number) for number in operator.inputs}) > 1:
        raise Fixed("a SELECT chooses whole rows")
    return walk.together(operator, len(walk.shape(operator.outputs[0])), cut)


@_rule("RESHAPE", "SQUEEZE", "EXPAND_DIMS", "FULLY_CONNECTED")
def _reshape(walk: _Walk, operator: Operator, cut: dict[int, int]) -> Place:
    """A FULLY_CONNECTED changes the last axis only, and names the others anew."""
    axis, shape = walk.first(operator), walk.shape(operator.inputs[0])
    if operator.name == "FULLY_CONNECTED" and axis == len(shape) - 1:
        raise Fixed("a FULLY_CONNECTED sums over the batch")
    return _after(walk, operator, math.prod(shape[:axis]) * walk.places[operator.inputs[0]].outer)


def _after(walk: _Walk, operator: Operator, blocks: int) -> Place:
    """Where the batch is that lies inside so many blocks of the numbers in their order."""
    shape, before = walk.shape(operator.outputs[0]), 1
    for axis, length in enumerate(shape):
        if length > 1 and before <= blocks < before * length and blocks % before == 0:
            return Place(axis, blocks // before)
        before *= length
    raise Fixed(f"a {operator.name} to {shape} tears the batch")


@_rule("TRANSPOSE")
def _transpose(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    axis = walk.first(operator)
    return walk.known(operator, 1).index(axis)


@_rule("SUM", "MEAN", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ALL", "REDUCE_ANY")
def _reduced(walk: _Walk, operator: Operator, cut: dict[int, int]) -> Optional[int]:
    axis, shape = walk.first(operator), walk.shape(operator.inputs[0])
    gone = {place % len(shape) for place in walk.known(operator, 1)}
    if axis in gone:
        return None
    keeps = len(walk.shape(operator.outputs[0])) == len(shape)
    return axis if keeps else axis - sum(place < axis for place in gone)


@_rule("SOFTMAX", "LOG_SOFTMAX", "LOCAL_RESPONSE_NORMALIZATION")
def _along_last(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    axis = walk.first(operator)
    if axis == len(walk.shape(operator.inputs[0])) - 1:
        raise Fixed(f"a {operator.name} runs over the batch")
    return axis


@_rule("BATCH_MATMUL")
def _matmul(walk: _Walk, operator: Operator, cut: dict[int, int]) -> Optional[int]:
    x, y = operator.inputs
    rank = len(walk.shape(operator.outputs[0]))
    rows, inner_x = (-1, -2) if operator.whole("AdjX", 0) else (-2, -1)
    inner_y, columns = (-1, -2) if operator.whole("AdjY", 0) else (-2, -1)
    of_x = walk.axis(x) - len(walk.shape(x)) if x in walk.places else None
    of_y = walk.axis(y) - len(walk.shape(y)) if y in walk.places else None
    if of_x == inner_x and of_y == inner_y:
        return None
    if of_x == rows and of_y is None:
        return rank - 2
    if of_x is None and of_y == columns:
        return rank - 1
    if {of_x, of_y} & {-1, -2}:
        raise Fixed("a BATCH_MATMUL multiplies examples with each other")
    return walk.together(operator, rank, cut)


@_rule(
    "CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "AVERAGE_POOL_2D", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR",
    "SPACE_TO_DEPTH", "DEPTH_TO_SPACE",
)  # fmt: skip
def _images(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    axis = walk.first(operator)
    if axis:
        raise Fixed(f"a {operator.name} runs over the batch")
    return axis


@_rule("SLICE")
def _slice(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    axis = walk.first(operator)
    if walk.shape(operator.inputs[0])[axis] != walk.shape(operator.outputs[0])[axis]:
        raise Fixed("a SLICE cuts the batch")
    return axis


@_rule("STRIDED_SLICE")
def _strided_slice(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    axis, length = walk.first(operator), walk.shape(operator.inputs[0])
    begin, end, strides = (walk.known(operator, place) for place in (1, 2, 3))
    if operator.whole("EllipsisMask", 0) or operator.whole("NewAxisMask", 0):
        raise Fixed("a STRIDED_SLICE renames axes")
    if axis < len(begin):
        starts = operator.whole("BeginMask", 0) >> axis & 1 or begin[axis] == 0
        ends = operator.whole("EndMask", 0) >> axis & 1 or end[axis] >= length[axis]
        if not (starts and ends and strides[axis] == 1) or operator.whole("ShrinkAxisMask", 0) >> axis & 1:
            raise Fixed("a STRIDED_SLICE cuts the batch")
    return axis - sum(operator.whole("ShrinkAxisMask", 0) >> place & 1 for place in range(axis))


@_rule("PAD", "PADV2", "MIRROR_PAD")
def _pad(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    axis = walk.first(operator)
    if any(walk.known(operator, 1)[2 * axis : 2 * axis + 2]):
        raise Fixed(f"a {operator.name} lengthens the batch")
    return axis


@_rule("TILE", "CUMSUM", "REVERSE_V2")
def _same_length(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    axis, shape = walk.first(operator), walk.shape(operator.inputs[0])
    along = walk.known(operator, 1)
    touched = along[axis] != 1 if operator.name == "TILE" else axis in {place % len(shape) for place in along}
    if touched:
        raise Fixed(f"a {operator.name} runs over the batch")
    return axis


@_rule("CONCATENATION")
def _concatenation(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    rank = len(walk.shape(operator.outputs[0]))
    axis = walk.together(operator, rank, cut)
    if axis == operator.whole("Axis", 0) % rank or any(number not in walk.places for number in operator.inputs):
        raise Fixed("a CONCATENATION lengthens the batch")
    return axis


@_rule("PACK")
def _pack(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    rank = len(walk.shape(operator.inputs[0]))
    axis = walk.together(operator, rank, cut)
    if any(number not in walk.places for number in operator.inputs):
        raise Fixed("a PACK takes something without a batch")
    return axis + (operator.whole("Axis", 0) % (rank + 1) <= axis)


@_rule("UNPACK", "ARG_MAX", "ARG_MIN")
def _without_an_axis(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    axis, rank = walk.first(operator), len(walk.shape(operator.inputs[0]))
    gone = operator.whole("Axis", 0) if operator.name == "UNPACK" else walk.known(operator, 1)[0]
    if gone % rank == axis:
        raise Fixed(f"a {operator.name} runs over the batch")
    return axis - (gone % rank < axis)


@_rule("SPLIT", "SPLIT_V")
def _split(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    source, along = (1, 0) if operator.name == "SPLIT" else (0, 2)
    axis = walk.only(operator, source)
    if walk.known(operator, along)[0] % len(walk.shape(operator.inputs[source])) == axis:
        raise Fixed(f"a {operator.name} cuts the batch")
    return axis


@_rule("GATHER")
def _gather(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    source, chosen = operator.inputs
    along = operator.whole("Axis", 0) % len(walk.shape(source))
    if operator.whole("BatchDims", 0):
        raise Fixed("a GATHER goes by example")
    if source not in walk.places:
        return along + walk.axis(chosen)
    axis = walk.first(operator)
    if axis == along:
        raise Fixed("a GATHER chooses among the batch")
    return axis if axis < along else axis + len(walk.shape(chosen)) - 1


@_rule("ONE_HOT")
def _one_hot(walk: _Walk, operator: Operator, cut: dict[int, int]) -> int:
    rank = len(walk.shape(operator.outputs[0]))
    axis = walk.first(operator)
    return axis + (operator.whole("Axis", -1) % rank <= axis)
