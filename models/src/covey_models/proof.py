"""The proof of a bundle: the TFLite file against the untouched TensorFlow step, on the same data, before it is written.

First every entry point is held against float32 TensorFlow over several steps. Nearly all nets agree within 1e-6, and
that settles it. Where they do not, float32 TensorFlow may be as far off as TFLite: one ReLU whose pre-activation lies
within rounding of 0, or Adam's division of a tiny gradient by its own size, is enough. Then both are held against
*float64* TensorFlow, tensor by tensor:

- the net's smooth twin (`covey_models.references`) must agree with float64 within 1e-6, or, in a tensor that float32
  TensorFlow gets wrong by more, be no further off than a few times that; this finds every wrong lowering but those of
  the kinked ops themselves;
- the net itself must, over up to 20 draws of data, be no further from float64 than float32 TensorFlow is (by their
  medians, else by a rank test); this finds wrong lowerings of kinked ops, whose errors are there on every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np
from scipy.stats import mannwhitneyu

from covey_models._tensorflow import import_tensorflow
from covey_models.last_layer import REPRESENT
from covey_models.losses import Labels
from covey_models.references import has_kinks, in_double, shadow_of, smooth_twin
from covey_models.steps import Steps
from covey_protocol.bundle import Proof
from covey_protocol.errors import BundleError
from covey_protocol.parameters import offsets

tf = import_tensorflow()
Array = np.ndarray[Any, Any]
Numbers = dict[str, Array]
Convert = Callable[[Mapping[str, Any]], bytes]  # reference functions -> a TFLite model

STEPS = 6
LEARNING_RATES = (0.05, 0.005, 0.0005, 0.00005)  # the first at which TensorFlow's own training stays in bounds
BOUND = 2.0  # times the largest parameter (or 1) at the start: beyond, errors drown in the scale they are held against
TOLERANCE = 1e-5  # against float32 TensorFlow; measured errors are below 1e-6
DOUBLE_TOLERANCE = 1e-6  # parameters against float64, on a net without kinks; TOLERANCE for gradients and outputs
TWIN_FACTOR = 5.0  # times float32 TensorFlow's own distance from float64, tensor by tensor
KINKED_FACTOR = 2.0  # the same for all tensors of a net with kinks together
CHECKED_AFTER = (3, 5, 10, 20)  # draws of data after which a net is judged
LOUDER = 4.0  # times the starting parameters, once more: activations reach what quiet ones never do (ReLU6's upper end)
DOUBLE_STEPS = 2  # so that an optimizer's state has a part in them
SIGNIFICANT = 1e-4  # of the rank test: refuses a right bundle once in ten thousand times that it is needed


@dataclass(frozen=True)
class DataRange:
    """What random examples are drawn from. bounds: of every input number; a normal distribution where None."""

    shape: tuple[int, ...]
    dtype: str
    bounds: Optional[tuple[float, float]]
    labels: Labels


@dataclass(frozen=True)
class Measured:
    """One comparison: the largest difference of any number, and what it may be."""

    entry_point: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # false for NaN too


# --- the three that are compared


class Side:
    """One program that has the entry points, as functions of arrays, and a way back to where it started."""

    call: dict[str, Callable[..., Numbers]]

    def reset(self) -> None:
        raise NotImplementedError

    def parameters(self) -> Array:
        values: Array = self.call["get_parameters"]()["parameters"]
        return values


class TensorFlowSide(Side):
    """ConcreteFunctions over variables."""

    def __init__(self, functions: Mapping[str, Any], variables: Sequence[Any]) -> None:
        self._variables = list(variables)
        self._start = [variable.numpy() for variable in variables]
        self.call = {name: _as_numpy(function) for name, function in functions.items()}

    def reset(self) -> None:
        for variable, value in zip(self._variables, self._start):
            variable.assign(value)


class DoubleSide(TensorFlowSide):
    """The same functions in float64, over copies of the variables."""

    def __init__(self, functions: Mapping[str, Any], steps: Steps) -> None:
        variables = steps.variables
        shadows = {id(variable.handle): shadow_of(variable) for variable in variables}
        doubled = {name: in_double(function, shadows, steps.constants) for name, function in functions.items()}
        super().__init__(doubled, [shadows[id(variable.handle)] for variable in variables])


class TFLiteSide(Side):
    """A TFLite model in the interpreter that devices have, where it is installed."""

    def __init__(self, model: bytes, entry_points: Sequence[str]) -> None:
        self._model, self._entry_points = model, entry_points
        self._interpreter, self.runtime = _interpreter_class()
        self.reset()

    def reset(self) -> None:
        try:
            opened = self._interpreter(model_content=self._model, num_threads=1)
            self.call = {name: opened.get_signature_runner(name) for name in self._entry_points}
        except (ValueError, RuntimeError) as exc:
            raise BundleError(
                f"{self.runtime} refuses the exported model ({exc})", "report the model's layers"
            ) from exc


def _interpreter_class() -> tuple[Any, str]:
    try:
        from tflite_runtime.interpreter import Interpreter

        return Interpreter, "tflite_runtime"
    except ImportError:
        return tf.lite.Interpreter, f"tensorflow {tf.__version__}"


def _as_numpy(function: Any) -> Callable[..., Numbers]:
    """A ConcreteFunction that takes and gives arrays, as a TFLite signature runner does."""

    def call(**inputs: Array) -> Numbers:
        outputs = function(**{name: tf.constant(value) for name, value in inputs.items()})
        return {name: np.array(value) for name, value in outputs.items()}

    return call


# --- data


@dataclass(frozen=True)
class Batch:
    """One step's inputs. seed: of the random numbers of this step, for models that draw some."""

    x: Array
    y: Array
    example_weight: Array
    seed: Array

    @property
    def is_empty(self) -> bool:
        return not self.example_weight.any()


