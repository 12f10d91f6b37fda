"""What a bundle promises: the entry points' contract, and that the user's model is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from export_helpers import BATCH, batch_of, opened, parameters
from patience import PATIENCE_S

from covey_models import export, zoo
from covey_models._tensorflow import import_tensorflow
from covey_models.convert import operators
from covey_models.lowering import LOWERINGS
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.errors import BundleError, ConfigError
from covey_protocol.parameters import offsets
from covey_protocol.seals import SealingKey

tensorflow = import_tensorflow()
layers = tensorflow.keras.layers

RATE = np.float32(0.1)


def keras_step(tf: Any, model: Any, batch: dict[str, Any]) -> None:
    """The step written the usual Keras way, without any of covey's code."""
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    with tf.GradientTape() as tape:
        losses = loss(batch["y"], model(batch["x"], training=True))
        mean = tf.reduce_sum(losses * batch["example_weight"]) / tf.reduce_sum(batch["example_weight"])
    for variable, gradient in zip(model.trainable_variables, tape.gradient(mean, model.trainable_variables)):
        variable.assign_sub(RATE * gradient)


def flat(model: Any) -> Any:
    return np.concatenate([variable.numpy().ravel() for variable in model.variables])


@pytest.mark.parametrize("which", ["digits", "batch_norm"])
def test_seven_steps_on_the_device_runtime_equal_seven_plain_keras_steps(
    which: str, tf: Any, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{which}_bundle")
    original = request.getfixturevalue(f"{which}_model")
    model = tf.keras.models.clone_model(original)
    model.set_weights(original.get_weights())
    device = opened(bundle)
    for seed in range(7):
        batch = batch_of(bundle, seed)
        if seed == 3:
            batch["example_weight"][BATCH // 2 :] = 0.0
        keras_step(tf, model, batch)
        device["train"](**batch, learning_rate=RATE)
    np.testing.assert_allclose(parameters(device), flat(model), atol=1e-6, rtol=0)
    assert np.abs(flat(model) - flat(original)).max() > 1e-2  # it did train


def test_the_file_starts_from_the_models_current_weights(digits_bundle: Bundle, digits_model: Any) -> None:
    np.testing.assert_array_equal(parameters(opened(digits_bundle)), flat(digits_model))


def test_export_leaves_every_weight_and_statistic_of_the_model_as_it_was(batch_norm_model: Any) -> None:
    before = [weight.copy() for weight in batch_norm_model.get_weights()]
    export(batch_norm_model, name="again", batch_size=2)
    for old, new in zip(before, batch_norm_model.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_the_same_model_gives_the_same_bytes(digits_bytes: bytes) -> None:
    again = zoo.build("small-cnn", (8, 8, 1), 10, seed=3)
    assert export(again, name="digits", batch_size=BATCH, input_range=(0.0, 1.0)) == digits_bytes


def test_only_builtin_ops_are_in_the_file(digits_bundle: Bundle, batch_norm_bundle: Bundle) -> None:
    for bundle in (digits_bundle, batch_norm_bundle):
        names = operators(bundle.model)
        assert "BATCH_MATMUL" in names
        assert not [name for name in names if name.startswith("custom")]
        assert not {"FULLY_CONNECTED", "TRANSPOSE_CONV"} & set(names)  # the slow forms


def test_a_bundle_trains_where_tensorflow_is_not_imported(digits_bytes: bytes, tmp_path: Any) -> None:
    path = tmp_path / "digits.covey"
    path.write_bytes(digits_bytes)
    code = """if True:
        import sys, numpy as np
        from tflite_runtime.interpreter import Interpreter
        from covey_protocol.bundle import read_bundle
        bundle = read_bundle(open(sys.argv[1], "rb").read())
        train = Interpreter(model_content=bundle.model).get_signature_runner("train")
        n = bundle.manifest.batch_size
        x = np.linspace(0, 1, n * 64, dtype=np.float32).reshape(n, 8, 8, 1)
        step = dict(x=x, y=np.arange(n, dtype=np.int32), example_weight=np.ones(n, np.float32))
        losses = [float(train(**step, learning_rate=np.float32(0.1))["loss"]) for _ in range(20)]
        assert losses[-1] < losses[0], losses
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=PATIENCE_S)


def test_absent_examples_have_no_part_in_the_step(digits_bundle: Bundle) -> None:
    batch, other = batch_of(digits_bundle, 1), batch_of(digits_bundle, 2)
    batch["example_weight"][5:] = 0.0
    replaced = {name: values.copy() for name, values in batch.items()}
    replaced["x"][5:], replaced["y"][5:] = other["x"][5:], other["y"][5:]
    results = []
    for given in (batch, replaced):
        device = opened(digits_bundle)
        device["train"](**given, learning_rate=RATE)
        results.append(parameters(device))
    np.testing.assert_allclose(results[0], results[1], atol=1e-7, rtol=0)


@pytest.mark.parametrize("which", ["digits", "batch_norm"])
def test_a_batch_without_any_weight_changes_nothing(which: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"{which}_bundle")
    device, batch = opened(bundle), batch_of(bundle)
    before = parameters(device)
    batch["example_weight"][:] = 0.0
    assert device["train"](**batch, learning_rate=RATE)["loss"] == 0.0
    np.testing.assert_array_equal(parameters(device), before)
    assert device["evaluate"](**batch) == {"loss_sum": 0.0, "correct": 0.0, "count": 0.0}


def test_weights_of_two_count_an_example_twice(digits_bundle: Bundle) -> None:
    device, batch = opened(digits_bundle), batch_of(digits_bundle)
    batch["example_weight"][:] = 0.0
    batch["example_weight"][:3] = 1.0
    once = device["evaluate"](**batch)
    batch["example_weight"][0] = 2.0
    twice = device["evaluate"](**batch)
    assert (once["count"], twice["count"]) == (3.0, 4.0)
    batch["example_weight"][:] = 0.0
    batch["example_weight"][0] = 1.0
    first = device["evaluate"](**batch)
    np.testing.assert_allclose(twice["loss_sum"] - once["loss_sum"], first["loss_sum"], rtol=1e-5)


@pytest.mark.parametrize("which", ["digits", "batch_norm"])
def test_the_gradient_is_the_step_and_changes_nothing(which: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"{which}_bundle")
    device, batch = opened(bundle), batch_of(bundle)
    before = parameters(device)
    computed = device["gradient"](**batch)
    np.testing.assert_array_equal(parameters(device), before)
    trained = device["train"](**batch, learning_rate=RATE)
    assert computed["loss"] == pytest.approx(trained["loss"], abs=1e-6)
    moved = (before - parameters(device)) / RATE
    for name, place in offsets(bundle.manifest.parameters).items():
        if "moving" in name:
            assert not computed["gradient"][place].any()
            assert moved[place].any()
        else:
            np.testing.assert_allclose(computed["gradient"][place], moved[place], atol=2e-6, rtol=0)


def test_parameters_go_in_and_come_out_unchanged(batch_norm_bundle: Bundle) -> None:
    device = opened(batch_norm_bundle)
    given = np.random.default_rng(0).standard_normal(batch_norm_bundle.manifest.dimension).astype(np.float32)
    assert device["set_parameters"](parameters=given)["dimension"] == len(given)
    np.testing.assert_array_equal(parameters(device), given)


def test_the_parameter_list_names_every_tensor_in_keras_order(batch_norm_bundle: Bundle, batch_norm_model: Any) -> None:
    specs = batch_norm_bundle.manifest.parameters
    assert [(spec.name, spec.trainable) for spec in specs] == [
        ("conv/kernel", True), ("conv/bias", True), ("norm/gamma", True), ("norm/beta", True),
        ("norm/moving_mean", False), ("norm/moving_variance", False), ("logits/kernel", True), ("logits/bias", True),
    ]  # fmt: skip
    assert [spec.shape for spec in specs] == [tuple(variable.shape) for variable in batch_norm_model.variables]


def test_infer_gives_probabilities(digits_bundle: Bundle) -> None:
    output = opened(digits_bundle)["infer"](x=batch_of(digits_bundle)["x"])["output"]
    assert output.shape == (BATCH, 10)
    np.testing.assert_allclose(output.sum(1), 1.0, atol=1e-6)


def test_two_layers_of_one_name_get_distinct_parameters(tf: Any) -> None:
    class Twin(tf.keras.layers.Layer):  # type: ignore[misc,name-defined]
        def build(self, shape: Any) -> None:
            self.first = self.add_weight("scale", (shape[-1],), initializer="ones")
            self.second = self.add_weight("scale", (shape[-1],), initializer="ones")

        def call(self, x: Any) -> Any:
            return x * self.first + self.second

    model = tf.keras.Sequential([tf.keras.layers.InputLayer((4,)), Twin(name="twin"), tf.keras.layers.Dense(2)])
    names = [spec.name for spec in read_bundle(export(model, name="twins", batch_size=2)).manifest.parameters]
    assert names[:2] == ["twin/scale", "twin/scale_1"]


def test_a_sealed_bundle_reads_back_under_its_key_only(digits_model: Any) -> None:
    key, other = SealingKey.from_seed(b"1" * 32), SealingKey.from_seed(b"2" * 32)
    names = tuple("abcdefghij")
    data = export(digits_model, name="sealed", batch_size=2, key=key, class_names=names, metadata={"author": "me"})
    manifest = read_bundle(data, sealed_by=key.public).manifest
    assert (manifest.name, manifest.class_names, manifest.metadata) == ("sealed", names, {"author": "me"})
    assert (manifest.label.minimum, manifest.label.maximum, manifest.num_classes) == (0.0, 9.0, 10)
    with pytest.raises(BundleError, match="seal"):
        read_bundle(data, sealed_by=other.public)


def test_the_manifest_states_the_proof_and_the_input(digits_bundle: Bundle) -> None:
    manifest = digits_bundle.manifest
    assert manifest.proof is not None
    assert manifest.proof.runtime == "tflite_runtime"
    assert manifest.proof.max_abs_error < 1e-6 < manifest.proof.tolerance
    assert manifest.proof.steps >= 5
    assert (manifest.input.shape, manifest.input.minimum, manifest.input.maximum) == ((8, 8, 1), 0.0, 1.0)
    assert (manifest.optimizer, manifest.loss, manifest.batch_size) == ("sgd", "sparse_categorical_crossentropy", BATCH)


def test_a_binary_model_with_one_logit_gives_both_probabilities(tf: Any) -> None:
    model = tf.keras.Sequential([tf.keras.layers.InputLayer((5,)), tf.keras.layers.Dense(1)])
    bundle = read_bundle(export(model, name="binary", loss="binary_crossentropy", batch_size=4))
    assert bundle.manifest.num_classes == 2
    batch = batch_of(bundle)
    device = opened(bundle)
    logits = model(batch["x"]).numpy()[:, 0]
    np.testing.assert_allclose(device["infer"](x=batch["x"])["output"][:, 1], 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert device["evaluate"](**batch)["correct"] == ((logits > 0) == batch["y"]).sum()


def test_a_regression_trains_on_float_labels(tf: Any) -> None:
    model = tf.keras.Sequential([tf.keras.layers.InputLayer((5,)), tf.keras.layers.Dense(1)])
    bundle = read_bundle(export(model, name="regression", loss="mean_squared_error", batch_size=4))
    assert (bundle.manifest.label.dtype, bundle.manifest.num_classes) == ("float32", None)
    batch, device = batch_of(bundle), opened(bundle)
    predicted = device["infer"](x=batch["x"])["output"][:, 0]
    summed = device["evaluate"](**batch)["loss_sum"]
    np.testing.assert_allclose(summed, ((predicted - batch["y"]) ** 2).sum(), rtol=1e-5)
    for _ in range(300):
        device["train"](**batch, learning_rate=RATE)
    assert device["evaluate"](**batch)["loss_sum"] < summed / 10


def test_a_wrong_lowering_is_caught_and_nothing_is_written(digits_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOWERINGS, "ReluGrad", lambda node, dy, y: dy)  # a ReLU without a kink
    before = flat(digits_model)
    with pytest.raises(
        BundleError, match=r"gradient differs from float64 TensorFlow by \d\.\de[-+]\d+, the tolerance is"
    ):
        export(digits_model, name="wrong", batch_size=4)
    np.testing.assert_array_equal(flat(digits_model), before)


class Special(layers.Layer):  # type: ignore[misc,name-defined]
    def call(self, x: Any) -> Any:
        return tensorflow.math.special.bessel_i0e(x)


class Broken(layers.Layer):  # type: ignore[misc,name-defined]
    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            raise RuntimeError("no training today")
        return x


def truncated_noise(x: Any) -> Any:
    return x + tensorflow.random.truncated_normal(tensorflow.shape(x))


def halved_until_small(x: Any) -> Any:
    return tensorflow.while_loop(lambda y: tensorflow.reduce_max(y) > 1.0, lambda y: (y * 0.5,), [x])[0]


@tensorflow.function  # type: ignore[untyped-decorator]
def hidden_softmax(x: Any) -> Any:
    return tensorflow.nn.softmax(x)


def sequential(*parts: Any, shape: tuple[Any, ...] = (4,), dtype: str = "float32") -> Any:
    return tensorflow.keras.Sequential([layers.InputLayer(shape, dtype=dtype), *parts])


def with_three_classes() -> Any:
    return sequential(layers.Dense(3))


def with_two_outputs() -> Any:
    inputs = layers.Input((4,))
    return tensorflow.keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(2)(inputs)])


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "an op without a lowering": (
        lambda: sequential(layers.Dense(4), Special(name="special"), layers.Dense(3)),
        {},
        "op BesselI0e of the layer 'special' is neither a TFLite builtin",
    ),
    "a random op that needs rejection": (
        lambda: sequential(layers.Lambda(truncated_noise, name="noise"), layers.Dense(3)),
        {},
        r"op TruncatedNormal of the layer 'noise'.*only uniform and normal numbers",
    ),
    "a loop of unknown length": (
        lambda: sequential(layers.Lambda(halved_until_small, name="halving"), layers.Dense(3)),
        {},
        r"layer 'halving'.*its length depends on the data.*fixed number of times",
    ),
    "a layer that fails in training": (
        lambda: sequential(Broken(), layers.Dense(3)),
        {},
        "cannot be traced.*no training today",
    ),
    "probabilities made out of sight": (
        lambda: sequential(layers.Dense(3), layers.Lambda(hidden_softmax, name="last")),
        {},
        "are probabilities, made where the export cannot see how",
    ),
    "an open input shape": (lambda: sequential(layers.LSTM(3), shape=(None, 2)), {}, "is open"),
    "nothing to train": (lambda: sequential(layers.Flatten()), {}, "nothing to train"),
    "not a model": (lambda: "a string", {}, "a str, not a Keras model"),
    "a model that is not built": (lambda: tensorflow.keras.Sequential([layers.Dense(3)]), {}, "is not built"),
    "two outputs": (with_two_outputs, {}, "2 outputs"),
    "a wrong number of classes": (with_three_classes, {"num_classes": 4}, "3 classes apart, not 4"),
    "too few class names": (with_three_classes, {"class_names": ["a"]}, "1 class names for 3"),
    "an unknown loss": (with_three_classes, {"loss": "hinge"}, "no loss 'hinge'.*choose one of"),
    "the wrong output for the loss": (lambda: sequential(layers.Dense(1)), {}, "needs one number per class"),
    "a loss that averages over the batch": (
        with_three_classes,
        {"loss": lambda labels, outputs: tensorflow.reduce_mean(outputs - labels)},
        r"gives shape \(\) for a batch of 2.*one number per example",
    ),
    "labels a built-in loss does not take": (
        with_three_classes,
        {"label_dtype": "float32"},
        r"takes int32 labels of shape \(\)",
    ),
    "an unknown optimizer": (with_three_classes, {"optimizer": "adamm"}, "did you mean 'adam'"),
    "a learning rate schedule": (
        with_three_classes,
        {"optimizer": tensorflow.keras.optimizers.SGD(tensorflow.keras.optimizers.schedules.CosineDecay(0.1, 10))},
        "has a learning rate schedule",
    ),
    "whole numbers without a range": (
        lambda: sequential(layers.Embedding(9, 3), layers.Flatten(), layers.Dense(3), shape=(5,), dtype="int32"),
        {},
        "their range is not given",
    ),
    "an input of another kind": (
        lambda: sequential(layers.Dense(3), shape=(5,), dtype="float64"),
        {},
        "input is float64",
    ),
    "another wish for moving statistics": (with_three_classes, {"moving_statistics": "both"}, "cannot be 'both'"),
    "an empty batch": (with_three_classes, {"batch_size": 0}, "batch size is 0"),
    "an inverted range": (with_three_classes, {"input_range": (1.0, 0.0)}, "lower bound first"),
    "a range in which the model itself diverges": (
        lambda: sequential(layers.Dense(9, "exponential"), layers.Dense(3)),
        {"input_range": (0.0, 1e30)},
        "loss of (nan|inf).*scale the input",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, settings, expected = REFUSED[case]
    model = make()
    capfd.readouterr()
    with pytest.raises((BundleError, ConfigError), match=expected) as caught:
        export(model, **{"name": "refused", "batch_size": 2, **settings})
    assert caught.value.remedy
    assert capfd.readouterr().err == ""  # no noise from the converter


def test_importing_the_package_and_its_command_line_imports_nothing_heavy() -> None:
    code = "import sys, covey_models.cli; print([n for n in ('tensorflow', 'sklearn', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.strip() == "[]"
