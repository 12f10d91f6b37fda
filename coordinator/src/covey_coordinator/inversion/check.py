"""The first inversion check: one real update of one step on one example, inverted as sent, clipped, and with noise.

The attacker is a curious coordinator: it holds the update, the parameters it sent out, the architecture and
the learning rate. One step on one example is the worst case a device can be in; more examples and steps mix
inputs, which this check does not try to separate. TensorFlow and SciPy are imported only while a check runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion import features as inverse
from covey_coordinator.inversion.dense import POWER_STEPS, DenseLayer, dense_layers, read_label, recover_input
from covey_coordinator.inversion.metrics import mse, psnr
from covey_coordinator.inversion.priors import Prior
from covey_coordinator.records import InversionRecord, Reconstruction
from covey_protocol.errors import UsageError
from covey_protocol.parameters import ParameterSpec, offsets, total_size
from covey_protocol.privacy import add_gaussian_noise, clip

Array = npt.NDArray[np.float32]

FLOAT32_ROUNDING = 2.0**-24  # half a unit in the last place: an update is a difference of float32 numbers
ORDER_KEEPING_LAYERS = ("InputLayer", "Flatten", "Reshape", "Dropout", "ActivityRegularization")


@dataclass(frozen=True)
class _Target:
    """What there is to attack.

    layer None: only the label. feature_map None beside a layer: the layer sees the input itself.
    """

    label_layer: DenseLayer | None
    label_bias: slice | None
    layer: DenseLayer | None
    feature_map: inverse.FeatureMap | None
    notes: tuple[str, ...]


def first_inversion_check(
    *,
    keras_model: Any,
    parameters: Array,
    parameter_specs: Sequence[ParameterSpec],
    update: Array,
    learning_rate: float,
    truth: Array,
    true_label: int,
    input_range: tuple[float, float],
    device_id: str,
    clip_norm: float,
    noise_multipliers: Sequence[float] = (0.01, 0.1, 1.0),
    seed: int,
    feature_names: Sequence[str] = (),
) -> InversionRecord:
    """Inverts one update as sent, clipped, and clipped with each noise, and measures against the truth.

    keras_model: built; its weights are set to `parameters` during the check and put back. parameters, update:
    (d,) in the order of parameter_specs, update = trained minus received after ONE plain SGD step on ONE
    example. truth: in the model's input shape without the batch; it is used to measure, never to invert.
    clip_norm: in parameter units. seed: of the noise and of the search's random starts. The attacker knows
    clip_norm and noise_multiplier.
    Raises UsageError where shapes do not fit or numbers are not finite. Where the model has no layer this
    check can invert, only the label is attacked and a note says so. Seconds for small pictures; memory and
    time grow with inputs times features, beyond features.MAX_JACOBIAN_NUMBERS the picture is not attacked (a
    note says so).
    """
    _check_arguments(parameters, parameter_specs, update, learning_rate, truth, input_range, feature_names)
    low, high = input_range
    prior = Prior(float(low), float(high))
    reconstructions = []
    with _holding(keras_model, parameter_specs, parameters):
        target = _find_target(keras_model, parameter_specs, truth.shape)
        for order, (title, sent, noise_multiplier) in enumerate(_as_sent(update, clip_norm, noise_multipliers, seed)):
            noise_std = 0.0 if noise_multiplier is None else noise_multiplier * clip_norm
            recovered, label = _attack(target, sent, parameters, noise_std, learning_rate, truth.size, prior, seed)
            image = recovered.values.reshape(truth.shape).astype(np.float32)
            error = mse(truth, image)
            reconstructions.append(
                Reconstruction(
                    title=title,
                    image=image,
                    mse=error,
                    psnr_db=psnr(error, input_range),
                    label=label,
                    clip_norm=clip_norm if order else None,
                    noise_multiplier=noise_multiplier,
                    resolved=recovered.resolved if target.layer is not None else None,
                )
            )
    return InversionRecord(
        device_id=device_id,
        attacker_sees=(
            "The update of one SGD step on one example, the parameters the device received, the model's architecture, "
            "the learning rate, and the settings of clipping and noise."
        ),
        method=_method(target),
        truth=np.asarray(truth, np.float32),
        true_label=int(true_label),
        input_range=(prior.low, prior.high),
        reconstructions=reconstructions,
        feature_names=tuple(feature_names),
        notes=_notes(target, update, clip_norm),
    )


def _as_sent(
    update: Array, clip_norm: float, noise_multipliers: Sequence[float], seed: int
) -> Iterator[tuple[str, Array, float | None]]:
    yield "as sent", update, None
    clipped = clip(update, clip_norm)
    yield f"clipped to {clip_norm:g}", clipped, None
    for order, multiplier in enumerate(noise_multipliers):
        rng = np.random.default_rng([seed, order])
        noisy = add_gaussian_noise(clipped, clip_norm, multiplier, rng)
        yield f"clipped to {clip_norm:g}, noise multiplier {multiplier:g}", noisy, multiplier


def _attack(
    target: _Target,
    sent: Array,
    parameters: Array,
    noise_std: float,
    learning_rate: float,
    num_inputs: int,
    prior: Prior,
    seed: int,
) -> tuple[inverse.Recovered, int | None]:
    gradient = -sent.astype(np.float64) / learning_rate
    if target.layer is None:
        return inverse.nothing_recovered(num_inputs, 1, prior), _label(target, gradient, None)
    kernel_gradient, bias_gradient = target.layer.gradients(gradient)
    stacked = np.vstack([kernel_gradient, bias_gradient[None, :]])
    error = math.hypot(noise_std, _rounding(target.layer, parameters, sent)) / learning_rate
    directions = [
        found.bias_gradient / math.sqrt(found.signal)
        for power_steps in (POWER_STEPS, 0)
        if (found := recover_input(kernel_gradient, bias_gradient, power_steps)) is not None
    ]
    if not directions or error == 0:
        return inverse.nothing_recovered(num_inputs, bias_gradient.size, prior), _label(target, gradient, None)
    if target.feature_map is None:
        candidates = [inverse.invert_direct(stacked, start, noise_std=error, prior=prior) for start in directions]
        recovered = min(candidates, key=lambda found: found.misfit)
    else:
        recovered = inverse.invert_features(
            target.feature_map, stacked, directions, noise_std=error, num_inputs=num_inputs, prior=prior, seed=seed
        )
    return recovered, _label(target, gradient, recovered)


def _label(target: _Target, gradient: npt.NDArray[np.float64], found: inverse.Recovered | None) -> int | None:
    if found is not None and target.label_layer is not None and target.label_layer == target.layer:
        return read_label(found.bias_gradient)
    if target.label_layer is not None:
        layer = recover_input(*target.label_layer.gradients(gradient), POWER_STEPS)
        if layer is not None:
            return read_label(layer.bias_gradient)
    if target.label_bias is None or not np.any(gradient[target.label_bias]):
        return None
    return read_label(gradient[target.label_bias])


def _rounding(layer: DenseLayer, parameters: Array, sent: Array) -> float:
    """The standard deviation of float32 rounding on one number of this layer's update, in parameter units."""

    def typical(flat: Array) -> float:
        return float(np.sqrt(np.mean(np.concatenate([flat[layer.kernel_place], flat[layer.bias_place]]) ** 2)))

    return FLOAT32_ROUNDING * (typical(parameters) + typical(sent))


