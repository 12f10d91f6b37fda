"""A bundle's entry points inside a graph of TFF: the very functions that `covey export` rewrites for TFLite.

They were traced on the Keras model's variables. Here their graphs are copied into the graph that is being built, on
variables made for it, so that a TFF computation is complete in itself and runs in a worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from covey_coordinator.simulation.learning import Array
from covey_models.steps import Steps
from covey_protocol.errors import UsageError

Tensor = Any


def captured_values(steps: Steps) -> dict[int, Array]:
    """id of what some entry point captured -> its value now. To be read before a graph is built."""
    known = {id(variable.handle): variable for variable in steps.variables}
    values: dict[int, Array] = dict(steps.constants)
    for function in steps.functions.values():
        for handle in function.captured_inputs:
            if id(handle) in known:
                values[id(handle)] = known[id(handle)].numpy()
            elif handle.dtype != tf.resource:  # a tensor that a layer holds
                values[id(handle)] = handle.numpy()
    return values


class EntryPoints:
    """Make it while a TFF computation is being traced, outside any tf.function; call it inside one.

    values: of `captured_values`, with which the variables start in every run of the computation: the optimizer's are
    those of a first step. A call's effects are done before its outputs are there.
    """

    def __init__(self, steps: Steps, values: Mapping[int, Array], names: Sequence[str]) -> None:
        self._functions = {name: steps.functions[name] for name in names}
        captured = {id(one): one for function in self._functions.values() for one in function.captured_inputs}
        self._held = {
            key: tf.Variable(values[key], trainable=False) if one.dtype == tf.resource else tf.constant(values[key])
            for key, one in captured.items()
        }

    def __call__(self, name: str, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name. inputs: all that the entry point takes, by name."""
        function, graph = self._functions[name], self._functions[name].graph
        own = graph.inputs[: len(graph.inputs) - len(function.captured_inputs)]
        names = [_name(tensor) for tensor in own]
        if set(names) != set(inputs):
            raise UsageError(f"{name} takes {', '.join(names)}, not {', '.join(inputs)}")
        given = [*(inputs[one] for one in names), *(self._captured(one) for one in function.captured_inputs)]
        here = tf.compat.v1.get_default_graph()
        replaced = {inner.name: here.capture(tf.convert_to_tensor(outer)) for inner, outer in zip(graph.inputs, given)}
        outputs = {key: tensor.name for key, tensor in function.structured_outputs.items()}
        effects = [operation.name for operation in graph.control_outputs]
        found = tf.graph_util.import_graph_def(
            graph.as_graph_def(), input_map=replaced, return_elements=[*outputs.values(), *effects], name=name
        )
        with tf.control_dependencies(found[len(outputs) :]):
            return {key: tf.identity(tensor) for key, tensor in zip(outputs, found)}

    def _captured(self, original: Any) -> Tensor:
        held = self._held[id(original)]
        return held.handle if original.dtype == tf.resource else held


def _name(tensor: Tensor) -> str:
    name: str = tensor.op.name
    return name
