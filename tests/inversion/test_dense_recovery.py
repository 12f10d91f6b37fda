"""One example's dense gradient gives away the layer's input exactly, and the output layer's bias the label."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inversion_helpers import digits_model, softmax_loss

from covey_coordinator.inversion.dense import dense_layers, label_proportions, read_label, recover_input
from covey_protocol.errors import UsageError
from covey_protocol.parameters import ParameterSpec

inputs = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-10, 10))
bias_gradients = hnp.arrays(np.float64, st.integers(1, 5), elements=st.floats(-1, 1)).filter(
    lambda values: np.linalg.norm(values) > 1e-3
)


@given(truth=inputs, bias=bias_gradients, factor=st.floats(1e-3, 1e3), power_steps=st.sampled_from([0, 20]))
def test_without_noise_the_input_comes_back_exactly_whatever_the_scale(truth, bias, factor, power_steps):
    found = recover_input(factor * np.outer(truth, bias), factor * bias, power_steps)
    np.testing.assert_allclose(found.values, truth, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.bias_gradient, factor * bias, rtol=1e-9, atol=1e-9 * factor)


def test_least_squares_over_units_is_the_formula_in_the_docstring():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(6, 4)), rng.normal(size=4)
    by_hand = sum(bias[c] * kernel[:, c] for c in range(4)) / sum(bias**2)
    np.testing.assert_allclose(recover_input(kernel, bias).values, by_hand)


def test_under_noise_the_rank_one_fit_is_closer_than_least_squares():
    rng = np.random.default_rng(1)
    truth, bias = rng.uniform(0, 1, 200), rng.normal(size=10)
    worst, better = 0.0, 0.0
    for _ in range(20):
        kernel = np.outer(truth, bias) + 0.1 * rng.normal(size=(200, 10))
        noisy = bias + 0.1 * rng.normal(size=10)
        worst += np.mean((recover_input(kernel, noisy).values - truth) ** 2)
        better += np.mean((recover_input(kernel, noisy, 30).values - truth) ** 2)
    assert better < worst


def test_the_predicted_error_is_the_measured_error():
    rng = np.random.default_rng(2)
    truth, bias = rng.uniform(0, 1, 400), np.array([0.4, -0.9, 0.5])
    errors, predicted = [], []
    for _ in range(200):
        found = recover_input(
            np.outer(truth, bias) + 0.01 * rng.normal(size=(400, 3)), bias + 0.01 * rng.normal(size=3), 20
        )
        errors.append(np.mean((found.values - truth) ** 2))
        predicted.append(0.01**2 * found.variance_factor())
    assert np.mean(errors) == pytest.approx(np.mean(predicted), rel=0.05)


def test_a_layer_without_gradient_says_nothing():
    assert recover_input(np.zeros((3, 2)), np.zeros(2)) is None


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(UsageError, match="NaN"):
        recover_input(np.full((3, 2), np.nan), np.ones(2))


def test_a_batch_gives_a_mixture_and_no_example():
    rng = np.random.default_rng(3)
    first, second = rng.uniform(0, 1, (2, 8))
    gradients = [rng.normal(size=5), rng.normal(size=5)]
    found = recover_input(np.outer(first, gradients[0]) + np.outer(second, gradients[1]), sum(gradients))
    assert min(np.abs(found.values - first).max(), np.abs(found.values - second).max()) > 0.05


def test_the_label_is_the_negative_entry_and_for_one_sigmoid_unit_the_sign():
    assert read_label(np.array([0.1, 0.2, -0.9, 0.6])) == 2
    assert read_label(np.array([-0.3])) == 1
    assert read_label(np.array([0.3])) == 0


def test_dense_layers_are_found_in_order_and_convolutions_and_statistics_are_not():
    specs = [
        ParameterSpec("conv/kernel", (3, 3, 1, 8)),
        ParameterSpec("conv/bias", (8,)),
        ParameterSpec("hidden/kernel", (12, 5)),
        ParameterSpec("hidden/bias", (5,)),
        ParameterSpec("frozen/kernel", (5, 5), trainable=False),
        ParameterSpec("frozen/bias", (5,), trainable=False),
        ParameterSpec("no_bias/kernel", (5, 4)),
        ParameterSpec("out/kernel", (4, 3)),
        ParameterSpec("out/bias", (3,)),
    ]
    assert [layer.kernel.name for layer in dense_layers(specs)] == ["hidden/kernel", "out/kernel"]
    layer = dense_layers(specs)[0]
    kernel, bias = layer.gradients(np.arange(80 + 60 + 5 + 30 + 20 + 15, dtype=np.float32))
    assert kernel.shape == (12, 5)
    assert kernel[0, 0] == 80
    assert bias[0] == 140


def test_label_proportions_are_exact_where_the_mean_prediction_is_known():
    labels, predictions = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    update = -0.1 * 7 * (predictions - labels)
    np.testing.assert_allclose(label_proportions(update, 0.1, 7, predictions), labels, atol=1e-9)


def test_label_proportions_of_a_skewed_device_name_its_majority_class(digits):
    """An ordinary update of several steps on a fresh model, 70% of whose examples show a 3."""
    import tensorflow as tf

    pictures, labels = digits
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.choice(np.where(labels == 3)[0], 28), rng.choice(np.where(labels != 3)[0], 12)])
    model, loss = digits_model(), softmax_loss()
    before = model.trainable_variables[-1].numpy()
    optimizer = tf.keras.optimizers.SGD(0.01)
    for _ in range(5):
        with tf.GradientTape() as tape:
            value = loss(labels[chosen], model(pictures[chosen]))
        optimizer.apply_gradients(zip(tape.gradient(value, model.trainable_variables), model.trainable_variables))
    shares = label_proportions(model.trainable_variables[-1].numpy() - before, 0.01, 5)
    assert shares.argmax() == 3
    assert shares[3] == pytest.approx(0.7, abs=0.1)
    assert shares.sum() == pytest.approx(1.0)


def test_proportions_of_no_steps_are_refused():
    with pytest.raises(UsageError, match="steps"):
        label_proportions(np.zeros(3), 0.1, 0)
