"""Features, classes and the search for constants."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from instances import fleet
from sklearn.datasets import load_digits

from covey_coordinator.teaching.reference import comt
from covey_coordinator.teaching.tuning import balanced, score_of, tuned
from covey_protocol.errors import ConfigError, DataError
from covey_protocol.features import Fourier, Linear, one_vs_rest
from covey_protocol.teaching import Problem, Settings


def test_fourier_features_meet_the_gaussian_kernel() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    seen = Fourier(20_000, width=1.5, seed=3)(x)[:, :-1]
    squares = ((x[:, None] - x[None]) ** 2).sum(axis=-1)
    assert np.allclose(seen @ seen.T, np.exp(-squares / (2 * 1.5**2)), atol=0.035)  # 5 / sqrt(20,000)


def test_a_seed_gives_the_same_features_everywhere_and_another_seed_others() -> None:
    x = np.arange(12.0).reshape(2, 2, 3) / 10
    first = Fourier(3, width=2.0, seed=1)(x)
    assert np.array_equal(first, Fourier(3, width=2.0, seed=1)(x.reshape(2, 6)))
    assert not np.allclose(first[:, :-1], Fourier(3, width=2.0, seed=2)(x)[:, :-1])
    pinned = [0.32338268, 0.54345056, 0.48730676, 1.0]  # numpy's promise of equal draws, held
    assert np.allclose(first[0], pinned, atol=1e-8)
    assert first.shape[1] == Fourier(3, width=2.0).count(6)
    with pytest.raises(ConfigError, match="width"):
        Fourier(3, width=0.0)


def test_linear_features_end_with_the_intercept() -> None:
    assert np.array_equal(Linear(2.0)(np.array([[3, 4]], np.uint8)), [[3.0, 4.0, 2.0]])
    assert Linear().count(2) == 3


def test_classes_become_columns() -> None:
    assert np.array_equal(one_vs_rest(np.array([2, 0]), 3), [[-1, -1, 1], [1, -1, -1]])
    for wrong in (np.array([3]), np.array([-1]), np.array([0.5])):
        with pytest.raises(DataError):
            one_vs_rest(wrong, 3)


def test_digits_can_be_taught_while_most_labels_are_wrong() -> None:
    """70 % of the teachers' labels are moved to the next digit: the many learn the wrong digit, the taught do not."""
    x, y = load_digits(return_X_y=True)
    features, random = Linear()(x / 16), np.random.default_rng(0)
    order = random.permutation(len(y))
    wrong = np.where(random.random(len(y)) < 0.7, (y + 1) % 10, y)
    kept, held, tests = order[:600], order[600:700], order[1000:]
    teachers = [(features[rows], one_vs_rest(wrong[rows], 10)) for rows in np.split(kept, 3)]
    trusted = [(features[held], one_vs_rest(y[held], 10))]
    score, problem = score_of(Problem("logistic")), Problem("logistic")
    told = Settings(lambda_w=30.0, lambda_t=100.0, rounds=12, rho=30.0, curvature=3.0)
    test = features[tests], one_vs_rest(y[tests], 10)
    misled = comt(teachers, [], problem, dataclasses.replace(told, lambda_t=0.0))
    taught = comt(teachers, trusted, problem, told)
    assert score(misled.theta, *test) < 0.3
    assert score(taught.theta, *test) > 0.8


def test_the_search_is_seeded_and_keeps_the_best_on_validation_data() -> None:
    teachers, trusted = fleet("ridge", seed=20)
    validation = fleet("ridge", seed=20, sizes=(1,), trusted=(30,))[1][0]
    base = Settings(rounds=40, tolerance=1e-3)
    found = tuned(teachers, trusted, validation, Problem(), tries=5, seed=4, base=base)
    again = tuned(teachers, trusted, validation, Problem(), tries=5, seed=4, base=base)
    other = tuned(teachers, trusted, validation, Problem(), tries=5, seed=5, base=base)
    assert found.tried == again.tried
    assert found.tried[0] == other.tried[0]
    assert found.tried[1:] != other.tried[1:]
    assert found.score == max(score for _, score in found.tried)
    assert (found.settings, found.score) in found.tried
    assert found.settings.rounds == 40
    assert score_of(Problem())(found.taught.theta, *validation) == found.score


def test_penalties_from_the_data_change_the_rounds_and_not_the_model() -> None:
    teachers, trusted = fleet("ridge", seed=21)
    told = Settings(lambda_t=3.0, rounds=600, tolerance=1e-6, curvature=0.5)
    plain = comt(teachers, trusted, Problem(), told)
    found = comt(teachers, trusted, Problem(), balanced(Problem(), teachers, trusted, told))
    assert plain.settled
    assert found.settled
    assert len(found.history) < len(plain.history) / 3
    assert np.allclose(found.theta, plain.theta, atol=1e-4)