def _find_target(keras_model: Any, specs: Sequence[ParameterSpec], input_shape: Sequence[int]) -> _Target:
    variables = _variables(keras_model, specs)
    owners = {id(layer.kernel): layer for layer in keras_model.submodules if type(layer).__name__ == "Dense"}
    found = [
        (layer, owners[id(variables[layer.kernel.name])])
        for layer in dense_layers(specs)
        if id(variables[layer.kernel.name]) in owners
    ]
    outputs = keras_model.output_shape[-1]
    places = offsets(specs)
    last = next((spec for spec in reversed(specs) if spec.trainable), None)
    label_bias = places[last.name] if last is not None and last.shape == (outputs,) else None
    label_layer = found[-1][0] if found and found[-1][0].bias.shape == (outputs,) else None
    notes: tuple[str, ...] = (
        () if label_bias or label_layer else ("The label was not attacked: no bias gradient of the output layer.",)
    )

    def label_only(why: str) -> _Target:
        note = f"The input was not attacked, only the label: {why}. The pictures shown are a blind guess."
        return _Target(label_layer, label_bias, None, None, (*notes, note))

    if not found:
        return label_only("the model has no dense layer with a bias")
    layer, keras_layer = found[0]
    submodel = _up_to(keras_model, keras_layer)
    if submodel is None:
        return label_only("the first dense layer's input cannot be followed back to the model's input")
    if len(submodel.output_shape) != 2:
        return label_only("the first dense layer is applied at several positions, whose inputs its gradient adds up")
    numbers = math.prod(input_shape)
    if all(type(between).__name__ in ORDER_KEEPING_LAYERS for between in submodel.layers):
        return _Target(label_layer, label_bias, layer, None, notes)
    if numbers * layer.kernel.shape[0] > inverse.MAX_JACOBIAN_NUMBERS:
        return label_only(f"{numbers} inputs and {layer.kernel.shape[0]} features are too many for this check")
    if any(type(between).__name__ in ("Dropout", "BatchNormalization") for between in submodel.layers):
        notes += ("Dropout or batch normalisation precede the dense layer; they were inverted in inference mode.",)
    return _Target(label_layer, label_bias, layer, inverse.keras_feature_map(submodel, input_shape), notes)


