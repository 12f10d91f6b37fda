"""What one update states of its examples: readings against updates computed here, with the gradients written out."""

from __future__ import annotations

import numpy as np
import pytest

from covey_protocol import leakage
from covey_protocol.leakage import (
    MOST_PSNR_DB,
    Truth,
    candidates,
    closest,
    counts_of,
    dense_layers,
    label_place,
    labels_told,
    leak_check,
    readability,
)
from covey_protocol.parameters import ParameterSpec

INPUTS, HIDDEN, CLASSES = 20, 12, 4
SPECS = (
    ParameterSpec("dense/kernel", (INPUTS, HIDDEN)),
    ParameterSpec("dense/bias", (HIDDEN,)),
    ParameterSpec("logits/kernel", (HIDDEN, CLASSES)),
    ParameterSpec("logits/bias", (CLASSES,)),
)
D = sum(spec.size for spec in SPECS)
LAYER = dense_layers(SPECS)[0]
RATE = 0.1
LOSS = "sparse_categorical_crossentropy"
PLACE = label_place(SPECS, LOSS, CLASSES)


def examples(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((n, INPUTS)), rng.integers(0, CLASSES, n)


def parameters(seed: int = 0, bias: np.ndarray | None = None) -> np.ndarray:
    flat = np.random.default_rng(seed).normal(0, 0.3, D)
    flat[LAYER.bias_place] = 0.0 if bias is None else bias
    return flat


def update(x: np.ndarray, y: np.ndarray, received: np.ndarray) -> np.ndarray:
    """One SGD step of a net with one hidden layer of ReLUs, float32 at the end as a device sends it."""
    kernel, bias = received[: INPUTS * HIDDEN].reshape(INPUTS, HIDDEN), received[LAYER.bias_place]
    start = INPUTS * HIDDEN + HIDDEN
    last = received[start : start + HIDDEN * CLASSES].reshape(HIDDEN, CLASSES)
    before = x @ kernel + bias
    hidden = np.maximum(before, 0)
    logits = hidden @ last + received[-CLASSES:]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    down = (chances - np.eye(CLASSES)[y]) / len(x)
    back = (down @ last.T) * (before > 0)
    gradient = np.concatenate([(x.T @ back).ravel(), back.sum(0), (hidden.T @ down).ravel(), down.sum(0)])
    return (received - RATE * gradient).astype(np.float32) - received.astype(np.float32)


def test_one_example_is_stated_to_more_than_60_db_and_its_label_told() -> None:
    x, y = examples(1)
    received = parameters()
    leak = leak_check(update(x, y, received), received, truth(x, y), PLACE, RATE, 1)
    assert leak.psnr_db is not None
    assert leak.psnr_db > 60
    assert leak.label_recovery == 1
    assert np.allclose(leak.reading, x[0], atol=1e-3)


def truth(x: np.ndarray, y: np.ndarray) -> Truth:
    return Truth(LAYER, x, (0.0, 1.0), True, y)


def test_a_batch_of_many_is_not_stated() -> None:
    x, y = examples(60)
    received = parameters(bias=np.full(HIDDEN, 1.0))  # every unit sees every example
    leak = leak_check(update(x, y, received), received, truth(x, y), PLACE, RATE, 1)
    assert leak.psnr_db is not None
    assert leak.psnr_db < 20


def test_a_unit_that_one_example_alone_has_moved_states_it_in_any_batch() -> None:
    x, y = examples(30)
    received = parameters()
    first = received[: INPUTS * HIDDEN].reshape(INPUTS, HIDDEN)
    first[:, :2] = 3 * (x[7] - x.mean(0))[:, None] * np.array([1.0, 1.1])
    bias = np.full(HIDDEN, 1.0)
    others = np.delete(x, 7, axis=0) @ first[:, :2]
    bias[:2] = -(others.max(0) + (x[7] @ first[:, :2])) / 2
    received[LAYER.bias_place] = bias
    sent = update(x, y, received)
    leak = leak_check(sent, received, truth(x, y), PLACE, RATE, 1)
    assert leak.psnr_db is not None
    assert leak.psnr_db > 60
    assert leak.example == 7
    assert readability(LAYER, sent).separable == 1  # known without the truth


def test_a_layer_made_to_separate_states_examples_by_differences_of_its_units() -> None:
    """Fowl et al. 2022: all units measure the same, with rising thresholds; here in an order that is not theirs."""
    x, y = examples(6, seed=3)
    received = parameters()
    shuffled = np.random.default_rng(5).permutation(HIDDEN)
    received[: INPUTS * HIDDEN] = np.repeat(np.full((INPUTS, 1), 1.0 / INPUTS), HIDDEN, axis=1).ravel()
    means = np.sort(x.mean(1))
    received[LAYER.bias_place] = -np.linspace(means[0] - 0.01, means[-1] - 0.001, HIDDEN)[shuffled]
    last = np.tile(np.random.default_rng(1).normal(0, 0.3, CLASSES), (HIDDEN, 1))  # alike for all units
    received[INPUTS * HIDDEN + HIDDEN : -CLASSES] = last.ravel()
    leak = leak_check(update(x, y, received), received, truth(x, y), PLACE, RATE, 1)
    assert leak.psnr_db is not None
    assert leak.psnr_db > 40


def test_clipping_hides_nothing_and_noise_does() -> None:
    x, y = examples(1)
    received = parameters()
    sent = update(x, y, received)
    clipped = sent / 30
    noised = clipped + np.random.default_rng(0).normal(0, np.linalg.norm(clipped), D)

    def told(one: np.ndarray) -> tuple[float, float]:
        leak = leak_check(one, received, truth(x, y), PLACE, RATE, 1)
        assert leak.psnr_db is not None
        assert leak.label_recovery is not None
        return leak.psnr_db, leak.label_recovery

    assert told(clipped)[0] > 60
    assert told(clipped)[1] == 1
    assert told(noised)[0] < 12


def test_label_counts_are_told_by_the_output_bias() -> None:
    labels = np.repeat(np.arange(CLASSES), [12, 5, 3, 0])
    step = RATE * (np.bincount(labels, minlength=CLASSES) / 20 - 0.25)  # of a model that predicts uniformly
    assert labels_told(step, labels, RATE, 1) == 1
    assert labels_told(step / 10, labels, RATE, 1) == 1  # shortened by clipping
    uniform = labels_told(np.zeros(CLASSES), labels, RATE, 1)
    assert uniform == pytest.approx((5 + 5 + 3 + 0) / 20)


def test_a_binary_label_is_told_by_the_sign() -> None:
    assert labels_told(np.array([0.5 * RATE]), np.array([1]), RATE, 1) == 1
    assert labels_told(np.array([0.5 * RATE]), np.array([0]), RATE, 1) == 0


def test_labels_are_looked_for_only_where_the_output_bias_tells_them() -> None:
    assert label_place(SPECS, "mean_squared_error", CLASSES) is None
    assert label_place(SPECS[:-1], LOSS, CLASSES) is None
    assert label_place(SPECS, LOSS, None) is None
    assert slice(D - CLASSES, D) == PLACE


@pytest.mark.parametrize("examples", [1, 7, 1000])
def test_counts_are_whole_and_sum_up(examples: int) -> None:
    shares = np.random.default_rng(examples).dirichlet(np.ones(9))
    counts = counts_of(shares, examples)
    assert counts.sum() == examples
    assert np.abs(counts - shares * examples).max() < 1


def test_rank_one_is_1_for_one_example_and_falls_with_more() -> None:
    received = parameters(bias=np.full(HIDDEN, 1.0))
    found = [readability(LAYER, update(*examples(n), received)).rank_one for n in (1, 3, 30)]
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found[1] < 0.999
    assert 0 < found[2] <= 1


def test_rank_one_is_the_energy_of_the_largest_singular_value() -> None:
    flat = np.random.default_rng(2).normal(size=D)
    kernel, bias = LAYER.gradients(flat)
    values = np.linalg.svd(np.vstack([kernel, bias]), compute_uv=False)
    assert readability(LAYER, flat).rank_one == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=1e-3)


