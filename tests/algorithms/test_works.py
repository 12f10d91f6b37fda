"""The works of Federated SVRG and SCAFFOLD in a device's training child, on a real TFLite runtime, against numpy.

The model is logistic regression on words, so the device's numbers are held against covey_coordinator's float64
reference, which shares the arithmetic but neither the model nor the data's form.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import covey_models
from covey_coordinator.algorithms.sparse_logistic import Posts, gradient, make_authors
from covey_edge.frames import Done, Open, Problem, Run
from covey_edge.trainer import Trainer
from covey_protocol import scaffold, svrg
from covey_protocol.messages import TrainingPlan
from covey_protocol.seals import SealingKey

Array = np.ndarray[Any, Any]
FEATURES, DECAY, BATCH = 40, 0.01, 4
D = FEATURES + 1
PLAN = TrainingPlan(epochs=1, learning_rate=0.5, shuffle_seed=7)


@pytest.fixture(scope="module")
def authors() -> list[Posts]:
    return make_authors(authors=3, features=FEATURES, fewest=18, most=22, words=5, own_words=6, seed=1).train


@pytest.fixture(scope="module")
def bundle(coordinator_key: SealingKey) -> bytes:
    layers, keras = tf.keras.layers, tf.keras
    model = keras.Sequential(
        [
            layers.InputLayer((FEATURES,)),
            layers.Dense(1, "sigmoid", kernel_regularizer=keras.regularizers.L2(DECAY / 2)),
        ]
    )
    return covey_models.export(
        model, name="words", loss="binary_crossentropy", batch_size=BATCH, correction=True, key=coordinator_key
    )


@pytest.fixture
def asked(tmp_path: Path, bundle: bytes, authors: list[Posts], coordinator_key: SealingKey) -> Any:
    """(work and more of the plan, vectors, ...) -> the first author's answer, from random parameters."""
    (tmp_path / "bundle").write_bytes(bundle)
    buffer = io.BytesIO()
    np.savez(buffer, x=authors[0].dense(), y=(authors[0].labels > 0).astype(np.int32))
    (tmp_path / "data.npz").write_bytes(buffer.getvalue())
    trainer = Trainer()
    opened = trainer.answer(
        Open(
            str(tmp_path / "bundle"),
            hashlib.sha256(bundle).digest(),
            coordinator_key.public.hex(),
            "npz",
            str(tmp_path / "data.npz"),
        )
    )
    assert isinstance(opened, Done), opened

    def ask(vectors: tuple[Array, ...] = (), *, kept: bytes = b"", noise: float = 0.0, **changes: Any) -> Any:
        plan = msgspec.structs.replace(PLAN, **changes)
        sent = tuple(vector.astype("<f4").tobytes() for vector in vectors)
        policy = (1.0 if noise else 0.0, noise, 1)
        request = Run("r.1.a", "pi", START.tobytes(), plan, *policy, withheld=kept, vectors=sent, max_epochs=20)
        return trainer.answer(request)

    return ask


START = np.random.default_rng(5).normal(0, 0.3, D).astype(np.float32)


def numbers(data: bytes) -> Array:
    return np.frombuffer(data, "<f4")


def slope_of(posts: Posts) -> svrg.Gradient:
    return lambda w, rows, step: gradient(w, posts.taken(rows), DECAY)


def test_a_gradient_round_sends_the_gradient_over_all_examples(asked: Any, authors: list[Posts]) -> None:
    done = asked(work="gradient")
    assert_allclose(numbers(done.update), gradient(START.astype(float), authors[0], DECAY), atol=1e-6)
    assert done.num_examples == len(authors[0])
    assert "training_loss" not in done.metrics


def test_a_features_round_sends_in_which_share_of_the_examples_each_word_is(asked: Any, authors: list[Posts]) -> None:
    done = asked(work="features")
    assert_allclose(numbers(done.update), authors[0].shares(), atol=1e-7)
    assert done.metrics == {}


