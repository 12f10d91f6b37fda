"""Consensus super teaching: teachers who know theta* choose, together, instances from which a learner learns it.

OUR RECONSTRUCTION. The paper (Han et al. 2019, IJCNN, arXiv:1905.02796) could be had as an abstract only; it names
consensus optimisation, a teaching risk |theta(S) - theta*|^2 and an oracle-type property as adaptive Lasso has. The
equations below are ours, and so are all deviations. docs/machine-teaching.md's CoMT is a relative without theta*.

The learner: theta(S) = argmin sum_{i in S} l(theta; z_i) + decay / 2 |theta|^2, ridge (l = (y - x'theta)^2 / 2) or
logistic (labels -1 and 1). Which S? Two relaxations, each a convex problem of all teachers together:

    "dual"      min_a sum_i l*(-a_i) + decay/2 |w|^2 + lambda_t |w - theta*|^2 + price sum_i omega_i |a_i|,
                w = (1 / decay) sum_i a_i x_i: the learner's dual with the teaching risk added, as CoMT has it. Whoever
                is kept is kept for its a_i, but the learner that is trained on those alone has other a_i.
    "matching"  min_b |sum_i b_i g_i - decay theta*|^2 / 2 + price sum_i omega_i b_i + smooth/2 |b|^2, 0 <= b <= 1,
                g_i = -grad l(theta*; z_i). The sum's remainder e is the learner's gradient at theta*, so that
                |theta(S) - theta*| <= |e| / decay for b = 1 on S and 0 elsewhere: what is matched is the risk itself.

Weights omega_i = 1 / (what the same problem at price 0 gave i)^gamma, as in adaptive Lasso; 0 there stays out. Both
are solved by consensus ADMM in their Fenchel duals, where the unknown is one d-vector and a teacher's instances are a
loss of it (`minimised`): a round is one d-vector from every teacher, of which the server needs the sum, and one back.
What exceeds `threshold` is selected. Then teachers take turns (`in_turns`): each adds or leaves out own instances while
that brings e nearer to 0, and tells the difference, a d-vector. Retraining is the same consensus once more.

Numpy, float64. Not here: crafting; hostile teachers; privacy: a turn's difference may be one instance's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import ConfigError, DataError
from covey_protocol.teaching import LOGISTIC, RIDGE, Array, Logistic, Loss, Squares, minimised

Flags = npt.NDArray[np.bool_]
RELAXATIONS = ("dual", "matching", "none")
NEVER = 1e12  # omega of an instance that the problem at price 0 did not use
BALANCE_EVERY, UNBALANCED, MOST_CHANGE = 5, 2.0, 5.0  # of ADMM's penalty, by its residuals (Boyd et al. 2011, 3.4.1)


@dataclass(frozen=True)
class SuperSettings:
    """kind: "ridge" or "logistic". relaxation: "dual", "matching", or "none": turns alone, from nobody.

    prices: tried from the first; the union with the least teaching risk is taken. They are in units of what the dearest
    instance is worth in "matching", and as written in "dual". turns: False leaves the relaxation's choice as it is.
    rounds: of one consensus, at most. tolerance: its residuals relative to its vector.
    """

    kind: str = RIDGE
    decay: float = 1.0
    relaxation: str = "matching"
    lambda_t: float = 100.0
    gamma: float = 1.0
    prices: tuple[float, ...] = (0.0, 0.001, 0.01)
    smooth: float = 0.001
    threshold: float = 1e-4
    turns: bool = True
    rounds: int = 500
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        if self.kind not in (RIDGE, LOGISTIC) or self.relaxation not in RELAXATIONS:
            raise ConfigError(
                f"super teaching of a {self.kind!r} learner by {self.relaxation!r}",
                f"choose {RIDGE!r} or {LOGISTIC!r}, and one of {', '.join(RELAXATIONS)}",
            )
        for name in ("decay", "smooth", "tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)!r}", "choose a finite number above 0")
        for name, value in (("lambda_t", self.lambda_t), ("gamma", self.gamma), ("prices", min(self.prices))):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} = {value!r}", "choose finite numbers, 0 or more")


class SuperTaught(NamedTuple):
    """theta: of the learner trained on the selected. risk: |theta - theta*|^2. selected, weights: per teacher, (n_k,);
    weights: a_i or b_i of the relaxation at `price`, before the turns. rounds: of all consensus problems together;
    turns: how many told a difference. vectors: d-vectors that teachers sent in all, trials of other prices included.
    """

    theta: Array
    risk: float
    selected: list[Flags]
    weights: list[Array]
    price: float
    rounds: int
    turns: int
    vectors: int


class Matching(NamedTuple):
    """psi(m) = max over 0 <= b <= 1 of -(m + price) b - smooth / 2 b^2, for each instance. price: (n,)."""

    price: Array
    smooth: float

    def value(self, m: Array) -> float:
        b = self.pull(m)
        return float(np.sum(-(m + self.price) * b - self.smooth / 2 * b * b))

    def pull(self, m: Array) -> Array:
        return np.clip(-(m + self.price) / self.smooth, 0.0, 1.0)

    def bend(self, m: Array) -> Array:
        b = -(m + self.price) / self.smooth
        return ((b > 0) & (b < 1)) / self.smooth


class Part(NamedTuple):
    """A teacher's part of a consensus problem: sum_i psi_i(z_i'p), z (n_k, d)."""

    z: Array
    loss: Loss


class Agreed(NamedTuple):
    """p: (d,) where the sum of all parts and the server's quadratic is least. rounds: until it was."""

    p: Array
    rounds: int


