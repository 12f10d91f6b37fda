"""The work behind `covey_models.export`: check the model, trace its steps, rewrite, convert, prove, pack.

Nothing is written here; a bundle that fails its proof never becomes bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import numpy as np

from covey_models._tensorflow import import_tensorflow, quiet
from covey_models.convert import convert
from covey_models.last_layer import only_last_trained
from covey_models.losses import Loss, behind, loss_for
from covey_models.lowering import lower
from covey_models.proof import DataRange, prove
from covey_models.steps import MOVING_STATISTICS, Recipe, Steps, layer_names, training_steps
from covey_protocol.bundle import FORMAT_VERSION, KEEPS, Manifest, Proof, TensorSpec, write_bundle
from covey_protocol.errors import BundleError, ConfigError, CoveyError
from covey_protocol.seals import SealingKey

tf = import_tensorflow()

ROUNDED = "round_outputs"  # in the manifest's metadata: what `infer` rounds to


@dataclass(frozen=True)
class Settings:
    """What `covey_models.export` was asked for; see there."""

    name: str
    loss: Any = "sparse_categorical_crossentropy"
    optimizer: Any = "sgd"
    batch_size: int = 16
    input_range: Optional[tuple[float, float]] = None
    label_dtype: Optional[str] = None
    label_shape: Optional[tuple[int, ...]] = None
    num_classes: Optional[int] = None
    class_names: tuple[str, ...] = ()
    clip: bool = False
    proximal: bool = False
    correction: bool = False
    moving_statistics: str = "average"
    teach: bool = False
    round_outputs: float = 0.0
    seed: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


def exported(model: Any, settings: Settings, key: Optional[SealingKey] = None) -> bytes:
    """The bytes of the bundle. The model is left as it was."""
    _check_settings(settings)
    _check_model(model)
    settings = _with_input_range(model, settings)
    loss = loss_for(
        settings.loss,
        tuple(model.output_shape[1:]),
        label_dtype=settings.label_dtype,
        label_shape=settings.label_shape,
        num_classes=settings.num_classes,
    )
    _check_classes(loss, settings)
    _check_rounding(loss, settings)
    recipe = Recipe(
        loss,
        settings.batch_size,
        settings.optimizer,
        settings.clip,
        settings.proximal,
        settings.correction,
        settings.moving_statistics,
        settings.teach,
        settings.round_outputs,
    )
    frozen = only_last_trained(model) if settings.teach else nullcontext()
    with quiet(), _unchanged(model), frozen:
        steps = _traced(model, recipe)
        tflite = convert_functions(steps.functions, model, steps)
        _check_outputs(model, loss, settings)
        data = DataRange(_input_shape(model), model.inputs[0].dtype.name, settings.input_range, loss.labels)
        proof = prove(tflite, steps, lambda functions: convert_functions(functions, model, steps), data, settings.seed)
    return write_bundle(_manifest(model, settings, steps, proof), tflite, key)


def _traced(model: Any, recipe: Recipe) -> Steps:
    try:
        return training_steps(model, recipe)
    except CoveyError:
        raise
    except Exception as exc:  # whatever a user's layer or loss raises when it is called
        said = " ".join(str(exc).split())[:300] or type(exc).__name__
        what = f"the training step of {model.name!r} cannot be traced with batches of {recipe.batch_size} ({said})"
        raise BundleError(what, "call the model and the loss on one batch in TensorFlow to see where it fails") from exc


def _manifest(model: Any, settings: Settings, steps: Steps, proof: Proof) -> Manifest:
    labels = steps.recipe.loss.labels
    return Manifest(
        format=FORMAT_VERSION,
        name=settings.name,
        model_sha256="",  # write_bundle fills these two in
        model_bytes=0,
        batch_size=settings.batch_size,
        input=_input_spec(model, settings.input_range),
        label=TensorSpec(labels.shape, labels.dtype, labels.minimum, labels.maximum),
        parameters=steps.specs,
        signatures=tuple(steps.functions),
        train_inputs=steps.train_inputs,
        loss=steps.recipe.loss.name,
        optimizer=steps.optimizer.name,
        num_classes=labels.classes,
        class_names=settings.class_names,
        tensorflow=tf.__version__,
        proof=proof,
        metadata=settings.metadata | _facts(settings, steps),
    )


def _facts(settings: Settings, steps: Steps) -> dict[str, str]:
    """What the metadata say of the model itself."""
    rounded = {ROUNDED: f"{settings.round_outputs:g}"} if settings.round_outputs else {}
    return rounded | ({KEEPS: f"{len(steps.kept)} variables"} if steps.kept else {})


def convert_functions(functions: Mapping[str, Any], model: Any, steps: Steps) -> bytes:
    """A TFLite model of some functions over the model's variables; frozen ones become constants."""
    layers = layer_names(model)
    lowered = {name: lower(function, layers, steps.constants) for name, function in functions.items()}
    return convert(lowered, steps.variables, layers)


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Put every variable of the model back, whatever happens in between."""
    before = [variable.numpy() for variable in model.variables]
    try:
        yield
    finally:
        for variable, value in zip(model.variables, before):
            variable.assign(value)


def _check_settings(settings: Settings) -> None:
    if settings.batch_size < 1:
        raise ConfigError(f"the batch size is {settings.batch_size}", "give 1 or more")
    if settings.input_range is not None:
        low, high = settings.input_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"the input range {low} to {high} is not one", "give two numbers, the lower bound first")
    if settings.moving_statistics not in MOVING_STATISTICS:
        what = f"moving statistics cannot be {settings.moving_statistics!r}"
        raise ConfigError(what, f"choose one of {', '.join(MOVING_STATISTICS)}")


def _check_model(model: Any) -> None:
    if not isinstance(model, tf.keras.Model):
        raise BundleError(f"this is a {type(model).__name__}, not a Keras model", "return a built tf.keras.Model")
    if not model.built or getattr(model, "inputs", None) is None:
        raise BundleError(f"the model {model.name!r} is not built", "give it an Input layer with a fixed shape")
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise BundleError(
            f"the model {model.name!r} has {len(model.inputs)} inputs and {len(model.outputs)} outputs",
            "export a model with one of each",
        )
    if model.inputs[0].dtype.name not in INPUT_DTYPES:
        what = f"the model's input is {model.inputs[0].dtype.name}"
        raise BundleError(what, f"give it an input of {', '.join(INPUT_DTYPES)}")
    if any(size is None for size in _input_shape(model)):
        raise BundleError(f"the model's input shape {_input_shape(model)} is open", "fix every axis but the batch")
    if any(size is None for size in model.output_shape[1:]):
        raise BundleError(f"the model's output shape {model.output_shape[1:]} is open", "fix every axis but the batch")
    if not model.trainable_variables:
        raise BundleError(f"the model {model.name!r} has nothing to train", "make a layer with weights trainable")


PROBABILITIES = ("sparse_categorical_crossentropy", "categorical_crossentropy", "binary_crossentropy")
INPUT_DTYPES = ("float32", "int32", "uint8")


def _input_shape(model: Any) -> tuple[Any, ...]:
    return tuple(model.inputs[0].shape[1:])


def _with_input_range(model: Any, settings: Settings) -> Settings:
    """Whole-number inputs must have bounds: an index beyond an embedding stops a device's training."""
    dtype = model.inputs[0].dtype.name
    if dtype == "uint8" and settings.input_range is None:
        return replace(settings, input_range=(0.0, 255.0))
    if dtype == "int32" and settings.input_range is None:
        what = f"the model {model.name!r} takes whole numbers and their range is not given"
        raise ConfigError(what, "give input_range, such as 0 and the vocabulary's size - 1")
    return settings


