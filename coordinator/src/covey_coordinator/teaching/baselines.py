"""What teaching is held against: learners that get the same noisy instances of K devices and the same trusted ones.

Each is a function (problem, settings) -> theta, in plain numpy. The settings are what is tuned; `decay` is the weight
of |theta|^2 / 2 beside mean losses everywhere. Some need all instances in one place, which federated learning does not
have: they are named so. Ours is said of those without a paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.aggregation.geometric_median import GeometricMedian
from covey_coordinator.aggregation.kernels import Updates
from covey_coordinator.aggregation.kernels.fast import NumpyKernels
from covey_coordinator.aggregation.rules import Batch, Rule
from covey_coordinator.aggregation.trimmed_mean import Median
from covey_coordinator.aggregation.trusted import FLTrust
from covey_coordinator.teaching.fitting import (
    RIDGE,
    Data,
    Floats,
    auc,
    fitted,
    joined,
    logistic,
    loss,
    ridge,
    sigmoid,
)
from covey_protocol import duti

Settings = Mapping[str, float]


class Problem(NamedTuple):
    """kind: ridge or logistic. devices: noisy instances, one Data per device. trusted: the same number of parts, the
    trusted instances that each device's teacher holds (some may be empty)."""

    kind: str
    devices: list[Data]
    trusted: list[Data]

    @property
    def all_trusted(self) -> Data:
        return joined(self.trusted)

    @property
    def all_noisy(self) -> Data:
        return joined(self.devices)


def trusted_only(problem: Problem, settings: Settings) -> Floats:
    """The learner on the trusted instances alone. decay."""
    return fitted(problem.kind, problem.all_trusted, settings["decay"])


def noisy_only(problem: Problem, settings: Settings) -> Floats:
    """The learner on everything the devices hold: what plain federated learning comes to. decay."""
    return fitted(problem.kind, problem.all_noisy, settings["decay"])


def trusted_and_noisy(problem: Problem, settings: Settings) -> Floats:
    """The learner on all instances, one as good as the other. decay."""
    return fitted(problem.kind, joined([*problem.devices, *problem.trusted]), settings["decay"])


def weighted(problem: Problem, settings: Settings) -> Floats:
    """Ours: the same with a tuned share of the weight for the noisy instances together. decay, share."""
    return _mixed(problem.kind, problem.all_noisy, problem.all_trusted, settings)


def _mixed(kind: str, noisy: Data, trusted: Data, settings: Settings) -> Floats:
    share = settings["share"]
    weights = np.concatenate(
        [
            np.full(len(noisy.y), share / max(len(noisy.y), 1)),
            np.full(len(trusted.y), (1.0 - share) / len(trusted.y)),
        ]
    )
    return fitted(kind, joined([noisy, trusted]), settings["decay"], weights)


def centred(problem: Problem, settings: Settings) -> Floats:
    """Ours, for regression: `weighted` after each device has taken its own means off its features and targets, so that
    what is shifted on a device as a whole does no harm; the trusted instances place the intercept. decay, share.

    The last feature is the intercept's ones. Known in econometrics as the within (fixed effects) estimator.
    """
    own = [Data(part.x - part.x.mean(0), part.y - part.y.mean()) for part in problem.devices]
    trusted = problem.all_trusted
    middle_x, middle_y = trusted.x.mean(0), trusted.y.mean()
    theta = _mixed(problem.kind, joined(own), Data(trusted.x - middle_x, trusted.y - middle_y), settings)
    theta[-1] = middle_y - middle_x[:-1] @ theta[:-1]
    return theta


def best_devices(problem: Problem, settings: Settings) -> Floats:
    """Ours, after Fang et al. 2020's rejection by loss: a tuned share of the devices is kept, those whose own models
    have the least loss on the trusted instances, and `weighted` learns on them. decay, share, kept."""
    trusted = problem.all_trusted
    losses = [loss(problem.kind, trusted, fitted(problem.kind, part, settings["decay"])) for part in problem.devices]
    number = max(1, round(settings["kept"] * len(losses)))
    kept = [problem.devices[place] for place in np.argsort(losses, kind="stable")[:number]]
    return _mixed(problem.kind, joined(kept), trusted, settings)


