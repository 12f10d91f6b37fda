"""Numbers that another reshape still shows are not overwritten in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from covey_models import compact
from covey_models._tensorflow import import_tensorflow
from covey_models.convert import convert
from covey_models.lowering import lower

tf = import_tensorflow()

SHAPE = (1, 400)


def shown_twice(x: Any, w: Any) -> Any:
    """A tensor made in place, reshaped twice: one reshape is multiplied, the other read after that."""
    t = (x + w[0, 0]) * tf.cos(x) + 1.0
    first, second = tf.reshape(t, [1, 1, 400]), tf.reshape(t, [400, 1])
    scale = tf.reshape(tf.reduce_sum(second * w), [1, 1, 1]) + 1.0
    return {"product": tf.raw_ops.BatchMatMulV2(x=first, y=scale, adj_x=True)}


def on_the_device_runtime(x: Any, w: Any) -> tuple[Any, Any]:
    from tflite_runtime.interpreter import Interpreter

    specs = [tf.TensorSpec(SHAPE, tf.float32, "x"), tf.TensorSpec((400, 1), tf.float32, "w")]
    traced = tf.function(shown_twice, input_signature=specs, autograph=False).get_concrete_function()
    runner = Interpreter(model_content=convert({"f": lower(traced)}, []), num_threads=1).get_signature_runner("f")
    return runner(x=x, w=w)["product"], traced(tf.constant(x), tf.constant(w))["product"].numpy()


def test_both_reshapes_of_a_tensor_keep_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    guards: list[int] = []
    counted = compact.guard_shared_inputs
    monkeypatch.setattr(compact, "guard_shared_inputs", lambda model: guards.append(counted(model)))
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    computed, expected = on_the_device_runtime(x, np.zeros((400, 1), np.float32))
    np.testing.assert_allclose(computed, expected, atol=1e-6)
    assert guards == [1]
