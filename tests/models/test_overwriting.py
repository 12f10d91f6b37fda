"""The copies around the fault of TFLite's memory planner: what it overwrites without them, and not with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from parity import Case, errors, normal, traced

from covey_models import compact
from covey_models import convert as converting
from covey_models._tensorflow import import_tensorflow
from covey_models.lowering import lower

tf = import_tensorflow()


def reads_again(x: Any, s: Any) -> list[Any]:
    """`product` is given on, changed in its new shape, and read again."""
    product = tf.sin(x) * s
    changed = tf.expand_dims(product, 0) * s
    total = tf.reduce_sum(tf.exp(-tf.abs(changed)))
    return [total, product * total]


def random_program(seed: int) -> Callable[[Any, Any], list[Any]]:
    """Ten ops, each on the results of earlier ones; every result is read again at the end."""
    source = random.Random(seed)
    steps = [
        (
            source.choice(["mul", "mul", "sub", "add", "scale", "reshape", "reshape"]),
            source.randrange(n),
            source.randrange(n),
        )
        for n in range(1, 11)
    ]

    def program(x: Any, s: Any) -> list[Any]:
        values = [tf.sin(x)]
        for op, first, second in steps:
            a = values[first]
            b = tf.reshape(values[second], a.shape)
            if op == "reshape":
                values.append(tf.reshape(a, [24] if a.shape.rank == 2 else [4, 6]))
            else:
                made = {"mul": a * (b + 0.5), "sub": a - b, "add": a + 2.0 * b, "scale": a * tf.reshape(s, a.shape)}
                values.append(made[op])
        total = tf.reduce_sum(tf.exp(-tf.abs(values[-1])))
        return [total, *(tf.reduce_sum(value * total) for value in values)]

    return program


def worst(function: Any) -> float:
    case = Case(function, normal((4, 6), (4, 6)), differentiate=False)
    return max(errors(case, traced(case)).values())


def test_a_tensor_that_is_read_again_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(reads_again) < 1e-6
    monkeypatch.setattr(compact, "copy_what_would_be_overwritten", lambda parsed: 0)
    assert worst(reads_again) > 0.1, "TFLite's planner is mended: the copies are not needed any more"


def reads_both_again(x: Any, s: Any) -> list[Any]:
    """The same with both factors of a product, each given on and read again."""
    first, second = tf.sin(x) * s, tf.cos(x) * s
    changed = tf.expand_dims(first, 0) * tf.expand_dims(second, 0)
    total = tf.reduce_sum(tf.exp(-tf.abs(changed)))
    return [total, first * total, second * total]


def test_two_tensors_that_one_op_might_overwrite_are_both_kept() -> None:
    assert worst(reads_both_again) < 1e-6


@pytest.mark.parametrize("seed", [11, 99, 101, 104, 113, 128, 136, 146])
def test_random_programs_compute_what_tensorflow_computes(seed: int) -> None:
    assert worst(random_program(seed)) < 2e-5


@pytest.mark.slow
def test_many_random_programs_compute_what_tensorflow_computes() -> None:
    assert max(worst(random_program(seed)) for seed in range(200)) < 5e-5


def copies_in(function: Any, shapes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    counts: list[int] = []
    counted = compact.copy_what_would_be_overwritten
    case = Case(function, normal(*[(4, 6)] * shapes), differentiate=False)
    with monkeypatch.context() as patched:
        patched.setattr(compact, "copy_what_would_be_overwritten", lambda parsed: counts.append(counted(parsed)))
        converting.convert({"step": lower(traced(case))}, [])
    return counts[0]


def test_only_what_is_in_danger_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert copies_in(lambda x: tf.sin(x) * 2.0 + 1.0, 1, monkeypatch) == 0
    assert copies_in(reads_again, 2, monkeypatch) == 1