def sign_corrected(problem: Problem, settings: Settings) -> Floats:
    """Ours, for classes: a device whose own model ranks the trusted instances the wrong way round (AUC below 1/2) has
    all its labels flipped; then `weighted`. decay, share."""
    trusted = problem.all_trusted
    mended = []
    for part in problem.devices:
        theta = fitted(problem.kind, part, settings["decay"])
        sign = -1.0 if auc(trusted.y, trusted.x @ theta) < 0.5 else 1.0
        mended.append(Data(part.x, sign * part.y))
    return _mixed(problem.kind, joined(mended), trusted, settings)


def coordinate_median(problem: Problem, settings: Settings) -> Floats:
    """covey's median of the devices' models, each learned on the device's noisy and its trusted instances. decay."""
    return _aggregated(problem, settings["decay"], Median())


def geometric_median(problem: Problem, settings: Settings) -> Floats:
    """covey's geometric median of the same models, one round of it (Chen, Su, Xu 2017 take it of gradients). decay."""
    return _aggregated(problem, settings["decay"], GeometricMedian())


def _aggregated(problem: Problem, decay: float, rule: Rule) -> Floats:
    models = [
        fitted(problem.kind, joined([noisy, trusted]), decay)
        for noisy, trusted in zip(problem.devices, problem.trusted)
    ]
    return _by_rule(rule, np.asarray(models))


def _by_rule(rule: Rule, updates: Floats, trusted: Floats | None = None) -> Floats:
    """(F,): the rule's aggregate of (n, F) updates, in its own float32."""
    n = len(updates)
    own = None if trusted is None else trusted.astype(np.float32)
    batch = Batch(Updates(updates.astype(np.float32)), np.ones(n, np.float32), np.arange(n), own)
    return np.asarray(rule.step(NumpyKernels(), batch).aggregate, np.float64)


RSA_STEPS = 1000


