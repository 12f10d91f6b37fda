"""Attribute inference from decision trees (Fredrikson et al. 2015, section 4): a person's one unknown answer.

The attacker knows all features of a person but one, the person's true class, how frequent each value of the unknown
feature is, and either what the tree answers and how often it errs (`black_box`) or the tree itself with the number of
training examples at each leaf (`white_box`). The countermeasure is where a tree may split on the sensitive feature:
`grow(..., sensitive=, priority=)`.

Trees are plain tables of leaves (`Tree`), made of a scikit-learn classifier by `from_sklearn` or by `grow`, because
scikit-learn cannot keep a feature to one depth. The attacked features' values are whole numbers, 0 .. values - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import UsageError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SEES_ANSWERS = (
    "The tree's answers to inputs of the attacker's choice and how often each class is mistaken for each; the person's "
    "class and all features but one; how frequent each value of that one is."
)
SEES_TREE = (
    "The tree with the number of training examples of each class at each leaf; the person's class and all features but "
    "one; how frequent each value of that one is."
)


@dataclass(frozen=True)
class Tree:
    """An example is at the one leaf with low < x <= high in every feature. low, high: (leaves, d); counts: (leaves, C).

    counts: how many training examples of each class came to each leaf.
    """

    low: Floats
    high: Floats
    counts: Floats

    def leaves(self, x: Floats) -> Integers:
        """(n,): the leaf of each example (n, d)."""
        inside = np.all((x[:, None] > self.low) & (x[:, None] <= self.high), axis=2)
        return np.asarray(inside.argmax(axis=1))

    def predict(self, x: Floats) -> Integers:
        return np.asarray(self.counts.argmax(axis=1)[self.leaves(x)])

    def splits_on(self, feature: int) -> bool:
        return bool(np.isfinite(self.low[:, feature]).any() or np.isfinite(self.high[:, feature]).any())


class Person(NamedTuple):
    """Whom the attacker asks about. x (n, d): `sensitive` is the column to be found and is never read. y (n,)."""

    x: Floats
    y: Integers
    sensitive: int


def marginal(column: Floats, values: int) -> Floats:
    """(values,): how frequent each value is, with one example added to each so that none is impossible."""
    counts = np.bincount(column.astype(np.int64), minlength=values) + 1.0
    return np.asarray(counts / counts.sum())


def confusion(tree: Tree, x: Floats, y: Integers) -> Floats:
    """(C, C): how often an example of a class (row) is answered with a class (column); rows add up to 1."""
    classes = tree.counts.shape[1]
    counts = np.zeros((classes, classes))
    np.add.at(counts, (y, tree.predict(x)), 1.0)
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0))


def mode(people: Person, prior: Floats) -> Integers:
    """The baseline: the most frequent value for everyone."""
    return np.full(len(people.x), prior.argmax())


def black_box(tree: Tree, people: Person, prior: Floats, errors: Floats) -> Integers:
    """(n,): argmax over v of errors[y, tree(v, known)] Pr[v]. The known features' marginals are the same for all v."""
    return _likeliest(np.stack([errors[people.y, tree.predict(one)] for one in _filled(people, prior)], axis=1) * prior)


def white_box(tree: Tree, people: Person, prior: Floats) -> Integers:
    """(n,): argmax over v of Pr[v] n(leaf, y) / (sum of Pr over the values that the leaf allows).

    That is the joint frequency of value, leaf and class, where a leaf's examples are spread over the values it allows
    as everybody's are. Deviation: the paper weighs the paths that fit the known features by their counts and the prior
    and does not say how a path that allows several values is to be shared out; this is our reading.
    """
    weights = []
    for value, one in enumerate(_filled(people, prior)):
        leaves = tree.leaves(one)
        weights.append(prior[value] * tree.counts[leaves, people.y] / _allowed(tree, people.sensitive, prior)[leaves])
    return _likeliest(np.stack(weights, axis=1) + np.finfo(np.float64).tiny * prior)


def _filled(people: Person, prior: Floats) -> list[Floats]:
    """The people with each value in turn in the unknown place."""
    found = []
    for value in range(len(prior)):
        one = people.x.copy()
        one[:, people.sensitive] = value
        found.append(one)
    return found


def _allowed(tree: Tree, feature: int, prior: Floats) -> Floats:
    values = np.arange(len(prior))
    inside = (values > tree.low[:, feature, None]) & (values <= tree.high[:, feature, None])
    return np.asarray(inside @ prior)


def _likeliest(weights: Floats) -> Integers:
    return np.asarray(weights.argmax(axis=1))


# --- how well


class Found(NamedTuple):
    """accuracy: of all guesses. precision, recall: of `positive`; precision is nan where it is never guessed."""

    accuracy: float
    precision: float
    recall: float


def judged(guess: Integers, truth: Integers, positive: int) -> Found:
    hit = np.sum((guess == positive) & (truth == positive))
    said, there = np.sum(guess == positive), np.sum(truth == positive)
    precision = float(hit / said) if said else float("nan")
    return Found(float((guess == truth).mean()), precision, float(hit / there) if there else float("nan"))


