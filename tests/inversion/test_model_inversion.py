"""MI-Face on softmax regression of digits: its rules of stopping, what rounding hides, and what gets around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.inversion import model_inversion as inversion
from covey_coordinator.inversion.keras_model import KerasModel
from covey_coordinator.inversion.model_inversion import Search, Slope
from covey_coordinator.reproduce import model_inversion as reproduction
from covey_protocol.errors import UsageError

ALL = np.arange(10)


@pytest.fixture(scope="module")
def softmax(digits: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """(model, parameters, mean pictures (10, 64) of digits that it was not trained on)."""
    import tensorflow as tf

    x, y = np.asarray(digits[0]).reshape(-1, 64), np.asarray(digits[1])
    net = reproduction.trained([tf.keras.layers.Dense(10)], x[:1000], y[:1000], 150, 0.05, 0)
    model = KerasModel(net)
    held = x[1000:], y[1000:]
    return model, model.parameters(), np.stack([held[0][held[1] == digit].mean(axis=0) for digit in ALL])


def kernel_and_bias(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return parameters[:640].reshape(64, 10).astype(np.float64), parameters[640:].astype(np.float64)


def test_a_white_box_gives_pictures_that_are_recognised(softmax: Any) -> None:
    model, parameters, means = softmax
    found = inversion.invert(inversion.white_box(model, parameters), ALL, np.zeros(64))
    assert set(found.ended) == {inversion.CONFIDENT}
    assert found.confidences.min() >= 0.99
    assert np.mean(reproduction.alike(found.inputs, means) == ALL) >= 0.9
    assert not found.empty.any()


def test_the_loss_and_the_outputs_give_the_same_slopes(softmax: Any) -> None:
    model, parameters, _ = softmax
    x = np.random.default_rng(0).random((10, 64))
    first = inversion.white_box(model, parameters)(x, ALL)
    second = inversion.white_box(model, parameters, through_loss=True)(x, ALL)
    np.testing.assert_allclose(first.confidence, second.confidence, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(first.slope, second.slope, rtol=1e-3, atol=1e-6)


def test_differences_of_answers_are_the_slope(softmax: Any) -> None:
    _, parameters, _ = softmax
    kernel, bias = kernel_and_bias(parameters)
    x = np.random.default_rng(0).random((3, 64))

    def ask(rows: np.ndarray) -> np.ndarray:
        return reproduction.softmax_of(rows @ kernel + bias)

    exact = reproduction.linear_slopes(kernel, bias)(x, ALL[:3])
    found = inversion.black_box(ask, 1e-4)(x, ALL[:3])
    np.testing.assert_allclose(found.slope, exact.slope, atol=1e-7)
    np.testing.assert_allclose(found.confidence, exact.confidence, atol=1e-12)
    assert found.answers == 3 * (2 * 64 + 1)
    for unit, seen in ((0.0, ask), (0.01, inversion.rounded(ask, 0.01))):
        short = reproduction.linear_black_box(kernel, bias, 0.5, unit)(x, ALL[:3])
        long = inversion.black_box(seen, 0.5)(x, ALL[:3])
        np.testing.assert_allclose(short.slope, long.slope, atol=1e-9)
        assert short.answers == long.answers


def test_asking_a_model_gives_what_infer_gives(softmax: Any) -> None:
    model, parameters, means = softmax
    kernel, bias = kernel_and_bias(parameters)
    answers = inversion.asked(model, parameters)(means)
    np.testing.assert_allclose(answers, reproduction.softmax_of(means @ kernel + bias), atol=1e-5)


def test_rounding_leaves_small_steps_nothing_and_one_who_knows_of_it_much(softmax: Any) -> None:
    _, parameters, means = softmax
    kernel, bias = kernel_and_bias(parameters)

    def ask(x: np.ndarray) -> np.ndarray:
        return reproduction.softmax_of(x @ kernel + bias)

    small = inversion.black_box(inversion.rounded(ask, 0.1), 1e-4)
    found = inversion.invert(small, ALL, np.zeros(64), Search(iterations=300))
    assert found.empty.all()
    assert set(found.ended) == {inversion.NO_BETTER}
    search = Search(iterations=120, patience=10**6, confidence=2.0, rate=0.3, unit=True)
    draw = inversion.blotches((8, 8), 8)

    def flat(x: np.ndarray) -> np.ndarray:
        return ask(x.reshape(len(x), 64))

    for seen in (inversion.rounded(flat, 0.1), inversion.labels_only(flat)):
        slopes = inversion.smoothed(seen, draw, 0.3, 30, 0)
        dithered = inversion.invert(slopes, ALL, np.zeros((8, 8)), search, process=inversion.within(0, 1))
        pictures = dithered.inputs.reshape(10, 64)
        assert np.mean(reproduction.alike(pictures, means) == ALL) >= 0.7


@pytest.mark.slow
def test_a_bundle_that_rounds_is_inverted_by_who_holds_the_file(digits: Any) -> None:
    """Its `infer` has no slope, and its loss does."""
    import tensorflow as tf

    import covey_models
    from covey_coordinator.inversion.bundle_model import BundleModel
    from covey_protocol.bundle import read_bundle

    x, y = np.asarray(digits[0]).reshape(-1, 64), np.asarray(digits[1])
    net = reproduction.trained([tf.keras.layers.Dense(10)], x[:1000], y[:1000], 150, 0.05, 0)
    parameters = np.concatenate([weight.ravel() for weight in net.get_weights()])
    data = covey_models.export(net, name="digits", batch_size=4, input_range=(0.0, 1.0), round_outputs=0.1)
    model = BundleModel(read_bundle(data))
    answers = inversion.asked(model, parameters)(x[:7])
    np.testing.assert_allclose(answers, np.round(answers, 1), atol=1e-6)
    with pytest.raises(UsageError, match="use through_loss"):
        inversion.white_box(model, parameters)(x[:2], ALL[:2])
    found = inversion.invert(inversion.white_box(model, parameters, through_loss=True), ALL, np.zeros(64))
    means = np.stack([x[1000:][y[1000:] == digit].mean(axis=0) for digit in ALL])
    assert np.mean(reproduction.alike(found.inputs, means) == ALL) >= 0.9


def confidence_of(values: list[float]) -> inversion.Slopes:
    """Gives these confidences one after another, of every class, with a slope of 1."""
    left = iter(values)

    def slopes(x: np.ndarray, labels: np.ndarray) -> Slope:
        return Slope(np.full(len(labels), next(left)), np.ones_like(x))

    return slopes


def test_it_ends_when_confident() -> None:
    found = inversion.invert(confidence_of([0.001, 0.5, 0.995, 1.0]), [0], np.zeros(2))
    assert (found.ended, int(found.iterations[0]), found.confidences[0]) == (("confident",), 2, 0.995)
    np.testing.assert_allclose(found.inputs, 0.2)  # two steps of 0.1 along a slope of 1


def test_it_ends_when_no_better_than_the_worst_of_the_last_and_gives_the_best() -> None:
    values = [0.1, 0.4, 0.3, 0.35, 0.3, 0.9]
    found = inversion.invert(confidence_of(values), [0], np.zeros(2), Search(patience=3))
    assert (found.ended, int(found.iterations[0]), found.confidences[0]) == (("no better",), 4, 0.4)
    np.testing.assert_allclose(found.inputs, 0.1)


def test_it_ends_after_all_steps_or_when_told() -> None:
    rising = [0.01 * number for number in range(20)]
    assert inversion.invert(confidence_of(rising), [0], np.zeros(2), Search(iterations=5)).ended == ("all steps",)
    asked = iter([False, True])
    stopped = inversion.invert(confidence_of(rising), [0, 1], np.zeros(2), stop=lambda: next(asked))
    assert stopped.ended == ("ended", "ended")


def test_what_is_known_of_inputs_pulls_towards_it(softmax: Any) -> None:
    model, parameters, means = softmax
    slopes, center = inversion.white_box(model, parameters), means.mean(axis=0)
    search = Search(iterations=200)
    free = inversion.invert(slopes, ALL, np.zeros(64), search).inputs
    pulled = inversion.invert(slopes, ALL, np.zeros(64), search, auxiliary=inversion.near(center, 30.0)).inputs
    assert np.linalg.norm(pulled - center) < np.linalg.norm(free - center)


def test_processed_pictures_are_calm_and_within_their_range() -> None:
    noisy = np.random.default_rng(0).normal(0.5, 0.5, (2, 16, 16))
    calm = inversion.denoised_and_sharpened()(noisy)
    assert calm.shape == noisy.shape
    assert calm.min() >= 0
    assert calm.max() <= 1
    assert np.abs(np.diff(calm)).mean() < np.abs(np.diff(np.clip(noisy, 0, 1))).mean()
    doubled = inversion.in_code_space(lambda x: x / 2, lambda code: 2 * code, inversion.within(0, 1))
    np.testing.assert_array_equal(doubled(np.array([0.3, 0.9])), [0.3, 0.5])


def test_a_unit_of_rounding_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="multiples of 0"):
        inversion.rounded(lambda x: x, 0.0)


@pytest.fixture(scope="module")
def faces_folder(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """att_faces.npz of ten 'people': digits enlarged to 112 x 92."""
    x, y = np.asarray(digits[0]).reshape(-1, 8, 8), np.asarray(digits[1])
    rows = np.concatenate([np.flatnonzero(y == digit)[:10] for digit in ALL])
    large = np.kron(x[rows], np.ones((1, 14, 12)))[:, :, 2:94]
    folder = tmp_path_factory.mktemp("faces")
    np.savez(folder / "att_faces.npz", images=(255 * large).astype(np.uint8), subject=y[rows])
    return folder


def test_a_reproduced_run_identifies_people_and_keeps_its_pictures(faces_folder: Path) -> None:
    told = reproduction.Attack("softmax", "white box", people=4, reduced=2, iterations=300)
    outcome = reproduction.run(told._asdict(), 0, faces_folder)
    assert outcome["value"] == 1.0
    pictures = reproduction.unpacked(outcome["pictures"], 4)
    assert pictures.shape == (4, 56, 46)
    assert np.ptp(pictures, axis=(1, 2)).tolist() == [255] * 4
