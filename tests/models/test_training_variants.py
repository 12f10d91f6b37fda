"""What surrounds the gradient: optimizers, losses, optional inputs, loops, and what travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from export_helpers import batch_of, opened, parameters

from covey_edge.runtime import Model
from covey_models import export
from covey_models._tensorflow import import_tensorflow
from covey_models.convert import operators
from covey_models.optimizers import NAMES
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.errors import BundleError

tf = import_tensorflow()
layers = tf.keras.layers
optimizers = tf.keras.optimizers

RATE = np.float32(0.02)


def bundle_of(model: Any, **settings: Any) -> Bundle:
    return read_bundle(export(model, **{"name": "variant", "batch_size": 6, "input_range": (0.0, 1.0), **settings}))


def small(outputs: int = 3, activation: str = "tanh") -> Any:
    tf.keras.utils.set_random_seed(5)
    return tf.keras.Sequential(
        [
            layers.InputLayer((6, 6, 2)),
            layers.Conv2D(4, 3, activation=activation),
            layers.Flatten(),
            layers.Dense(outputs),
        ]
    )


def flat(model: Any) -> Any:
    return np.concatenate([variable.numpy().ravel() for variable in model.variables])


def gradients(model: Any, batch: dict[str, Any]) -> list[Any]:
    """The plain mean gradient, the usual Keras way."""
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tf.GradientTape() as tape:
        mean = loss(batch["y"], model(batch["x"], training=True), sample_weight=batch["example_weight"])
        mean *= len(batch["y"]) / batch["example_weight"].sum()  # Keras divides by the batch size
    computed: list[Any] = tape.gradient(mean, model.trainable_variables)
    return computed


# --- optimizers

KERAS: dict[str, Callable[[], Any]] = {
    "sgd": optimizers.SGD,
    "momentum": lambda: optimizers.SGD(momentum=0.9),
    "nesterov": lambda: optimizers.SGD(momentum=0.9, nesterov=True),
    "adam": optimizers.Adam,
    "adamw": optimizers.AdamW,
    "rmsprop": optimizers.RMSprop,
    "adagrad": optimizers.Adagrad,
}
OWN: dict[str, Callable[[], Any]] = {
    "clipped, with weight decay": lambda: optimizers.SGD(clipnorm=0.1, weight_decay=0.01),
    "Adam with AMSGrad": lambda: optimizers.Adam(amsgrad=True, beta_1=0.8),
    "Adadelta": lambda: optimizers.Adadelta(rho=0.9),
    "Adamax": optimizers.Adamax,
    "centred RMSprop with momentum": lambda: optimizers.RMSprop(momentum=0.5, centered=True),
    "legacy SGD with momentum": lambda: optimizers.legacy.SGD(momentum=0.9),
    "legacy Adam": optimizers.legacy.Adam,
}


def trained_by_keras(optimizer: Any, bundle: Bundle, steps: int) -> Any:
    model = small()
    optimizer.learning_rate = RATE
    for seed in range(steps):
        optimizer.apply_gradients(zip(gradients(model, batch_of(bundle, seed)), model.trainable_variables))
    return flat(model)


def trained_on_the_device(device: dict[str, Any], bundle: Bundle, steps: int) -> Any:
    for seed in range(steps):
        device["train"](**batch_of(bundle, seed), learning_rate=RATE)
    return parameters(device)


EVERYDAY = ("sgd", "adam", "centred RMSprop with momentum", "clipped, with weight decay")


@pytest.mark.parametrize(
    "name", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in (*NAMES, *OWN)]
)
def test_five_steps_of_every_optimizer_equal_keras(name: str) -> None:
    make = KERAS.get(name) or OWN[name]
    bundle = bundle_of(small(), optimizer=name if name in NAMES else make())
    expected = trained_by_keras(make(), bundle, 5)
    np.testing.assert_allclose(trained_on_the_device(opened(bundle), bundle, 5), expected, atol=1e-5, rtol=0)
    assert np.abs(expected - flat(small())).max() > 1e-3 or name == "Adadelta"


def test_a_round_starts_without_the_momentum_of_the_one_before() -> None:
    bundle = bundle_of(small(), optimizer="adam")
    device, start = opened(bundle), flat(small())
    first = trained_on_the_device(device, bundle, 3)
    device["set_parameters"](parameters=start)
    assert not np.array_equal(trained_on_the_device(device, bundle, 3), first)  # the moments are still there
    device["set_parameters"](parameters=start)
    device["reset_optimizer"]()
    np.testing.assert_array_equal(trained_on_the_device(device, bundle, 3), first)


def test_optimizer_state_never_travels() -> None:
    bundle = bundle_of(small(), optimizer="adam")
    assert bundle.manifest.dimension == small().count_params()
    assert bundle.manifest.optimizer == "adam"


def test_a_users_optimizer_object_is_left_as_it_was() -> None:
    mine = optimizers.Adam(0.5)
    bundle_of(small(), optimizer=mine)
    assert float(mine.learning_rate) == 0.5
    assert len(mine.variables) <= 2  # it was never built: no moments


# --- optional inputs of a step


def test_the_gradient_is_clipped_to_the_given_norm_and_no_further() -> None:
    bundle = bundle_of(small(), clip=True)
    batch, start = batch_of(bundle), flat(small())
    gradient = np.concatenate([part.numpy().ravel() for part in gradients(small(), batch)])
    norm = np.linalg.norm(gradient)
    for clip_norm, factor in ((0.1 * norm, 0.1), (2.0 * norm, 1.0), (3e38, 1.0)):
        device = opened(bundle)
        device["train"](**batch, learning_rate=RATE, clip_norm=np.float32(clip_norm))
        np.testing.assert_allclose(parameters(device), start - RATE * factor * gradient, atol=1e-6, rtol=0)


def test_the_proximal_term_pulls_to_its_center_and_the_correction_is_added() -> None:
    bundle = bundle_of(small(), proximal=True, correction=True)
    assert bundle.manifest.train_inputs == ("proximal", "correction")
    batch, start = batch_of(bundle), flat(small())
    gradient = np.concatenate([part.numpy().ravel() for part in gradients(small(), batch)])
    random = np.random.default_rng(0)
    center, correction = (random.standard_normal(len(start)).astype(np.float32) for _ in range(2))
    device = opened(bundle)
    device["train"](
        **batch,
        learning_rate=RATE,
        proximal_weight=np.float32(0.5),
        proximal_center=center,
        correction=correction,
    )
    expected = start - RATE * (gradient + 0.5 * (start - center) + correction)
    np.testing.assert_allclose(parameters(device), expected, atol=1e-6, rtol=0)


# --- what travels


def with_a_frozen_base() -> Any:
    tf.keras.utils.set_random_seed(2)
    inputs = layers.Input((6, 6, 2))
    base = tf.keras.Sequential([layers.Conv2D(5, 3, activation="relu"), layers.BatchNormalization()], name="base")
    base.trainable = False
    return tf.keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(base(inputs))))


def test_of_a_frozen_base_and_a_head_only_the_head_travels() -> None:
    bundle = bundle_of(with_a_frozen_base())
    assert [spec.name for spec in bundle.manifest.parameters] == ["head/kernel", "head/bias"]
    model, device = with_a_frozen_base(), opened(bundle)
    batch = batch_of(bundle)
    for variable, gradient in zip(model.trainable_variables, gradients(model, batch)):
        variable.assign_sub(RATE * gradient)
    device["train"](**batch, learning_rate=RATE)
    head = np.concatenate([variable.numpy().ravel() for variable in model.trainable_variables])
    np.testing.assert_allclose(parameters(device), head, atol=1e-6, rtol=0)


def with_batch_norm() -> Any:
    tf.keras.utils.set_random_seed(2)
    parts = [layers.Conv2D(5, 3), layers.BatchNormalization(momentum=0.5, name="norm"), layers.Activation("tanh")]
    return tf.keras.Sequential([layers.InputLayer((6, 6, 2)), *parts, layers.Flatten(), layers.Dense(3)])


def test_moving_statistics_travel_unless_they_are_to_stay() -> None:
    averaged, local = (bundle_of(with_batch_norm(), moving_statistics=wish) for wish in ("average", "local"))
    names = [spec.name for spec in averaged.manifest.parameters if not spec.trainable]
    assert names == ["norm/moving_mean", "norm/moving_variance"]
    assert [spec.shape for spec in averaged.manifest.parameters if spec.trainable] == [
        spec.shape for spec in local.manifest.parameters
    ]
    assert (averaged.manifest.metadata, local.manifest.metadata) == ({}, {"keeps": "2 variables"})


def test_statistics_that_stay_on_the_device_still_move_there() -> None:
    bundle = bundle_of(with_batch_norm(), moving_statistics="local")
    device, batch = opened(bundle), batch_of(bundle)
    before, start = device["infer"](x=batch["x"])["output"].copy(), parameters(device)
    device["train"](**batch, learning_rate=np.float32(1e-30))
    np.testing.assert_allclose(parameters(device), start, atol=1e-20)
    assert np.abs(device["infer"](x=batch["x"])["output"] - before).max() > 1e-3

    agents = Model(bundle)
    agents.train_batch(batch["x"], batch["y"], 1e-30)
    moved = agents.infer(batch["x"])
    assert np.abs(moved - before).max() > 1e-3
    agents.let_go()
    np.testing.assert_array_equal(agents.infer(batch["x"]), moved)


# --- losses


def labels_for(bundle: Bundle) -> dict[str, Any]:
    """A batch whose labels have the manifest's shape."""
    batch, spec = batch_of(bundle), bundle.manifest.label
    random = np.random.default_rng(1)
    shape = (bundle.manifest.batch_size, *spec.shape)
    drawn = random.integers(0, 2, shape) if spec.maximum == 1.0 else random.standard_normal(shape)
    if bundle.manifest.loss == "categorical_crossentropy":
        drawn = np.eye(shape[-1])[random.integers(0, shape[-1], shape[:-1])]
    return {**batch, "y": drawn.astype(spec.dtype)}


