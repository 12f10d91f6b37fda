"""Which of the methods is best on the trusted examples, each tuned on other trusted examples than it is judged on.

The trusted examples are cut into folds. For each fold, every method is tuned and learns on the others, and is scored
on this one; tuning holds a third of the others out. So no score has seen its own fold, whichever method has more
settings to choose from. What is compared are the differences fold by fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.teach.data import Examples, Work
from covey_coordinator.teach.methods import CONTESTANTS, Contestant
from covey_protocol.errors import DataError
from covey_protocol.teaching import RIDGE, Array

FOLDS = 5
TUNING_SHARE = 1 / 3
LEAST = 10  # trusted examples; of fewer no fold says anything
CLEARLY = 2.0  # standard errors of the mean difference


@dataclass(frozen=True)
class Compared:
    """scores: by method, one for each fold: accuracy, or R2. settings: by method, tuned on all trusted examples."""

    scores: dict[str, list[float]]
    settings: dict[str, Any]

    def mean(self, name: str) -> float:
        return float(np.mean(self.scores[name]))

    def gain(self) -> tuple[float, float]:
        """(mean, standard error) of teaching's score above that of the trusted examples alone."""
        differences = np.subtract(self.scores["teaching"], self.scores["trusted-only"])
        return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))

    def helps(self) -> bool:
        mean, error = self.gain()
        return mean > 0 and mean > CLEARLY * error


def compared(work: Work, seed: int, tries: int, finished: Callable[[str], None]) -> Compared:
    """tries: settings of teaching. finished: told of each fold of each method, and of each last tuning."""
    if len(work.trusted) < LEAST:
        raise DataError(
            f"{len(work.trusted)} trusted examples", f"give {LEAST} or more: some of them have to judge the others"
        )
    parts = [work.data.take(rows) for rows in work.parts]
    folds = stratified(work, work.trusted.y, FOLDS, seed)
    scores: dict[str, list[float]] = {}
    settings: dict[str, Any] = {}
    for name, one in CONTESTANTS.items():
        scores[name] = []
        for number, fold in enumerate(folds):
            rest = np.concatenate([other for other in folds if other is not fold])
            held = work.trusted.take(np.sort(rest))
            setting = tuned(work, one, parts, held, seed + number, tries)
            theta = one.method(work, parts, held, setting)
            scores[name].append(score(work, work.trusted.take(fold), theta))
            finished(f"{one.title}: {scores[name][-1]:.3f} on fold {number + 1}")
        settings[name] = tuned(work, one, parts, work.trusted, seed, tries)
        finished(f"{one.title}: tuned")
    return Compared(scores, settings)


def steps() -> int:
    """How often `compared` calls `finished`."""
    return len(CONTESTANTS) * (FOLDS + 1)


def tuned(work: Work, one: Contestant, parts: Sequence[Examples], trusted: Examples, seed: int, tries: int) -> Any:
    """The setting whose model, of two thirds of these trusted examples, is best on the last third."""
    judges = stratified(work, trusted.y, round(1 / TUNING_SHARE), seed)[0]
    others = np.setdiff1d(np.arange(len(trusted)), judges)
    held, judging = trusted.take(others), trusted.take(judges)
    settings = one.settings(work, parts, held, tries, seed)
    found = [loss(work, judging, one.method(work, parts, held, setting)) for setting in settings]
    return settings[int(np.argmin(found))]


def stratified(work: Work, y: npt.NDArray[Any], count: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Rows in so many folds, each with its share of every class."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(y))
    if work.kind != RIDGE:
        order = order[np.argsort(y[order], kind="stable")]
    return [np.sort(order[place::count]) for place in range(count)]


def score(work: Work, examples: Examples, theta: Array) -> float:
    """Accuracy, or R2 of numbers."""
    outputs = examples.features @ theta
    if work.kind == RIDGE:
        spread = float(np.sum((examples.y - examples.y.mean()) ** 2))
        return 1.0 - float(np.sum((examples.y - outputs[:, 0]) ** 2)) / max(spread, 1e-300)
    return float(np.mean(chosen(outputs) == examples.y))


def chosen(outputs: Array) -> npt.NDArray[np.int64]:
    """(n, C) -> (n,), the class."""
    return np.asarray(outputs.argmax(axis=1) if outputs.shape[1] > 1 else outputs[:, 0] > 0, np.int64)


def loss(work: Work, examples: Examples, theta: Array) -> float:
    """What settings are chosen by: it tells models apart that few examples score alike."""
    outputs, y = examples.features @ theta, work.targets(examples.y)
    if work.kind == RIDGE:
        return float(np.mean((y - outputs) ** 2))
    return float(np.mean(np.logaddexp(0.0, -y * outputs)))
