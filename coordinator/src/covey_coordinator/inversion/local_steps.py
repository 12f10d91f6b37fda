"""Inversion of updates of several local steps: the whole local training is unrolled and differentiated.

Every dummy example takes its place in every batch it was in. Whoever wrote the plan knows which batches held the same
example, because the plan's seed and the device's id fix the order. Source: Geiping et al. 2020 (arXiv:2003.14053),
section 6; for orders that are not known compare Dimitrov et al. 2022 (arXiv:2206.12395).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from covey_coordinator.inversion.contract import AttackedModel, Finding, Progress, Seen, Stop
from covey_coordinator.inversion.labels import labels_for
from covey_coordinator.inversion.matching import (
    DIRECTION,
    Bend,
    Descent,
    Distance,
    Rows,
    Simulate,
    Work,
    bend,
    best_of,
    descend,
    faded,
    in_the_bundles_form,
    problem_of,
    rows_of_steps,
)
from covey_protocol.errors import ConfigError

ORDERS = ("known", "unknown")
OPTIMIZERS = ("adam", "l-bfgs")
MAX_STEPS = 200  # each adds a forward and a backward pass to one graph, which cannot be stopped while it is built


@dataclass(frozen=True)
class LocalSteps:
    """order: "known" as the coordinator knows it, or "unknown": every pass is taken to be in the same order.

    optimizer: "adam" as in `inverting_gradients`, "l-bfgs" as in `deep_leakage`. iterations, restarts: of each start,
    as there; l-bfgs may spend iterations * restarts evaluations. labels: given, one for each example in the device's
    own order; None reads how often each class occurs off the update and, with adam, gives every start another order of
    them.
    """

    order: str = "known"
    optimizer: str = "adam"
    iterations: int = 2400
    restarts: int = 2
    labels: Any = None
    distance: Distance = DIRECTION
    descent: Descent = field(default_factory=Descent)
    bending: Bend = field(default_factory=Bend)

    def __post_init__(self) -> None:
        if self.order not in ORDERS or self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"no order {self.order!r} with optimizer {self.optimizer!r}",
                f"choose from {', '.join(ORDERS)} and {', '.join(OPTIMIZERS)}",
            )

    @property
    def name(self) -> str:
        return "local-steps"

    @property
    def sees(self) -> str:
        order = (
            "with its shuffle seed and the device's id" if self.order == "known" else "but not the order of examples"
        )
        return f"The update, the parameters sent out, the model, the plan {order}, and how many examples there are."

    def run(
        self, model: AttackedModel, seen: Seen, *, seed: int, stop: Stop | None = None, progress: Progress | None = None
    ) -> Finding:
        batches = schedule(seen, model.manifest.batch_size, self.order)
        if len(batches) > MAX_STEPS:
            raise ConfigError(
                f"an update of {len(batches)} local steps is too long to unroll (at most {MAX_STEPS})",
                "inverting-gradients takes it as one step",
            )
        problem = problem_of(model, seen, seen.examples, unrolled(model, seen, batches), self.distance)
        work, rng = Work(self.iterations * self.restarts, stop, progress), np.random.default_rng(seed)
        labels = labels_for(model, seen, self.labels, seed)
        if self.optimizer == "l-bfgs":
            best = bend(problem, in_the_bundles_form(model, labels), 0, rng, self.bending, work)
        else:
            later = [labels if self.labels is not None else rng.permutation(labels) for _ in range(self.restarts - 1)]
            orders, starts = [labels, *later], problem.starts(rng, self.restarts)
            given = np.stack([in_the_bundles_form(model, order) for order in orders])
            found = descend(problem, given, starts, faded(self.descent, problem, seen), work)
            best = best_of(found)
            labels = next(order for one, order in zip(found, orders) if one is best)
        return Finding(self.name, self.sees, best.inputs, labels, best.score, work.seconds, work.done)


def schedule(seen: Seen, batch_size: int, order: str = "known") -> list[Rows]:
    """The rows of every step's batch, in the order of the steps."""
    known = rows_of_steps(seen, batch_size)
    if order == "known":
        return known
    rows = np.arange(seen.examples)
    one_pass = [rows[start : start + batch_size] for start in range(0, seen.examples, batch_size)]
    return one_pass * seen.plan.epochs


def unrolled(model: AttackedModel, seen: Seen, batches: list[Rows]) -> Simulate:
    """The update of these steps, divided by minus the rate and their number. A short batch is filled with its own
    examples at weight 0, as devices fill it.
    """
    import tensorflow as tf

    size = model.manifest.batch_size
    scale = -1.0 / (seen.plan.learning_rate * len(batches))
    filled = [np.resize(rows, size) for rows in batches]
    weights = [(np.arange(size) < len(rows)).astype(np.float64) for rows in batches]

    def simulate(parameters: Any, x: Any, y: Any) -> Any:
        picked = [
            (tf.gather(x, rows), tf.gather(y, rows), tf.constant(weight, model.dtype))
            for rows, weight in zip(filled, weights)
        ]
        return scale * model.update(parameters, picked, seen.plan)

    return simulate
