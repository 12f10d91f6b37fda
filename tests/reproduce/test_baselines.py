"""What teaching is held against: each on data where it must do well, and where it must not be moved."""

from __future__ import annotations

import numpy as np
import pytest

from covey_coordinator.teaching import baselines, fitting
from covey_coordinator.teaching.baselines import Problem
from covey_coordinator.teaching.fitting import LOGISTIC, RIDGE, Data, Floats, auc, fitted
from covey_protocol import duti

TRUTH = np.array([1.0, -2.0, 0.5, 3.0])


def part(n: int, seed: int, kind: str = RIDGE, noise: float = 0.1) -> Data:
    """n instances of the truth with 3 features and a 1; logistic ones are labelled by its sign, with noise."""
    random = np.random.default_rng(seed)
    x = np.concatenate([random.uniform(-1, 1, (n, 3)), np.ones((n, 1))], axis=1)
    z = x @ (TRUTH if kind == RIDGE else TRUTH * [1, 1, 1, 0]) + noise * random.normal(size=n)
    return Data(x, z if kind == RIDGE else np.where(z > 0, 1.0, -1.0))


def problem(kind: str = RIDGE, devices: int = 5, n: int = 60, trusted: int = 6) -> Problem:
    noise = 0.1 if kind == RIDGE else 0.5
    return Problem(
        kind,
        [part(n, place, kind, noise) for place in range(devices)],
        [part(trusted, 100 + place, kind, noise) for place in range(devices)],
    )


def hit(clean: Problem, places: range, change: object) -> Problem:
    assert callable(change)
    return clean._replace(devices=[change(one) if k in places else one for k, one in enumerate(clean.devices)])


def wild(data: Data) -> Data:
    return Data(data.x, 1000.0 - 50.0 * data.y)


def flipped(data: Data) -> Data:
    """80% of the labels."""
    flips = np.random.default_rng(len(data.y)).permutation(len(data.y))[: round(0.8 * len(data.y))]
    y = data.y.copy()
    y[flips] *= -1
    return Data(data.x, y)


def far(theta: Floats) -> float:
    return float(np.linalg.norm(theta - TRUTH))


def ranked(theta: Floats) -> float:
    test = part(500, 999, LOGISTIC, 0.0)
    return auc(test.y, test.x @ theta)


def numerical(function: object, at: Floats) -> Floats:
    assert callable(function)
    steps = 1e-6 * np.eye(len(at))
    return np.array([(function(at + step) - function(at - step)) / 2e-6 for step in steps])


@pytest.mark.parametrize("kind", [RIDGE, LOGISTIC])
def test_the_gradient_of_the_learners_objective_is_zero_where_they_end(kind: str) -> None:
    data, weights = part(30, 0, kind, 1.0), np.random.default_rng(1).uniform(0, 0.1, 30)

    def objective(theta: Floats) -> float:
        z = data.x @ theta
        losses = (z - data.y) ** 2 / 2 if kind == RIDGE else np.log1p(np.exp(-data.y * z))
        return float(weights @ losses + 0.05 / 2 * theta @ theta)

    np.testing.assert_allclose(numerical(objective, fitted(kind, data, 0.05, weights)), 0.0, atol=1e-5)


def test_auc_counts_pairs_and_half_of_the_ties() -> None:
    y, scores = np.array([1, -1, 1, -1, -1.0]), np.array([0.5, 0.5, 0.9, 0.1, 0.7])
    pairs = [(a > b) + (a == b) / 2 for a in scores[y > 0] for b in scores[y < 0]]
    assert auc(y, scores) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(np.ones(3), scores[:3]) == 0.5


def test_a_devices_own_shift_does_not_move_the_centred_learner() -> None:
    clean, settings = problem(), {"decay": 1e-4, "share": 0.7}

    def shift(data: Data) -> Data:
        return Data(data.x + np.array([3.0, -1.0, 2.0, 0.0]), data.y + 40.0)

    shifted = hit(clean, range(5), shift)
    np.testing.assert_allclose(baselines.centred(shifted, settings), baselines.centred(clean, settings), atol=1e-9)
    assert far(baselines.centred(shifted, settings)) < 0.1
    assert far(baselines.weighted(shifted, settings)) > 1.0


def test_without_a_share_for_the_devices_the_weighted_learner_is_the_trusted_one() -> None:
    spoiled = hit(problem(), range(5), wild)
    alone = baselines.trusted_only(spoiled, {"decay": 1e-3})
    near = baselines.weighted(spoiled, {"decay": 1e-3, "share": 1e-12})
    np.testing.assert_allclose(near, alone, atol=1e-5)


@pytest.mark.parametrize("rule", [baselines.coordinate_median, baselines.geometric_median])
def test_two_wild_devices_of_five_do_not_move_the_medians_and_four_do(rule: object) -> None:
    assert callable(rule)
    assert far(rule(hit(problem(), range(2), wild), {"decay": 1e-4})) < 0.5
    assert far(rule(hit(problem(), range(4), wild), {"decay": 1e-4})) > 10.0
    assert far(baselines.noisy_only(hit(problem(), range(2), wild), {"decay": 1e-4})) > 10.0


def test_rsa_is_near_the_truth_and_a_wild_device_pulls_no_harder_than_its_penalty() -> None:
    settings = {"decay": 1e-4, "penalty": 0.05, "rate": 0.3}
    clean = problem()
    spoiled = hit(clean, range(1), wild)
    assert far(baselines.rsa(clean, settings)) < 0.5
    assert far(baselines.rsa(spoiled, settings)) < 0.5
    wilder = hit(spoiled, range(1), wild)
    np.testing.assert_allclose(baselines.rsa(wilder, settings), baselines.rsa(spoiled, settings), atol=0.1)


