"""Random programs whose results are all read again: what TFLite's memory planner overwrites without the guards."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from parity import Case, errors, normal, traced

from covey_models import compact
from covey_models._tensorflow import import_tensorflow

tf = import_tensorflow()

OPS = ("mul", "mul", "sub", "add", "scale", "reshape", "reshape")


def program(seed: int) -> Callable[[Any, Any], list[Any]]:
    """Ten ops, each on the results of earlier ones; every result is read again at the end."""
    source = random.Random(seed)
    steps = [(source.choice(OPS), source.randrange(n), source.randrange(n)) for n in range(1, 11)]

    def run(x: Any, s: Any) -> list[Any]:
        values = [tf.sin(x)]
        for op, first, second in steps:
            a = values[first]
            b = tf.reshape(values[second], a.shape)
            other = [24] if a.shape.rank == 2 else [4, 6]
            made = {
                "mul": lambda a=a, b=b: a * (b + 0.5),
                "sub": lambda a=a, b=b: a - b,
                "add": lambda a=a, b=b: a + 2.0 * b,
                "scale": lambda a=a: a * tf.reshape(s, a.shape),
                "reshape": lambda a=a, other=other: tf.reshape(a, other),
            }
            values.append(made[op]())
        total = tf.reduce_sum(tf.exp(-tf.abs(values[-1])))
        return [total, *(tf.reduce_sum(value * total) for value in values)]

    return run


def worst(function: Any) -> float:
    case = Case(function, normal((4, 6), (4, 6)), differentiate=False)
    return max(errors(case, traced(case)).values())


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_compute_what_tensorflow_computes(seed: int) -> None:
    assert worst(program(seed)) < 2e-5


@pytest.mark.slow
def test_many_random_programs_compute_what_tensorflow_computes() -> None:
    assert max(worst(program(seed)) for seed in range(200)) < 5e-5


def chained(x: Any, s: Any) -> list[Any]:
    """A product made in place is reshaped, the reshape changed, and the product read again."""
    product = tf.sin(x) * s
    changed = tf.expand_dims(product, 0) * s
    total = tf.reduce_sum(tf.exp(-tf.abs(changed)))
    return [total, product * total]


def test_without_the_guard_a_tensor_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(chained) < 1e-6
    monkeypatch.setattr(compact, "guard_shared_inputs", lambda model: 0)
    assert worst(chained) > 0.1, "tflite_runtime is mended: the guard is not needed any more"
