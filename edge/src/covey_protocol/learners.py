"""Ridge and logistic regression, weighted: the learners under DUTI, machine teaching's baselines and its scores.

Plain numpy, float64. A column of ones among the features is the intercept, and is regularised like the others.
Objective of both: sum_i weights_i loss_i + (decay / 2) |theta|^2. Teachers learn otherwise: covey_protocol.teaching.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RIDGE, LOGISTIC = "ridge", "logistic"
NEWTON_STEPS = 25
NEWTON_TOLERANCE = 1e-8  # of the decrement g'H^-1 g, which is twice the distance from the least objective
LEAST_CURVATURE = 1e-10  # added to the Hessian's diagonal, so that decay = 0 on few instances has an answer
MOST_MARGIN = 500.0  # exp of more overflows


class Data(NamedTuple):
    """x: (n, F) features. y: (n,) targets; for logistic regression -1 and 1."""

    x: Floats
    y: Floats

    def take(self, rows: Any) -> Data:
        return Data(self.x[rows], self.y[rows])


def sigmoid(z: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -MOST_MARGIN, MOST_MARGIN))))


def fitted(kind: str, data: Data, decay: float, weights: Optional[Floats] = None) -> Floats:
    """(F,): the learner of this kind. weights: (n,), of the losses; all 1 / n if left out."""
    if weights is None:
        weights = np.full(len(data.y), 1.0 / len(data.y))
    if kind == RIDGE:
        return ridge(data.x, data.y, weights, decay)
    return logistic(data.x, (data.y + 1.0) / 2.0, weights, decay)


def ridge(x: Floats, y: Floats, weights: Floats, decay: float) -> Floats:
    """loss_i = (x_i'theta - y_i)^2 / 2."""
    weighted = x.T * weights
    return np.asarray(np.linalg.solve(weighted @ x + _diagonal(x, decay), weighted @ y))


def logistic(x: Floats, chance: Floats, weights: Floats, decay: float, start: Optional[Floats] = None) -> Floats:
    """loss_i = -chance_i log s_i - (1 - chance_i) log(1 - s_i), s = sigmoid(x theta). chance: (n,) in [0, 1], of the
    label 1: soft labels. By Newton's steps, halved while they do not descend."""
    theta = np.zeros(x.shape[1]) if start is None else start
    value = _entropy(x @ theta, chance, weights) + decay / 2 * float(theta @ theta)
    for _ in range(NEWTON_STEPS):
        shares = sigmoid(x @ theta)
        gradient = x.T @ (weights * (shares - chance)) + decay * theta
        hessian = (x.T * (weights * shares * (1.0 - shares))) @ x + _diagonal(x, decay)
        step = np.linalg.solve(hessian, gradient)
        slope = float(step @ gradient)
        if slope < NEWTON_TOLERANCE:
            break
        theta, value, moved = _descended(x, chance, weights, decay, theta, step, value)
        if not moved:
            break
    return theta


def _descended(
    x: Floats, chance: Floats, weights: Floats, decay: float, theta: Floats, step: Floats, value: float
) -> tuple[Floats, float, bool]:
    """(theta, its objective, whether it moved): along -step, halved until the objective is less."""
    for halvings in range(20):
        tried = theta - step / 2**halvings
        found = _entropy(x @ tried, chance, weights) + decay / 2 * float(tried @ tried)
        if found < value:
            return tried, found, True
    return theta, value, False


def _entropy(z: Floats, chance: Floats, weights: Floats) -> float:
    return float(weights @ (np.logaddexp(0.0, z) - chance * z))


def _diagonal(x: Floats, decay: float) -> Floats:
    return np.asarray((decay + LEAST_CURVATURE) * np.eye(x.shape[1]))