def test_rsa_learns_classes_too() -> None:
    settings = {"decay": 1e-4, "penalty": 0.05, "rate": 0.3}
    assert ranked(baselines.rsa(hit(problem(LOGISTIC), range(1), flipped), settings)) > 0.95


def test_rewls_leaves_out_gross_errors_and_keeps_nearly_everything_clean() -> None:
    clean = problem()
    everything = fitting.joined([*clean.devices, *clean.trusted])
    plain = fitted(RIDGE, everything, 1e-9)
    np.testing.assert_allclose(baselines.rewls(clean, {"decay": 1e-9}), plain, atol=0.02)
    spoiled = hit(clean, range(2), wild)  # 36% of all instances
    assert far(baselines.rewls(spoiled, {"decay": 1e-9})) < 0.1
    assert far(baselines.rewls(hit(clean, range(3), wild), {"decay": 1e-9})) > 10.0  # above its breakdown


def test_the_adaptive_cutoff_keeps_nearly_all_normal_residuals_and_no_outlier() -> None:
    residuals = np.abs(np.random.default_rng(0).normal(size=4000))
    assert np.mean(residuals >= baselines.adaptive_cutoff(residuals)) < 0.005
    residuals[:1000] = 8.0
    kept = residuals < baselines.adaptive_cutoff(residuals)
    assert not kept[:1000].any()
    assert kept[1000:].mean() > 0.995


def test_fltrust_learns_from_clean_devices_among_hostile_ones() -> None:
    """And not from hostile ones: with those alone, which all point away, it stands still."""
    settings = {"decay": 1e-4, "rate": 0.3}
    assert ranked(baselines.fltrust(hit(problem(LOGISTIC), range(2), flipped), settings)) > 0.95
    against = hit(problem(LOGISTIC), range(5), lambda data: Data(data.x, -data.y))
    np.testing.assert_array_equal(baselines.fltrust(against, settings), np.zeros(4))


def test_where_most_labels_are_flipped_plain_learning_is_the_wrong_way_round_and_these_are_not() -> None:
    spoiled, settings = hit(problem(LOGISTIC), range(5), flipped), {"decay": 1e-3, "share": 0.9}
    assert ranked(baselines.noisy_only(spoiled, settings)) < 0.2
    assert ranked(baselines.sign_corrected(spoiled, settings)) > 0.95
    assert ranked(baselines.robust_logistic(spoiled, settings)) > 0.95


def test_the_devices_with_least_trusted_loss_are_the_clean_ones() -> None:
    spoiled = hit(problem(), range(3), wild)
    settings = {"decay": 1e-4, "share": 0.9, "kept": 0.4}
    assert far(baselines.best_devices(spoiled, settings)) < 0.1
    assert far(baselines.best_devices(spoiled, {**settings, "kept": 0.6})) > 1.0


def test_dutis_changes_satisfy_the_conditions_of_the_least_objective() -> None:
    """Of a lasso: the smooth part's gradient is price / n against every change, and no more where there is none."""
    clean, trusted, decay, price, confidence = part(40, 0), part(8, 1), 0.05, 0.5, 20.0
    noisy = Data(clean.x, clean.y + np.where(np.arange(40) < 12, 4.0, 0.0))
    found = duti.changes(noisy, trusted, decay, price, confidence)

    def smooth(delta: Floats) -> float:
        theta = fitted(RIDGE, Data(noisy.x, noisy.y + delta), decay)
        return confidence * fitting.loss(RIDGE, trusted, theta) + fitting.loss(
            RIDGE, Data(noisy.x, noisy.y + delta), theta
        )

    gradient, changed = numerical(smooth, found), np.abs(found) > 1e-6
    assert 0 < changed.sum() < 40
    np.testing.assert_allclose(gradient[changed], -np.sign(found[changed]) * price / 40, rtol=5e-3)
    assert np.abs(gradient[~changed]).max() < price / 40 * 1.005
    largest = np.argsort(-np.abs(found))[:12]
    assert np.mean(largest < 12) > 0.7  # what it would change most is what was changed


def test_duti_finds_labels_that_are_systematically_wrong_where_trusted_items_say_so() -> None:
    """As in the paper's first figure: one corner of the class is labelled wrongly."""
    clean = part(80, 3, LOGISTIC, 0.0)
    corner = (clean.y > 0) & (clean.x[:, 1] < -0.5)
    noisy = Data(clean.x, np.where(corner, -1.0, clean.y))
    trusted = part(20, 4, LOGISTIC, 0.0)
    chance = duti.chances(noisy, trusted, 1e-2, 0.5, 100.0)
    suspect = np.abs(chance - (noisy.y + 1) / 2)
    assert corner.sum() > 8
    assert suspect[corner].mean() > 5 * suspect[~corner].mean()
    assert ((chance >= 0) & (chance <= 1)).all()
    none = duti.chances(noisy, trusted, 1e-2, 1e6, 100.0)
    np.testing.assert_array_equal(none, (noisy.y + 1) / 2)  # changes are too dear


def test_learning_on_debugged_labels_is_better_than_on_given_ones() -> None:
    spoiled = hit(problem(LOGISTIC), range(5), flipped)
    settings = {"decay": 1e-2, "price": 0.01, "confidence": 100.0}
    assert ranked(baselines.debugged(spoiled, settings)) > 0.5 > ranked(baselines.noisy_only(spoiled, settings))
    settings = {"decay": 1e-3, "price": 1e-3, "confidence": 100.0}
    shifted = hit(problem(), range(5), lambda data: Data(data.x, data.y + 20.0))
    assert far(baselines.debugged(shifted, settings)) < far(baselines.trusted_and_noisy(shifted, settings))