@dataclass(frozen=True)
class Trial:
    """What is fed to the sides. start: the parameters all begin from. learning_rate: one that keeps training stable."""

    steps: Steps
    data: DataRange
    seed: int
    start: Array
    learning_rate: float = LEARNING_RATES[0]

    def batches(self, draw: int, count: int) -> list[Batch]:
        """Random batches. Of six: one with a third of its examples absent, one with uneven weights, one empty."""
        random = np.random.default_rng([self.seed, draw])
        size = self.steps.batch_size
        batches = []
        for step in range(count):
            x, y = _inputs(random, self.data, size), _labels(random, self.data.labels, size)
            weight = np.ones(size)
            if step == 1:
                weight[size - size // 3 :] = 0.0
            elif step == 2:
                weight = random.uniform(0.1, 2.0, size)
            elif step == 3:
                weight = np.zeros(size)
            batches.append(Batch(x, y, weight.astype(np.float32), np.array(1000 * draw + step, np.int32)))
        return batches

    def begin(self, side: Side, loudness: float = 1.0) -> None:
        """Put a side at the start, or at a multiple of it."""
        side.reset()
        side.call["set_parameters"](parameters=np.float32(loudness) * self.start)

    def evaluate(self, side: Side, batch: Batch) -> Numbers:
        return side.call["evaluate"](x=batch.x, y=batch.y, example_weight=batch.example_weight)

    def gradient(self, side: Side, batch: Batch) -> Numbers:
        return side.call["gradient"](**self._gradient_inputs(batch))

    def train(self, side: Side, batch: Batch) -> Numbers:
        """A step, the optional inputs with values that change it."""
        wave = np.sin(np.arange(len(self.start), dtype=np.float32))
        optional: dict[str, Numbers] = {
            "clip_norm": {"clip_norm": np.array(1.0, np.float32)},
            "proximal": {
                "proximal_weight": np.array(0.1, np.float32),
                "proximal_center": self.start + np.float32(0.01) * wave,
            },
            "correction": {"correction": np.float32(0.01) * wave},
        }
        inputs = {**self._gradient_inputs(batch), "learning_rate": np.array(self.learning_rate, np.float32)}
        for name in self.steps.train_inputs:
            inputs.update(optional.get(name, {}))
        return side.call["train"](**inputs)

    def _gradient_inputs(self, batch: Batch) -> Numbers:
        seed = {"seed": batch.seed} if "seed" in self.steps.train_inputs else {}
        return {"x": batch.x, "y": batch.y, "example_weight": batch.example_weight, **seed}


def _inputs(random: np.random.Generator, data: DataRange, size: int) -> Array:
    shape = (size, *data.shape)
    if data.dtype != "float32":
        low, high = data.bounds or (0, 255)
        return random.integers(int(low), int(high), shape, endpoint=True).astype(data.dtype)
    x = random.standard_normal(shape) if data.bounds is None else random.uniform(*data.bounds, shape)
    return x.astype(np.float32)


def _labels(random: np.random.Generator, labels: Labels, size: int) -> Array:
    shape = (size, *labels.shape)
    if labels.dtype == "int32":
        return random.integers(0, labels.classes or 2, shape).astype(np.int32)
    if labels.classes is not None:
        one_hot: Array = np.eye(labels.classes, dtype=np.float32)[random.integers(0, labels.classes, shape[:-1])]
        return one_hot
    if labels.maximum is not None:
        return random.integers(0, 2, shape).astype(np.float32)
    return random.standard_normal(shape).astype(np.float32)


# --- the judgement


def prove(model: bytes, steps: Steps, convert: Convert, data: DataRange, seed: int) -> Proof:
    """Hold every entry point of `model` against `steps`. Trains the Keras variables: the caller restores them.

    convert: makes a TFLite model of reference functions, for the smooth twin. Raises BundleError stating the measured
    error and the tolerance.
    """
    ours = TFLiteSide(model, tuple(steps.functions))
    theirs = TensorFlowSide(steps.functions, steps.variables)
    trial = _stable(Trial(steps, data, seed, theirs.parameters()), theirs)
    measured = _against_float32(ours, theirs, trial)
    failed = [one for one in measured if not one.holds]
    if not failed:
        if not _agree_at_louder(ours, theirs, trial):  # saturated ends amplify rounding too: float64 decides
            _no_further_anywhere((ours, theirs, _double(theirs, steps)), trial, LOUDER, TWIN_FACTOR, {}, _tensors)
        worst = _worst(measured)
        return Proof(STEPS, worst.error, worst.tolerance, ours.runtime)
    _refuse_what_is_not_rounding(failed)
    worst = _against_float64(ours, theirs, trial, convert)
    return Proof(DOUBLE_STEPS, worst.error, worst.tolerance, ours.runtime, "float64")


def _double(theirs: Side, steps: Steps) -> DoubleSide:
    """The net in float64, from where TensorFlow's side started."""
    theirs.reset()
    return DoubleSide(steps.functions, steps)


def _worst(measured: Sequence[Measured]) -> Measured:
    """The largest difference of any parameter after training."""
    return max((one for one in measured if one.entry_point.startswith("train")), key=lambda one: one.error)


def _stable(trial: Trial, theirs: Side) -> Trial:
    """The trial at the first learning rate that keeps TensorFlow's own training in bounds and moves something."""
    bound = BOUND * max(1.0, float(np.abs(trial.start).max()))
    for rate in LEARNING_RATES:
        trial = replace(trial, learning_rate=rate)
        trial.begin(theirs)
        losses = [trial.train(theirs, batch)["loss"] for batch in trial.batches(0, STEPS)]
        _refuse_divergence(losses[0])
        trained = theirs.parameters()
        if np.array_equal(trained, trial.start):
            raise BundleError("training moves no weight of the model", "check that the output depends on its weights")
        if np.abs(trained).max() <= bound:  # false for NaN too
            break
    return trial


def _refused(measured: Measured, judge: str) -> BundleError:
    return BundleError(
        f"the exported model does not do what TensorFlow does: {measured.entry_point} differs from {judge} by "
        f"{measured.error:.1e}, the tolerance is {measured.tolerance:.1e}",
        "scale the input to about 1 and prefer smooth activations; if it stays, report the model's layers",
    )


def _against_float32(ours: Side, theirs: Side, trial: Trial) -> list[Measured]:
    """Train both sides from the start and compare all they give and hold, after every step."""
    sides, start = (ours, theirs), trial.start
    for side in sides:
        side.reset()
    measured = [_measure("get_parameters", *_parameters(sides), tolerance=0.0)]
    for side in sides:
        side.call["set_parameters"](parameters=start[::-1].copy())
    measured.append(_measure("set_parameters", *_parameters(sides), tolerance=0.0))
    for side in sides:
        trial.begin(side)
    batches = trial.batches(0, STEPS)
    for batch in batches:
        if batch.is_empty and trial.steps.optimizer.state:  # momentum would move the weights, as it does in Keras
            continue
        before = ours.parameters()
        measured += _measure_all("gradient", *(trial.gradient(side, batch) for side in sides))
        measured += _measure_all("evaluate", *(trial.evaluate(side, batch) for side in sides))
        measured += _measure_all("loss", *(trial.train(side, batch) for side in sides))
        measured.append(_measure("train", *_parameters(sides)))
        if batch.is_empty:
            measured.append(_measure(_EMPTY, ours.parameters(), before))
    for name in ("infer", *([REPRESENT] if REPRESENT in ours.call else [])):
        measured += _measure_all(name, *(side.call[name](x=batches[0].x) for side in sides))
    return measured + _measured_reset(sides, trial, batches[0])


def _agree_at_louder(ours: Side, theirs: Side, trial: Trial) -> bool:
    """Whether the gradients at louder parameters agree; True where TensorFlow itself has none there."""
    batch = trial.batches(0, 1)[0]
    for side in (ours, theirs):
        trial.begin(side, LOUDER)
    mine, own = (trial.gradient(side, batch)["gradient"] for side in (ours, theirs))
    return not np.isfinite(own).all() or _measure("gradient", mine, own).holds


def _measured_reset(sides: tuple[Side, Side], trial: Trial, batch: Batch) -> list[Measured]:
    """A step after `reset_optimizer`: both sides must have forgotten what they did before."""
    if "reset_optimizer" not in sides[0].call:
        return []
    for side in sides:
        side.call["set_parameters"](parameters=trial.start)
        side.call["reset_optimizer"]()
        trial.train(side, batch)
    return [_measure("reset_optimizer", *_parameters(sides))]


def _parameters(sides: tuple[Side, Side]) -> tuple[Array, Array]:
    return sides[0].parameters(), sides[1].parameters()


def _measure(entry_point: str, ours: Array, theirs: Array, *, tolerance: float = TOLERANCE) -> Measured:
    allowed = tolerance * max(1.0, float(np.abs(theirs).max(initial=0.0)))
    difference = np.abs(np.asarray(ours, np.float64) - theirs)
    return Measured(entry_point, float(difference.max(initial=0.0)), allowed)


def _measure_all(entry_point: str, ours: Numbers, theirs: Numbers) -> list[Measured]:
    return [_measure(entry_point, ours[name], expected) for name, expected in theirs.items()]


Sides = tuple[Side, Side, Side]  # ours, float32 TensorFlow, float64 TensorFlow


def _against_float64(ours: TFLiteSide, theirs: TensorFlowSide, trial: Trial, convert: Convert) -> Measured:
    """The worst parameter of the net without kinks; raises where that, or the net itself, is refused."""
    steps = trial.steps
    if not has_kinks(steps.functions.values()):
        return _without_kinks((ours, theirs, _double(theirs, steps)), trial)
    functions = {name: smooth_twin(steps.functions[name]) for name in steps.functions if name not in _IN_OTHERS}
    theirs.reset()
    twin = TFLiteSide(convert(functions), tuple(functions))
    worst = _without_kinks((twin, TensorFlowSide(functions, steps.variables), DoubleSide(functions, steps)), trial)
    _with_kinks((ours, theirs, _double(theirs, steps)), trial)
    return worst


_IN_OTHERS = (
    "gradient",
    "infer",
    REPRESENT,
)  # what they compute, `train` and `evaluate` do too: not converted again for a twin


def _outcomes(sides: Sides, trial: Trial, draw: int, loudness: float = 1.0) -> dict[str, tuple[Array, Array, Array]]:
    """What each entry point gives on each side, all from the same start; "train" is the parameters after two steps."""
    batches = trial.batches(draw, DOUBLE_STEPS)
    outcomes = []
    for side in sides:
        trial.begin(side, loudness)
        outcome = {"evaluate": trial.evaluate(side, batches[0])["loss_sum"]}
        if "gradient" in sides[0].call:
            outcome["gradient"] = trial.gradient(side, batches[0])["gradient"]
            outcome["infer"] = side.call["infer"](x=batches[0].x)["output"]
        if REPRESENT in sides[0].call:
            outcome[REPRESENT] = side.call[REPRESENT](x=batches[0].x)["features"]
        for batch in batches:
            trial.train(side, batch)
        outcomes.append({**outcome, "train": side.parameters()})
    return {name: tuple(outcome[name] for outcome in outcomes) for name in outcomes[0]}  # type: ignore[misc]


def _without_kinks(sides: Sides, trial: Trial) -> Measured:
    """Tensor by tensor: within the tolerance of float64, or within a few times TensorFlow's own distance."""
    tolerances = {"train": DOUBLE_TOLERANCE}
    return _worst(_no_further_anywhere(sides, trial, 1.0, TWIN_FACTOR, tolerances, _tensors))


def _with_kinks(sides: Sides, trial: Trial) -> None:
    """As a whole: no further from float64 than TensorFlow is, at the start and at louder parameters."""
    for loudness in (1.0, LOUDER):
        _no_further_anywhere(sides, trial, loudness, KINKED_FACTOR, {}, lambda entry_point, steps: {"": ...})


def _tensors(entry_point: str, steps: Steps) -> dict[str, Any]:
    """Name -> place of what is judged on its own: each tensor of a parameter vector."""
    return dict(offsets(steps.specs)) if entry_point in ("gradient", "train") else {"": ...}


def _no_further_anywhere(
    sides: Sides,
    trial: Trial,
    loudness: float,
    factor: float,
    tolerances: Mapping[str, float],
    parts: Callable[[str, Steps], dict[str, Any]],
) -> list[Measured]:
    """Judge every part of what every entry point gives, over as many draws of data as it takes.

    A part may be off by its tolerance or by `factor` times float32 TensorFlow's own distance, both as medians. Both are
    heavy-tailed where rounding is amplified, so a part that fails after a few draws is judged again after more.
    """
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}
    scales: dict[str, float] = {}
    refused: list[Measured] = []
    for draw in range(max(CHECKED_AFTER)):
        for entry_point, values in _outcomes(sides, trial, draw, loudness).items():
            if not np.isfinite(values[2]).all():  # at louder parameters float64 itself may overflow
                continue
            scales[entry_point] = max(scales.get(entry_point, 1.0), float(np.abs(values[2]).max()))
            for name, place in parts(entry_point, trial.steps).items():
                errors.setdefault((entry_point, name), []).append(_distances(*(value[place] for value in values)))
        if draw + 1 in CHECKED_AFTER:
            judged = [
                _judged(key, np.array(pairs), tolerances.get(key[0], TOLERANCE) * scales[key[0]], factor)
                for key, pairs in errors.items()
            ]
            refused = [one for one in judged if not one.holds]
            if not refused:
                return judged
    raise _refused(refused[0], "float64 TensorFlow")


