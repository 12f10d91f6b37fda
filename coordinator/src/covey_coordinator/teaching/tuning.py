"""Constants of CoMT: penalties from the data, the rest by a seeded random search on validation data.

The validation data must be clean and not among the trusted instances; a validation set larger than the trusted one (as
in the paper) is itself worth more as trusted data, so say how large it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from covey_coordinator.teaching.reference import Data, Taught, comt
from covey_protocol.errors import ConfigError
from covey_protocol.teaching import LOGISTIC, RIDGE, Problem, Settings

Array = npt.NDArray[np.float64]
BEND = {RIDGE: 1.0, LOGISTIC: 0.1}  # of the learner's loss; at most 1/4 for the logistic one, less away from 0
Score = Callable[[Array, Array, Array], float]


class Tuned(NamedTuple):
    """settings and taught: the best of those tried, by `score`; tried: all, in their order."""

    settings: Settings
    score: float
    taught: Taught
    tried: list[tuple[Settings, float]]


def score_of(problem: Problem) -> Score:
    """(theta, x, y) -> more is better: R^2 of ridge (mean of columns), accuracy of logistic (the largest column)."""
    return _r2 if problem.kind == RIDGE else _accuracy


def tuned(
    teachers: Sequence[Data],
    trusted: Sequence[Data],
    validation: Data,
    problem: Problem,
    *,
    tries: int = 30,
    seed: int = 0,
    base: Settings | None = None,
    score: Score | None = None,
) -> Tuned:
    """The best of `tries` settings drawn from `drawn`, with the rounds and tolerance of `base`.

    The first try is the same whatever the seed: the middle of the ranges, without crafting.
    """
    if tries < 1:
        raise ConfigError(f"tuning with {tries} tries", "choose 1 or more")
    random = np.random.default_rng([seed, 0x7E4C])
    judge = score or score_of(problem)
    best: Tuned | None = None
    tried: list[tuple[Settings, float]] = []
    for number in range(tries):
        settings = drawn(problem, teachers, trusted, random if number else None, base or Settings())
        taught = comt(teachers, trusted, problem, settings)
        value = judge(taught.theta, *validation)
        tried.append((settings, value))
        if best is None or value > best.score:
            best = Tuned(settings, value, taught, tried)
    assert best is not None  # tries is above 0
    return best


def drawn(
    problem: Problem,
    teachers: Sequence[Data],
    trusted: Sequence[Data],
    random: np.random.Generator | None,
    base: Settings,
) -> Settings:
    """Settings in ranges that follow the data's scale, so that no unit matters; the middle where `random` is None.

    lambda_w: 1e-4 to 10 of what all instances bend. lambda_t: the trusted instances bend 1e-2 to 1e4 times lambda_w.
    lambda_a: 0 in half of the tries, else 1e-2 to 3 (ridge: of the targets' deviation). lambda_z: infinite in half,
    else so that crafting adds 1e-1 to 1e3 times lambda_w to the regularisation (docs/teaching-mathematics.md, (14)).
    """

    def between(low: float, high: float) -> float:
        return float(10 ** (random.uniform(low, high) if random is not None else (low + high) / 2))

    bend = BEND[problem.kind]
    everyone, held = bend * sum(_bends(x) for x, _ in teachers), 2 * bend * sum(_bends(x) for x, _ in trusted)
    lambda_w = between(-4, 1) * everyone
    lambda_t = between(-2, 4) * lambda_w / held if held else 0.0
    y = np.concatenate([y for _, y in teachers])
    spread, count = (float(np.std(y)), len(y)) if problem.kind == RIDGE else (1.0, len(y))
    sparse, crafting = between(-2, 0.5) * spread, count * spread**2 / (2 * lambda_w * between(-1, 3))
    coins = (random.random(2) < 0.5) if random is not None else (True, True)
    settings = dataclasses.replace(
        base,
        lambda_w=lambda_w,
        lambda_t=lambda_t,
        lambda_a=0.0 if coins[0] else sparse,
        lambda_z=np.inf if coins[1] else crafting,
    )
    return balanced(problem, teachers, trusted, settings)


def balanced(problem: Problem, teachers: Sequence[Data], trusted: Sequence[Data], settings: Settings) -> Settings:
    """With the penalties rho and curvature at the geometric mean of the eigenvalues they stand against.

    Of one teacher, and of one holder, on average. They change the number of rounds and nothing else.
    """
    bend = BEND[problem.kind]
    learner = [_middle(x, bend, settings.lambda_w / len(teachers)) for x, _ in teachers if len(x)]
    held = [_middle(x, 2 * bend * settings.lambda_t, settings.lambda_w) for x, _ in trusted if len(x)]
    rho = float(np.mean(held)) if held and settings.lambda_t else settings.rho
    return dataclasses.replace(settings, curvature=float(np.mean(learner)), rho=rho)


def _bends(x: Array) -> float:
    """The mean eigenvalue of X'X, the intercept's included."""
    return float((x**2).sum() / x.shape[1])


def _middle(x: Array, bend: float, floor: float) -> float:
    eigenvalues = np.linalg.eigvalsh(x.T @ x)
    return float(np.exp(np.mean(np.log(bend * np.maximum(eigenvalues, 0.0) + floor))))


def _r2(theta: Array, x: Array, y: Array) -> float:
    missed, spread = ((y - x @ theta) ** 2).sum(axis=0), ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    return float(np.mean(1 - missed / spread))


def _accuracy(theta: Array, x: Array, y: Array) -> float:
    seen = x @ theta
    if y.ndim == 1:
        return float(np.mean(np.where(seen > 0, 1.0, -1.0) == y))
    return float(np.mean(seen.argmax(axis=1) == y.argmax(axis=1)))
