"""A function and its gradient through the rewriter, the real converter and the real interpreter, beside TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from covey_models._tensorflow import import_tensorflow, quiet
from covey_models.convert import convert, operators
from covey_models.importing import ReadBack
from covey_models.lowering import lower

tf = import_tensorflow()
Array = np.ndarray[Any, Any]
Inputs = Callable[[], "list[Array]"]


@dataclass(frozen=True)
class Case:
    """What to compute and on what.

    function: tensors -> a tensor or a nest of them. inputs: makes the arrays. differentiate: also compare the gradient
    of a weighted sum of all outputs with respect to every float input and every variable. in_tensorflow: the same
    function in operations that TensorFlow has everywhere, where `function` is not.
    """

    function: Callable[..., Any]
    inputs: Inputs
    differentiate: bool = True
    tolerance: float = 2e-6  # of the larger of 1 and the largest number; float32 rounding of a few dozen terms
    in_tensorflow: Optional[Callable[..., Any]] = None


def normal(*shapes: tuple[int, ...]) -> Inputs:
    return lambda: [
        np.random.default_rng(number).standard_normal(shape).astype(np.float32) for number, shape in enumerate(shapes)
    ]


def between(low: float, high: float, *shapes: tuple[int, ...]) -> Inputs:
    return lambda: [
        np.random.default_rng(number).uniform(low, high, shape).astype(np.float32)
        for number, shape in enumerate(shapes)
    ]


def indices(limit: int, *shape: int) -> Inputs:
    return lambda: [np.random.default_rng(9).integers(0, limit, shape).astype(np.int32)]


def together(*parts: Inputs) -> Inputs:
    return lambda: [array for part in parts for array in part()]


def of_layer(
    build: Callable[[], Any],
    *shapes: tuple[int, ...],
    inputs: Any = None,
    tolerance: float = 2e-6,
    by_shape: bool = False,
    **arguments: Any,
) -> Case:
    """A Keras layer called on normal numbers. It is built once, by an eager call or by the shape of its input."""
    made = inputs or normal(*shapes)

    @functools.lru_cache(maxsize=1)
    def layer() -> Any:
        with tf.init_scope():
            tf.keras.utils.set_random_seed(1)
            built = build()
            examples = [tf.constant(array) for array in made()]
            if by_shape:
                built.build(examples[0].shape)
            else:
                built(examples[0] if len(examples) == 1 else examples, **arguments)
            return built

    def call(*tensors: Any) -> Any:
        return layer()(tensors[0] if len(tensors) == 1 else list(tensors), **arguments)

    return Case(call, made, tolerance=tolerance)


def traced(case: Case) -> Any:
    """A ConcreteFunction x0, x1, ... -> y0, y1, ..., g0, g1, ...: outputs, then gradients."""
    arrays = case.inputs()

    def step(*inputs: Any) -> dict[str, Any]:
        watched = [tensor for tensor in inputs if tensor.dtype.is_floating]
        with tf.GradientTape() as tape:
            for tensor in watched:
                tape.watch(tensor)
            outputs = tf.nest.flatten(case.function(*inputs))
            total = _weighted(outputs)
        results = {f"y{i}": _number(output) for i, output in enumerate(outputs)}
        if case.differentiate:
            sources = watched + [variable for variable in tape.watched_variables() if variable.trainable]
            gradients = tape.gradient(total, sources)
            assert any(gradient is not None for gradient in gradients)
            results.update({f"g{i}": tf.convert_to_tensor(one) for i, one in enumerate(gradients) if one is not None})
        return results

    names = [f"x{i}" for i in range(len(arrays))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    step.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    specs = [tf.TensorSpec(array.shape, array.dtype, name) for name, array in zip(names, arrays)]
    return tf.function(step, input_signature=specs, autograph=False).get_concrete_function()


def _weighted(outputs: Iterable[Any]) -> Any:
    """Uneven weights, so that gradients that cancel in a plain sum do not."""
    total = tf.constant(0.0)
    for number, output in enumerate(outputs):
        if output.dtype == tf.float32:
            weights = np.random.default_rng(100 + number).uniform(0.5, 1.5, output.shape).astype(np.float32)
            total += tf.reduce_sum(output * weights)
    return total


def _number(output: Any) -> Any:
    return tf.cast(output, tf.int32) if output.dtype == tf.bool else tf.identity(output)


def converted(function: Any, variables: Any = ()) -> bytes:
    """A ConcreteFunction, rewritten, as a TFLite file of builtins alone with the entry point `step`."""
    with quiet():
        model = convert({"step": lower(function)}, list(variables))
    assert not [name for name in operators(model) if name.startswith("custom")]
    return model


def interpreted(model: bytes) -> Callable[..., dict[str, Array]]:
    """The entry point `step` in the interpreter that devices use."""
    from tflite_runtime.interpreter import Interpreter

    with quiet():
        return Interpreter(model_content=model, num_threads=1).get_signature_runner("step")


def in_tflite(function: Any, variables: Any = ()) -> Callable[..., dict[str, Array]]:
    return interpreted(converted(function, variables))


def errors(case: Case, function: Any, *, read_back: bool = False) -> dict[str, float]:
    """Per output and gradient: the largest difference from TensorFlow over the larger of 1 and the largest number.

    read_back: also "... read back", of `covey_models.importing` from the interpreter, on the same file; takes long.
    """
    inputs = {f"x{i}": array for i, array in enumerate(case.inputs())}
    before = [variable.numpy() for variable in function.variables]
    twin = dataclasses.replace(case, function=case.in_tensorflow) if case.in_tensorflow else None
    in_tensorflow = traced(twin) if twin else function
    expected = in_tensorflow(**{name: tf.constant(array) for name, array in inputs.items()})
    for variable, value in zip(function.variables, before):
        variable.assign(value)
    model = converted(function, function.variables)
    computed = interpreted(model)(**inputs)
    found = {name: relative_error(computed[name], value.numpy()) for name, value in expected.items()}
    if not read_back:
        return found
    read = ReadBack(model)
    taken = {name: inputs[name] for name in read.entry_point("step").inputs}
    again, _ = read.run("step", taken, read.initial)
    return found | {f"{name} read back": relative_error(np.asarray(again[name]), computed[name]) for name in expected}


def relative_error(computed: Array, expected: Array) -> float:
    assert computed.shape == expected.shape
    if not computed.size:
        return 0.0
    same = (computed == expected) | (np.isnan(computed) & np.isnan(expected))
    wide, wanted = computed.astype(np.float64), expected.astype(np.float64)
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=1.0)
    with np.errstate(invalid="ignore"):
        return float((np.where(same, 0.0, np.abs(wide - wanted)) / largest).max())


UPDATES = ("ResourceApply", "ResourceScatter", "Assign")  # what op types that change variables begin with


def op_types(graph: Any) -> set[str]:
    """All op types of a graph and of the functions it calls."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *[node for function in definition.library.function for node in function.node_def]]
    return {node.op for node in nodes}
