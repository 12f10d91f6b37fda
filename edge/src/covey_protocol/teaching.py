"""Machine teaching (CoMT), the arithmetic of one teacher: a device with many instances, trusted or not.

Numpy alone, and one definition for live devices, the simulation's twin and the reference. The derivation, with the
places where we leave the paper, is docs/teaching-mathematics.md; equations are numbered there, "(6)". What the server
does: covey_coordinator.teaching.server. Source: Han, Zhang 2020 (AAAI, "Robust Federated Training via Collaborative
Machine Teaching using Trusted Instances"), equations 4 and 5 and Algorithm 1.

Shapes: n instances, F features, C columns (targets of ridge, classes of logistic one against the rest). Arrays are
float64; a vector (F,) goes wherever y is (n,), a matrix (F, C) where y is (n, C). Columns do not know of each other.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import NamedTuple, Optional, Protocol, Union

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import ConfigError, DataError, StorageError, UsageError

Array = npt.NDArray[np.float64]
RIDGE, LOGISTIC = "ridge", "logistic"
SELECTED_ABOVE = 1e-4  # the paper's threshold on |a_i|
NEWTON_STEPS = 100  # a safeguard: the learners of the tests take 1 to 5, begun where the last round ended
HALVINGS = 40
NEARLY_DONE = 1e-12  # Newton's decrement, relative to the value; the step after it is the last, and exact to rounding


@dataclass(frozen=True)
class Problem:
    """kind: "ridge" or "logistic". fixed: how many of the last features no crafting may change (the intercept)."""

    kind: str = RIDGE
    fixed: int = 1

    def __post_init__(self) -> None:
        if self.kind not in (RIDGE, LOGISTIC):
            raise ConfigError(f"machine teaching of a {self.kind!r} learner", f"choose {RIDGE!r} or {LOGISTIC!r}")
        if self.fixed < 0:
            raise ConfigError(f"{self.fixed} fixed features", "name 0 or more")


@dataclass(frozen=True)
class Settings:
    """The constants of equation (3), of sums over instances, not of means; infinity turns crafting off.

    lambda_w: regularisation of the learner. lambda_t: weight of a trusted instance. lambda_a: what an instance must
    be worth to be used at all. lambda_z, lambda_y: price of crafting features and targets. rho, curvature: of ADMM;
    they decide how many rounds it takes, not where it ends. rho: how firmly holders of trusted instances are held to
    the model; good near what a trusted instance set bends, 2 lambda_t m_k. curvature: the same of teachers, good near
    the geometric mean of the eigenvalues of one's X'X, for logistic a tenth of it. rounds: at most so many; tolerance:
    of the residuals, relative to the model.
    """

    lambda_w: float = 1.0
    lambda_t: float = 1.0
    lambda_a: float = 0.0
    lambda_z: float = math.inf
    lambda_y: float = math.inf
    rho: float = 1.0
    curvature: float = 1.0
    rounds: int = 300
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("lambda_w", "lambda_z", "rho", "curvature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)!r}", "choose a number above 0")
        for name in ("lambda_t", "lambda_a", "tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)!r}", "choose a finite number, 0 or more")
        if not math.isfinite(self.lambda_w + self.rho + self.curvature):
            raise ConfigError("an infinite lambda_w, rho or curvature", "choose finite numbers")
        if not self.lambda_y > 0.5:
            raise ConfigError(
                f"lambda_y = {self.lambda_y!r}: at 1/2 and below, crafted targets grow without bound",
                "choose a number above 0.5",
            )
        if self.rounds < 1:
            raise ConfigError(f"{self.rounds} rounds of teaching", "choose 1 or more")


class Squares(NamedTuple):
    """psi(m) = scale / 2 * soft(target - m, margin)^2 of each instance."""

    target: Array
    scale: float
    margin: Union[float, Array] = 0.0

    def value(self, m: Array) -> float:
        return float(self.scale / 2 * np.sum(_soft(self.target - m, self.margin) ** 2))

    def pull(self, m: Array) -> Array:
        """-psi'(m): of the learner's loss, that is the instance's dual variable a_i."""
        return np.asarray(self.scale * _soft(self.target - m, self.margin))

    def bend(self, m: Array) -> Array:
        return np.asarray(self.scale * (np.abs(self.target - m) > self.margin))