LOSSES: dict[str, tuple[Any, int, Callable[[Any, Any], Any]]] = {
    "one-hot labels": (
        "categorical_crossentropy",
        3,
        lambda y, p: tf.keras.losses.categorical_crossentropy(y, p, from_logits=True),
    ),
    "several yes or no": (
        "binary_crossentropy",
        3,
        lambda y, p: tf.keras.losses.binary_crossentropy(y, p, from_logits=True),
    ),
    "several numbers": ("mean_squared_error", 3, tf.keras.losses.mean_squared_error),
    "absolute differences": ("mean_absolute_error", 3, tf.keras.losses.mean_absolute_error),
    "Huber": ("huber", 3, tf.keras.losses.huber),
    "a Keras loss object": (tf.keras.losses.LogCosh(), 3, tf.keras.losses.log_cosh),
    "a function": (
        lambda y, p: tf.reduce_max(tf.square(y - p), -1),
        3,
        lambda y, p: tf.reduce_max(tf.square(y - p), -1),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_are_what_keras_computes(case: str) -> None:
    loss, outputs, expected = LOSSES[case]
    bundle = bundle_of(small(outputs), loss=loss)
    batch = labels_for(bundle)
    computed = opened(bundle)["evaluate"](**batch)["loss_sum"]
    per_example = expected(tf.constant(batch["y"]), small(outputs)(batch["x"]))
    np.testing.assert_allclose(computed, float(tf.reduce_sum(per_example)), rtol=1e-5)


@pytest.mark.parametrize(
    ("activation", "outputs", "loss"),
    [("softmax", 3, "sparse_categorical_crossentropy"), ("sigmoid", 1, "binary_crossentropy")],
)
def test_a_model_that_ends_in_probabilities_trains_as_its_logits_do(activation: str, outputs: int, loss: str) -> None:
    logits = small(outputs)
    ended = tf.keras.Sequential([layers.InputLayer((6, 6, 2)), *logits.layers, layers.Activation(activation)])
    results = []
    for model in (logits, ended):
        bundle = bundle_of(model, loss=loss)
        device, batch = opened(bundle), batch_of(bundle)
        trained = device["train"](**batch, learning_rate=RATE)["loss"]
        results.append((trained, parameters(device), device["infer"](x=batch["x"])["output"].copy()))
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, atol=1e-7)


def test_per_pixel_labels_are_averaged_over_each_image() -> None:
    tf.keras.utils.set_random_seed(0)
    model = tf.keras.Sequential([layers.InputLayer((6, 6, 2)), layers.Conv2D(4, 3, padding="same")])
    bundle = bundle_of(model)
    assert (bundle.manifest.label.shape, bundle.manifest.num_classes) == ((6, 6), 4)
    batch = batch_of(bundle)
    batch["y"] = np.random.default_rng(0).integers(0, 4, (6, 6, 6)).astype(np.int32)
    result = opened(bundle)["evaluate"](**batch)
    per_pixel = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["y"], model(batch["x"]))
    np.testing.assert_allclose(result["loss_sum"], 6 * float(tf.reduce_mean(per_pixel)), rtol=1e-5)
    right = np.argmax(model(batch["x"]), -1) == batch["y"]
    np.testing.assert_allclose(result["correct"], 6 * right.mean(), rtol=1e-5)