@pytest.mark.parametrize("scaled", [False, True])
def test_a_pass_of_svrg_is_the_references(asked: Any, authors: list[Posts], scaled: bool) -> None:
    full = np.random.default_rng(1).normal(0, 0.05, D)
    fleet = np.mean([one.shares() for one in authors], axis=0)
    done = asked((full, fleet) if scaled else (full,), work="svrg")
    order, n = svrg.order_of(7, "pi"), len(authors[0])
    scale = svrg.scales(fleet, authors[0].shares()) if scaled else None
    rate = svrg.local_rate(0.5, n, BATCH)
    end = svrg.local_steps(
        START.astype(float), full, slope_of(authors[0]), svrg.passes(n, BATCH, 1, order), rate, scale
    )
    assert_allclose(numbers(done.update), end - START, atol=2e-6)
    assert np.abs(numbers(done.update)).max() > 0.01


def test_so_many_steps_are_drawn_and_not_passed(asked: Any, authors: list[Posts]) -> None:
    full = np.random.default_rng(1).normal(0, 0.05, D)
    done = asked((full,), work="svrg", steps=9, learning_rate=0.1)
    batches = svrg.drawn(len(authors[0]), BATCH, 9, svrg.order_of(7, "pi"))
    end = svrg.local_steps(START.astype(float), full, slope_of(authors[0]), batches, 0.1)
    assert_allclose(numbers(done.update), end - START, atol=2e-6)


def test_scaffold_corrects_every_step_and_keeps_its_control(asked: Any, authors: list[Posts]) -> None:
    rng = np.random.default_rng(2)
    fleet, own = rng.normal(0, 0.1, D), rng.normal(0, 0.1, D)
    done = asked((fleet,), kept=own.astype("<f4").tobytes(), work="scaffold", steps=7, learning_rate=0.2)
    w, slope = START.astype(float), slope_of(authors[0])
    for step, rows in enumerate(scaffold.batches(len(authors[0]), BATCH, 7, svrg.order_of(7, "pi"))):
        w = w - 0.2 * (slope(w, rows, step) + fleet - own)
    assert_allclose(numbers(done.update), w - START, atol=2e-6)
    assert_allclose(numbers(done.withheld), own - fleet - (w - START) / (7 * 0.2), atol=1e-5)
    first = asked((fleet,), work="scaffold", steps=7, learning_rate=0.2)  # a device that has none starts at zero
    assert np.abs(numbers(first.update) - numbers(done.update)).max() > 1e-3
    assert "training_loss" in first.metrics


WRONG = {
    "no vector": ((), {"work": "svrg"}, "svrg with 0 vectors"),
    "a vector of another size": ((np.zeros(3),), {"work": "svrg"}, "not 1 to 2 of 164"),
    "a vector that is not finite": ((np.full(D, np.nan),), {"work": "scaffold", "steps": 2}, "not finite"),
    "a vector for a gradient": ((np.zeros(D),), {"work": "gradient"}, "not 0 to 0"),
    "clipped gradients": ((np.zeros(D),), {"work": "svrg", "gradient_clip_norm": 1.0}, "leave one of them out|--clip"),
    "more steps than the owner's epochs": ((np.zeros(D),), {"work": "svrg", "steps": 81}, r"allows .80, train"),
    "SCAFFOLD without steps": ((np.zeros(D),), {"work": "scaffold"}, "without a number of steps"),
    "a work of another day": ((), {"work": "dream"}, "'dream'"),
    "steps of plain training": ((), {"steps": 3}, "set epochs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_followed_is_a_failure_with_a_reason(asked: Any, what: str) -> None:
    vectors, changes, words = WRONG[what]
    problem = asked(vectors, **changes)
    assert isinstance(problem, Problem)
    assert problem.kind == "TrainingError"
    assert re.search(words, f"{problem.what}; {problem.remedy}")


def test_a_device_that_adds_noise_tells_no_shares_and_noises_its_gradient(asked: Any) -> None:
    assert "adds noise" in asked(work="features", noise=0.5).what
    exact, noised = asked(work="gradient"), asked(work="gradient", noise=0.5)
    assert list(noised.metrics) == ["seconds"]
    assert np.std(numbers(noised.update) - numbers(exact.update)) > 0.2


def test_a_gradient_is_repeated_bit_for_bit(asked: Any) -> None:
    assert_array_equal(numbers(asked(work="gradient").update), numbers(asked(work="gradient").update))