Consensus = Callable[[Sequence[Part], float, Array, SuperSettings], Agreed]


def agreed(parts: Sequence[Part], curvature: float, linear: Array, settings: SuperSettings) -> Agreed:
    """argmin_p sum of all parts + curvature / 2 |p|^2 + linear'p, by consensus ADMM from 0.

    p-step: every teacher's own problem near z - u_k. z-step: the server's, from the sum of p_k + u_k. The penalty
    starts at the parts' mean curvature and follows the residuals; teachers hear of it with z.
    """
    count = len(parts)

    def next_round(z: Array, penalty: float, own: Array, duals: Array) -> Round:
        own = np.stack([near(part, z - u, penalty, p) for part, u, p in zip(parts, duals, own)])
        new = centre(np.sum(own + duals, axis=0), count, penalty, curvature, linear)
        return Round(new, float(np.linalg.norm(own - new)), own, duals + own - new)

    return until_agreed(next_round, count, len(linear), first_penalty(parts, curvature, len(linear)), settings)


class Round(NamedTuple):
    """z: (d,), the new consensus. apart: |own - z| over all teachers. own, duals: (teachers, d)."""

    z: Array
    apart: float
    own: Array
    duals: Array


def until_agreed(
    next_round: Callable[[Array, float, Array, Array], Round],
    count: int,
    d: int,
    penalty: float,
    settings: SuperSettings,
) -> Agreed:
    """Rounds from 0 until the residuals are small. next_round: of (z, penalty, own, duals), wherever it is computed."""
    own, duals, z = np.zeros((count, d)), np.zeros((count, d)), np.zeros(d)
    for number in range(1, settings.rounds + 1):
        old = z
        z, apart, own, duals = next_round(z, penalty, own, duals)
        moved = math.sqrt(count) * float(np.linalg.norm(z - old))
        if max(apart, moved) <= settings.tolerance * max(math.sqrt(count) * float(np.linalg.norm(z)), 1e-12):
            return Agreed(z, number)
        if number % BALANCE_EVERY == 0:
            factor = balance(apart, moved)
            penalty, duals = penalty * factor, duals / factor
    return Agreed(z, settings.rounds)


def first_penalty(parts: Sequence[Part], curvature: float, d: int) -> float:
    """The mean second derivative of a part at 0, in one direction."""
    bends = sum(float(np.sum(part.loss.bend(np.zeros(len(part.z))) @ part.z**2)) for part in parts)
    return max(bends, curvature) / (len(parts) * d)


def near(part: Part, target: Array, penalty: float, start: Array) -> Array:
    """argmin_p of the part + penalty / 2 |p - target|^2: what a teacher computes in a round."""
    return minimised(part.z, part.loss, -penalty * target, penalty, start)


