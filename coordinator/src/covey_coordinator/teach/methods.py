"""What `covey teach` compares: teaching, and what needs none. Each learns of parts and trusted examples, at a setting.

A learner is ridge or logistic regression on the features, with lambda_w / 2 |w|^2 beside a sum of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from covey_coordinator.teach.data import Examples, Work
from covey_coordinator.teaching.reference import Taught, comt
from covey_protocol.teaching import RIDGE, Array, Logistic, Problem, Settings, Squares, minimised

Setting = dict[str, float]
Method = Callable[[Work, Sequence[Examples], Examples, Setting], Array]  # -> theta (F + 1, C)

DECAYS = (0.01, 0.1, 1.0, 10.0, 100.0)
ROUNDS, TOLERANCE = 60, 3e-3  # of teaching; settings are ranked, and scores compared, to a percent


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


def trusted_only(work: Work, parts: Sequence[Examples], trusted: Examples, setting: Setting) -> Array:
    return learned(work, trusted, setting["lambda_w"])


def everything(work: Work, parts: Sequence[Examples], trusted: Examples, setting: Setting) -> Array:
    return learned(work, joined([*parts, trusted]), setting["lambda_w"])


def median(work: Work, parts: Sequence[Examples], trusted: Examples, setting: Setting) -> Array:
    """Number by number, of the models that each teacher learns alone."""
    return np.asarray(np.median([learned(work, part, setting["lambda_w"]) for part in parts], axis=0))


def teaching(work: Work, parts: Sequence[Examples], trusted: Examples, setting: Setting) -> Array:
    return taught(work, parts, trusted, setting).theta


def taught(work: Work, parts: Sequence[Examples], trusted: Examples, setting: Setting) -> Taught:
    """CoMT, the trusted examples being the coordinator's."""
    data = [(part.features, work.targets(part.y)) for part in parts]
    nothing = data[0][0][:0], data[0][1][:0]
    held = (trusted.features, work.targets(trusted.y))
    settings = settings_of(parts, trusted, setting)
    return comt(data, [*[nothing] * len(data), held], Problem(work.kind), settings)


def settings_of(parts: Sequence[Examples], trusted: Examples, setting: Setting) -> Settings:
    """With the pace that suits these examples, which moves no result. trust: weight of all trusted examples together,
    in weights of all others together."""
    n, width = sum(len(part) for part in parts), parts[0].features.shape[1]
    weight = setting["trust"] * n / len(trusted)
    bend = sum(float(np.sum(part.features**2)) for part in parts) / (width * len(parts))
    return Settings(
        lambda_w=setting["lambda_w"],
        lambda_t=weight,
        lambda_a=setting["lambda_a"],
        lambda_z=setting["lambda_z"],
        lambda_y=setting["lambda_y"],
        rho=2 * weight * len(trusted),
        curvature=max(bend, setting["lambda_w"]),
        rounds=ROUNDS,
        tolerance=TOLERANCE,
    )


def decays(random: np.random.Generator, count: int) -> list[Setting]:
    return [{"lambda_w": decay} for decay in DECAYS]


def teachings(random: np.random.Generator, count: int) -> list[Setting]:
    """Drawn anew each time; the same generator draws the same ones."""
    choices: dict[str, Any] = {
        "lambda_w": DECAYS,
        "trust": (0.03, 0.3, 3.0, 30.0),
        "lambda_a": (0.0, 0.05, 0.2),
        "lambda_z": (np.inf, 100.0, 1.0),
        "lambda_y": (np.inf, 10.0, 1.0),
    }
    return [{name: float(random.choice(values)) for name, values in choices.items()} for _ in range(count)]


@dataclass(frozen=True)
class Contestant:
    """settings: of (generator, how many at most) those that it is tuned over."""

    title: str
    method: Method
    settings: Callable[[np.random.Generator, int], list[Setting]]


CONTESTANTS = {
    "trusted-only": Contestant("trusted examples alone", trusted_only, decays),
    "everything": Contestant("all examples together", everything, decays),
    "median": Contestant("median of the teachers' models", median, decays),
    "teaching": Contestant("machine teaching (CoMT)", teaching, teachings),
}