def test_nothing_is_read_from_nothing() -> None:
    assert readability(LAYER, np.zeros(D)) == (0.0, 0)
    assert len(candidates(LAYER, np.zeros(D), parameters())) == 0
    assert closest(np.zeros((0, 3)), np.zeros((5, 3)), (0.0, 1.0)) is None


def test_of_a_wide_layer_the_units_that_moved_most_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = examples(1)
    received = parameters()
    sent = update(x, y, received)
    moved = np.abs(sent[LAYER.bias_place]) > 0
    assert moved.sum() > 3
    monkeypatch.setattr(leakage, "MOST_READ", 3 * INPUTS)
    read = candidates(LAYER, sent, received)
    assert len(read) == 1 + 3 + 2  # the whole, three units, two pairs of neighbours
    assert np.allclose(read[1:4], x[0], atol=1e-3)


def test_the_closest_is_found_and_its_error_is_exact() -> None:
    x, _ = examples(50)
    found = closest(np.stack([x[3] + 0.1, x[9] + 0.01]), x, (0.0, 2.0))
    assert found is not None
    assert found.example == 9
    assert found.psnr_db == pytest.approx(10 * np.log10(4 / 0.01**2))
    same = closest(x[5:6], x, (0.0, 1.0))
    assert same is not None
    assert same.psnr_db == MOST_PSNR_DB
