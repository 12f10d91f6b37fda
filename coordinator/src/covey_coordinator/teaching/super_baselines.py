"""What super teaching is held against: the combinatorial problem itself, one instance at a time or all subsets.

min over S of |theta(S) - theta*|^2, a mixed-integer problem: pool-based super teaching (Ma et al. 2018) hands it to a
solver; here it is forward selection on the true risk, and exhaustive search where instances are few. All data in one
place, which no federation has. Numpy, float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from covey_coordinator.teaching.super_teaching import SuperSettings, learners
from covey_protocol.errors import ConfigError
from covey_protocol.teaching import RIDGE, Array, minimised

MOST_EXHAUSTIVE = 16  # instances: 65,536 learners


def learned(x: Array, y: Array, settings: SuperSettings, start: Array | None = None) -> Array:
    """theta of all these instances."""
    (part,) = learners([(x, y)], settings)
    zeros = np.zeros(x.shape[1])
    return minimised(part.z, part.loss, zeros, settings.decay, zeros if start is None else start)


def greedy(
    x: Array, y: Array, theta_star: Array, settings: SuperSettings, most: int | None = None
) -> tuple[npt.NDArray[np.bool_], float]:
    """(S, risk): from nobody, the instance that leaves the least risk, while that falls and S has fewer than `most`.

    Every candidate's learner is trained: ridge by a rank-one change of the inverse, all at once; logistic by Newton
    from the last learner.
    """
    chosen, theta = np.zeros(len(y), bool), np.zeros(x.shape[1])
    risk = float(np.sum((theta - theta_star) ** 2))
    while not chosen.all() and (most is None or chosen.sum() < most):
        tried = (
            _ridge_tries(x, y, chosen, settings) if settings.kind == RIDGE else _tries(x, y, chosen, theta, settings)
        )
        risks = np.where(chosen, np.inf, np.sum((tried - theta_star) ** 2, axis=1))
        best = int(np.argmin(risks))
        if risks[best] >= risk:
            break
        chosen[best], risk, theta = True, float(risks[best]), tried[best]
    return chosen, risk


def _ridge_tries(x: Array, y: Array, chosen: npt.NDArray[np.bool_], settings: SuperSettings) -> Array:
    """(n, d): theta of S and each instance, by Sherman and Morrison."""
    inverse = np.linalg.inv(x[chosen].T @ x[chosen] + settings.decay * np.eye(x.shape[1]))
    theta = inverse @ (y[chosen] @ x[chosen])
    reach = x @ inverse
    return np.asarray(theta + ((y - x @ theta) / (1 + np.sum(reach * x, axis=1)))[:, None] * reach)


def _tries(x: Array, y: Array, chosen: npt.NDArray[np.bool_], theta: Array, settings: SuperSettings) -> Array:
    base = np.flatnonzero(chosen)
    rows = (np.append(base, number) for number in range(len(y)))
    return np.stack([learned(x[one], y[one], settings, theta) for one in rows])


def exhaustive(x: Array, y: Array, theta_star: Array, settings: SuperSettings) -> tuple[npt.NDArray[np.bool_], float]:
    """(S, risk) of the best of all subsets. Raises ConfigError for more than 16 instances."""
    n = len(y)
    if n > MOST_EXHAUSTIVE:
        raise ConfigError(f"all subsets of {n} instances", f"search at most {MOST_EXHAUSTIVE}, or choose greedily")
    best, least = np.zeros(n, bool), float(np.sum(np.asarray(theta_star) ** 2))
    for number in range(1, 2**n):
        chosen = (number >> np.arange(n)) & 1 == 1
        risk = float(np.sum((learned(x[chosen], y[chosen], settings) - theta_star) ** 2))
        if risk < least:
            best, least = chosen, risk
    return best, least
