"""What `covey teach` compares: teaching, and what needs none. Each learns of parts and trusted examples, at a setting.

A plain learner is ridge or logistic regression on the features, with decay / 2 |w|^2 beside a sum of losses; its
setting is the decay. The setting of teaching are its constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.teach.data import Examples, Work
from covey_coordinator.teaching.reference import Data, Taught, comt
from covey_coordinator.teaching.tuning import balanced, drawn
from covey_protocol.teaching import RIDGE, Array, Logistic, Problem, Settings, Squares, minimised

Method = Callable[[Work, Sequence[Examples], Examples, Any], Array]  # the last is a setting; -> theta (F + 1, C)

DECAYS = tuple(10.0**power for power in range(-4, 3))
BASE = Settings(rounds=60, tolerance=3e-3)  # settings are ranked, and scores compared, to a percent


def learned(work: Work, examples: Examples, decay: float) -> Array:
    """(F + 1, C): the plain learner on these examples."""
    y = work.targets(examples.y)
    return np.stack([_column(work, examples.features, y[:, place], decay) for place in range(y.shape[1])], axis=1)


def _column(work: Work, x: Array, y: Array, decay: float) -> Array:
    start = np.zeros(x.shape[1])
    if work.kind == RIDGE:
        return minimised(x, Squares(y, 1.0), start, decay, start)
    return minimised(y[:, None] * x, Logistic(1.0), start, decay, start)


def joined(parts: Sequence[Examples]) -> Examples:
    return Examples(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "features", "y")))


def trusted_only(work: Work, parts: Sequence[Examples], trusted: Examples, setting: float) -> Array:
    return learned(work, trusted, setting)


def everything(work: Work, parts: Sequence[Examples], trusted: Examples, setting: float) -> Array:
    return learned(work, joined([*parts, trusted]), setting)


def median(work: Work, parts: Sequence[Examples], trusted: Examples, setting: float) -> Array:
    """Number by number, of the models that each teacher learns alone."""
    return np.asarray(np.median([learned(work, part, setting) for part in parts], axis=0))


def teaching(work: Work, parts: Sequence[Examples], trusted: Examples, setting: Settings) -> Array:
    return taught(work, parts, trusted, setting).theta


def taught(work: Work, parts: Sequence[Examples], trusted: Examples, setting: Settings) -> Taught:
    """CoMT, the trusted examples being the coordinator's, at the pace that suits these."""
    teachers, held = as_data(work, parts, trusted)
    problem = Problem(work.kind)
    return comt(teachers, held, problem, balanced(problem, teachers, held, setting))


def as_data(work: Work, parts: Sequence[Examples], trusted: Examples) -> tuple[list[Data], list[Data]]:
    """What the teachers have, and what is trusted: one set more than there are teachers, which have none."""
    teachers = [(part.features, work.targets(part.y)) for part in parts]
    nothing = teachers[0][0][:0], teachers[0][1][:0]
    return teachers, [*[nothing] * len(teachers), (trusted.features, work.targets(trusted.y))]


def decays(work: Work, parts: Sequence[Examples], trusted: Examples, tries: int, seed: int) -> list[Any]:
    return list(DECAYS)


def teachings(work: Work, parts: Sequence[Examples], trusted: Examples, tries: int, seed: int) -> list[Any]:
    """The middle of the ranges, and others drawn from them."""
    data, random = as_data(work, parts, trusted), np.random.default_rng(seed)
    return [drawn(Problem(work.kind), *data, random if number else None, BASE) for number in range(tries)]


@dataclass(frozen=True)
class Contestant:
    """settings: those that it is tuned over."""

    title: str
    method: Method
    settings: Callable[[Work, Sequence[Examples], Examples, int, int], list[Any]]


CONTESTANTS = {
    "trusted-only": Contestant("trusted examples alone", trusted_only, decays),
    "everything": Contestant("all examples together", everything, decays),
    "median": Contestant("median of the teachers' models", median, decays),
    "teaching": Contestant("machine teaching (CoMT)", teaching, teachings),
}
