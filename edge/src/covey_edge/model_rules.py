"""Which of two models a device uses: paired scores on its held-out examples. Numbers in, decisions out; no NumPy, since
the agent's own process decides.

Held-out examples are few and everybody's scores on them are noisy, but on the *same* examples two models are wrong
together: so the difference is judged, group by group, and not the two scores.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from msgspec import Struct

Measure = Literal["loss", "accuracy"]


class Score(Struct, frozen=True):
    """One model on the held-out examples: of each group, the sum of losses and how many answers were right."""

    losses: tuple[float, ...]
    correct: tuple[float, ...]

    def mean(self, measure: Measure, counts: tuple[int, ...]) -> float:
        return sum(self.losses if measure == "loss" else self.correct) / sum(counts)


class Gain(NamedTuple):
    """By how much a model is better than another, in units of the measure; below 0 it is worse. error: standard error
    of it."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.4g}, standard error {self.error:.2g}"


def gain(new: Score, old: Score, counts: tuple[int, ...], measure: Measure) -> Gain:
    """Of `new` over `old` per example, from the paired differences of groups of `counts` examples.

    The standard error of a ratio of sums over groups (Cochran 1977, Sampling Techniques, eq. 6.13, without the finite
    population correction); infinite with fewer than two groups. A loss that is not finite loses against any that is.
    """
    if measure == "loss":
        differences = [o - n for n, o in zip(new.losses, old.losses)]
        finite = [math.isfinite(sum(score.losses)) for score in (new, old)]
        if not all(finite):
            return Gain(0.0 if not any(finite) else math.inf if finite[0] else -math.inf, 0.0)
    else:
        differences = [n - o for n, o in zip(new.correct, old.correct)]
    total, groups = sum(counts), len(counts)
    value = sum(differences) / total
    if groups < 2:
        return Gain(value, math.inf)
    squares = sum((d - value * count) ** 2 for d, count in zip(differences, counts))
    return Gain(value, math.sqrt(squares * groups / (groups - 1)) / total)


def is_worse(of: Gain, min_gain: float) -> bool:
    """Whether a new model is kept out: worse by more than min_gain and one standard error. A tie lets it in."""
    return of.value < -(min_gain + of.error)


def is_preferred(personal: Gain, min_gain: float, *, in_use: bool) -> bool:
    """Whether the personal model is used in place of the federated one, given its gain over that.

    To come into use it must be better by more than min_gain and one standard error; to stay in use, better at all. So
    two models that are about equal do not take turns, and a tie is the federated one's.
    """
    return personal.value > (0.0 if in_use else min_gain + personal.error)
