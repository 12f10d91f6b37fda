"""`covey inspect`: right about what is in the file, close about what it costs, and never upset by a bad one."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_models import export
from covey_models._tensorflow import flatbuffer_schema
from covey_models.android import FLOOR, RELEASES, needed_release, numbers
from covey_models.cli import inspect_command
from covey_models.inspecting import Inspection, inspect
from covey_models.runtime_operators import HIGHEST_VERSION, LOWEST_VERSION
from covey_models.tflite_file import read_tflite
from covey_protocol.bundle import Bundle, write_bundle
from covey_protocol.errors import EXIT_BUNDLE, BundleError
from covey_protocol.seals import SealingKey

KEY = SealingKey.from_seed(bytes([4]) * 32)


def flops_of(inspection: Inspection) -> dict[str, Any]:
    return {one.name: one.flops for one in inspection.entry_points}


def test_the_flops_of_a_dense_net_are_those_counted_by_hand(tf: Any) -> None:
    batch, inputs, hidden, classes = 4, 12, 7, 5
    layers = tf.keras.layers
    model = tf.keras.Sequential([layers.InputLayer((inputs,)), layers.Dense(hidden, "relu"), layers.Dense(classes)])
    counted = flops_of(inspect(export(model, name="dense", batch_size=batch)))
    first, second = 2 * batch * inputs * hidden, 2 * batch * hidden * classes
    assert counted["infer"].products == first + second
    assert counted["infer"].others == batch * (hidden + 2 * classes)  # two biases, one softmax; the ReLU is fused
    # forward; both kernels' gradients; the gradient of the hidden layer, but none of the input
    assert counted["train"].products == (first + second) + (first + second) + second
    assert counted["get_parameters"].total == 0


def test_the_flops_of_a_convolution_net_are_those_counted_by_hand(tf: Any) -> None:
    batch, layers = 2, tf.keras.layers
    model = tf.keras.Sequential(
        [layers.InputLayer((8, 8, 3)), layers.Conv2D(4, 3, activation="relu"), layers.Flatten(), layers.Dense(10)]
    )
    counted = flops_of(inspect(export(model, name="conv", batch_size=batch)))
    convolution, dense = 2 * batch * (6 * 6 * 4) * (3 * 3 * 3), 2 * batch * (6 * 6 * 4) * 10
    assert counted["infer"].products == convolution + dense
    assert counted["train"].products == 2 * convolution + 3 * dense


def test_the_report_names_what_the_bundle_holds(batch_norm_bundle: Bundle) -> None:
    inspection = inspect(write_bundle(batch_norm_bundle.manifest, batch_norm_bundle.model, KEY), key=KEY.public)
    assert inspection.sealed_by == KEY.public.hex()
    train = next(one for one in inspection.entry_points if one.name == "train")
    ports = {port.name: (port.type, port.shape) for port in (*train.inputs, *train.outputs)}
    assert ports == {
        "x": ("FLOAT32", (8, 6, 6, 2)),
        "y": ("INT32", (8,)),
        "example_weight": ("FLOAT32", (8,)),
        "learning_rate": ("FLOAT32", ()),
        "loss": ("FLOAT32", ()),
    }
    assert train.operators["VAR_HANDLE"] == 8
    assert inspection.memory.optimizer == 0
    assert not inspection.problems
    moving = [spec.name for spec in inspection.manifest.parameters if not spec.trainable]
    assert moving == ["norm/moving_mean", "norm/moving_variance"]


MEASURE = """
import sys, numpy as np
from pathlib import Path
from covey_edge.runtime import Model, installed
from covey_protocol.bundle import read_bundle
def resident(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
installed()
before = resident("VmRSS:")
bundle = read_bundle(Path(sys.argv[1]).read_bytes())
spec, model = bundle.manifest, Model(bundle)
received = model.parameters()
model.set_parameters(received)
x = np.ones((spec.batch_size, *spec.input.shape), np.float32) / 2
y = np.zeros(spec.batch_size, np.int32)
model.evaluate(x, y)
for _ in range(3):
    model.train_batch(x, y, 0.01)
update = model.parameters() - received
print(resident("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_estimate_is_near_what_a_real_interpreter_takes(tf: Any, tmp_path: Path) -> None:
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.InputLayer((32, 32, 3)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPool2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    path = tmp_path / "net.covey"
    path.write_bytes(export(model, name="net", input_range=(0.0, 1.0)))
    estimated = inspect(path.read_bytes()).memory.total
    command = [sys.executable, "-c", MEASURE, str(path)]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"estimated {estimated / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert estimated > 10e6  # large enough that the runtime's own few megabytes do not decide
    assert 0.75 < measured / estimated < 1.7  # docs/bundle.md: 1.05 to 1.25 on the machine that wrote it


def test_adams_two_moments_count_as_optimizer_state(tf: Any) -> None:
    layers = tf.keras.layers
    model = tf.keras.Sequential([layers.InputLayer((12,)), layers.Dense(7), layers.Dense(5)])
    inspection = inspect(export(model, name="adam", optimizer="adam", batch_size=4))
    parameters = 4 * inspection.manifest.dimension
    assert inspection.memory.parameters == parameters
    assert 2 * parameters <= inspection.memory.optimizer <= 2 * parameters + 100  # a step count and the like


def test_momentum_counts_as_optimizer_state(coordinator_key: SealingKey) -> None:
    from handmade_bundles import INPUTS, OUTPUTS, linear_bundle

    inspection = inspect(linear_bundle(coordinator_key))
    assert inspection.memory.optimizer == 4 * INPUTS * OUTPUTS
    assert inspection.manifest.train_inputs == ("seed", "clip_norm", "proximal", "correction")


# --- targets


def model_of(operator_codes: list[tuple[int, int, str]]) -> bytes:
    """A TFLite model that asks for these (number, version, custom name) and does nothing."""
    import flatbuffers

    schema = flatbuffer_schema()
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version = 3
    graph.tensors, graph.inputs, graph.outputs, graph.operators = [], [], [], []
    model.subgraphs, model.buffers, model.operatorCodes = [graph], [schema.BufferT()], []
    for number, version, custom in operator_codes:
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        code.customCode = custom or None
        model.operatorCodes.append(code)
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_the_table_of_operators_is_what_the_runtime_takes() -> None:
    from tflite_runtime.interpreter import Interpreter

    schema = flatbuffer_schema()
    numbers = {name: number for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}

    def taken(name: str, version: int) -> bool:
        try:
            Interpreter(model_content=model_of([(numbers[name], version, "")]))
        except ValueError:
            return False
        return True

    measured = {name: [version for version in range(1, 16) if taken(name, version)] for name in numbers}
    expected = {
        name: list(range(LOWEST_VERSION.get(name, 1), HIGHEST_VERSION[name] + 1)) if name in HIGHEST_VERSION else []
        for name in numbers
    }
    assert measured == expected


def with_operator_codes(bundle: Bundle, change: Any) -> bytes:
    """The bundle with its model's operator codes changed."""
    import flatbuffers

    schema = flatbuffer_schema()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bundle.model, 0))
    change(model.operatorCodes)
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return write_bundle(bundle.manifest, bytes(builder.Output()))


def make_newer(codes: list[Any]) -> None:
    codes[0].version = 40


def make_custom(codes: list[Any]) -> None:
    codes[0].builtinCode, codes[0].deprecatedBuiltinCode, codes[0].customCode = 32, 32, b"MyOp\n\x1b[31m"


@pytest.mark.parametrize(
    ("change", "words"), [(make_newer, "version 40 is not in TFLite 2.14"), (make_custom, "custom MyOp??[31m is not")]
)
@pytest.mark.parametrize("target", ["edge", "android"])
def test_a_model_the_target_does_not_take_is_reported_and_ends_with_a_code(
    change: Any, words: str, target: str, digits_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "new.covey").write_bytes(with_operator_codes(digits_bundle, change))
    result = run(tmp_path / "new.covey", "--target", target)
    assert isinstance(result.exception, BundleError)
    assert result.exception.exit_code == EXIT_BUNDLE
    assert words in result.output
    assert words in str(result.exception)


# --- as a command


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(inspect_command, [str(argument) for argument in arguments])


def test_the_command_prints_text_or_one_json_object(digits_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "digits.covey"
    path.write_bytes(digits_bytes)
    text = run(path)
    assert text.exit_code == 0, text.exception
    for part in (
        "digits",
        "not sealed",
        "conv_1/kernel",
        "d = 3818",
        "BATCH_MATMUL",
        "one training step",
        "target edge",
    ):
        assert part in text.output
    assert max(len(line) for line in text.output.splitlines()) < 200
    plain = json.loads(run(path, "--json", "--target", "android").output)
    assert plain["dimension"] == 3818
    assert plain["target"] == "android"
    assert plain["memory"]["total"] == sum(v for name, v in plain["memory"].items() if name != "total")
    assert plain["traffic"]["parameters_down"] > 4 * 3818
    assert plain["update_bytes"]["float32"] == 4 * 3818
    assert plain["update_bytes"]["rotated-8bit"] == 3865
    assert "15.3 kB as float32, 3865 B as rotated-8bit, 1945 B as rotated-4bit" in text.output


def test_a_wrong_key_is_refused(digits_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "digits.covey"
    path.write_bytes(write_bundle(digits_bundle.manifest, digits_bundle.model, KEY))
    assert KEY.public.hex() in run(path, "--key", KEY.public.hex()).output
    other = SealingKey.from_seed(bytes([5]) * 32).public.hex()
    assert isinstance(run(path, "--key", other).exception, BundleError)


def test_inspecting_imports_neither_tensorflow_nor_a_runtime(digits_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "digits.covey").write_bytes(digits_bytes)
    script = f"""
import sys
from pathlib import Path
from covey_models.inspecting import inspect, lines
list(lines(inspect(Path({str(tmp_path / "digits.covey")!r}).read_bytes())))
print(sorted({{"tensorflow", "tflite_runtime", "ai_edge_litert"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


# --- bad files


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_model_is_read_or_refused_and_nothing_else(digits_bundle: Bundle, data: st.DataObject) -> None:
    """The bundle around it is whole, so that only the reader of the model stands in the way."""
    model = bytearray(digits_bundle.model)
    if data.draw(st.booleans()):
        del model[data.draw(st.integers(0, len(model) - 1)) :]
    for _ in range(data.draw(st.integers(0, 8))):
        if model:
            place = data.draw(st.integers(0, len(model) - 1))
            model[place] = data.draw(st.integers(0, 255))
    for _ in range(data.draw(st.integers(0, 2))):  # an offset or a count
        if len(model) > 4:
            struct.pack_into(
                "<i", model, data.draw(st.integers(0, len(model) - 4)), data.draw(st.integers(-(2**31), 2**31 - 1))
            )
    try:
        inspect(write_bundle(digits_bundle.manifest, bytes(model)))
    except BundleError:
        return


def test_a_model_whose_loop_calls_itself_is_counted_once(digits_bundle: Bundle) -> None:
    """WHILE with its own subgraph as the body, twice: naive counting would never end."""
    import flatbuffers

    schema = flatbuffer_schema()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(digits_bundle.model, 0))
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.WHILE
    code.version = 1
    model.operatorCodes.append(code)
    for _ in range(2):
        loop, options = schema.OperatorT(), schema.WhileOptionsT()
        loop.opcodeIndex = len(model.operatorCodes) - 1
        loop.builtinOptionsType, loop.builtinOptions = schema.BuiltinOptions.WhileOptions, options
        loop.inputs, loop.outputs = [], []
        options.condSubgraphIndex = options.bodySubgraphIndex = 0
        model.subgraphs[0].operators.append(loop)
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    counted = inspect(write_bundle(digits_bundle.manifest, bytes(builder.Output())))
    plain = inspect(write_bundle(digits_bundle.manifest, digits_bundle.model))
    assert flops_of(counted) == flops_of(plain)


def test_a_model_that_lacks_an_entry_point_of_its_manifest_is_refused(digits_bundle: Bundle) -> None:
    signatures = (*digits_bundle.manifest.signatures, "grow")
    manifest = msgspec.structs.replace(digits_bundle.manifest, signatures=signatures)
    with pytest.raises(BundleError, match="lacks the entry points grow"):
        inspect(write_bundle(manifest, digits_bundle.model))


def test_a_file_that_is_no_model_is_refused() -> None:
    with pytest.raises(BundleError, match="not a TFLite file"):
        read_tflite(b"not a model at all")
    assert importlib.util.find_spec("tensorflow") is not None


# --- Android


def test_the_table_of_releases_says_of_2_14_what_was_measured_of_it() -> None:
    for (name, version), release in RELEASES.items():
        in_2_14 = name in HIGHEST_VERSION and version <= HIGHEST_VERSION[name]
        assert in_2_14 == (numbers(release) <= (2, 14)), (name, version, release)


@pytest.mark.parametrize("kind", ["digits", "batch-norm"])
def test_ordinary_models_run_on_android_from_a_release_on_that_is_said(
    kind: str, digits_bundle: Bundle, batch_norm_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = {"digits": digits_bundle, "batch-norm": batch_norm_bundle}[kind]
    (tmp_path / "model.covey").write_bytes(write_bundle(bundle.manifest, bundle.model))
    result = run(tmp_path / "model.covey", "--target", "android")
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    found = re.search(r"needs org\.tensorflow:tensorflow-lite (2\.[0-9]+) or newer \(for ", words)
    assert found is not None
    release, reason = needed_release(read_tflite(bundle.model))
    assert found.group(1) == release
    assert reason is None or numbers(FLOOR) < numbers(release) <= (2, 14)
    assert "without an input: get_parameters" in words
    assert "Java's runSignature refuses them" in words


def test_a_flex_operator_is_refused_with_the_place_where_it_is(digits_bundle: Bundle, tmp_path: Path) -> None:
    """As the converter makes them with SELECT_TF_OPS: a custom operator of that name. Android's runtime has none."""

    def make_flex(codes: list[Any]) -> None:
        schema = flatbuffer_schema()
        product = next(code for code in codes if code.builtinCode == schema.BuiltinOperator.BATCH_MATMUL)
        product.builtinCode, product.deprecatedBuiltinCode, product.customCode = 32, 32, b"FlexMatMul"

    (tmp_path / "flex.covey").write_bytes(with_operator_codes(digits_bundle, make_flex))
    result = run(tmp_path / "flex.covey", "--target", "android")
    assert isinstance(result.exception, BundleError)
    words = " ".join(result.output.split())
    assert re.search(r"custom FlexMatMul is not among the operators of TFLite 2\.14 \(\w+, after \w+/kernel\)", words)
