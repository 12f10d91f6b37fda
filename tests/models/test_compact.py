"""Compacting a TFLite file: less of it, and bit for bit the same training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from export_helpers import BATCH, batch_of

from covey_models import convert, zoo
from covey_models._tensorflow import flatbuffer_schema, import_tensorflow
from covey_models.compact import ALIGNMENT, compacted
from covey_models.losses import loss_for
from covey_models.lowering import lower
from covey_models.steps import Recipe, training_steps
from covey_protocol.bundle import Bundle

tf = import_tensorflow()


@pytest.fixture(scope="module")
def as_converted() -> bytes:
    """What the converter makes of the digits CNN, before it is compacted."""
    model = zoo.build("small-cnn", (8, 8, 1), 10, seed=3)
    steps = training_steps(model, Recipe(loss_for("sparse_categorical_crossentropy", (10,)), BATCH))
    lowered = {name: lower(function, (), steps.constants) for name, function in steps.functions.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "compacted", lambda model: model)
        return convert.convert(lowered, steps.variables)


def interpreters() -> list[Any]:
    from tflite_runtime.interpreter import Interpreter

    return [Interpreter, tf.lite.Interpreter]


@pytest.mark.parametrize("interpreter_class", interpreters(), ids=["tflite_runtime", "tensorflow"])
def test_the_compacted_file_trains_to_the_same_bits(
    interpreter_class: Any, as_converted: bytes, digits_bundle: Bundle
) -> None:
    after = []
    for model in (as_converted, compacted(as_converted)):
        interpreter = interpreter_class(model_content=model, num_threads=1)
        train, get_parameters = (interpreter.get_signature_runner(name) for name in ("train", "get_parameters"))
        losses = [train(**batch_of(digits_bundle, seed), learning_rate=np.float32(0.1))["loss"] for seed in range(3)]
        after.append(np.append(get_parameters()["parameters"], losses))
    np.testing.assert_array_equal(*after)


def test_a_small_model_loses_a_third_of_its_file(as_converted: bytes) -> None:
    assert len(compacted(as_converted)) < len(as_converted) * 2 / 3


def test_no_constant_is_there_twice_and_all_are_aligned(as_converted: bytes) -> None:
    model = compacted(as_converted)
    root = flatbuffer_schema().Model.GetRootAs(model, 0)
    whole, seen = np.frombuffer(model, np.uint8), set()
    for index in range(1, root.BuffersLength()):
        content = root.Buffers(index).DataAsNumpy()
        assert content.tobytes() not in seen
        seen.add(content.tobytes())
        assert (content.ctypes.data - whole.ctypes.data) % ALIGNMENT == 0


def test_compacting_twice_changes_nothing_more(as_converted: bytes) -> None:
    once = compacted(as_converted)
    assert compacted(once) == once
