"""Optimizer steps that a user may trace: several steps in TFLite against the same steps in TensorFlow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from parity import UPDATES, in_tflite, op_types, relative_error

from covey_models._tensorflow import import_tensorflow
from covey_models.lowering import LOWERINGS, lower
from covey_protocol.errors import BundleError

tf = import_tensorflow()
keras = tf.keras.optimizers
legacy = tf.keras.optimizers.legacy

STEPS = 4
SHAPE = (3, 4)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "legacy SGD": lambda: legacy.SGD(0.05),
    "legacy SGD with momentum": lambda: legacy.SGD(0.05, momentum=0.9),
    "legacy SGD with Nesterov's momentum": lambda: legacy.SGD(0.05, momentum=0.9, nesterov=True),
    "legacy SGD with a schedule": lambda: legacy.SGD(tf.keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "legacy Adam": lambda: legacy.Adam(0.05),
    "legacy Adam with AMSGrad": lambda: legacy.Adam(0.05, amsgrad=True),
    "legacy Adamax": lambda: legacy.Adamax(0.05),
    "legacy Nadam": lambda: legacy.Nadam(0.05),
    "legacy RMSprop with momentum": lambda: legacy.RMSprop(0.05, momentum=0.5),
    "legacy RMSprop": lambda: legacy.RMSprop(0.05),
    "legacy RMSprop, centred, with momentum": lambda: legacy.RMSprop(0.05, momentum=0.5, centered=True),
    "legacy Adagrad": lambda: legacy.Adagrad(0.05),
    "legacy Adadelta": lambda: legacy.Adadelta(0.5),
    "legacy FTRL": lambda: legacy.Ftrl(0.1, l1_regularization_strength=0.02, l2_regularization_strength=0.1),
    "legacy FTRL with shrinkage": lambda: legacy.Ftrl(0.1, l2_shrinkage_regularization_strength=0.1),
    "SGD with momentum and clipped gradients": lambda: keras.SGD(0.05, momentum=0.9, nesterov=True, clipnorm=0.5),
    "Adam with a moving average of the weights": lambda: keras.Adam(0.05, use_ema=True, ema_momentum=0.9),
    "Adam with AMSGrad and a global clip": lambda: keras.Adam(0.05, amsgrad=True, global_clipnorm=0.5),
    "AdamW": lambda: keras.AdamW(0.05, weight_decay=0.01),
    "Adamax": lambda: keras.Adamax(0.05),
    "RMSprop, centred": lambda: keras.RMSprop(0.05, momentum=0.5, centered=True),
    "Adagrad": lambda: keras.Adagrad(0.05),
    "Adadelta": lambda: keras.Adadelta(0.5),
    "FTRL": lambda: keras.Ftrl(0.1, l1_regularization_strength=0.02),
    "Lion": lambda: keras.Lion(0.01),
    "Adafactor": lambda: keras.Adafactor(0.05),
}


def random_arrays() -> list[Any]:
    random = np.random.default_rng(5)
    return [random.standard_normal(SHAPE).astype(np.float32) for _ in range(STEPS)]


def traced_step(update: Callable[[Any], Any], variables: Callable[[], list[Any]]) -> Any:
    """A ConcreteFunction gradient -> v0, v1, ...: the float variables after one more update."""

    def step(gradient: Any) -> dict[str, Any]:
        update(gradient)
        return {
            f"v{number}": variable.read_value() for number, variable in enumerate(variables()) if is_float(variable)
        }

    spec = tf.TensorSpec(SHAPE, tf.float32, "gradient")
    return tf.function(step, input_signature=[spec], autograph=False).get_concrete_function()


def stepped(update: Callable[[Any], Any], variables: Callable[[], list[Any]]) -> float:
    """The largest relative error of any variable over all steps, TFLite against TensorFlow."""
    function = traced_step(update, variables)
    tflite = in_tflite(function, [*variables(), *function.variables])
    worst = 0.0
    for gradient in random_arrays():
        computed = tflite(gradient=gradient)
        for name, expected in function(tf.constant(gradient)).items():
            worst = max(worst, relative_error(computed[name], expected.numpy()))
    return worst


def is_float(variable: Any) -> bool:
    return bool(variable.dtype.is_floating)


def of_optimizer(made: Any) -> tuple[Callable[[Any], Any], Callable[[], list[Any]]]:
    weights = tf.Variable(np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(SHAPE))
    made.apply_gradients([(tf.constant(random_arrays()[0]), weights)])  # makes the slots, which a traced step cannot

    def variables() -> list[Any]:
        return [weights, *(made.variables() if callable(made.variables) else made.variables)]

    return lambda gradient: made.apply_gradients([(gradient, weights)]), variables


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizers_steps_equal_tensorflows(optimizer: str) -> None:
    assert stepped(*of_optimizer(OPTIMIZERS[optimizer]())) < 1e-6


def of_handle(op: str, slots: int, **arguments: Any) -> tuple[Callable[[Any], None], Callable[[], list[Any]]]:
    """A raw op `op` on a variable and its slots, which start from 0.1."""
    weights = tf.Variable(np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(SHAPE))
    held = [weights, *(tf.Variable(tf.fill(SHAPE, 0.1)) for _ in range(slots))]
    names = [name for name in ("var", "accum", "m", "linear", "mg", "ms", "mom") if name in _parameters(op)]

    def update(gradient: Any) -> None:
        handles = {name: variable.handle for name, variable in zip(names, held)}
        named = {("delta" if "delta" in _parameters(op) else "grad"): gradient}
        getattr(tf.raw_ops, op)(**handles, **named, **arguments)

    return update, lambda: held


def _parameters(op: str) -> list[str]:
    return list(inspect.signature(getattr(tf.raw_ops, op)).parameters)


RAW: dict[str, Any] = {
    "ResourceApplyGradientDescent": of_handle("ResourceApplyGradientDescent", 0, alpha=0.1),
    "ResourceApplyMomentum": of_handle("ResourceApplyMomentum", 1, lr=0.1, momentum=0.9),
    "ResourceApplyMomentum, Nesterov": of_handle("ResourceApplyMomentum", 1, lr=0.1, momentum=0.9, use_nesterov=True),
    "ResourceApplyAdagrad": of_handle("ResourceApplyAdagrad", 1, lr=0.1),
    "ResourceApplyAdagrad, fixed slots": of_handle("ResourceApplyAdagrad", 1, lr=0.1, update_slots=False),
    "ResourceApplyAddSign": of_handle("ResourceApplyAddSign", 1, lr=0.1, alpha=1.0, sign_decay=0.9, beta=0.8),
    "ResourceApplyPowerSign": of_handle("ResourceApplyPowerSign", 1, lr=0.1, logbase=1.0, sign_decay=0.9, beta=0.8),
    "ResourceApplyProximalGradientDescent": of_handle(
        "ResourceApplyProximalGradientDescent", 0, alpha=0.1, l1=0.3, l2=0.2
    ),
    "ResourceApplyProximalAdagrad": of_handle("ResourceApplyProximalAdagrad", 1, lr=0.1, l1=0.3, l2=0.2),
    "ResourceApplyFtrl, scaled": of_handle(
        "ResourceApplyFtrl", 2, lr=0.1, l1=0.1, l2=0.2, lr_power=-0.5, multiply_linear_by_lr=True
    ),
}


@pytest.mark.parametrize("op", RAW)
def test_a_fused_optimizer_ops_steps_equal_tensorflows(op: str) -> None:
    assert stepped(*RAW[op]) < 1e-6


ROWS = {
    "scatter_add": lambda table, rows: table.scatter_add(tf.IndexedSlices(rows, tf.constant([1, 4, 1]))),
    "scatter_sub": lambda table, rows: table.scatter_sub(tf.IndexedSlices(rows, tf.constant([1, 4, 1]))),
    "scatter_update": lambda table, rows: table.scatter_update(tf.IndexedSlices(rows, tf.constant([1, 4, 0]))),
    "scatter_nd_add": lambda table, rows: table.scatter_nd_add([[1], [4], [1]], rows),
    "scatter_nd_sub": lambda table, rows: table.scatter_nd_sub([[1], [4], [1]], rows),
    "scatter_nd_update": lambda table, rows: table.scatter_nd_update([[1], [4], [0]], rows),
}


def of_rows(method: str) -> tuple[Callable[[Any], Any], Callable[[], list[Any]]]:
    table = tf.Variable(np.linspace(-1.0, 1.0, 20, dtype=np.float32).reshape(5, 4))
    return lambda rows: ROWS[method](table, rows), lambda: [table]


@pytest.mark.parametrize("method", ROWS)
def test_rows_of_a_variable_change_as_in_tensorflow(method: str) -> None:
    assert stepped(*of_rows(method)) < 1e-6


def test_every_lowering_of_an_update_has_a_case() -> None:
    updates = [*map(of_optimizer, (made() for made in OPTIMIZERS.values())), *RAW.values(), *map(of_rows, ROWS)]
    seen = {op for update in updates for op in op_types(traced_step(*update).graph)}
    wanted = {op for op in LOWERINGS if op.startswith(UPDATES)}
    assert wanted <= seen, wanted - seen


def test_rows_outside_a_table_are_an_error_and_not_a_wrong_row() -> None:
    table = tf.Variable(np.ones((5, 4), np.float32))

    def step(index: Any) -> dict[str, Any]:
        return {"rows": tf.nn.embedding_lookup(table, index)}

    spec = tf.TensorSpec([2], tf.int32, "index")
    traced = tf.function(step, input_signature=[spec], autograph=False).get_concrete_function()
    lookup = in_tflite(traced, [table])
    assert lookup(index=np.array([0, 4], np.int32))["rows"].shape == (2, 4)
    for outside in (5, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            lookup(index=np.array([0, outside], np.int32))


def test_a_sparse_update_of_an_optimizer_is_refused_with_a_remedy() -> None:
    table, optimizer = tf.Variable(np.ones((5, 4), np.float32)), legacy.Adagrad(0.1)
    optimizer.apply_gradients([(tf.zeros((5, 4)), table)])

    def step(index: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.nn.embedding_lookup(table, index) ** 2)
        optimizer.apply_gradients([(tape.gradient(loss, table), table)])
        return {"loss": loss}

    spec = tf.TensorSpec([2], tf.int32, "index")
    traced = tf.function(step, input_signature=[spec], autograph=False).get_concrete_function()
    with pytest.raises(BundleError) as refused:
        lower(traced)
    assert "tf.convert_to_tensor(gradient)" in refused.value.remedy