def centre(total: Any, count: Any, penalty: Any, curvature: Any, linear: Any) -> Any:
    """The server's step, of arrays or tensors. total: the sum of p_k + u_k."""
    return (penalty * total - linear) / (count * penalty + curvature)


def balance(apart: float, moved: float) -> float:
    """What the penalty is multiplied by: 1 where the residuals are within UNBALANCED^2 of each other."""
    factor = math.sqrt(apart / max(moved, 1e-300))
    if 1 / UNBALANCED <= factor <= UNBALANCED:
        return 1.0
    return min(max(factor, 1 / MOST_CHANGE), MOST_CHANGE)


def super_teach(
    teachers: Sequence[tuple[Array, Array]],
    theta_star: Array,
    settings: SuperSettings = SuperSettings(),
    consensus: Consensus = agreed,
) -> SuperTaught:
    """teachers: (x (n_k, d), y (n_k,)) each; logistic labels are -1 and 1. consensus: another engine's `agreed`.

    Raises DataError for what does not fit together.
    """
    data, star = _checked(teachers, theta_star, settings), np.asarray(theta_star, np.float64)
    best, rounds, turns, vectors = None, 0, 0, 0
    for price, weights, spent in _relaxed(data, star, settings, consensus):
        selected = [np.abs(part) > settings.threshold for part in weights]
        if settings.turns:
            selected, taken = in_turns(pulls(data, star, settings), selected, settings.decay * star)
            turns, vectors = turns + taken, vectors + taken + len(data)
        theta, used = retrained(data, selected, settings, consensus)
        rounds, vectors = rounds + spent + used, vectors + len(data) * (spent + used)
        risk = float(np.sum((theta - star) ** 2))
        if best is None or risk < best[1]:
            best = (theta, risk, selected, weights, price)
    assert best is not None
    return SuperTaught(*best, rounds, turns, vectors)


def pulls(data: Sequence[tuple[Array, Array]], star: Array, settings: SuperSettings) -> list[Array]:
    """g_i = -grad l(theta*; z_i), (n_k, d) per teacher: what each instance adds to decay * theta."""
    return [part.z * part.loss.pull(part.z @ star)[:, None] for part in learners(data, settings)]


def learners(
    data: Sequence[tuple[Array, Array]], settings: SuperSettings, margins: Sequence[Array] | None = None
) -> list[Part]:
    """The learner's own loss of every teacher's instances; with margins (n_k,), the prices of their a_i."""
    at = [np.zeros(len(y)) for _, y in data] if margins is None else margins
    if settings.kind == RIDGE:
        return [Part(x, Squares(y, 1.0, margin)) for (x, y), margin in zip(data, at)]
    return [Part(y[:, None] * x, Logistic(1.0, margin)) for (x, y), margin in zip(data, at)]


def retrained(
    data: Sequence[tuple[Array, Array]],
    selected: Sequence[Flags],
    settings: SuperSettings,
    consensus: Consensus = agreed,
) -> tuple[Array, int]:
    """theta(S) and the rounds it took; each teacher trains on what it selected."""
    chosen = [(x[flags], y[flags]) for (x, y), flags in zip(data, selected)]
    found = consensus(learners(chosen, settings), settings.decay, np.zeros(data[0][0].shape[1]), settings)
    return found.p, found.rounds


def in_turns(g: Sequence[Array], selected: Sequence[Flags], goal: Array) -> tuple[list[Flags], int]:
    """Teachers change own choices, in turn, while e = sum over S of g_i - goal comes nearer to 0, until nobody can.

    Returns the choices and how many turns told a difference. |e| falls with every change, and choices are finite.
    """
    chosen = [flags.copy() for flags in selected]
    e = sum((flags @ part for part, flags in zip(g, chosen)), -np.asarray(goal, np.float64))
    turns = idle = 0
    while idle < len(g):
        for number, part in enumerate(g):
            changed, new = _own_turn(part, chosen[number], e)
            idle = 0 if changed else idle + 1
            turns, e = turns + changed, new
            if idle >= len(g):
                break
    return chosen, turns


