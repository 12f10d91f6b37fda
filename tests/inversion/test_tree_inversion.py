"""Decision trees: our CART beside scikit-learn's, and what the attackers make of hand-made and of grown trees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.tree import DecisionTreeClassifier

from covey_coordinator.inversion import tree_inversion as inversion
from covey_coordinator.inversion.tree_inversion import Person, Tree
from covey_coordinator.reproduce import tree_inversion as reproduction
from covey_protocol.errors import UsageError

INF = np.inf


def table(seed: int, size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(size, 4))
    return x, ((x[:, 0] > 0.3) + (x[:, 1] * x[:, 2] > 0) + (random.random(size) < 0.1)).astype(np.int64)


@pytest.mark.parametrize("seed", range(3))
def test_a_grown_tree_is_scikit_learns(seed: int) -> None:
    x, y = table(seed)
    theirs = DecisionTreeClassifier(max_depth=5, min_samples_leaf=3, random_state=0).fit(x, y)
    ours = inversion.grow(x, y, max_depth=5, min_leaf=3)
    other, _ = table(seed + 10)
    assert np.mean(ours.predict(other) == theirs.predict(other)) > 0.99  # ties and the rounding of thresholds
    assert len(ours.counts) == theirs.get_n_leaves()


def test_the_leaves_of_scikit_learns_tree_answer_as_it_does_and_count_its_examples() -> None:
    x, y = table(0)
    theirs = DecisionTreeClassifier(max_depth=5, random_state=0).fit(x.astype(np.float32), y)
    ours = inversion.from_sklearn(theirs)
    other = table(1)[0].astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(ours.predict(other), theirs.predict(other))
    assert ours.counts.sum() == pytest.approx(len(x))
    np.testing.assert_allclose(ours.counts.sum(axis=0), np.bincount(y))
    inside = np.all((other[:, None] > ours.low) & (other[:, None] <= ours.high), axis=2)
    np.testing.assert_array_equal(inside.sum(axis=1), 1)


def test_a_tree_whose_classes_are_not_numbered_is_refused() -> None:
    x, y = table(0)
    with pytest.raises(UsageError, match="number them from 0"):
        inversion.from_sklearn(DecisionTreeClassifier(max_depth=2).fit(x, y + 1))


# feature 0 is secret (0 or 1), feature 1 is known; the secret is asked only where the known one is above 0.5
HANDMADE = Tree(
    low=np.array([[-INF, -INF], [-INF, 0.5], [0.5, 0.5]]),
    high=np.array([[INF, 0.5], [0.5, INF], [INF, INF]]),
    counts=np.array([[40.0, 10.0], [30.0, 2.0], [3.0, 15.0]]),
)
PEOPLE = Person(np.array([[9.0, 0.0], [9.0, 1.0], [9.0, 1.0]]), np.array([1, 1, 0]), 0)  # what they hide is not read
PRIOR = np.array([0.8, 0.2])


def test_a_white_box_weighs_leaves_by_their_counts_and_falls_back_to_the_most_frequent() -> None:
    # not asked: 0.8 > 0.2; class 1: 2 against 15; class 0: 30 against 3
    assert inversion.white_box(HANDMADE, PEOPLE, PRIOR).tolist() == [0, 1, 0]


def test_a_black_box_knows_how_often_the_tree_errs() -> None:
    errors = np.array([[0.96, 0.04], [0.44, 0.56]])
    # class 1, known above 0.5: 0.44 * 0.8 (answer 0) against 0.56 * 0.2
    assert inversion.black_box(HANDMADE, PEOPLE, PRIOR, errors).tolist() == [0, 0, 0]
    sure = np.array([[0.99, 0.01], [0.05, 0.95]])
    assert inversion.black_box(HANDMADE, PEOPLE, PRIOR, sure).tolist() == [0, 1, 0]


def test_the_confusion_is_that_of_the_tree() -> None:
    x = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(inversion.confusion(HANDMADE, x, np.array([0, 1, 1, 0])), [[0.5, 0.5], [0.5, 0.5]])


def xor(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.integers(0, 2, (400, 3)).astype(np.float64)
    return x, ((x[:, 0] + x[:, 1]) % 2).astype(np.int64)


def test_an_answer_that_decides_the_class_is_found_exactly() -> None:
    x, y = xor(0)
    tree = inversion.grow(x, y, max_depth=3)
    prior = inversion.marginal(x[:, 0], 2)
    for guess in (
        inversion.white_box(tree, Person(x, y, 0), prior),
        inversion.black_box(tree, Person(x, y, 0), prior, inversion.confusion(tree, x, y)),
    ):
        np.testing.assert_array_equal(guess, x[:, 0])
    assert inversion.judged(guess, x[:, 0].astype(np.int64), 1) == (1.0, 1.0, 1.0)


def test_a_tree_asks_at_its_depth_and_nowhere_else() -> None:
    x, y = table(0)
    x[:, 3] = (x[:, 0] + 0.2 * x[:, 3] > 0.3) * 1.0  # would be chosen at the top
    first = inversion.grow(x, y, max_depth=4, sensitive=3, priority=0)
    assert np.all(np.isfinite(first.low[:, 3]) | np.isfinite(first.high[:, 3]))  # every path asks
    never = inversion.grow(x, y, max_depth=4, sensitive=3, priority=4)
    assert not never.splits_on(3)
    assert inversion.grow(x, y, max_depth=4, sensitive=3, priority=1).splits_on(3)


def test_a_tree_that_never_asks_leaves_the_most_frequent_value() -> None:
    table_ = reproduction.survey(0, 332, 0.171, 1.5)
    rows = np.arange(332)
    settings: tuple[Any, ...] = (table_, rows[80:], rows[:80])
    never = reproduction.judged(*settings, reproduction.WHITE, reproduction.DEPTH, 0)
    baseline = reproduction.judged(*settings, reproduction.BASELINE, None, 0)
    first = reproduction.judged(*settings, reproduction.WHITE, 0, 0)
    assert never == baseline
    assert first["value"] > baseline["value"]
    assert baseline["recall"] == 0.0
    assert reproduction.judged(*settings, reproduction.IDEAL, None, 0)["value"] > 0.95


def test_the_made_up_survey_has_the_published_size_and_share() -> None:
    shares = [reproduction.survey(seed, 332, 0.171, 1.5).x[:, 0].mean() for seed in range(40)]
    assert np.mean(shares) == pytest.approx(0.171, abs=0.01)  # 40 surveys: standard error 0.003