def test_own_labels_with_classes_are_counted_right_and_wrong() -> None:
    def focal(labels: Any, outputs: Any) -> Any:
        chosen = tf.gather(tf.nn.softmax(outputs), labels, batch_dims=1)
        return -((1.0 - chosen) ** 2) * tf.math.log(chosen)

    bundle = bundle_of(small(), loss=focal, label_dtype="int32", label_shape=(), num_classes=3)
    batch = batch_of(bundle)
    predicted = np.argmax(small()(batch["x"]), -1)
    assert opened(bundle)["evaluate"](**batch)["correct"] == (predicted == batch["y"]).sum()


# --- inputs


def test_whole_number_inputs_reach_an_embedding() -> None:
    parts = [layers.Embedding(20, 6), layers.GlobalAveragePooling1D(), layers.Dense(3)]
    model = tf.keras.Sequential([layers.InputLayer((7,), dtype="int32"), *parts])
    bundle = bundle_of(model, input_range=(0, 19))
    assert (bundle.manifest.input.dtype, bundle.manifest.input.maximum) == ("int32", 19.0)


def test_pixels_of_one_byte_are_scaled_in_the_model() -> None:
    parts = [layers.Rescaling(1 / 255.0), layers.Conv2D(3, 3), layers.Flatten(), layers.Dense(3)]
    bundle = bundle_of(tf.keras.Sequential([layers.InputLayer((6, 6, 1), dtype="uint8"), *parts]), input_range=None)
    assert (bundle.manifest.input.dtype, bundle.manifest.input.maximum) == ("uint8", 255.0)