def rsa(problem: Problem, settings: Settings) -> Floats:
    """RSA (Li, Xu, Chen, Giannakis, Ling, AAAI 2019), equations 8 and 9, with the l1 norm:
    x_k -= a (grad f_k(x_k) + penalty sign(x_k - x_0)), x_0 -= a (grad f_0(x_0) + penalty sum_k sign(x_0 - x_k)).

    f_k is device k's mean loss; f_0, which is only a regulariser there, also has the trusted instances' mean loss. Full
    gradients, a = rate / sqrt(step); the answer is x_0's mean over the second half of the steps. decay, penalty, rate.
    """
    x, y, present = _stacked(problem.devices)
    trusted, decay, penalty = problem.all_trusted, settings["decay"], settings["penalty"]
    gradient = _gradients(problem.kind, x, y, present)
    own = _gradients(problem.kind, trusted.x[None], trusted.y[None], np.full((1, len(trusted.y)), 1 / len(trusted.y)))
    devices, server = np.zeros((len(x), x.shape[2])), np.zeros(x.shape[2])
    total = np.zeros_like(server)
    for number in range(RSA_STEPS):
        step = settings["rate"] / np.sqrt(number + 1.0)
        signs = penalty * np.sign(devices - server)
        moved = server - step * (own(server[None])[0] + decay * server - signs.sum(0))
        devices = devices - step * (gradient(devices) + signs)
        server = moved
        if number >= RSA_STEPS // 2:
            total += server
    return np.asarray(total / (RSA_STEPS - RSA_STEPS // 2))


def _stacked(parts: list[Data]) -> tuple[Floats, Floats, Floats]:
    """(K, n, F), (K, n), and (K, n) weights 1 / n_k that are 0 where a shorter part was filled up."""
    longest, width = max(len(part.y) for part in parts), parts[0].x.shape[1]
    x, y = np.zeros((len(parts), longest, width)), np.zeros((len(parts), longest))
    present = np.zeros((len(parts), longest))
    for place, part in enumerate(parts):
        size = len(part.y)
        x[place, :size], y[place, :size], present[place, :size] = part.x, part.y, 1.0 / size
    return x, y, present


class _Gradients:
    """Of each part's mean loss at its own parameters: (K, F) -> (K, F). A ridge's from (F, F) products made once."""

    def __init__(self, x: Floats, y: Floats, weights: Floats) -> None:
        self._x, self._y, self._weights = x, y, weights
        self._turned = (x * weights[:, :, None]).transpose(0, 2, 1)

    def __call__(self, theta: Floats) -> Floats:
        z = np.matmul(self._x, theta[:, :, None])[:, :, 0]
        return np.asarray(np.matmul(self._turned, (-self._y * sigmoid(-self._y * z))[:, :, None])[:, :, 0])


class _RidgeGradients(_Gradients):
    def __init__(self, x: Floats, y: Floats, weights: Floats) -> None:
        super().__init__(x, y, weights)
        self._gram, self._right = np.matmul(self._turned, x), np.matmul(self._turned, y[:, :, None])[:, :, 0]

    def __call__(self, theta: Floats) -> Floats:
        return np.asarray(np.matmul(self._gram, theta[:, :, None])[:, :, 0] - self._right)


def _gradients(kind: str, x: Floats, y: Floats, weights: Floats) -> _Gradients:
    return (_RidgeGradients if kind == RIDGE else _Gradients)(x, y, weights)


FLTRUST_ROUNDS, LOCAL_STEPS = 100, 10


def fltrust(problem: Problem, settings: Settings) -> Floats:
    """covey's rule FLTrust (Cao, Fang, Liu, Gong, NDSS 2021): devices and server train from the same model, and the
    server's update says how much each device's counts. decay, rate.

    Full local gradients, 10 steps a round, 100 rounds; the server learns at rate 1.
    """
    parts = [*problem.devices, problem.all_trusted]
    gradient = _gradients(problem.kind, *_stacked(parts))
    theta = np.zeros(parts[0].x.shape[1])
    for _ in range(FLTRUST_ROUNDS):
        models = np.tile(theta, (len(parts), 1))
        for _ in range(LOCAL_STEPS):
            models = models - settings["rate"] * (gradient(models) + settings["decay"] * models)
        theta = theta + _by_rule(FLTrust(), models[:-1] - theta, models[-1] - theta)
    return theta


SUBSETS, KEPT_SUBSETS, CONCENTRATIONS, REWLS_CUTOFF = 200, 10, 10, 2.5
MAD_TO_SIGMA = 1.4826


def rewls(problem: Problem, settings: Settings) -> Floats:
    """REWLS (Gervini, Yohai, Ann. Statist. 2002), sections 2 and 3: least squares on the instances whose residual from
    a robust first fit is below an adaptive cutoff. On all instances in one place. decay.

    First fit: least trimmed squares by 200 random subsets with concentration steps (Rousseeuw, Van Driessen 2006),
    where the paper has an S-estimate; scale: normalised median of |residuals|.
    """
    data = joined([*problem.devices, *problem.trusted])
    residuals = np.abs(data.x @ _least_trimmed_squares(data) - data.y)
    standardised = residuals / max(MAD_TO_SIGMA * float(np.median(residuals)), 1e-12)
    return fitted(RIDGE, data.take(standardised < adaptive_cutoff(standardised)), settings["decay"])


def adaptive_cutoff(residuals: Floats) -> float:
    """The i-th smallest of n absolute standardised residuals, i = n - floor(n d); d is by how much the share of them
    below t is less than a normal distribution's, at most over t >= 2.5."""
    from scipy.special import erf

    ordered, n = np.sort(residuals), len(residuals)
    beyond = ordered >= REWLS_CUTOFF
    missing = erf(ordered[beyond] / np.sqrt(2.0)) - np.arange(n)[beyond] / n
    return float(ordered[n - 1 - int(n * max(missing.max(initial=0.0), 0.0))])


def _least_trimmed_squares(data: Data) -> Floats:
    """(F,): the fit with the least sum of the (n + F + 1) // 2 smallest squared residuals that was found."""
    n, width = data.x.shape
    kept = (n + width + 1) // 2
    random = np.random.default_rng(0)
    candidates = []
    for _ in range(SUBSETS):
        rows = random.choice(n, width, replace=False)
        candidates.append(np.linalg.lstsq(data.x[rows], data.y[rows], rcond=None)[0])
    squares = (data.x @ np.asarray(candidates).T - data.y[:, None]) ** 2
    sums = np.partition(squares, kept - 1, axis=0)[:kept].sum(0)
    found = [_concentrated(data, candidates[place], kept) for place in np.argsort(sums, kind="stable")[:KEPT_SUBSETS]]
    return min(found, key=lambda pair: pair[0])[1]


def _concentrated(data: Data, theta: Floats, kept: int) -> tuple[float, Floats]:
    """(sum of the smallest squares, theta) after least squares on the instances that fit best, again and again."""
    for _ in range(CONCENTRATIONS):
        squares = (data.x @ theta - data.y) ** 2
        near = data.take(np.argpartition(squares, kept - 1)[:kept])
        theta = ridge(near.x, near.y, np.ones(kept), 0.0)
    squares = (data.x @ theta - data.y) ** 2
    return float(np.partition(squares, kept - 1)[:kept].sum()), theta


FLIP_ROUNDS, FLIPS_AT_FIRST = 15, 0.4


def robust_logistic(problem: Problem, settings: Settings) -> Floats:
    """Logistic regression that learns how often labels are flipped (Bootkrajang, Kaban, ECML 2012), by EM: the chance
    that an instance is truly of class 1 given its label, and then parameters and flip rates. decay.

    Rates per device and class; trusted instances are never flipped; it starts from the trusted instances' model, since
    from labels alone most-flipped and hardly-flipped look alike.
    """
    trusted, decay = problem.all_trusted, settings["decay"]
    theta = fitted(problem.kind, trusted, decay)
    noisy = problem.all_noisy
    x = np.concatenate([noisy.x, trusted.x])
    weights = np.full(len(x), 1.0 / len(x))
    owner = np.repeat(np.arange(len(problem.devices)), [len(part.y) for part in problem.devices])
    rates = np.full((len(problem.devices), 2), FLIPS_AT_FIRST)  # of true -1 and of true 1
    for _ in range(FLIP_ROUNDS):
        chance = _truth(noisy, theta, rates[owner])
        rates = _flip_rates((noisy.y + 1) / 2, chance, owner, len(rates))
        theta = logistic(x, np.concatenate([chance, (trusted.y + 1) / 2]), weights, decay, start=theta)
    return theta


def _truth(noisy: Data, theta: Floats, rates: Floats) -> Floats:
    """(n,): the chance that the true class is 1, given the label and the rates (n, 2)."""
    prior, given = sigmoid(noisy.x @ theta), noisy.y > 0
    one = prior * np.where(given, 1.0 - rates[:, 1], rates[:, 1])
    other = (1.0 - prior) * np.where(given, rates[:, 0], 1.0 - rates[:, 0])
    return np.asarray(one / np.maximum(one + other, 1e-300))


def _flip_rates(given: Floats, chance: Floats, owner: Any, devices: int) -> Floats:
    """(K, 2): how often a true -1 is given as 1, and the other way round. given: (n,) labels as 0 and 1."""

    def per_device(values: Floats) -> Floats:
        return np.asarray(np.bincount(owner, values, devices), np.float64)

    ones, others = per_device(chance), per_device(1.0 - chance)
    flipped = np.stack(
        [
            per_device((1.0 - chance) * given) / np.maximum(others, 1e-9),
            per_device(chance * (1.0 - given)) / np.maximum(ones, 1e-9),
        ],
        axis=1,
    )
    return np.asarray(np.clip(flipped, 0.01, 0.99))


def debugged(problem: Problem, settings: Settings) -> Floats:
    """DUTI on every device with its own trusted instances; then the learner on all debugged and trusted instances.
    decay, price, confidence."""
    mended = [
        Data(
            noisy.x,
            duti.debugged(problem.kind, noisy, trusted, settings["decay"], settings["price"], settings["confidence"]),
        )
        for noisy, trusted in zip(problem.devices, problem.trusted)
    ]
    data = joined([*mended, *problem.trusted])
    weights = np.full(len(data.y), 1.0 / len(data.y))
    if problem.kind == RIDGE:
        return ridge(data.x, data.y, weights, settings["decay"])
    return logistic(data.x, (data.y + 1.0) / 2.0, weights, settings["decay"])
