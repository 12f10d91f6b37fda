"""The proof of a bundle: the TFLite file against the untouched TensorFlow step, on the same data, before it is written.

A wrong lowering fails on any data. Right ones can still differ on rare data: where a pre-activation lies within
rounding of a ReLU's kink, two correct float32 programs take different sides. So a failed comparison is repeated on
other data, and only a model that fails on every draw is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from covey_models._tensorflow import import_tensorflow
from covey_models.losses import Loss
from covey_models.steps import Steps
from covey_protocol.bundle import Proof
from covey_protocol.errors import BundleError

tf = import_tensorflow()
Array = np.ndarray[Any, Any]

STEPS = 6
DRAWS = 3
RELATIVE_TOLERANCE = 1e-5  # measured errors are below 1e-6; float32 rounding over six steps stays far under this
LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Batch:
    x: Array
    y: Array
    example_weight: Array

    def inputs(self) -> dict[str, Array]:
        return {"x": self.x, "y": self.y, "example_weight": self.example_weight}


@dataclass(frozen=True)
class DataRange:
    """What random examples are drawn from."""

    shape: tuple[int, ...]
    bounds: Optional[tuple[float, float]]
    num_classes: Optional[int]


@dataclass(frozen=True)
class Measured:
    """One comparison: the largest difference of any number, and what it may be."""

    entry_point: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # false for NaN too


def prove(model: bytes, steps: Steps, loss: Loss, data: DataRange, seed: int) -> Proof:
    """Compare every entry point of `model` with `steps`. Trains the Keras variables: the caller restores them.

    Raises BundleError stating the measured error and the tolerance.
    """
    reference = {name: _as_numpy(function) for name, function in steps.functions.items()}
    start = reference["get_parameters"]()["parameters"]
    runners, runtime = _runners(model, steps.functions)
    failed: list[Measured] = []
    for draw in range(DRAWS):
        measured = _compared(runners, reference, _batches(steps, loss, data, seed, draw), start)
        failed = [one for one in measured if not one.holds]
        if not failed:
            _refuse_standstill(reference["get_parameters"]()["parameters"], start)
            worst = max((one for one in measured if one.entry_point == "train"), key=lambda one: one.error)
            return Proof(STEPS, worst.error, worst.tolerance, runtime)
    raise BundleError(
        f"the exported model does not do what TensorFlow does: {failed[0].entry_point} differs by "
        f"{failed[0].error:.1e}, the tolerance is {failed[0].tolerance:.1e}",
        "scale the input to about 1 and prefer smooth activations; if it stays, report the model's layers",
    )


def _runners(model: bytes, entry_points: Iterable[str]) -> tuple[dict[str, Any], str]:
    """The entry points in a TFLite interpreter, and which one: the devices' where it is installed."""
    try:
        from tflite_runtime.interpreter import Interpreter

        runtime = "tflite_runtime"
    except ImportError:
        Interpreter, runtime = tf.lite.Interpreter, f"tensorflow {tf.__version__}"
    try:
        opened = Interpreter(model_content=model, num_threads=1)
        return {name: opened.get_signature_runner(name) for name in entry_points}, runtime
    except (ValueError, RuntimeError) as exc:
        raise BundleError(f"{runtime} refuses the exported model ({exc})", "report the model's layers") from exc


def _as_numpy(function: Any) -> Callable[..., dict[str, Array]]:
    """A ConcreteFunction that takes and gives arrays, as a TFLite signature runner does."""

    def call(**inputs: Array) -> dict[str, Array]:
        outputs = function(**{name: tf.constant(value) for name, value in inputs.items()})
        return {name: np.array(value) for name, value in outputs.items()}

    return call


def _batches(steps: Steps, loss: Loss, data: DataRange, seed: int, draw: int) -> list[Batch]:
    """STEPS random batches: one with a third of its examples absent, one with uneven weights, one empty."""
    random = np.random.default_rng([seed, draw])
    count = steps.batch_size
    batches = []
    for step in range(STEPS):
        shape = (count, *data.shape)
        x = random.standard_normal(shape) if data.bounds is None else random.uniform(*data.bounds, shape)
        y = random.standard_normal(count) if data.num_classes is None else random.integers(0, data.num_classes, count)
        weight = np.ones(count)
        if step == 1:
            weight[count - count // 3 :] = 0.0
        elif step == 2:
            weight = random.uniform(0.1, 2.0, count)
        elif step == 3:
            weight = np.zeros(count)
        batches.append(Batch(x.astype(np.float32), y.astype(loss.label_dtype), weight.astype(np.float32)))
    return batches


Functions = Mapping[str, Callable[..., dict[str, Array]]]


def _compared(runners: Functions, reference: Functions, batches: list[Batch], start: Array) -> list[Measured]:
    """Train both sides from `start` and compare all they give and hold, after every step."""
    sides = (runners, reference)
    for side in sides:
        side["set_parameters"](parameters=start)
    measured = [_measure("set_parameters", *_parameters(sides))]
    rate = np.float32(LEARNING_RATE)
    for batch in batches:
        before = runners["get_parameters"]()["parameters"]
        for entry_point in ("gradient", "evaluate"):
            measured += _measure_all(entry_point, *(side[entry_point](**batch.inputs()) for side in sides))
        losses = [side["train"](**batch.inputs(), learning_rate=rate) for side in sides]
        _refuse_divergence(losses[1]["loss"])
        measured += _measure_all("the loss of train", *losses)
        measured.append(_measure("train", *_parameters(sides)))
        if not batch.example_weight.any():
            measured.append(_measure("train on an empty batch", runners["get_parameters"]()["parameters"], before))
    return measured + _measure_all("infer", *(side["infer"](x=batches[0].x) for side in sides))


def _parameters(sides: tuple[Functions, Functions]) -> list[Array]:
    return [side["get_parameters"]()["parameters"] for side in sides]


def _measure(entry_point: str, ours: Array, theirs: Array) -> Measured:
    tolerance = RELATIVE_TOLERANCE * max(1.0, float(np.abs(theirs).max(initial=0.0)))
    difference = np.abs(np.asarray(ours, np.float64) - theirs)
    return Measured(entry_point, float(difference.max(initial=0.0)), tolerance)


def _measure_all(entry_point: str, ours: dict[str, Array], theirs: dict[str, Array]) -> list[Measured]:
    return [_measure(entry_point, ours[name], expected) for name, expected in theirs.items()]


def _refuse_divergence(loss: Array) -> None:
    if not np.isfinite(loss).all():
        raise BundleError(
            f"the model's own TensorFlow step gives a loss of {float(loss)} on data in its input range",
            "scale the input to about 1 (input_range) or make the model's weights smaller",
        )


def _refuse_standstill(trained: Array, start: Array) -> None:
    if np.array_equal(trained, start):
        raise BundleError("training moves no weight of the model", "check that the output depends on its weights")
