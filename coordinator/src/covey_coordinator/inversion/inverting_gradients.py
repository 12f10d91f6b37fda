"""Inverting gradients: dummy inputs whose gradient points where the seen one does, kept smooth, by signed Adam.

Blind to the gradient's length, so clipping does not stop it; gets further than L-BFGS alone on trained and deeper
models, with ReLUs and in batches. Source: Geiping, Bauermeister, Droege, Moeller 2020 (arXiv:2003.14053). Ours: L-BFGS
finishes what Adam began, and in batches moves the labels too, which an update tells with less certainty.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from covey_coordinator.inversion.contract import AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.deep_leakage import WholeBatch
from covey_coordinator.inversion.labels import labels_for, soft_labels_possible
from covey_coordinator.inversion.matching import (
    CERTAIN,
    DIRECTION,
    LIKELY,
    SEES,
    Bend,
    Descent,
    Distance,
    Work,
    best_of,
    descend,
    faded,
    in_the_bundles_form,
    problem_of,
    refine,
)

WITHOUT_END = 1_000_000  # evaluations: L-BFGS is not given up, there is no other start


@dataclass(frozen=True)
class InvertingGradients:
    """iterations: of each start. restarts: starts, all side by side; the one of least distance wins. labels: one for
    each example; None reads them off the update. finish: the share of all iterations that L-BFGS gets, on the best
    start, with as much smoothness as the noise known to be in the update asks for. Of a batch whose labels were read,
    the last part of it (`moving`, a share of all iterations) moves them with the inputs.

    The paper's settings: 4,800 iterations or more, cosine distance, total variation of 0.01 to 0.0001 in its units,
    Adam alone.
    """

    iterations: int = 2400
    restarts: int = 2
    labels: Any = None
    distance: Distance = DIRECTION
    settings: Descent = field(default_factory=Descent)
    finish: float = 0.5
    moving: float = 0.3
    finishing: Bend = field(default_factory=lambda: Bend(memory=30, patience=WITHOUT_END))

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
        settings = faded(self.settings, problem, seen)
        last = settings.smoothing * settings.fade
        starts = problem.starts(np.random.default_rng(seed), self.restarts)
        given = in_the_bundles_form(model, labels)
        found = descend(problem, np.stack([given] * self.restarts), starts, settings, work, 1.0 - self.finish)
        best = best_of(found)
        if self.finish:
            bent = partial(refine, problem, smoothing=last)
            if self.labels is None and seen.examples > 1 and soft_labels_possible(model):
                # shares for both, so that labels that stay and labels that move have one graph
                shares = np.eye(model.manifest.num_classes or 0)[labels]
                keep = round(self.moving * work.total)
                best = bent(shares, best, self.finishing, work, logits=CERTAIN, keep=keep)
                best = bent(shares, best, self.finishing, work, logits=LIKELY)
            else:
                best = bent(given, best, self.finishing, work)
        told = labels if best.labels is None else best.labels.argmax(-1)
        if not work.over:  # L-BFGS found no way down along its line; signs may
            small = dataclasses.replace(settings, step=settings.step / 100, fade=1.0, smoothing=last)
            again = in_the_bundles_form(model, told)[None]
            best = best_of([best, *descend(problem, again, best.inputs[None], small, work)])
        return Finding(self.name, self.sees, best.inputs, told, best.score, work.seconds, work.done)
