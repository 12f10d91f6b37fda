"""The entry points of a training bundle, written as plain TensorFlow around an untouched Keras model.

This is the reference: `covey_models.lowering` rewrites exactly these functions, and the export's proof runs them in
TensorFlow beside the TFLite result. Nothing here knows TFLite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from covey_models._tensorflow import import_tensorflow
from covey_models.losses import Loss
from covey_protocol.errors import BundleError
from covey_protocol.parameters import ParameterSpec

tf = import_tensorflow()
Tensor = Any

TINY = 1e-12  # keeps an average over no examples finite: 0 / TINY is 0


@dataclass(frozen=True)
class Steps:
    """The traced entry points of one model.

    functions: entry point -> tf.ConcreteFunction on the model's own variables. parameters: the float variables in wire
    order. specs: the same, as the manifest lists them.
    """

    functions: dict[str, Any]
    parameters: list[Any]
    specs: tuple[ParameterSpec, ...]
    batch_size: int


def parameters_of(model: Any) -> list[Any]:
    """The variables that travel: all float ones, in the order of model.variables."""
    parameters = [variable for variable in model.variables if variable.dtype.is_floating]
    for variable in parameters:
        if variable.dtype != tf.float32:
            raise BundleError(f"the variable {variable.name} is {variable.dtype.name}", "build the model in float32")
    return parameters


def parameter_specs(model: Any) -> tuple[ParameterSpec, ...]:
    """Keras' paths without ":0", numbered where two variables share one."""
    trainable = {id(variable) for variable in model.trainable_variables}
    taken: set[str] = set()
    specs = []
    for variable in parameters_of(model):
        name = _unique(variable.name.split(":")[0], taken)
        specs.append(ParameterSpec(name, tuple(variable.shape), "float32", id(variable) in trainable))
    return tuple(specs)


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def training_steps(model: Any, loss: Loss, batch_size: int) -> Steps:
    """Trace all entry points of `model` for a fixed batch size."""
    specs = parameter_specs(model)
    x = tf.TensorSpec([batch_size, *model.input_shape[1:]], tf.float32, name="x")
    y = tf.TensorSpec([batch_size], loss.label_dtype, name="y")
    weight = tf.TensorSpec([batch_size], tf.float32, name="example_weight")
    rate = tf.TensorSpec([], tf.float32, name="learning_rate")
    vector = tf.TensorSpec([sum(spec.size for spec in specs)], tf.float32, name="parameters")
    step = _Step(model, loss, parameters_of(model), _moving_state(model, x))
    signatures: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "train": (step.train, [x, y, weight, rate]),
        "evaluate": (step.evaluate, [x, y, weight]),
        "infer": (step.infer, [x]),
        "gradient": (step.gradient, [x, y, weight]),
        "get_parameters": (step.get_parameters, []),
        "set_parameters": (step.set_parameters, [vector]),
    }
    functions = {name: _traced(function, inputs) for name, (function, inputs) in signatures.items()}
    return Steps(functions, step.parameters, specs, batch_size)


def _traced(function: Callable[..., Any], inputs: list[Any]) -> Any:
    return tf.function(function, input_signature=inputs, autograph=False).get_concrete_function()


def _moving_state(model: Any, x: Any) -> list[Any]:
    """The variables that the forward pass itself assigns in training, such as BatchNorm's moving statistics."""
    forward = _traced(lambda x: model(x, training=True), [x])
    handles = dict(zip((placeholder.ref() for placeholder in forward.inputs[1:]), forward.captured_inputs))
    assigned = {
        id(handles[tensor.ref()])
        for op in forward.graph.get_operations()
        if op.type.startswith("Assign") or op.type == "StatefulPartitionedCall"
        for tensor in op.inputs
        if tensor.dtype == tf.resource and tensor.ref() in handles
    }
    return [variable for variable in model.variables if id(variable.handle) in assigned and variable.dtype.is_floating]


class _Step:
    """The entry points as methods.

    state: variables the forward pass assigns. An example with weight 0 has no part in loss and gradient; it does
    take part in BatchNorm's batch statistics, so callers fill a partial batch with real examples, not with zeros.
    """

    def __init__(self, model: Any, loss: Loss, parameters: list[Any], state: list[Any]) -> None:
        self.model = model
        self.loss = loss
        self.parameters = parameters
        self.state = state

    def train(self, x: Tensor, y: Tensor, example_weight: Tensor, learning_rate: Tensor) -> dict[str, Tensor]:
        """One SGD step on the weighted mean loss; a batch of zero weights changes nothing."""
        before = [variable.read_value() for variable in self.state]
        loss, gradients = self._loss_and_gradients(x, y, example_weight)
        for variable, gradient in gradients:
            variable.assign_sub(learning_rate * gradient)
        present = _any_present(example_weight)
        for variable, old in zip(self.state, before):
            variable.assign(present * variable.read_value() + (1.0 - present) * old)
        return {"loss": loss}

    def gradient(self, x: Tensor, y: Tensor, example_weight: Tensor) -> dict[str, Tensor]:
        """The gradient that `train` would step along, zeros for what is not trained; changes no parameter."""
        before = [variable.read_value() for variable in self.state]
        loss, gradients = self._loss_and_gradients(x, y, example_weight)
        known = {id(variable): gradient for variable, gradient in gradients}
        parts = [known.get(id(variable), tf.zeros(variable.shape)) for variable in self.parameters]
        for variable, old in zip(self.state, before):
            variable.assign(old)
        return {"gradient": tf.concat([tf.reshape(part, [-1]) for part in parts], 0), "loss": loss}

    def evaluate(self, x: Tensor, y: Tensor, example_weight: Tensor) -> dict[str, Tensor]:
        outputs = self._outputs(x, training=False)
        return {
            "loss_sum": tf.reduce_sum(example_weight * self.loss.per_example(y, outputs)),
            "correct": tf.reduce_sum(example_weight * self.loss.correct(y, outputs)),
            "count": tf.reduce_sum(example_weight),
        }

    def infer(self, x: Tensor) -> dict[str, Tensor]:
        return {"output": self.loss.prediction(self._outputs(x, training=False))}

    def get_parameters(self) -> dict[str, Tensor]:
        return {"parameters": tf.concat([tf.reshape(variable, [-1]) for variable in self.parameters], 0)}

    def set_parameters(self, parameters: Tensor) -> dict[str, Tensor]:
        parts = tf.split(parameters, [int(variable.shape.num_elements()) for variable in self.parameters])
        for variable, part in zip(self.parameters, parts):
            variable.assign(tf.reshape(part, variable.shape))
        return {"dimension": tf.size(parameters)}

    def _outputs(self, x: Tensor, training: bool) -> Tensor:
        return self.model(x, training=training)

    def _loss_and_gradients(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, list[tuple[Any, Tensor]]]:
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            losses = self.loss.per_example(y, self._outputs(x, training=True))
            loss = tf.reduce_sum(weight * losses) / tf.maximum(tf.reduce_sum(weight), TINY)
            if self.model.losses:  # the model's own regularisation; none of it on an empty batch
                loss += _any_present(weight) * tf.add_n(self.model.losses)
        gradients = zip(variables, tape.gradient(loss, variables))
        return loss, [
            (variable, tf.convert_to_tensor(gradient)) for variable, gradient in gradients if gradient is not None
        ]


def _any_present(example_weight: Tensor) -> Tensor:
    """1.0 if any example has a weight, else 0.0: exact factors, so that old * 0 + new * 1 is new."""
    return tf.sign(tf.reduce_sum(example_weight))
