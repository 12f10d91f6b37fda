"""DUTI: which labels of a training set are wrong, found by a few trusted items (Zhang, Zhu, Wright, AAAI 2018).

The least change of labels such that the model learned from the changed ones agrees with the trusted items and with
the changed ones themselves. Relaxed as in the paper: absolute changes of targets for regression; for classes the
chance of each label, a number in [0, 1] here since there are two. One teacher's instances at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from covey_protocol.learners import (
    LOGISTIC,
    RIDGE,
    Data,
    Floats,
    fitted,
    logistic,
    sigmoid,
)

LASSO_STEPS = 150  # FISTA's
LABEL_STEPS = 25  # projected gradient steps on the chances of labels
POWER_STEPS = 30


def debugged(kind: str, noisy: Data, trusted: Data, decay: float, price: float, confidence: float) -> Floats:
    """(n,): labels after debugging, between -1 and 1 for classes.

    price: the paper's gamma, of a change per instance; confidence: its c, of every trusted item.
    """
    if kind == RIDGE:
        return noisy.y + changes(noisy, trusted, decay, price, confidence)
    return 2.0 * chances(noisy, trusted, decay, price, confidence) - 1.0


def changes(noisy: Data, trusted: Data, decay: float, price: float, confidence: float) -> Floats:
    """(n,), delta of the paper's regression: min over delta of
    (c / m) sum loss(trusted, theta) + (1 / n) sum loss(x_i, y_i + delta_i, theta) + (gamma / n) |delta|_1,
    theta the ridge regression of (x, y + delta).

    theta is linear in delta, so this is a lasso, solved by FISTA (Beck, Teboulle 2009) instead of the paper's
    quasi-Newton steps. loss = half the square, where the paper has the square.
    """
    n, m = len(noisy.y), max(len(trusted.y), 1)
    gram = noisy.x.T @ noisy.x / n + decay * np.eye(noisy.x.shape[1])
    learned = np.linalg.solve(gram, noisy.x.T / n)  # (F, n): theta = learned @ labels

    def residuals(labels: Floats, targets: Floats) -> tuple[Floats, Floats]:
        theta = learned @ labels
        return trusted.x @ theta - targets, noisy.x @ theta - labels

    def pulled(far: Floats, near: Floats) -> Floats:
        """The transpose of `residuals`, weighted: the gradient."""
        back = trusted.x.T @ far * (confidence / m) + noisy.x.T @ near / n
        return np.asarray(learned.T @ back - near / n)

    step = 1.0 / _largest(lambda v: pulled(*residuals(v, np.zeros(len(trusted.y)))), n)
    delta, ahead, momentum = np.zeros(n), np.zeros(n), 1.0
    for _ in range(LASSO_STEPS):
        moved = ahead - step * pulled(*residuals(noisy.y + ahead, trusted.y))
        new = np.sign(moved) * np.maximum(np.abs(moved) - step * price / n, 0.0)
        grown = (1.0 + np.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
        ahead = new + (momentum - 1.0) / grown * (new - delta)
        delta, momentum = new, grown
    return delta


def _largest(product: object, n: int) -> float:
    """The largest eigenvalue of a symmetric operator, from above: 1.05 times what power iterations find."""
    assert callable(product)
    v = np.random.default_rng(0).normal(size=n)
    for _ in range(POWER_STEPS):
        v = product(v / np.linalg.norm(v))
    return 1.05 * float(np.linalg.norm(v))


def chances(noisy: Data, trusted: Data, decay: float, price: float, confidence: float) -> Floats:
    """(n,) in [0, 1]: of the label 1. The paper's relaxation for classes:
    (c / m) sum loss(trusted, theta) + (1 / n) sum [p_i loss(x_i, 1, theta) + (1 - p_i) loss(x_i, -1, theta)]
    + (gamma / n) sum (1 - the chance of the given label), theta the logistic regression of the soft labels p.

    Projected gradient descent; the gradient through theta by the implicit function theorem, d theta / d p_i =
    H^-1 x_i / n. Steps: each moves the chance that would move most by 1 / 4, less with the number of the step.
    """
    n, given = len(noisy.y), (noisy.y + 1.0) / 2.0
    weights, sign = np.full(n, 1.0 / n), np.where(noisy.y > 0, -1.0, 1.0)  # sign: of a change away from the given label
    chance, theta = given, fitted(LOGISTIC, noisy, decay)
    best, least = given, np.inf
    for number in range(LABEL_STEPS):
        z = noisy.x @ theta
        value = _objective(z, chance, np.abs(chance - given), trusted, theta, price, confidence)
        if value < least:
            best, least = chance, value
        shares = sigmoid(z)
        hessian = (noisy.x.T * (weights * shares * (1.0 - shares))) @ noisy.x + decay * np.eye(len(theta))
        outer = _pull(trusted, theta) * confidence + noisy.x.T @ ((shares - chance) / n)
        gradient = noisy.x @ np.linalg.solve(hessian, outer) - z + price * sign
        moved = chance - gradient * (0.25 / np.sqrt(number + 1.0) / max(float(np.abs(gradient).max()), 1e-12))
        chance = np.clip(moved, 0.0, 1.0)
        theta = logistic(noisy.x, chance, weights, decay, start=theta)
    return best


def _objective(
    z: Floats, chance: Floats, changed: Floats, trusted: Data, theta: Floats, price: float, confidence: float
) -> float:
    own = np.mean(np.logaddexp(0.0, z) - chance * z)
    theirs = np.mean(np.logaddexp(0.0, -trusted.y * (trusted.x @ theta))) if len(trusted.y) else 0.0
    return float(confidence * theirs + own + price * changed.mean())


def _pull(trusted: Data, theta: Floats) -> Floats:
    """The gradient of the trusted items' mean loss; zero without any."""
    if not len(trusted.y):
        return np.zeros(len(theta))
    wrong = sigmoid(-trusted.y * (trusted.x @ theta))
    return np.asarray(-trusted.x.T @ (wrong * trusted.y) / len(trusted.y))


def class_chances(
    x: Floats, given: npt.NDArray[np.int64], classes: int, trusted: tuple[Floats, npt.NDArray[np.int64]], *told: float
) -> Floats:
    """(n, classes), rows that sum to 1: the chance of each label, each class debugged against the rest.

    x, given: (n, F) and (n,), from 0; trusted: the same. told: decay, price, confidence. A class that neither has any
    instance of stays at 0. The paper debugs all classes at once; one at a time needs (F, F) systems only.
    """
    columns = []
    for one in range(classes):
        noisy, vouched = (Data(rows, np.where(labels == one, 1.0, -1.0)) for rows, labels in ((x, given), trusted))
        named = (noisy.y > 0).any() or (vouched.y > 0).any()
        columns.append(chances(noisy, vouched, *told) if named else np.zeros(len(x)))
    found = np.stack(columns, axis=1)
    return np.asarray(found / np.maximum(found.sum(axis=1, keepdims=True), 1e-300))
