"""A TFLite file read back into TensorFlow computes what the interpreter computes, and can be differentiated twice."""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
import pytest
from export_helpers import BATCH, batch_of, opened
from parity import interpreted, relative_error
from test_lowering import CASES, model_of
from test_zoo import SHAPES

from covey_models import build, export
from covey_models._tensorflow import flatbuffer_schema, import_tensorflow
from covey_models.compact import FILE_IDENTIFIER
from covey_models.convert import convert
from covey_models.importing import ReadBack
from covey_models.lowering import Lowered
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.errors import BundleError

tf = import_tensorflow()

ROUNDING = 2e-6
BATCHED = ("x", "y", "example_weight")


def inputs_of(bundle: Bundle, name: str, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch and neutral values for what else the entry point takes."""
    others = {
        "learning_rate": np.float32(0.1),
        "clip_norm": np.float32(0.5),
        "proximal_weight": np.float32(0.1),
        "proximal_center": np.full(bundle.manifest.dimension, 0.01, np.float32),
        "seed": np.int32(5),
    }
    taken = ReadBack(bundle.model).entry_point(name).inputs
    return {key: (batch | others)[key] for key in taken}


def check_all_entry_points(bundle: Bundle, double: bool, tolerance: float = ROUNDING) -> None:
    """Two training steps, with what they leave behind, and all that computes from it."""
    read, device = ReadBack(bundle.model, double=double), opened(bundle)
    state = dict(read.initial)
    for step, name in enumerate(("train", "train", "gradient", "evaluate", "infer", "get_parameters")):
        inputs = inputs_of(bundle, name, batch_of(bundle, step))
        wanted = device[name](**inputs)
        found, state = read.run(name, inputs, state)
        for key, value in wanted.items():
            assert relative_error(found[key].numpy(), value) < tolerance, (name, key)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("which", ["digits", "batch_norm"])
def test_every_entry_point_computes_what_the_interpreter_computes(
    which: str, double: bool, request: pytest.FixtureRequest
) -> None:
    check_all_entry_points(request.getfixturevalue(f"{which}_bundle"), double)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_model_of_the_zoo_is_read_back(name: str) -> None:
    model = build(name, SHAPES[name], 5, seed=3)
    bundle = read_bundle(export(model, name=name, batch_size=4, optimizer="momentum", clip=True, proximal=True))
    check_all_entry_points(bundle, False, 1e-5)
    assert_derivative_of_loss(bundle, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_is_read_back(case: str) -> None:
    bundle = read_bundle(export(model_of(CASES[case]()), name="case", batch_size=8, input_range=(0.0, 1.0)))
    check_all_entry_points(bundle, False, 1e-5)
    assert_derivative_of_loss(bundle, 1e-4)


def assert_derivative_of_loss(bundle: Bundle, tolerance: float) -> None:
    """The derivative of the loss that is read back is what the bundle's own `gradient` gives on a device."""
    read, batch = ReadBack(bundle.model), batch_of(bundle)
    parameters = tf.constant(opened(bundle)["get_parameters"]()["parameters"])
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        _, state = read.run("set_parameters", {"parameters": parameters}, read.initial)
        loss = read.run("gradient", inputs_of(bundle, "gradient", batch), state, ["loss"])[0]["loss"]
    derivative = tape.gradient(loss, parameters, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    wanted = opened(bundle)["gradient"](**inputs_of(bundle, "gradient", batch))["gradient"]
    assert np.abs(derivative - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("which", ["digits", "batch_norm"])
def test_the_derivative_of_the_loss_is_the_bundles_own_gradient(which: str, request: pytest.FixtureRequest) -> None:
    assert_derivative_of_loss(request.getfixturevalue(f"{which}_bundle"), 1e-5)


def test_the_gradient_can_be_differentiated_in_the_input(batch_norm_bundle: Bundle) -> None:
    read, random = ReadBack(batch_norm_bundle.model, double=True), np.random.default_rng(1)
    batch = batch_of(batch_norm_bundle)
    x, towards = tf.constant(batch["x"], tf.float64), random.standard_normal(batch["x"].shape)
    along = random.standard_normal(batch_norm_bundle.manifest.dimension)

    def measured(x: Any) -> Any:
        gradient = read.run("gradient", {**batch, "x": x}, read.initial, ["gradient"])[0]["gradient"]
        return tf.reduce_sum(gradient * along)

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = measured(x)
    slope = float(tf.reduce_sum(tape.gradient(value, x) * towards))
    step = 1e-6
    assert slope == pytest.approx(float(measured(x + step * towards) - measured(x - step * towards)) / (2 * step), 1e-5)


def test_operators_that_the_converter_makes_by_itself_are_read_back() -> None:
    def step(x: Any) -> dict[str, Any]:
        kernel = tf.constant(np.random.default_rng(1).standard_normal((3, 3, 3, 4)).astype(np.float32))
        y, rows = tf.nn.conv2d(x, kernel, 2, "SAME"), tf.reshape(x, [2, -1])
        return {
            "convolution": y,
            "dilated": tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "VALID", dilations=2) + 0.1),
            "leaky": tf.nn.leaky_relu(y, 0.3),
            "hard swish": y * tf.nn.relu6(y + 3.0) / 6.0,
            "between ones": tf.minimum(tf.maximum(y, -1.0), 1.0),
            "difference": tf.math.squared_difference(y, y[:1]),
            "all": tf.cast(tf.reduce_all(rows > -2.0, 1), tf.int32),
            "any": tf.cast(tf.reduce_any(rows > 2.0, 0), tf.int32),
            "reversed": tf.reverse(rows, [1]),
            "smallest": tf.math.unsorted_segment_min(rows, [0, 1], 2),
            "product": tf.math.unsorted_segment_prod(rows, [0, 0], 2),
            "dense": tf.matmul(rows, tf.ones([192, 5]) * 0.1) + tf.constant([1.0, 2.0, 3.0, 4.0, 5.0]),
        }

    model = plainly_converted(step, (2, 8, 8, 3))
    x = np.random.default_rng(2).standard_normal((2, 8, 8, 3)).astype(np.float32)
    wanted, read = interpreted(model)(x=x), ReadBack(model)
    found, _ = read.run("step", {"x": x}, read.initial)
    assert {name: relative_error(found[name].numpy(), wanted[name]) for name in wanted} == {
        name: pytest.approx(0.0, abs=ROUNDING) for name in wanted
    }


def plainly_converted(step: Any, shape: tuple[int, ...]) -> bytes:
    """Without covey's rewriting: with the operators that TFLite's converter chooses."""
    function = tf.function(step, input_signature=[tf.TensorSpec(shape, tf.float32, name="x")])
    return convert({"step": Lowered(function.get_concrete_function(), {})}, [])


def test_another_number_of_examples_gives_the_rows_of_a_whole_batch(digits_bundle: Bundle) -> None:
    read, batch = ReadBack(digits_bundle.model), batch_of(digits_bundle)
    whole = read.run("infer", {"x": batch["x"]}, read.initial, ["output"])[0]["output"]
    for count in (1, 3, BATCH + 5):
        sized = read.for_count("infer", ["output"], ["x"], BATCH, count)
        x = np.resize(batch["x"], (count, *batch["x"].shape[1:]))
        found = read.run("infer", {"x": x}, read.initial, ["output"], sized)[0]["output"]
        np.testing.assert_allclose(found, np.resize(whole, (count, 10)), atol=1e-6)


def test_what_mixes_the_examples_of_a_batch_is_not_resized(batch_norm_bundle: Bundle) -> None:
    read = ReadBack(batch_norm_bundle.model)
    assert read.for_count("train", ["loss"], BATCHED, BATCH, 3) is None
    assert read.for_count("infer", ["output"], ["x"], BATCH, 3) is not None


def test_an_operator_that_is_unknown_is_named() -> None:
    model = plainly_converted(lambda x: {"y": tf.math.segment_sum(x, [0, 0, 1])}, (3, 2))
    read = ReadBack(model)
    with pytest.raises(BundleError, match="operator SEGMENT_SUM, which cannot be read"):
        read.run("step", {"x": np.ones((3, 2), np.float32)}, read.initial)


def test_a_small_file_with_huge_tensors_is_refused_before_anything_is_built(digits_bundle: Bundle) -> None:
    schema = flatbuffer_schema()
    parsed = schema.ModelT.InitFromObj(schema.Model.GetRootAs(digits_bundle.model, 0))
    infer = parsed.subgraphs[next(one.subgraphIndex for one in parsed.signatureDefs if one.signatureKey == b"infer")]
    infer.tensors[infer.operators[-1].outputs[0]].shape = [2**14, 2**15]
    builder = flatbuffers.Builder(0)
    builder.Finish(parsed.Pack(builder), FILE_IDENTIFIER)
    read = ReadBack(bytes(builder.Output()))
    with pytest.raises(BundleError, match="infer of the model has tensors of 536870912 numbers"):
        read.run("infer", {"x": batch_of(digits_bundle)["x"]}, read.initial)


def test_damaged_files_are_refused_and_nothing_else_is_raised(digits_bundle: Bundle) -> None:
    random, refused = np.random.default_rng(0), 0
    x = batch_of(digits_bundle)["x"]
    for _ in range(30):
        damaged = bytearray(digits_bundle.model)
        for place in random.integers(0, len(damaged), 4):
            damaged[place] = random.integers(0, 256)
        try:
            read = ReadBack(bytes(damaged))
            read.run("infer", {"x": x}, read.initial)
        except BundleError:
            refused += 1
    assert 3 < refused < 30
