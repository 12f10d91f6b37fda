"""The entry points of a training bundle, written as plain TensorFlow around an untouched Keras model.

This is the reference: `covey_models.lowering` rewrites exactly these functions, and the export's proof runs them in
TensorFlow beside the TFLite result. Nothing here knows TFLite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from covey_models._tensorflow import import_tensorflow, layers_of, variable_dtype
from covey_models.last_layer import REPRESENT, representation
from covey_models.losses import Loss
from covey_models.lowering import all_ops, is_random, seeded
from covey_models.optimizers import Optimizer, optimizer_for
from covey_protocol.errors import BundleError
from covey_protocol.parameters import ParameterSpec, total_size

tf = import_tensorflow()
Tensor = Any

TINY = 1e-12  # keeps an average over no examples finite: 0 / TINY is 0
MOVING_STATISTICS = ("average", "local")


@dataclass(frozen=True)
class Recipe:
    """How a model is to be trained.

    optimizer: a name or a Keras optimizer. clip, proximal, correction: which optional inputs `train` gets.
    moving_statistics: "average" lets BatchNorm's moving statistics travel with the parameters, "local" keeps them on
    each device. teach: give the bundle the entry point `represent`. round_outputs: `infer` answers with multiples of
    it, 0 for unrounded; nothing else is rounded.
    """

    loss: Loss
    batch_size: int
    optimizer: Any = "sgd"
    clip: bool = False
    proximal: bool = False
    correction: bool = False
    moving_statistics: str = "average"
    teach: bool = False
    round_outputs: float = 0.0


@dataclass(frozen=True)
class Steps:
    """The traced entry points of one model.

    functions: entry point -> tf.ConcreteFunction on the model's own variables. parameters: the variables that travel,
    in wire order. specs: the same, as the manifest lists them. variables: all that some entry point can change.
    constants: id of a handle -> value, for the variables that are only read. train_inputs: `train`'s optional inputs.
    """

    functions: dict[str, Any]
    parameters: list[Any]
    specs: tuple[ParameterSpec, ...]
    variables: list[Any]
    constants: dict[int, Any]
    recipe: Recipe
    optimizer: Optimizer
    train_inputs: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        return self.recipe.batch_size

    @property
    def kept(self) -> list[Any]:
        """The variables that change, do not travel, and are not the optimizer's: they outlast a round on the device."""
        others = {id(variable) for variable in [*self.parameters, *_optimizer_variables(self.optimizer)]}
        return [variable for variable in self.variables if id(variable) not in others]


def parameter_specs(parameters: Sequence[Any], trainable: Collection[int]) -> tuple[ParameterSpec, ...]:
    """Keras' paths without ":0", numbered where two variables share one. trainable: ids of the trained variables."""
    taken: set[str] = set()
    specs = []
    for variable in parameters:
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


def training_steps(model: Any, recipe: Recipe) -> Steps:
    """Trace all entry points of `model` for a fixed batch size."""
    x = tf.TensorSpec([recipe.batch_size, *model.input_shape[1:]], model.inputs[0].dtype, name="x")
    forward = _traced(lambda x: model(x, training=True), [x])
    state = _assigned(forward, model.variables)
    travels = _travelling(model, state, recipe.moving_statistics)
    optimizer = optimizer_for(recipe.optimizer, model.trainable_variables)
    specs = parameter_specs(travels, {id(variable) for variable in model.trainable_variables})
    train_inputs = _train_inputs(recipe, is_random(forward))
    step = _Step(model, recipe, optimizer, travels, state)
    signatures = _signatures(step, x, total_size(specs), train_inputs)
    layers = layer_names(model)
    functions = {name: _seeded(_traced(*signature), layers) for name, signature in signatures.items()}
    changing = [*_distinct([*model.trainable_variables, *state]), *_optimizer_variables(optimizer)]
    constants = _constants(functions.values(), changing)
    return Steps(functions, travels, specs, changing, constants, recipe, optimizer, train_inputs)


def layer_names(model: Any) -> set[str]:
    return {layer.name for layer in layers_of(model)}


