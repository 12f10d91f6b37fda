"""A bundle whose entry points are written out here: every optional input of `train`, state, odd shapes and dtypes.

A linear map of 4 uint8 numbers to 3 floats, trained by momentum on half the squared error. What a training step was
given beside its batch is kept in the parameters, so that a test can read what arrived.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from covey_protocol.bundle import REQUIRED_SIGNATURES, TRAIN_INPUTS, Manifest, TensorSpec, write_bundle
from covey_protocol.parameters import ParameterSpec
from covey_protocol.seals import SealingKey

BATCH, INPUTS, OUTPUTS, SEEDS = 4, 4, 3, 8
MOMENTUM = 0.5
SMALL = (4099, 3)  # a shape found nowhere else in the file
SMALL_BYTES = np.array(SMALL, "<i4").tobytes()
CLIP_UNIT = 2.0**-110  # what is remembered of a clip norm stays a number that an update may have
SEED_UNIT = 65536  # the seeds are kept modulo this, which float32 holds exactly
SPECS = (
    ParameterSpec("linear/kernel", (INPUTS, OUTPUTS)),
    ParameterSpec("given/seeds", (SEEDS,)),
    ParameterSpec("given/clip_norm", (1,)),
    ParameterSpec("norm/moving_variance", (INPUTS,), trainable=False),
)


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "format": 1,
        "name": "linear",
        "model_sha256": "",
        "model_bytes": 0,
        "batch_size": BATCH,
        "input": TensorSpec((INPUTS,), "uint8"),
        "label": TensorSpec((OUTPUTS,), "float32"),
        "parameters": SPECS,
        "signatures": (*REQUIRED_SIGNATURES, "gradient", "reset_optimizer"),
        "loss": "mean_squared_error",
        "optimizer": "sgd",
        "train_inputs": TRAIN_INPUTS,
    }
    return Manifest(**{**values, **changes})


def linear_bundle(key: SealingKey, bomb: str = "") -> bytes:
    """The sealed bundle. `train` clips the batch's gradient, then adds the correction and FedProx's pull.

    bomb: "memory" makes `train` ask for 16 GiB, "time" makes it loop without end; both are sound TFLite models.
    """
    from covey_models._tensorflow import import_tensorflow
    from covey_models.convert import convert
    from covey_models.lowering import Lowered, lower

    tf = import_tensorflow()
    kernel = tf.Variable(start_kernel())
    velocity = tf.Variable(tf.zeros([INPUTS, OUTPUTS]))
    seeds = tf.Variable(tf.zeros([SEEDS]))
    clipped_to = tf.Variable(tf.zeros([1]))
    variance = tf.Variable(tf.fill([INPUTS], 0.25))
    parameters = [kernel, seeds, clipped_to, variance]
    sizes = [spec.size for spec in SPECS]

    def loss_and_gradient(x: Any, y: Any, weight: Any) -> tuple[Any, Any]:
        x = tf.cast(x, tf.float32)
        error = tf.matmul(x, kernel) - y
        share = tf.expand_dims(weight / tf.maximum(tf.reduce_sum(weight), 1e-12), 1)
        return 0.5 * tf.reduce_sum(share * error * error), tf.matmul(x, share * error, transpose_a=True)

    def train(
        x: Any,
        y: Any,
        example_weight: Any,
        learning_rate: Any,
        seed: Any,
        clip_norm: Any,
        proximal_weight: Any,
        proximal_center: Any,
        correction: Any,
    ) -> dict[str, Any]:
        loss, gradient = loss_and_gradient(x, y, example_weight)
        norm = tf.sqrt(tf.reduce_sum(gradient * gradient))
        gradient = gradient * (clip_norm / tf.maximum(norm, clip_norm))
        gradient += tf.reshape(correction[: sizes[0]], kernel.shape)
        gradient += proximal_weight * (kernel - tf.reshape(proximal_center[: sizes[0]], kernel.shape))
        velocity.assign(MOMENTUM * velocity + gradient)
        kernel.assign_sub(learning_rate * velocity)
        kept = tf.cast(tf.math.floormod(seed, SEED_UNIT), tf.float32)
        seeds.assign(tf.concat([seeds[1:], tf.reshape(kept, [1])], 0))
        clipped_to.assign(tf.reshape(clip_norm * CLIP_UNIT, [1]))
        return {"loss": loss}

    def exploding(
        x: Any,
        y: Any,
        example_weight: Any,
        learning_rate: Any,
        seed: Any,
        clip_norm: Any,
        proximal_weight: Any,
        proximal_center: Any,
        correction: Any,
    ) -> dict[str, Any]:
        if bomb == "memory":
            return {"loss": tf.reduce_sum(tf.fill(SMALL, learning_rate))}
        return {"loss": tf.while_loop(lambda value: value < 2.0, lambda value: [tf.sqrt(value)], [learning_rate])[0]}

    def gradient(x: Any, y: Any, example_weight: Any, seed: Any) -> dict[str, Any]:
        loss, part = loss_and_gradient(x, y, example_weight)
        rest = tf.zeros([sum(sizes[1:])]) + tf.cast(seed, tf.float32)
        return {"gradient": tf.concat([tf.reshape(part, [-1]), rest], 0), "loss": loss}

    def evaluate(x: Any, y: Any, example_weight: Any) -> dict[str, Any]:
        error = tf.matmul(tf.cast(x, tf.float32), kernel) - y
        loss = tf.reduce_sum(example_weight * 0.5 * tf.reduce_sum(error * error, 1))
        return {"loss_sum": loss, "correct": 0.0 * loss, "count": tf.reduce_sum(example_weight)}

    def infer(x: Any) -> dict[str, Any]:
        return {"output": tf.matmul(tf.cast(x, tf.float32), kernel)}

    def get_parameters() -> dict[str, Any]:
        return {"parameters": tf.concat([tf.reshape(variable, [-1]) for variable in parameters], 0)}

    def set_parameters(parameters: Any) -> dict[str, Any]:
        start = 0
        for variable, size in zip((kernel, seeds, clipped_to, variance), sizes):
            variable.assign(tf.reshape(parameters[start : start + size], variable.shape))
            start += size
        return {"dimension": tf.constant(start)}

    def reset_optimizer() -> dict[str, Any]:
        velocity.assign(tf.zeros([INPUTS, OUTPUTS]))
        return {"count": tf.constant(1)}

    number, vector = tf.TensorSpec([], tf.float32), tf.TensorSpec([sum(sizes)], tf.float32)
    whole = tf.TensorSpec([], tf.int32)
    x = tf.TensorSpec([BATCH, INPUTS], tf.uint8)
    batch = [x, tf.TensorSpec([BATCH, OUTPUTS], tf.float32), tf.TensorSpec([BATCH], tf.float32)]
    functions = {
        train: [*batch, number, whole, number, number, vector, vector],
        gradient: [*batch, whole],
        evaluate: batch,
        infer: [x],
        get_parameters: [],
        set_parameters: [vector],
        reset_optimizer: [],
    }
    traced = {
        function.__name__: tf.function(function, input_signature=signature, autograph=False).get_concrete_function()
        for function, signature in functions.items()
    }
    lowered = {name: lower(function) for name, function in traced.items()}
    if bomb:
        function = tf.function(exploding, input_signature=functions[train], autograph=False)
        lowered["train"] = Lowered(function.get_concrete_function(), {})
    model = convert(lowered, [*parameters, velocity])
    if bomb == "memory":  # asked for that much itself, the converter would allocate it
        assert model.count(SMALL_BYTES) >= 1
        model = model.replace(SMALL_BYTES, np.array([2**16, 2**16], "<i4").tobytes())
    return write_bundle(manifest(), model, key)


def start_kernel() -> np.ndarray[Any, Any]:
    return np.linspace(-0.5, 0.5, INPUTS * OUTPUTS, dtype=np.float32).reshape(INPUTS, OUTPUTS)