def _own_turn(g: Array, chosen: Flags, e: Array) -> tuple[bool, Array]:
    """Changes `chosen` in place, always the instance that helps most; returns whether it did, and e afterwards."""
    if not len(g):
        return False, e
    squares, changed = np.sum(g * g, axis=1), False
    while True:
        sign = np.where(chosen, -1.0, 1.0)
        gain = 2 * sign * (g @ e) + squares  # of |e|^2
        best = int(np.argmin(gain))
        if gain[best] >= -1e-12 * float(e @ e):
            return changed, e
        e, changed = e + sign[best] * g[best], True
        chosen[best] = not chosen[best]


def _relaxed(
    data: Sequence[tuple[Array, Array]], star: Array, settings: SuperSettings, consensus: Consensus
) -> list[tuple[float, list[Array], int]]:
    """(price, weights per teacher, rounds) for every price."""
    if settings.relaxation == "none":
        return [(0.0, [np.zeros(len(y)) for _, y in data], 0)]
    solve = _dual if settings.relaxation == "dual" else _matched
    free, spent = solve(data, star, [np.zeros(len(y)) for _, y in data], settings, consensus)
    found = [] if 0.0 not in settings.prices else [(0.0, free, spent)]
    with np.errstate(divide="ignore"):
        omega = [np.minimum(np.abs(part) ** -settings.gamma, NEVER) for part in free]
    unit = 1.0 if settings.relaxation == "dual" else _dearest(pulls(data, star, settings), settings.decay * star)
    for price in settings.prices:
        if price > 0:
            weights, rounds = solve(data, star, [price * unit * one for one in omega], settings, consensus)
            found.append((price, weights, rounds + (0 if found else spent)))
    return found


def _dual(
    data: Sequence[tuple[Array, Array]], star: Array, prices: list[Array], settings: SuperSettings, consensus: Consensus
) -> tuple[list[Array], int]:
    """a_i of "dual". w = (decay p + 2 lambda_t theta*) / (decay + 2 lambda_t), p the consensus."""
    stiff = settings.decay + 2 * settings.lambda_t
    parts = learners(data, settings, prices)
    found = consensus(parts, settings.decay**2 / stiff, 2 * settings.decay * settings.lambda_t / stiff * star, settings)
    return [part.loss.pull(part.z @ found.p) for part in parts], found.rounds


def _matched(
    data: Sequence[tuple[Array, Array]], star: Array, prices: list[Array], settings: SuperSettings, consensus: Consensus
) -> tuple[list[Array], int]:
    """b_i of "matching". smooth is relative to the mean |g_i|^2."""
    g = pulls(data, star, settings)
    smooth = settings.smooth * sum(float(np.sum(one * one)) for one in g) / max(sum(len(one) for one in g), 1)
    parts = [Part(one, Matching(price, max(smooth, 1e-12))) for one, price in zip(g, prices)]
    found = consensus(parts, 1.0, settings.decay * star, settings)
    return [part.loss.pull(part.z @ found.p) for part in parts], found.rounds


def _dearest(g: Sequence[Array], goal: Array) -> float:
    """The price above which, with omega 1, nobody is worth anything: max_i g_i'goal."""
    return max(float(np.max(one @ goal, initial=0.0)) for one in g)


def _checked(
    teachers: Sequence[tuple[Array, Array]], star: Array, settings: SuperSettings
) -> list[tuple[Array, Array]]:
    data = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in teachers]
    d = np.shape(star)
    if not data or len(d) != 1 or any(x.ndim != 2 or x.shape[1:] != d or y.shape != x.shape[:1] for x, y in data):
        raise DataError("teachers' instances and theta* do not fit together", "give (n, d), (n,) and (d,)")
    if not all(np.isfinite(x).all() and np.isfinite(y).all() for x, y in data) or not np.isfinite(star).all():
        raise DataError("instances, targets or theta* with numbers that are not finite", "leave them out")
    if settings.kind == LOGISTIC and not all(np.isin(y, (-1.0, 1.0)).all() for _, y in data):
        raise DataError("labels of a logistic learner other than -1 and 1", "write them as -1 and 1")
    return data