def _train_inputs(recipe: Recipe, random: bool) -> tuple[str, ...]:
    wanted = {"seed": random, "clip_norm": recipe.clip, "proximal": recipe.proximal, "correction": recipe.correction}
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _signatures(
    step: _Step, x: Any, dimension: int, train_inputs: Sequence[str]
) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Entry point -> (function, specs of its inputs)."""
    labels = step.recipe.loss.labels
    y = tf.TensorSpec([x.shape[0], *labels.shape], labels.dtype, name="y")
    weight = tf.TensorSpec([x.shape[0]], tf.float32, name="example_weight")
    optional = {
        "seed": [tf.TensorSpec([], tf.int32, name="seed")],
        "clip_norm": [_number("clip_norm")],
        "proximal": [_number("proximal_weight"), tf.TensorSpec([dimension], tf.float32, name="proximal_center")],
        "correction": [tf.TensorSpec([dimension], tf.float32, name="correction")],
    }
    more = [spec for name in train_inputs for spec in optional[name]]
    seed = optional["seed"] if "seed" in train_inputs else []
    signatures: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "train": (step.train, [x, y, weight, _number("learning_rate"), *more]),
        "evaluate": (step.evaluate, [x, y, weight]),
        "infer": (step.infer, [x]),
        "gradient": (step.gradient, [x, y, weight, *seed]),
        "get_parameters": (step.get_parameters, []),
        "set_parameters": (step.set_parameters, [tf.TensorSpec([dimension], tf.float32, name="parameters")]),
    }
    if step.recipe.teach:
        signatures[REPRESENT] = (step.represent, [x])
    if step.optimizer.state:
        signatures["reset_optimizer"] = (step.reset_optimizer, [])
    return signatures


def _number(name: str) -> Any:
    return tf.TensorSpec([], tf.float32, name=name)


def _traced(function: Callable[..., Any], inputs: list[Any]) -> Any:
    """The ConcreteFunction of `function`, called with inputs by their names."""

    def by_name(*values: Tensor) -> Any:
        return function(**{spec.name: value for spec, value in zip(inputs, values)})

    names = [inspect.Parameter(spec.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for spec in inputs]
    by_name.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]  # how tf.function names inputs
    return tf.function(by_name, input_signature=inputs, autograph=False).get_concrete_function()


def _seeded(function: Any, layers: Collection[str]) -> Any:
    return seeded(function, layers) if is_random(function) else function


def _assigned(forward: Any, variables: Sequence[Any]) -> list[Any]:
    """The variables that a forward pass itself assigns in training, such as BatchNorm's moving statistics."""
    graph = forward.graph
    handles = dict(zip((placeholder.ref() for placeholder in forward.inputs[1:]), forward.captured_inputs))
    inside_calls = any(op.type.startswith("Assign") and op.graph is not graph for op in all_ops(graph))
    assigned = {
        id(handles[tensor.ref()])
        for op in graph.get_operations()
        if op.type.startswith("Assign") or (inside_calls and op.type in ("StatefulPartitionedCall", "While", "If"))
        for tensor in op.inputs
        if tensor.dtype == tf.resource and tensor.ref() in handles
    }
    return [variable for variable in variables if id(variable.handle) in assigned]


def _travelling(model: Any, state: Sequence[Any], moving_statistics: str) -> list[Any]:
    """The trained variables and, if they are averaged, the moving statistics, in the order of model.variables."""
    trained = {id(variable) for variable in model.trainable_variables}
    averaged = {id(variable) for variable in state} if moving_statistics == "average" else set()
    travels = [
        variable
        for variable in model.variables
        if id(variable) in trained or (id(variable) in averaged and variable.dtype.is_floating)
    ]
    for variable in travels:
        if variable.dtype != tf.float32:
            raise BundleError(f"the variable {variable.name} is {variable.dtype.name}", "build the model in float32")
    return travels


def _constants(functions: Iterable[Any], changing: Sequence[Any]) -> dict[int, Any]:
    """id of the handle -> value of every variable that the functions read and none of them changes."""
    known = {id(variable.handle) for variable in changing}
    constants: dict[int, Any] = {}
    for function in functions:
        handles = dict(zip((inner.ref() for inner in function.inputs[::-1]), function.captured_inputs[::-1]))
        for op in function.graph.get_operations():
            for tensor in op.inputs:
                handle = handles.get(tensor.ref())
                if handle is None or handle.dtype != tf.resource or id(handle) in known or id(handle) in constants:
                    continue
                constants[id(handle)] = _value(handle, op)
    return constants


def _value(handle: Any, reader: Any) -> Any:
    dtype = variable_dtype(handle)
    if dtype is None or reader.type.startswith("Assign"):
        raise BundleError(
            f"the training step uses a variable or table that is not among model.variables ({reader.name})",
            "create it with add_weight in the layer that uses it",
        )
    return np.asarray(tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype))


