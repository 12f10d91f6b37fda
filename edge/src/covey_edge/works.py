"""What a device makes of its data where the plan asks for another work than `train`: docs/protocol.md, section 8.4.

Runs in the training child. The arithmetic is covey_protocol.svrg's and covey_protocol.scaffold's; this file gives it
the bundle's entry points; machine teaching is in `teaching`. Federated SVRG goes by `gradient` alone: its step scales a
difference of two gradients, which no constant added inside `train` can do, and so any bundle can follow it. SCAFFOLD
adds a constant: `train`'s `correction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Optional

import numpy as np

from covey_edge.data_sources import Examples
from covey_edge.frames import Done, Run
from covey_edge.runtime import Floats, Model
from covey_protocol import scaffold, svrg
from covey_protocol.bundle import check_plan
from covey_protocol.errors import TrainingError
from covey_protocol.works import CORRECT, GRADIENT, SVRG, TEACH, VECTORS, feature_units


class Made(NamedTuple):
    """update: (d,), as it was made, before clipping and noise. loss: mean over the steps, where they tell it.

    kept: what the device keeps for its next round of this work: float32 little-endian, or a teacher's state; b"" for
    nothing. found: what its owner is told of the data, by file name.
    """

    update: Floats
    loss: Optional[float] = None
    kept: bytes = b""
    found: Mapping[str, bytes] = {}


def counted(model: Model, examples: Examples, request: Run) -> Done:
    """The update of a `features` round: exact shares of the examples, so not for a device that adds noise."""
    check_plan(model.manifest, request.plan)
    if request.noise_multiplier:
        raise TrainingError(
            "this device adds noise, and shares of its examples have none", "turn feature_scaling off, or invite others"
        )
    values = _shares(model, examples).astype("<f4")
    return Done(values.tobytes(), len(examples[0]), {}, model.runtime)


def made(model: Model, examples: Examples, request: Run, received: Floats) -> Made:
    """The update of any other work, from the parameters `received`, which the model holds.

    TrainingError for a plan that the bundle cannot follow, or vectors that do not belong to it.
    """
    check_plan(model.manifest, request.plan)
    _check_steps(model, examples, request)
    vectors = _vectors(model, request)
    if request.plan.work == GRADIENT:
        return Made(model.gradient(*examples, seed=_seed(model, request, 0)))
    if request.plan.work == SVRG:
        return _svrg(model, examples, request, received, vectors)
    if request.plan.work in (TEACH, CORRECT):
        from covey_edge.teaching import taught  # for few rounds, as its reports

        update, kept, found = taught(model, examples, request, received, vectors)
        return Made(update, None, kept, found)
    return _scaffold(model, examples, request, received, vectors[0])


def _svrg(model: Model, examples: Examples, request: Run, received: Floats, vectors: list[Floats]) -> Made:
    (x, y), plan, size = examples, request.plan, model.manifest.batch_size
    order = svrg.order_of(plan.shuffle_seed, request.order_name)

    def gradient(w: Floats, rows: svrg.Rows, step: int) -> Floats:
        model.set_parameters(w)
        return model.gradient(x[rows], y[rows], seed=_seed(model, request, step))

    if plan.steps:
        batches, rate = svrg.drawn(len(x), size, plan.steps, order), plan.learning_rate
    else:
        batches = svrg.passes(len(x), size, plan.epochs, order)
        rate = svrg.local_rate(plan.learning_rate, len(x), size)
    scale = svrg.scales(vectors[1], _shares(model, examples)) if len(vectors) > 1 else None
    return Made(svrg.local_steps(received, vectors[0], gradient, batches, rate, scale) - received)


def _scaffold(model: Model, examples: Examples, request: Run, received: Floats, fleet: Floats) -> Made:
    (x, y), plan = examples, request.plan
    own = np.frombuffer(request.withheld, "<f4") if request.withheld else np.zeros(len(received), np.float32)
    model.start_training(plan, scaffold.correction(fleet, own))
    order = svrg.order_of(plan.shuffle_seed, request.order_name)
    losses = [
        model.train_batch(x[rows], y[rows], plan.learning_rate, _seed(model, request, step))
        for step, rows in enumerate(scaffold.batches(len(x), model.manifest.batch_size, plan.steps, order))
    ]
    update = model.parameters() - received
    control = scaffold.next_control(fleet, own, update, plan.steps, plan.learning_rate)
    return Made(update, float(np.mean(losses)), control.astype("<f4").tobytes())


def _shares(model: Model, examples: Examples) -> Floats:
    """phi_k, one number for each parameter. TrainingError where no parameter belongs to a feature."""
    units = feature_units(model.manifest.facts)
    if units is None:
        raise TrainingError(f"bundle {model.manifest.name!r} has no kernel on its inputs", "turn feature_scaling off")
    return svrg.per_parameter(svrg.shares(examples[0]), units, model.manifest.dimension)


def _check_steps(model: Model, examples: Examples, request: Run) -> None:
    """Steps cost what epochs cost, and the owner has said how many of these are enough."""
    most = request.max_epochs * -(-len(examples[0]) // model.manifest.batch_size)
    if request.max_epochs and request.plan.steps > most:
        raise TrainingError(
            f"{request.plan.steps} steps are more than this device allows ({most}, training.max_epochs)",
            "ask for fewer local_steps",
        )


def _vectors(model: Model, request: Run) -> list[Floats]:
    plan, d = request.plan, model.manifest.dimension
    fewest, most = VECTORS.get(plan.work, (0, 0))
    if not fewest <= len(request.vectors) <= most or any(len(data) != 4 * d for data in request.vectors):
        raise TrainingError(
            f"{plan.work} with {len(request.vectors)} vectors of {[len(data) for data in request.vectors]} bytes, "
            f"not {fewest} to {most} of {4 * d}"
        )
    vectors = [np.frombuffer(data, "<f4").astype(np.float32) for data in request.vectors]
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise TrainingError(f"{plan.work} with a vector that is not finite")
    return vectors


def _seed(model: Model, request: Run, step: int) -> int:
    """The seed of what the model draws in this step; 0 where it draws nothing."""
    draws = "seed" in model.manifest.train_inputs
    return svrg.step_seed(request.plan.shuffle_seed, request.order_name, step) if draws else 0