def _check_outputs(model: Any, loss: Loss, settings: Settings) -> None:
    """Refuse probabilities where logits are needed and the softmax is hidden, say in a nested function."""
    if not loss.takes_logits:
        return
    low, high = settings.input_range or (-1.0, 1.0)
    numbers = np.random.default_rng(settings.seed).uniform(low, high, (settings.batch_size, *_input_shape(model)))
    x = tf.constant(numbers.astype(model.inputs[0].dtype.as_numpy_dtype))

    def last_values() -> Any:
        return behind("Sigmoid", behind("Softmax", model(x, training=False)))

    values = tf.function(last_values, autograph=False)().numpy()
    sums = values.sum(-1)
    if values.shape[-1] > 1 and (values >= 0.0).all() and np.abs(sums - 1.0).max() < 1e-3:
        raise BundleError(
            f"the outputs of {model.name!r} are probabilities, made where the export cannot see how",
            f"end the model in logits or in a plain softmax layer: {loss.name} needs the logits",
        )


def _check_rounding(loss: Loss, settings: Settings) -> None:
    unit = settings.round_outputs
    if not 0 <= unit < 1:  # false for NaN too
        raise ConfigError(f"outputs cannot be rounded to multiples of {unit}", "give a number from 0 (off) to below 1")
    if unit and loss.name not in PROBABILITIES:
        raise ConfigError(
            f"rounding is for probabilities, and a bundle trained on {loss.name} answers with the model's outputs",
            f"leave round_outputs out, or train on {', '.join(PROBABILITIES)}",
        )


def _check_classes(loss: Loss, settings: Settings) -> None:
    classes = loss.labels.classes
    if settings.num_classes is not None and settings.num_classes != classes:
        raise BundleError(
            f"the model tells {classes} classes apart, not {settings.num_classes}",
            "change the last layer or the number",
        )
    if settings.class_names and len(settings.class_names) != classes:
        raise ConfigError(
            f"there are {len(settings.class_names)} class names for {classes} classes", "give one name per class"
        )


def _input_spec(model: Any, bounds: Optional[tuple[float, float]]) -> TensorSpec:
    low, high = (None, None) if bounds is None else (float(bounds[0]), float(bounds[1]))
    return TensorSpec(_input_shape(model), model.inputs[0].dtype.name, low, high)