# --- loops


class Scanned(layers.Layer):  # type: ignore[misc,name-defined]
    """tf.scan and tf.map_fn over time, as a user writes them."""

    def build(self, shape: Any) -> None:
        self.matrix = self.add_weight("matrix", (shape[-1], shape[-1]), initializer="orthogonal")

    def call(self, x: Any) -> Any:
        by_time = tf.transpose(x, [1, 0, 2])
        states = tf.scan(lambda state, now: tf.tanh(state @ self.matrix + now), by_time)
        squared = tf.map_fn(lambda state: state * state, states)
        return squared[-1] + states[0]


class Powers(layers.Layer):  # type: ignore[misc,name-defined]
    """A while loop inside a while loop, and a branch on the turn's number."""

    def call(self, x: Any) -> Any:
        def inner(turn: Any, y: Any) -> Any:
            return turn + 1, tf.cond(turn < 1, lambda: tf.tanh(y), lambda: 0.9 * y)

        def outer(turn: Any, y: Any) -> Any:
            return turn + 1, tf.while_loop(lambda t, _: t < 2, inner, [0, y])[1] + 0.1 * x

        return tf.while_loop(lambda turn, _: turn < 3, outer, [0, x])[1]


LOOPS: dict[str, Callable[[], list[Any]]] = {
    "LSTM": lambda: [layers.LSTM(5)],
    "stacked GRU": lambda: [layers.GRU(5, return_sequences=True), layers.GRU(4)],
    "SimpleRNN, backwards": lambda: [layers.SimpleRNN(5, go_backwards=True)],
    "Bidirectional LSTM": lambda: [layers.Bidirectional(layers.LSTM(4))],
    "LSTM behind a mask": lambda: [layers.Masking(0.0), layers.LSTM(4)],
    "GRU without reset_after, with dropout": lambda: [layers.GRU(4, reset_after=False, dropout=0.2)],
    "scan and map": lambda: [Scanned()],
    "TimeDistributed": lambda: [layers.TimeDistributed(layers.Dense(3, "tanh"))],
    "loops in loops": lambda: [Powers()],
    "ConvLSTM": lambda: [layers.Reshape((6, 4, 1)), layers.ConvLSTM1D(3, 2, padding="same")],
}


@pytest.mark.parametrize("case", [
    case if case in ("LSTM", "loops in loops")
    else pytest.param(case, marks=pytest.mark.slow) for case in LOOPS
])  # fmt: skip
def test_loops_are_unrolled_as_a_user_writes_them(case: str) -> None:
    tf.keras.utils.set_random_seed(1)
    model = tf.keras.Sequential([layers.InputLayer((6, 4)), *LOOPS[case](), layers.Flatten(), layers.Dense(3)])
    bundle = bundle_of(model)
    assert bundle.manifest.proof is not None
    assert (bundle.manifest.proof.judgement, bundle.manifest.proof.max_abs_error < 1e-6) == ("float32", True)
    assert not {"WHILE", "IF"} & set(operators(bundle.model))


def test_an_endless_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covey_models.lowering.loops.MOST_TURNS", 100)
    forever = layers.Lambda(lambda x: tf.while_loop(lambda turn, y: turn >= 0, lambda turn, y: (turn, y), [0, x])[1])
    with pytest.raises(BundleError, match=r"op \w*While of the layer 'lambda.*more than 100 times"):
        bundle_of(tf.keras.Sequential([layers.InputLayer((4,)), forever, layers.Dense(3)]))