class Logistic(NamedTuple):
    """psi(m) = scale * log(1 + exp(-(m + margin))), m the instance's label times what the model says."""

    scale: float
    margin: Union[float, Array] = 0.0

    def value(self, m: Array) -> float:
        return float(self.scale * np.sum(np.logaddexp(0.0, -(m + self.margin))))

    def pull(self, m: Array) -> Array:
        return np.asarray(self.scale * np.exp(-np.logaddexp(0.0, m + self.margin)))

    def bend(self, m: Array) -> Array:
        p = np.exp(-np.logaddexp(0.0, m + self.margin))
        return np.asarray(self.scale * p * (1 - p))


class Loss(Protocol):
    """A sum of psi over instances, with its slope (`pull`) and second derivative (`bend`) in every m (n,)."""

    def value(self, m: Array) -> float: ...

    def pull(self, m: Array) -> Array: ...

    def bend(self, m: Array) -> Array: ...


class Judged(NamedTuple):
    """What a teacher found about its own instances, for their owner. Nothing of it is in any message.

    selected: (n,) used by the learner at all. weight: (n,) or (n, C), the dual variable a_i: how hard the instance
    pulls. residual: the same shape, at the taught model; ridge: target minus prediction, logistic: the label's margin,
    below 0 where the model says otherwise. feature_change: (n,), norm of what crafting adds to the features;
    target_change: as weight.
    """

    selected: npt.NDArray[np.bool_]
    weight: Array
    residual: Array
    feature_change: Array
    target_change: Array


