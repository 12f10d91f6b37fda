"""CoMT in numpy, all teachers in one process: what TFF and devices are held against, and what experiments run.

The arithmetic is covey_protocol.teaching's and `server`'s; this joins them, every teacher in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from covey_coordinator.teaching.server import Residuals, begun, moved
from covey_protocol.errors import DataError
from covey_protocol.teaching import Problem, Settings, Teacher

Array = npt.NDArray[np.float64]
Data = tuple[Array, Array]


class Crafted(NamedTuple):
    """What a teacher would add to its instances: features (n, F) (C, n, F for C columns) and targets, as y."""

    features: Array
    targets: Array


class Taught(NamedTuple):
    """theta: (F,) or (F, C), the taught model. alphas, crafted: by teacher. history: by round. settled: in time."""

    theta: Array
    alphas: list[Array]
    crafted: list[Crafted]
    history: list[Residuals]
    settled: bool


def comt(teachers: Sequence[Data], trusted: Sequence[Data], problem: Problem, settings: Settings) -> Taught:
    """teachers: (X (n_k, F), y (n_k,) or (n_k, C)) each; trusted: the same, of the teachers in their order.

    Further trusted sets, if there are more than teachers, are holders without other instances (such as the server).
    Sets may be empty. Raises DataError for shapes that do not fit, ConfigError for settings.
    """
    fleet = assembled(teachers, trusted, problem, settings)
    busy, holders = [one for one in fleet if one.teaches], [one for one in fleet if one.trusts]
    state, nothing = begun(fleet[0].share.shape), np.zeros(fleet[0].share.shape)
    history: list[Residuals] = []
    settled = False
    while not settled and len(history) < settings.rounds:
        answers = sum((one.answer(state.theta, state.u, state.tau - one.share) for one in busy), nothing)
        corrections = sum((one.correct(state.theta) for one in holders), nothing)
        state, residuals = moved(state, settings, answers, len(busy), corrections, len(holders))
        history.append(residuals)
        settled = residuals.settled(settings.tolerance)
    for one in fleet:
        one.told(state.theta)
    return Taught(state.theta, [one.alpha for one in fleet], [crafted(one) for one in fleet], history, settled)


def assembled(teachers: Sequence[Data], trusted: Sequence[Data], problem: Problem, settings: Settings) -> list[Teacher]:
    """One Teacher for each set, counting who has what."""
    if not any(len(x) for x, _ in teachers):
        raise DataError("machine teaching without an instance to teach with", "give one teacher some at least")
    nothing = (teachers[0][0][:0], teachers[0][1][:0])
    count = max(len(teachers), len(trusted))
    plain = [*teachers, *[nothing] * (count - len(teachers))]
    checked = [*trusted, *[nothing] * (count - len(trusted))]
    busy = sum(len(x) > 0 for x, _ in plain)
    return [Teacher(problem, settings, *mine, held, busy) for mine, held in zip(plain, checked)]


def crafted(teacher: Teacher) -> Crafted:
    """B = v a' and b_y = a / (2 lambda_y), spelled out: O(n F) numbers that a teacher itself never needs."""
    judged, direction = teacher.judged(), teacher.direction
    if direction.ndim == 1:
        return Crafted(np.outer(judged.weight, direction), judged.target_change)
    return Crafted(np.einsum("nc,fc->cnf", judged.weight, direction), judged.target_change)
