"""The works of machine teaching on a device: docs/protocol.md, section 8.4. Runs in the training child.

The arithmetic is covey_protocol.teaching's. This file gives it the device's instances as the bundle's last layer sees
them, and makes the report for the device's owner, which stays here. What leaves the device is the sum of its instances,
each times its dual variable, and what its trusted instances add to the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from covey_edge.data_sources import Examples
from covey_edge.examples import other_examples
from covey_edge.frames import Run
from covey_edge.runtime import Floats, Model
from covey_edge.teaching_report import Judged, Report, class_report, files, regression_report
from covey_protocol.errors import StorageError, TrainingError
from covey_protocol.messages import TeachingPlan
from covey_protocol.teaching import RIDGE, Array, Problem, Settings, Teacher
from covey_protocol.works import CORRECT, LEARNERS, taught_layer

FIXED = 1  # features that no crafting may change: the intercept


class Taught(NamedTuple):
    """update: (d,). kept: the teacher's state after it. found: the owner's report by file name, empty where none."""

    update: Floats
    kept: bytes
    found: dict[str, bytes]


def taught(model: Model, examples: Examples, request: Run, received: Floats, vectors: list[Floats]) -> Taught:
    """The update of either work. vectors: of `teach`, the fleet's u and tau.

    Starts anew where the kept state is of other data. TrainingError for a correction without trusted instances.
    """
    theta, *sums = (as_matrix(model, vector) for vector in (received, *vectors))
    own = instances(model, examples)
    teacher = _restored(model, own, request)
    if request.plan.work == CORRECT:
        return Taught(as_flat(teacher.correct(theta)), teacher.saved(), {})
    u, tau = sums
    answer = teacher.answer(theta, u, tau - teacher.share)
    report = reported(model, examples, own, theta, teacher, request)
    return Taught(as_flat(answer), teacher.saved(), files(report, examples[0]))


def _restored(model: Model, own: tuple[Array, Array], request: Run) -> Teacher:
    plan = request.plan.teaching
    assert plan is not UNSET  # works.check_work
    trusted = _trusted(model, request) if request.plan.work == CORRECT else None

    def begun() -> Teacher:
        return Teacher(problem_of(model), settings_of(plan), *own, trusted, plan.teachers)

    try:
        return begun().loaded(request.withheld) if request.withheld else begun()
    except StorageError:  # the data are others now
        return begun()


def _trusted(model: Model, request: Run) -> tuple[Array, Array]:
    if not request.trusted_path:
        raise TrainingError("this device has no trusted instances", "set data.trusted_path in its agent.toml")
    path = Path(request.trusted_path)
    held = other_examples(request.data_source, path, request.reading, model.manifest, "trusted")
    return instances(model, held)


def problem_of(model: Model) -> Problem:
    return Problem(LEARNERS[model.manifest.loss], FIXED)


def settings_of(plan: TeachingPlan) -> Settings:
    constants = plan.lambda_w, plan.lambda_t, plan.lambda_a, plan.lambda_z, plan.lambda_y, plan.rho, plan.curvature
    return Settings(*constants)


def instances(model: Model, examples: Examples) -> tuple[Array, Array]:
    """x (n, F + 1), what the last layer sees of each example and a 1; y (n, C), targets or labels of -1 and 1."""
    return seen(model, examples[0]), targets(model, examples[1])


def seen(model: Model, x: npt.NDArray[Any]) -> Array:
    features = model.represented(x) if "represent" in model.manifest.signatures else x.reshape(len(x), -1)
    return np.hstack([features.astype(np.float64), np.ones((len(x), 1))])


def targets(model: Model, y: npt.NDArray[Any]) -> Array:
    """(n, C): of a ridge learner the numbers; of a logistic one 1 in the column of the label's class and -1 elsewhere,
    one column for yes or no."""
    layer = taught_layer(model.manifest.facts)
    assert layer is not None  # works.check_work
    columns = layer[1]
    if problem_of(model).kind == RIDGE:
        return y.astype(np.float64).reshape(len(y), columns)
    labels = y.reshape(len(y))
    yes = labels[:, None] == (np.arange(columns) if columns > 1 else np.array([1]))
    return np.where(yes, 1.0, -1.0)


def as_matrix(model: Model, flat: Floats) -> Array:
    """The kernel (F, C) with the bias (C,) as its last row, of the d numbers on the wire."""
    layer = taught_layer(model.manifest.facts)
    assert layer is not None
    return flat.astype(np.float64).reshape(layer[0] + 1, layer[1])


def as_flat(matrix: Array) -> Floats:
    return matrix.astype(np.float32).reshape(-1)


def reported(
    model: Model, examples: Examples, own: tuple[Array, Array], theta: Array, teacher: Teacher, request: Run
) -> Report:
    """What the owner reads: every instance against the model theta, and what the teacher used it for."""
    (x, y), told = own, (request.plan.task, request.round_id)
    found = teacher.judged()
    sizes = np.maximum(np.linalg.norm(x[:, :-FIXED], axis=1), 1e-12)
    weights = np.abs(found.weight).reshape(len(x), -1).max(axis=1)
    judged = Judged(found.selected, weights, found.feature_change / sizes)
    outputs = x @ theta
    if teacher.problem.kind == RIDGE:
        worst = np.abs(y - outputs).argmax(axis=1)  # of several targets the one that is furthest off
        rows = np.arange(len(y))
        return regression_report(*told, y[rows, worst], outputs[rows, worst], judged)
    chances = chances_of(outputs)
    return class_report(*told, examples[1].reshape(-1), chances, judged, model.manifest.class_names)


def chances_of(outputs: Array) -> Array:
    """(n, C) of learners of one class against the rest -> their chances, made to add up to 1; (n, 1) -> (n, 2)."""
    with np.errstate(over="ignore"):
        yes = 1.0 / (1.0 + np.exp(-outputs))
    if outputs.shape[1] == 1:
        return np.hstack([1.0 - yes, yes])
    return np.asarray(yes / np.maximum(yes.sum(axis=1, keepdims=True), 1e-300))
