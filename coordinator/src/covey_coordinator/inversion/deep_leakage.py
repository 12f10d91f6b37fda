"""Deep leakage from gradients: dummy inputs whose gradient has the seen gradient's every number, by L-BFGS.

Finds small batches almost exactly on small smooth models that nobody trained. ReLUs, training and larger batches
stop it; `inverting_gradients` gets further there. Source: Zhu, Liu, Han 2019 (arXiv:1906.08935); with labels read off
the gradient: iDLG, Zhao et al. 2020 (arXiv:2001.02610).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from covey_coordinator.inversion.contract import AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.labels import labels_for, soft_labels_possible
from covey_coordinator.inversion.matching import (
    EVERY_NUMBER,
    SEES,
    Bend,
    Distance,
    Work,
    bend,
    in_the_bundles_form,
    problem_of,
)


@dataclass(frozen=True)
class DeepLeakage:
    """evaluations: of the objective with its slope, over all starts together. labels: "sought" with the inputs as in
    DLG, "read" off the gradient as in iDLG, or given, one for each example.

    Deviations from Zhu et al.: SciPy's L-BFGS-B, which searches along its line and keeps to the inputs' box; a new
    start where one is stuck; the best point is kept. A model whose labels cannot be sought softly gets them read.
    """

    evaluations: int = 2000
    labels: Any = "sought"
    distance: Distance = EVERY_NUMBER
    settings: Bend = field(default_factory=Bend)

    @property
    def name(self) -> str:
        return "deep-leakage"

    @property
    def sees(self) -> str:
        return SEES

    def run(
        self, model: AttackedModel, seen: Seen, *, seed: int, stop: Stop | None = None, progress: Progress | None = None
    ) -> Finding:
        problem = problem_of(model, seen, seen.examples, WholeBatch(model), self.distance)
        sought = isinstance(self.labels, str) and self.labels == "sought" and soft_labels_possible(model)
        labels = (
            None if sought else labels_for(model, seen, None if isinstance(self.labels, str) else self.labels, seed)
        )
        work = Work(self.evaluations, stop, progress)
        rng = np.random.default_rng(seed)
        given = None if labels is None else in_the_bundles_form(model, labels)
        best = bend(problem, given, model.manifest.num_classes or 0, rng, self.settings, work)
        found = best.labels.argmax(-1) if best.labels is not None else labels
        return Finding(self.name, self.sees, best.inputs, found, best.score, work.seconds, best.evaluations)


@dataclass(frozen=True)
class WholeBatch:
    """All examples in one step at the parameters sent out: exact for an update of one step, else an approximation."""

    model: AttackedModel

    def __call__(self, parameters: Any, x: Any, y: Any) -> Any:
        return self.model.gradient(parameters, x, y)
