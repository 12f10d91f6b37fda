"""The learners under machine teaching's baselines (covey_protocol.learners), and their scores."""

from __future__ import annotations

import numpy as np

from covey_protocol.learners import LOGISTIC, RIDGE, Data, Floats, fitted, logistic, ridge, sigmoid

__all__ = [
    "LOGISTIC",
    "RIDGE",
    "Data",
    "Floats",
    "auc",
    "fitted",
    "joined",
    "logistic",
    "loss",
    "r_squared",
    "ridge",
    "score",
    "sigmoid",
]


def joined(parts: list[Data]) -> Data:
    return Data(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))


def loss(kind: str, data: Data, theta: Floats) -> float:
    """The mean loss, without decay."""
    z = data.x @ theta
    if kind == RIDGE:
        return float(np.mean((z - data.y) ** 2) / 2)
    return float(np.mean(np.logaddexp(0.0, -data.y * z)))


def r_squared(y: Floats, predicted: Floats) -> float:
    """1 - squared error / variance: 1 is exact, 0 no better than the mean, and it may be far below 0."""
    return float(1.0 - np.sum((y - predicted) ** 2) / np.sum((y - y.mean()) ** 2))


def auc(y: Floats, scores: Floats) -> float:
    """The chance that an instance of class 1 scores above one of class -1; ties count half. 0.5 if a class is empty."""
    positive = y > 0
    ones, others = int(positive.sum()), int((~positive).sum())
    if not ones or not others:
        return 0.5
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[places]
    return float((ranks[positive].sum() - ones * (ones + 1) / 2.0) / (ones * others))


def score(kind: str, y: Floats, predicted: Floats) -> float:
    """R2 of a ridge regression, AUC of a logistic one: larger is better."""
    return r_squared(y, predicted) if kind == RIDGE else auc(y, predicted)