def _judged(key: tuple[str, str], errors: Array, tolerance: float, factor: float) -> Measured:
    """errors: (draws, 2), ours and TensorFlow's distances from float64."""
    entry_point, name = key
    label = f"{entry_point} ({name})" if name else entry_point
    mine, own = np.median(errors, axis=0)
    allowed = max(tolerance, factor * float(own))
    if mine > allowed and np.isfinite(errors).all() and len(errors) == max(CHECKED_AFTER):
        larger = mannwhitneyu(errors[:, 0], errors[:, 1], alternative="greater")
        allowed = float(mine) if larger.pvalue > SIGNIFICANT else allowed
    return Measured(label, float(mine), allowed)


def _distances(mine: Array, own: Array, exact: Array) -> tuple[float, float]:
    """How far ours and float32 TensorFlow are from float64."""
    return (float(np.abs(mine - exact).max(initial=0.0)), float(np.abs(own - exact).max(initial=0.0)))


def _refuse_divergence(loss: Array) -> None:
    if not np.isfinite(loss).all():
        raise BundleError(
            f"the model's own TensorFlow step gives a loss of {float(loss)} on data in its input range",
            "scale the input to about 1 (input_range) or make the model's weights smaller",
        )


def _refuse_what_is_not_rounding(failed: Sequence[Measured]) -> None:
    """Values that are not finite, or parameters that do not go in and out unchanged, need no second judge."""
    for one in failed:
        if not np.isfinite(one.error) or one.entry_point in ("get_parameters", "set_parameters", _EMPTY):
            raise _refused(one, "TensorFlow")


_EMPTY = "train on an empty batch"
