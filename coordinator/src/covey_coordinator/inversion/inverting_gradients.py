"""Inverting gradients: dummy inputs whose gradient points where the seen one does, kept smooth, by signed Adam.

Blind to the gradient's length, so clipping does not stop it; gets further than L-BFGS on trained and deeper models,
with ReLUs and in batches. Source: Geiping, Bauermeister, Droege, Moeller 2020 (arXiv:2003.14053).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from covey_coordinator.inversion.contract import AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.deep_leakage import WholeBatch
from covey_coordinator.inversion.labels import labels_for
from covey_coordinator.inversion.matching import (
    DIRECTION,
    SEES,
    Descent,
    Distance,
    Work,
    best_of,
    descend,
    faded,
    in_the_bundles_form,
    problem_of,
)


@dataclass(frozen=True)
class InvertingGradients:
    """iterations: of each start. restarts: starts, all side by side; the one of least distance wins. labels: one for
    each example; None reads them off the update.

    The paper's settings: 4,800 iterations or more, cosine distance, total variation of 0.01 to 0.0001 in its units.
    """

    iterations: int = 2400
    restarts: int = 2
    labels: Any = None
    distance: Distance = DIRECTION
    settings: Descent = field(default_factory=Descent)

    @property
    def name(self) -> str:
        return "inverting-gradients"

    @property
    def sees(self) -> str:
        return SEES

    def run(
        self, model: AttackedModel, seen: Seen, *, seed: int, stop: Stop | None = None, progress: Progress | None = None
    ) -> Finding:
        problem = problem_of(model, seen, seen.examples, WholeBatch(model), self.distance)
        labels = labels_for(model, seen, self.labels, seed)
        work = Work(self.iterations * self.restarts, stop, progress)
        settings = faded(self.settings, seen)
        starts = problem.starts(np.random.default_rng(seed), self.restarts)
        found = descend(problem, np.stack([in_the_bundles_form(model, labels)] * self.restarts), starts, settings, work)
        best = best_of(found)
        done = sum(one.evaluations for one in found)
        return Finding(self.name, self.sees, best.inputs, labels, best.score, work.seconds, done)
