"""`covey export`, as an operator uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from export_helpers import BATCH, batch_of, opened, parameters

from covey_models import losses, names, optimizers
from covey_models.cli import export_command
from covey_protocol.bundle import read_bundle
from covey_protocol.errors import BundleError, ConfigError, CoveyError, StorageError
from covey_protocol.seals import SealingKey

MODULE = """
from covey_models import build as zoo
from beside import WIDTH

def softmax():
    return zoo("softmax", (4,), 3, seed=1)

def as_text():
    import tensorflow as tf
    layers = tf.keras.layers
    counted = layers.Lambda(lambda x: tf.strings.to_number(tf.strings.as_string(x)), name="text")
    return tf.keras.Sequential([layers.InputLayer((4,)), layers.Dense(WIDTH), counted, layers.Dense(3)])

def norm():
    import tensorflow as tf
    layers = tf.keras.layers
    return tf.keras.Sequential(
        [layers.InputLayer((4,)), layers.Dense(WIDTH), layers.BatchNormalization(), layers.Dense(2)]
    )

def pseudo_huber(labels, outputs):
    import tensorflow as tf
    return tf.reduce_sum(tf.sqrt(1.0 + (outputs - labels[:, tf.newaxis]) ** 2) - 1.0, -1)

def rmsprop():
    import tensorflow as tf
    return tf.keras.optimizers.RMSprop(rho=0.8)

def failing():
    raise ValueError("no data today")

number = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "mymodel.py"
    path.write_text(MODULE)
    (tmp_path / "beside.py").write_text("WIDTH = 3")
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(export_command, [str(argument) for argument in arguments])


def test_it_writes_a_sealed_bundle_and_says_so_in_one_line(module: Path, tmp_path: Path) -> None:
    key, output = SealingKey.generate(), tmp_path / "out.covey"
    (tmp_path / "key.pem").write_bytes(key.pem())
    result = run(f"{module}:softmax", "-o", output, "--batch", 5, "--input-range", -1, 1, "--key", tmp_path / "key.pem")
    assert result.exit_code == 0, result.exception
    manifest = read_bundle(output.read_bytes(), sealed_by=key.public).manifest
    assert (manifest.name, manifest.batch_size, manifest.input.minimum) == ("softmax", 5, -1.0)
    assert result.output.count("\n") == 1
    for part in ("15 parameters", f"{output.stat().st_size} bytes", "sealed", "after 6 steps"):
        assert part in result.output


def test_every_setting_reaches_the_bundle(module: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.covey"
    result = run(
        f"{module}:norm", "-o", output, "--loss", f"{module}:pseudo_huber", "--label-shape", "", "--optimizer",
        f"{module}:rmsprop", "--clip", "--proximal", "--correction", "--moving-statistics", "local", "--batch", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    manifest = read_bundle(output.read_bytes()).manifest
    assert (manifest.loss, manifest.optimizer, manifest.label.shape) == ("pseudo_huber", "rmsprop", ())
    assert manifest.train_inputs == ("clip_norm", "proximal", "correction")
    assert "reset_optimizer" in manifest.signatures
    assert all(spec.trainable for spec in manifest.parameters)


def test_rounded_outputs_are_multiples_of_the_unit_and_training_is_as_without(module: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    bundles = {}
    for name, options in (("plain", []), ("rounded", ["--round-outputs", 0.05])):
        path = tmp_path / f"{name}.covey"
        result = run(f"{module}:softmax", "-o", path, "--batch", BATCH, *options)
        assert result.exit_code == 0, result.exception
        bundles[name] = bundle = read_bundle(path.read_bytes())
        calls, batch = opened(bundle), batch_of(bundle)
        answer = calls["infer"](x=batch["x"])["output"].copy()
        calls["train"](**batch, learning_rate=np.float32(0.5))
        given[name] = answer, parameters(calls)
    (answer, trained), (rounded, also_trained) = given["plain"], given["rounded"]
    assert np.array_equal(trained, also_trained)
    assert np.abs(rounded / 0.05 - np.round(rounded / 0.05)).max() < 1e-5
    assert np.abs(rounded - answer).max() <= 0.025 + 1e-6
    assert np.abs(rounded - answer).max() > 1e-3  # it did something
    assert bundles["rounded"].manifest.metadata == {"round_outputs": "0.05"}
    assert bundles["plain"].manifest.metadata == {}


def test_the_help_lists_the_losses_and_optimizers_there_are() -> None:
    assert (tuple(losses.BUILT_IN), optimizers.NAMES) == (names.LOSSES, names.OPTIMIZERS)


REFUSED: dict[str, tuple[str, list[str], type[CoveyError], str]] = {
    "an op that cannot travel": (
        "{m}:as_text",
        [],
        BundleError,
        "the op AsString of the layer 'text'",
    ),
    "a wrong number of classes": ("{m}:softmax", ["--classes", "7"], BundleError, "3 classes apart, not 7"),
    "rounding to more than all": ("{m}:softmax", ["--round-outputs", "1"], ConfigError, "multiples of 1.0"),
    "rounding what is no probability": (
        "{m}:softmax",
        ["--loss", "mean_squared_error", "--round-outputs", "0.1"],
        ConfigError,
        "rounding is for probabilities",
    ),
    "no such function": ("{m}:other", [], ConfigError, "has no function 'other'"),
    "not a function": ("{m}:number", [], ConfigError, "has no function 'number'"),
    "a function that fails": ("{m}:failing", [], ConfigError, "ValueError: no data today"),
    "no such file": ("{m}x.py:softmax", [], ConfigError, "there is no file"),
    "no function named": ("{m}", [], ConfigError, "MODULE.py:FUNCTION"),
    "no such key": ("{m}:softmax", ["--key", "{m}.pem"], ConfigError, "cannot be read"),
    "not a key": ("{m}:softmax", ["--key", "{m}"], ConfigError, "not a readable private key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_cause_and_keep_the_old_file(case: str, module: Path, tmp_path: Path) -> None:
    source, options, kind, expected = REFUSED[case]
    output = tmp_path / "out.covey"
    output.write_bytes(b"old")
    result = run(source.format(m=module), "-o", output, *(option.format(m=module) for option in options))
    assert isinstance(result.exception, kind)
    assert expected in str(result.exception)
    assert output.read_bytes() == b"old"


def test_a_folder_that_is_not_there_is_a_storage_error(module: Path, tmp_path: Path) -> None:
    result = run(f"{module}:softmax", "-o", tmp_path / "nowhere" / "out.covey")
    assert isinstance(result.exception, StorageError)
    assert {path.name for path in tmp_path.iterdir()} <= {"mymodel.py", "beside.py", "__pycache__"}


def test_a_module_that_does_not_run_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    result = run(f"{tmp_path}/broken.py:build", "-o", tmp_path / "out.covey")
    assert isinstance(result.exception, ConfigError)
    assert "nothing_of_this_name" in str(result.exception)