def _up_to(keras_model: Any, keras_layer: Any) -> Any:
    """The part of the model before this layer, or None where Keras has no graph of it (subclassed or nested models)."""
    import tensorflow as tf

    try:
        return tf.keras.Model(keras_model.inputs, keras_layer.input)
    except (AttributeError, ValueError, TypeError):
        return None


def _method(target: _Target) -> str:
    label = "the label from the signs of the output layer's bias gradient (iDLG)"
    if target.layer is None:
        return f"Read {label}."
    opening = (
        f"The input of the dense layer {target.layer.kernel.name.rsplit('/', 1)[0]!r} from its rank-one gradient, "
    )
    if target.feature_map is None:
        return f"{opening}which here is the example itself; {label}."
    return f"{opening}then the picture by Gauss-Newton steps back through the layers before it; {label}."


def _notes(target: _Target, update: Array, clip_norm: float) -> tuple[str, ...]:
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if norm <= clip_norm:
        size = f"The update's norm {norm:.3g} is below the clip norm {clip_norm:g}: clipping left it as it was."
    else:
        size = f"Clipping shortened the update from norm {norm:.3g} to {clip_norm:g}; its direction is the same."
    return (*target.notes, size)


def _variables(keras_model: Any, specs: Sequence[ParameterSpec]) -> dict[str, Any]:
    """The Keras variable of every parameter: by name where all names are found, else in Keras' own order."""
    by_name = {variable.name.split(":")[0]: variable for variable in keras_model.weights}
    ordered = list(keras_model.trainable_weights) + list(keras_model.non_trainable_weights)
    if all(spec.name in by_name for spec in specs):
        found = {spec.name: by_name[spec.name] for spec in specs}
    else:
        found = {spec.name: variable for spec, variable in zip(specs, ordered)}
    if len(found) < len(specs) or any(tuple(found[spec.name].shape) != tuple(spec.shape) for spec in specs):
        raise UsageError("the Keras model and the parameter specification differ", "use both from one bundle")
    return found


@contextmanager
def _holding(keras_model: Any, specs: Sequence[ParameterSpec], parameters: Array) -> Iterator[None]:
    """Sets the model's weights for a while. Not safe while another thread uses the same model."""
    variables = _variables(keras_model, specs)
    places = offsets(specs)
    before = {name: variable.numpy() for name, variable in variables.items()}
    try:
        for spec in specs:
            variables[spec.name].assign(parameters[places[spec.name]].reshape(spec.shape))
        yield
    finally:
        for name, values in before.items():
            variables[name].assign(values)


def _check_arguments(
    parameters: Array,
    specs: Sequence[ParameterSpec],
    update: Array,
    learning_rate: float,
    truth: Array,
    input_range: tuple[float, float],
    feature_names: Sequence[str],
) -> None:
    size = total_size(specs)
    for name, flat in (("parameters", parameters), ("update", update)):
        if flat.shape != (size,):
            raise UsageError(f"{name} have shape {flat.shape}", f"the specification says ({size},)")
        if not np.all(np.isfinite(flat)):
            raise UsageError(f"{name} hold NaN or infinity", "only finite updates reach this check")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UsageError(f"learning_rate is {learning_rate}", "give the positive rate the device trained with")
    if feature_names and (truth.ndim != 1 or len(feature_names) != truth.size):
        raise UsageError(f"{len(feature_names)} feature names for an input of shape {truth.shape}")
    psnr(0.0, input_range)  # refuses a range without width