def _distinct(variables: Sequence[Any]) -> list[Any]:
    return list({id(variable): variable for variable in variables}.values())


def _optimizer_variables(optimizer: Optimizer) -> list[Any]:
    return [*optimizer.state, optimizer.keras.learning_rate] if optimizer.state else []  # type: ignore[union-attr]


class _Step:
    """The entry points as methods.

    state: variables the forward pass assigns. An example with weight 0 has no part in loss and gradient; it does
    take part in BatchNorm's batch statistics, so callers fill a partial batch with real examples, not with zeros.
    """

    def __init__(
        self, model: Any, recipe: Recipe, optimizer: Optimizer, parameters: list[Any], state: list[Any]
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.loss = recipe.loss
        self.optimizer = optimizer
        self.parameters = parameters
        self.state = state

    def train(
        self, x: Tensor, y: Tensor, example_weight: Tensor, learning_rate: Tensor,
        seed: Optional[Tensor] = None, clip_norm: Optional[Tensor] = None, proximal_weight: Optional[Tensor] = None,
        proximal_center: Optional[Tensor] = None, correction: Optional[Tensor] = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One optimizer step on the weighted mean loss. With plain SGD a batch of zero weights changes nothing."""
        before = [variable.read_value() for variable in self.state]
        present = _any_present(example_weight)
        loss, gradients = self._loss_and_gradients(x, y, example_weight)
        if clip_norm is not None:
            gradients = clipped(gradients, clip_norm)
        if proximal_center is not None:
            centers = self._parts(proximal_center)
            gradients = [
                (variable, gradient + present * proximal_weight * (variable - centers[id(variable)]))
                for variable, gradient in gradients
            ]
        if correction is not None:
            parts = self._parts(correction)
            gradients = [(variable, gradient + present * parts[id(variable)]) for variable, gradient in gradients]
        self.optimizer.apply(gradients, learning_rate)
        for variable, old in zip(self.state, before):
            if variable.dtype.is_floating:
                variable.assign(present * variable.read_value() + (1.0 - present) * old)
        return {"loss": loss}

    def gradient(
        self, x: Tensor, y: Tensor, example_weight: Tensor, seed: Optional[Tensor] = None
    ) -> dict[str, Tensor]:
        """The loss's gradient before clipping and the like, zeros for what is not trained; changes no parameter."""
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
        output = self.loss.prediction(self._outputs(x, training=False))
        unit = self.recipe.round_outputs
        return {"output": tf.round(output * (1.0 / unit)) * unit if unit else output}

    def represent(self, x: Tensor) -> dict[str, Tensor]:
        """What the last Dense layer sees: one vector per example."""
        return {"features": representation(self.model)(x, training=False)}

    def get_parameters(self) -> dict[str, Tensor]:
        return {"parameters": tf.concat([tf.reshape(variable, [-1]) for variable in self.parameters], 0)}

    def set_parameters(self, parameters: Tensor) -> dict[str, Tensor]:
        parts = self._parts(parameters)
        for variable in self.parameters:
            variable.assign(parts[id(variable)])
        return {"dimension": tf.size(parameters)}

    def reset_optimizer(self) -> dict[str, Tensor]:
        """Momentum, moments and step count as they were at the first step."""
        self.optimizer.reset()
        return {"count": tf.constant(len(self.optimizer.state), tf.int32)}

    def _outputs(self, x: Tensor, training: bool) -> Tensor:
        return self.model(x, training=training)

    def _parts(self, flat: Tensor) -> dict[int, Tensor]:
        """id of a variable -> its part of a flat vector, in its shape."""
        parts = tf.split(flat, [int(variable.shape.num_elements()) for variable in self.parameters])
        return {
            id(variable): tf.reshape(part, variable.shape) for variable, part in zip(self.parameters, parts)
        }  # fmt: skip

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


def clipped(gradients: Sequence[tuple[Any, Tensor]], clip_norm: Tensor) -> list[tuple[Any, Tensor]]:
    """All gradients times min(1, clip_norm / their joint L2 norm)."""
    norm = tf.sqrt(tf.add_n([tf.reduce_sum(gradient * gradient) for _, gradient in gradients]))
    factor = clip_norm / tf.maximum(norm, clip_norm)
    return [(variable, gradient * factor) for variable, gradient in gradients]


def _any_present(example_weight: Tensor) -> Tensor:
    """1.0 if any example has a weight, else 0.0: exact factors, so that old * 0 + new * 1 is new."""
    return tf.sign(tf.reduce_sum(example_weight))