def ideal(x: Floats, y: Integers, sensitive: int, seed: int) -> Integers:
    """What a tree finds that is trained on the sensitive feature itself, of the same examples: how well one can do."""
    from sklearn.tree import DecisionTreeClassifier

    known = np.column_stack([np.delete(x, sensitive, axis=1), y])
    truth = x[:, sensitive].astype(np.int64)
    return np.asarray(DecisionTreeClassifier(random_state=seed).fit(known, truth).predict(known))


# --- trees


def from_sklearn(classifier: Any) -> Tree:
    """The leaves of a fitted DecisionTreeClassifier whose classes are 0 .. C - 1."""
    tree = classifier.tree_
    if list(classifier.classes_) != list(range(len(classifier.classes_))):
        raise UsageError(f"the tree's classes are {list(classifier.classes_)}", "number them from 0")
    box = np.full(classifier.n_features_in_, np.inf)
    found: list[tuple[Floats, Floats, Floats]] = []
    waiting = [(0, -box, box)]
    while waiting:
        node, low, high = waiting.pop()
        feature, threshold = tree.feature[node], tree.threshold[node]
        if tree.children_left[node] == tree.children_right[node]:
            shares = tree.value[node][0]
            found.append((low, high, tree.weighted_n_node_samples[node] * shares / shares.sum()))
            continue
        left, right = high.copy(), low.copy()
        left[feature], right[feature] = min(high[feature], threshold), max(low[feature], threshold)
        waiting += [(tree.children_right[node], right, high), (tree.children_left[node], low, left)]
    return _tree(found)


def _tree(leaves: Sequence[tuple[Floats, Floats, Floats]]) -> Tree:
    low, high, counts = (np.stack(column) for column in zip(*leaves))
    return Tree(low, high, counts)


def grow(
    x: Floats,
    y: Integers,
    *,
    max_depth: int,
    min_leaf: int = 1,
    sensitive: int | None = None,
    priority: int | None = None,
) -> Tree:
    """CART (Breiman et al. 1984): binary splits x <= threshold of the largest fall of the Gini impurity.

    sensitive, priority: the countermeasure. The sensitive feature is split on at this depth of the tree only (0 is the
    top), and there wherever it lowers the impurity at all; None lets it compete like any other, and a priority of
    max_depth or more keeps it out. Source: Fredrikson et al. 2015, section 4.4, in our reading.
    Ties go to the lower feature and threshold.
    """
    counts = np.eye(int(y.max()) + 1)[y]
    box = np.full(x.shape[1], np.inf)
    found: list[tuple[Floats, Floats, Floats]] = []
    waiting = [(np.arange(len(x)), 0, -box, box)]
    while waiting:
        rows, depth, low, high = waiting.pop()
        features = _features(x.shape[1], depth, sensitive, priority)
        split = _split(x[rows], counts[rows], features, min_leaf) if depth < max_depth else None
        if split is None:
            found.append((low, high, counts[rows].sum(axis=0)))
            continue
        feature, threshold = split
        left, right = high.copy(), low.copy()
        left[feature] = right[feature] = threshold
        below = x[rows, feature] <= threshold
        waiting += [(rows[~below], depth + 1, right, high), (rows[below], depth + 1, low, left)]
    return _tree(found)


def _features(count: int, depth: int, sensitive: int | None, priority: int | None) -> list[list[int]]:
    """Features to be tried, in groups: of the next group only where no feature of the one before lowers anything."""
    if sensitive is None or priority is None:
        return [list(range(count))]
    others = [feature for feature in range(count) if feature != sensitive]
    return [[sensitive], others] if depth == priority else [others]


def _split(x: Floats, counts: Floats, groups: Sequence[Sequence[int]], min_leaf: int) -> tuple[int, float] | None:
    """(feature, threshold) of the best split of the first group that has one."""
    before = _impurity(counts.sum(axis=0))
    for group in groups:
        found = [(fall, -feature, threshold) for feature in group
                 for fall, threshold in _best(x[:, feature], counts, before, min_leaf)]  # fmt: skip
        if found:
            _, feature, threshold = max(found)
            return -feature, threshold
    return None


def _best(column: Floats, counts: Floats, before: float, min_leaf: int) -> list[tuple[float, float]]:
    """[(fall of n times the impurity, threshold)], empty where none falls."""
    order = np.argsort(column, kind="stable")
    values, sums = column[order], counts[order].cumsum(axis=0)
    places = np.flatnonzero(values[1:] > values[:-1]) + 1  # so many examples go left
    places = places[(places >= min_leaf) & (len(values) - places >= min_leaf)]
    if not len(places):
        return []
    left = sums[places - 1]
    falls = before - _impurity(left) - _impurity(sums[-1] - left)
    best = int(falls.argmax())
    if falls[best] <= 1e-9 * max(1.0, before):
        return []
    place = places[best]
    return [(float(falls[best]), float((values[place - 1] + values[place]) / 2))]


def _impurity(counts: Floats) -> Any:
    """n times the Gini impurity of class counts (..., C)."""
    totals = counts.sum(axis=-1)
    return totals - (counts**2).sum(axis=-1) / np.maximum(totals, 1.0)
