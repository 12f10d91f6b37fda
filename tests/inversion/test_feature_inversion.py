"""The Gauss-Newton inversion through layers, on maps whose answer is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from covey_coordinator.inversion.features import FeatureMap, Prior, invert_direct, invert_features

PRIOR = Prior(0.0, 1.0)


def linear_map(matrix: np.ndarray) -> FeatureMap:
    return FeatureMap(lambda x: matrix @ x, lambda x: matrix)


def gradient_of(features: np.ndarray, bias: np.ndarray, noise_std: float, seed: int) -> np.ndarray:
    stacked = np.outer(np.append(features, 1.0), bias)
    return stacked + noise_std * np.random.default_rng(seed).normal(size=stacked.shape)


BIAS = np.array([0.5, -0.8, 0.3])
DIRECTION = BIAS / np.linalg.norm(BIAS)


def test_a_linear_map_of_full_rank_gives_the_input_back():
    rng = np.random.default_rng(0)
    matrix, truth = rng.normal(size=(12, 6)), rng.uniform(0, 1, 6)
    stacked = gradient_of(matrix @ truth, BIAS, 1e-8, 1)
    found = invert_features(linear_map(matrix), stacked, [DIRECTION], noise_std=1e-8, num_inputs=6, prior=PRIOR, seed=0)
    np.testing.assert_allclose(found.values, truth, atol=1e-5)
    np.testing.assert_allclose(found.bias_gradient, BIAS, atol=1e-5)
    assert found.resolved == pytest.approx(6, abs=1e-3)


def test_what_the_map_does_not_see_stays_at_the_prior_and_is_not_counted_as_resolved():
    """Tarantola: trace(R) is the number of resolved parameters. Six inputs, of which the map sees the first four."""
    matrix = np.eye(6)[:4]
    truth = np.array([0.1, 0.9, 0.2, 0.8, 0.0, 1.0])
    stacked = gradient_of(matrix @ truth, BIAS, 1e-6, 1)
    found = invert_features(linear_map(matrix), stacked, [DIRECTION], noise_std=1e-6, num_inputs=6, prior=PRIOR, seed=0)
    np.testing.assert_allclose(found.values[:4], truth[:4], atol=1e-4)
    np.testing.assert_allclose(found.values[4:], 0.5, atol=1e-6)
    assert found.resolved == pytest.approx(4, abs=1e-3)


def test_the_resolution_is_tarantolas_formula_on_a_linear_map():
    """Against the textbook matrices, written out: x and the scale |b| unknown, the scale without a prior.

    The tolerance covers the correction for noise that the fit follows, 0.5% of the signal here.
    """
    rng = np.random.default_rng(3)
    matrix, truth, noise_std = rng.normal(size=(5, 4)), rng.uniform(0.2, 0.8, 4), 0.05
    stacked = gradient_of(matrix @ truth, BIAS, 0.0, 0)
    found = invert_features(
        linear_map(matrix), stacked, [DIRECTION], noise_std=noise_std, num_inputs=4, prior=PRIOR, seed=0
    )
    size = np.linalg.norm(found.bias_gradient)
    inside = found.values + np.sign(0.5 - found.values) * 1e-3
    by_input = np.vstack([size * matrix, np.zeros((1, 4))])
    by_scale = np.append(matrix @ inside, 1.0)[:, None]
    slopes = np.hstack([by_input, by_scale])
    precision = slopes.T @ slopes / noise_std**2 + np.diag([1 / PRIOR.spread**2] * 4 + [0.0])
    posterior = np.linalg.inv(precision)[:4, :4]
    assert found.resolved == pytest.approx(np.trace(np.eye(4) - posterior / PRIOR.spread**2), rel=5e-3)


def test_the_identity_in_closed_form_agrees_with_the_search():
    rng = np.random.default_rng(4)
    truth = rng.uniform(0.1, 0.9, 8)
    stacked = gradient_of(truth, BIAS, 0.02, 5)
    direct = invert_direct(stacked, DIRECTION, noise_std=0.02, prior=PRIOR)
    searched = invert_features(
        linear_map(np.eye(8)), stacked, [DIRECTION], noise_std=0.02, num_inputs=8, prior=PRIOR, seed=0
    )
    np.testing.assert_allclose(direct.values, searched.values, atol=5e-3)
    assert direct.misfit == pytest.approx(searched.misfit, rel=1e-3)
    assert direct.resolved == pytest.approx(searched.resolved, rel=0.02)


def test_the_answer_stays_inside_the_input_range_under_any_noise():
    stacked = gradient_of(np.array([0.0, 1.0, 0.0, 1.0]), BIAS, 1.0, 6)
    for found in (
        invert_direct(stacked, DIRECTION, noise_std=1.0, prior=PRIOR),
        invert_features(linear_map(np.eye(4)), stacked, [DIRECTION], noise_std=1.0, num_inputs=4, prior=PRIOR, seed=0),
    ):
        assert found.values.min() >= 0
        assert found.values.max() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_noise_far_above_the_signal_resolves_nothing(seed):
    truth = np.random.default_rng(7).uniform(0, 1, 50)
    stacked = gradient_of(truth, BIAS, 100.0, seed)
    searched = invert_features(
        linear_map(np.eye(50)), stacked, [DIRECTION], noise_std=100.0, num_inputs=50, prior=PRIOR, seed=0
    )
    assert invert_direct(stacked, DIRECTION, noise_std=100.0, prior=PRIOR).resolved < 5
    assert searched.resolved < 5
