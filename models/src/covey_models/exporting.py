"""The work behind `covey_models.export`: check the model, trace its steps, rewrite, convert, prove, pack.

Nothing is written here; a bundle that fails its proof never becomes bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

from covey_models._tensorflow import import_tensorflow, quiet
from covey_models.convert import convert
from covey_models.losses import Loss, loss_named
from covey_models.lowering import lower
from covey_models.proof import DataRange, prove
from covey_models.steps import Steps, training_steps
from covey_protocol.bundle import FORMAT_VERSION, Manifest, Proof, TensorSpec, write_bundle
from covey_protocol.errors import BundleError, ConfigError, CoveyError
from covey_protocol.seals import SealingKey

tf = import_tensorflow()


@dataclass(frozen=True)
class Settings:
    """What `covey_models.export` was asked for; see there."""

    name: str
    loss: str
    batch_size: int
    input_range: Optional[tuple[float, float]] = None
    num_classes: Optional[int] = None
    class_names: tuple[str, ...] = ()
    seed: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


def exported(model: Any, settings: Settings, key: Optional[SealingKey] = None) -> bytes:
    """The bytes of the bundle. The model is left as it was."""
    loss = loss_named(settings.loss)
    _check_settings(settings)
    _check_model(model)
    classes = _checked_classes(model, loss, settings)
    with quiet(), _unchanged(model):
        steps = _traced(model, loss, settings.batch_size)
        tflite = _converted(model, steps)
        data = DataRange(tuple(model.input_shape[1:]), settings.input_range, classes)
        proof = prove(tflite, steps, loss, data, settings.seed)
    return write_bundle(_manifest(model, settings, loss, classes, steps, proof), tflite, key)


def _traced(model: Any, loss: Loss, batch_size: int) -> Steps:
    try:
        return training_steps(model, loss, batch_size)
    except CoveyError:
        raise
    except Exception as exc:  # whatever a user's layer raises when it is called
        said = " ".join(str(exc).split())[:300] or type(exc).__name__
        what = f"the training step of {model.name!r} cannot be traced with batches of {batch_size} ({said})"
        raise BundleError(what, "call the model on one batch in TensorFlow to see where it fails") from exc


def _manifest(
    model: Any, settings: Settings, loss: Loss, classes: Optional[int], steps: Steps, proof: Proof
) -> Manifest:
    return Manifest(
        format=FORMAT_VERSION,
        name=settings.name,
        model_sha256="",  # write_bundle fills these two in
        model_bytes=0,
        batch_size=settings.batch_size,
        input=_input_spec(model, settings.input_range),
        label=_label_spec(loss, classes),
        parameters=steps.specs,
        signatures=tuple(steps.functions),
        loss=loss.name,
        optimizer="sgd",
        num_classes=classes,
        class_names=settings.class_names,
        tensorflow=tf.__version__,
        proof=proof,
        metadata=settings.metadata,
    )


def _converted(model: Any, steps: Steps) -> bytes:
    layers = _layer_names(model)
    _check_variables(model, steps)
    lowered = {name: lower(function, layers) for name, function in steps.functions.items()}
    return convert(lowered, list(model.variables), layers)


def _layer_names(model: Any) -> set[str]:
    return {layer.name for layer in model._flatten_layers(include_self=False)}


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
    if model.inputs[0].dtype != tf.float32:
        raise BundleError(f"the model's input is {model.inputs[0].dtype.name}", "give it a float32 input")
    if any(size is None for size in model.input_shape[1:]):
        raise BundleError(f"the model's input shape {model.input_shape[1:]} is open", "fix every axis but the batch")
    if not model.trainable_variables:
        raise BundleError(f"the model {model.name!r} has nothing to train", "make a layer with weights trainable")
    _check_ends_in_logits(model)


def _check_ends_in_logits(model: Any) -> None:
    last = model.layers[-1]
    activation = getattr(getattr(last, "activation", None), "__name__", "")
    if activation in ("softmax", "sigmoid") or isinstance(last, tf.keras.layers.Softmax):
        raise BundleError(
            f"the model ends in {activation or 'softmax'} (layer {last.name!r})",
            "end it in logits: the loss and `infer` apply it themselves, with less rounding",
        )


def _check_variables(model: Any, steps: Steps) -> None:
    known = {id(variable.handle) for variable in model.variables}
    for function in steps.functions.values():
        for captured in function.captured_inputs:
            if captured.dtype == tf.resource and id(captured) not in known:
                raise BundleError(
                    f"the model {model.name!r} uses a variable or table that is not among model.variables",
                    "create it with add_weight in the layer that uses it",
                )


def _checked_classes(model: Any, loss: Loss, settings: Settings) -> Optional[int]:
    """How many classes the bundle tells apart; None for a regression."""
    shape = tuple(model.output_shape)
    if len(shape) != 2 or (loss.outputs is not None and shape[1] != loss.outputs):
        wanted = "(batch, classes)" if loss.outputs is None else f"(batch, {loss.outputs})"
        raise BundleError(f"the model's output has shape {shape}, {loss.name} needs {wanted}", "change the last layer")
    classes = None if loss.label_dtype == "float32" else loss.classes or int(shape[1])
    if settings.num_classes is not None and settings.num_classes != classes:
        raise BundleError(
            f"the model tells {classes} classes apart, not {settings.num_classes}",
            "change the last layer or the number",
        )
    if settings.class_names and len(settings.class_names) != classes:
        raise ConfigError(
            f"there are {len(settings.class_names)} class names for {classes} classes", "give one name per class"
        )
    return classes


def _input_spec(model: Any, bounds: Optional[tuple[float, float]]) -> TensorSpec:
    low, high = (None, None) if bounds is None else (float(bounds[0]), float(bounds[1]))
    return TensorSpec(tuple(model.input_shape[1:]), "float32", low, high)


def _label_spec(loss: Loss, classes: Optional[int]) -> TensorSpec:
    if classes is None:
        return TensorSpec((), loss.label_dtype)
    return TensorSpec((), loss.label_dtype, 0.0, float(classes - 1))