class Teacher:
    """One teacher's instances and what it remembers from round to round.

    x (n, F), y (n,) or (n, C): what it does not trust; logistic labels are -1 and 1. trusted: the same of what it
    does. n may be 0 in either. teachers: how many have instances of the first kind, this one included if it has.
    Raises DataError for what does not fit together.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        x: Array,
        y: Array,
        trusted: Optional[tuple[Array, Array]] = None,
        teachers: int = 1,
    ) -> None:
        if teachers < 1:
            raise UsageError(f"machine teaching by {teachers} teachers", "count this one, too")
        self.problem, self.settings = problem, settings
        self._vector = np.ndim(y) == 1
        self._x, self._y = _checked(problem, x, y)
        own = (self._x[:0], self._y[:0]) if trusted is None else _checked(problem, *trusted)
        if own[0].shape[1] != self._x.shape[1] or own[1].shape[1] != self._y.shape[1]:
            raise DataError("trusted instances of another shape than the others", "give both the same features")
        self._trusted = own
        self._teachers = teachers
        n, f, c = len(self._x), self._x.shape[1], self._y.shape[1]
        if problem.fixed > f:
            raise DataError(f"{problem.fixed} fixed among {f} features", "name fewer")
        self._alpha = np.zeros((n, c))
        self._direction, self._local = np.zeros((f, c)), np.zeros((f, c))
        self._share, self._theta = np.zeros((f, c)), np.zeros((f, c))
        self._own_theta, self._dual = np.zeros((f, c)), np.zeros((f, c))
        self._corrected = False

    @property
    def teaches(self) -> bool:
        """True for a teacher with instances that it does not trust: only such are counted as `teachers`."""
        return len(self._x) > 0

    @property
    def trusts(self) -> bool:
        """True for a holder of trusted instances: only holders are asked for `correct`, and only they are counted."""
        return len(self._trusted[0]) > 0

    @property
    def share(self) -> Array:
        """Its part of the learner's w, as it last answered: what `others` leaves out of the sum."""
        return self._shown(self._share)

    @property
    def alpha(self) -> Array:
        """(n,) or (n, C) the instances' dual variables."""
        return self._shown(self._alpha)

    @property
    def direction(self) -> Array:
        """(F,) or (F, C): v of the crafting B = v a' (8)."""
        return self._shown(self._direction)

    def answer(self, theta: Array, u: Array, others: Array) -> Array:
        """Its new part of w (6, 7, 8), of the shape of theta.

        theta: the model, u: the dual of theta = tau, both the server's. others: the sum of the other teachers' parts:
        tau - share where its last answer is part of tau, tau where it is not.
        """
        theta, u, others = (self._columns(part) for part in (theta, u, others))
        self._theta = theta
        if self.teaches:
            wanted = self._share + (theta - others - self._share) / self._teachers + u
            for column in range(theta.shape[1]):
                self._answer_column(column, wanted[:, column])
        return self.share

    def correct(self, theta: Array) -> Array:
        """What its trusted instances would change in theta (9), of the shape of theta; in the same round as `answer`.

        Raises UsageError for a teacher that trusts nothing.
        """
        if not self.trusts:
            raise UsageError("a correction by a teacher without trusted instances", "ask holders only")
        theta = self._columns(theta)
        if self._corrected:
            self._dual = self._dual + self._own_theta - theta
        for column in range(theta.shape[1]):
            self._own_theta[:, column] = self._corrected_column(column, theta[:, column] - self._dual[:, column])
        self._corrected = True
        return self._shown(self._own_theta + self._dual - theta)

    def told(self, theta: Array) -> None:
        """The model that teaching ended with, which `judged` is about."""
        self._theta = self._columns(theta)

    def judged(self) -> Judged:
        """About its instances, at the model it was last told."""
        seen = self._x @ self._theta
        residual = self._y - seen if self.problem.kind == RIDGE else self._y * seen
        length = np.linalg.norm(self._direction, axis=0)
        return Judged(
            (np.abs(self._alpha) > SELECTED_ABOVE).any(axis=1),
            self._shown(self._alpha),
            self._shown(residual),
            np.linalg.norm(self._alpha * length, axis=1),
            self._shown(self._alpha / (2 * self.settings.lambda_y) * (self.problem.kind == RIDGE)),
        )

    def saved(self) -> bytes:
        """What the next round depends on, without the instances."""
        file = io.BytesIO()
        np.savez(file, corrected=np.array(self._corrected), **{name: getattr(self, f"_{name}") for name in _KEPT})
        return file.getvalue()

    def loaded(self, data: bytes) -> Teacher:
        """This teacher, in the state that was saved. Raises StorageError for another's state or damaged bytes."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as kept:
                parts = {name: np.array(kept[name], np.float64) for name in _KEPT}
                corrected = bool(kept["corrected"])
        except Exception as exc:  # numpy and zipfile raise many things for damaged bytes
            raise StorageError("the saved state of a teacher cannot be read", "begin the teaching anew") from exc
        for name, part in parts.items():
            if part.shape != getattr(self, f"_{name}").shape or not np.isfinite(part).all():
                raise StorageError(f"the saved {name} of a teacher is of other data", "begin the teaching anew")
        for name, part in parts.items():
            setattr(self, f"_{name}", part)
        self._corrected = corrected
        return self

    def _answer_column(self, column: int, wanted: Array) -> None:
        told = self.settings
        kappa = told.lambda_w**2 / told.curvature
        x, loss = self._margins(column), self._learner(column)
        crafted = x + np.outer(self._alpha[:, column], self._direction[:, column])
        linear = told.lambda_w * wanted
        self._local[:, column] = minimised(crafted, loss, linear, told.curvature, self._local[:, column])
        alpha = loss.pull(crafted @ self._local[:, column])
        size, plain = float(alpha @ alpha), x.T @ alpha / told.lambda_w
        v = kappa / told.lambda_w * (wanted - plain) / (kappa * size / told.lambda_w**2 + 2 * told.lambda_z)
        v[len(v) - self.problem.fixed :] = 0.0
        self._alpha[:, column], self._direction[:, column] = alpha, v
        self._share[:, column] = plain + size / told.lambda_w * v

    def _corrected_column(self, column: int, target: Array) -> Array:
        x, y = self._trusted[0], self._trusted[1][:, column]
        loss: Loss
        if self.problem.kind == RIDGE:
            loss = Squares(y, 2 * self.settings.lambda_t)
        else:
            x, loss = y[:, None] * x, Logistic(self.settings.lambda_t)
        return minimised(x, loss, -self.settings.rho * target, self.settings.rho, target)

    def _margins(self, column: int) -> Array:
        return self._x if self.problem.kind == RIDGE else self._y[:, column, None] * self._x

    def _learner(self, column: int) -> Loss:
        if self.problem.kind == LOGISTIC:
            return Logistic(1.0, self.settings.lambda_a)
        return Squares(self._y[:, column], 1 / (1 - 1 / (2 * self.settings.lambda_y)), self.settings.lambda_a)

    def _columns(self, part: Array) -> Array:
        """(F, C) of what came as (F,) or (F, C). Raises UsageError for other shapes and infinite or missing numbers."""
        wide = np.array(part, np.float64).reshape(len(part), -1)
        if wide.shape != self._share.shape or not np.isfinite(wide).all():
            raise UsageError(
                f"a model of shape {np.shape(part)} where {self._share.shape} is taught, or not finite",
                "send what the server made",
            )
        return wide

    def _shown(self, part: Array) -> Array:
        return np.array(part[:, 0] if self._vector else part)


_KEPT = ("alpha", "direction", "local", "share", "theta", "own_theta", "dual")


def minimised(z: Array, loss: Loss, linear: Array, curvature: float, start: Array) -> Array:
    """The w (F,) with the least sum_i psi_i(z_i' w) + linear' w + curvature / 2 |w|^2, by damped Newton.

    A step costs O(n F^2 + F^3). The sum is strongly convex and halved steps descend, so it arrives from any start,
    in NEWTON_STEPS unless the logistic losses are asked for more than they can pull (margins of 1e6 and beyond);
    psi of Squares with a margin has no second derivative at two points, where `bend` takes 0 (semismooth Newton).
    """
    w = start
    value = float(loss.value(z @ w) + linear @ w + curvature / 2 * (w @ w))
    for _ in range(NEWTON_STEPS):
        m = z @ w
        gradient = linear + curvature * w - z.T @ loss.pull(m)
        step = np.linalg.solve(z.T @ (loss.bend(m)[:, None] * z) + curvature * np.eye(len(w)), gradient)
        decrement = float(gradient @ step)
        if decrement <= NEARLY_DONE * max(1.0, abs(value)):
            return np.asarray(w - step)
        factor = 1.0
        for _ in range(HALVINGS):
            tried = w - factor * step
            new = float(loss.value(z @ tried) + linear @ tried + curvature / 2 * (tried @ tried))
            if new <= value - 0.25 * factor * decrement:
                break
            factor /= 2
        w, value = tried, new
    return w


def _soft(values: Array, threshold: Union[float, Array]) -> Array:
    return np.asarray(np.sign(values) * np.maximum(np.abs(values) - threshold, 0.0))


def _checked(problem: Problem, x: Array, y: Array) -> tuple[Array, Array]:
    features, targets = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if features.ndim != 2 or targets.ndim not in (1, 2) or len(features) != len(targets):
        raise DataError(f"instances of shape {features.shape} with targets {targets.shape}", "give (n, F) and (n,)")
    if not (np.isfinite(features).all() and np.isfinite(targets).all()):
        raise DataError("instances with numbers that are not finite", "leave them out")
    if problem.kind == LOGISTIC and not np.isin(targets, (-1.0, 1.0)).all():
        raise DataError("labels of a logistic learner other than -1 and 1", "use one_vs_rest for classes")
    return features, targets.reshape(len(targets), 1 if targets.ndim == 1 else targets.shape[1])
