"""A device looks for wrong labels in its own data, with instances that its owner vouches for (DUTI). Runs in the
training child; nothing of it is sent.

The mathematics is covey_protocol.duti's: the least change of labels with which a linear model agrees with the trusted
instances. The model is ridge or logistic regression on what the bundle's last layer sees, where it has `represent`,
else on the numbers of an example. What is found goes into a report for the owner, who also says (data.debug in
agent.toml) whether this device trains without the doubted instances or with the labels that are suggested for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from covey_edge.data_sources import Examples
from covey_edge.examples import other_examples
from covey_edge.frames import Run
from covey_edge.runtime import Model
from covey_edge.teaching import seen
from covey_edge.teaching_report import DOUBTFUL, Instance, Report, against, far, files
from covey_protocol.duti import changes, class_chances
from covey_protocol.errors import TrainingError
from covey_protocol.learners import RIDGE, Data, Floats
from covey_protocol.messages import TrainingPlan
from covey_protocol.works import CORRECT, LEARNERS, TEACH

DROP, MEND = "drop", "mend"  # data.debug; "report" changes nothing
OFF = "turn data.debug off in agent.toml"
BY, EXPECTED = "a look for wrong labels", "suggested label"
DECAY, PRICE, CONFIDENCE = 0.01, 0.5, 10.0  # measured on digits (docs/machine-teaching.md)
SPREAD = 1e-12  # least deviation of numbers
CHANGED = 1e-3  # of the deviation of a column of numbers: less is the lasso's rounding
MOST_FEATURES = 1024  # of what the learner sees: systems of so many unknowns, some for each class and step
MOST_NUMBERS = 30_000_000  # instances times features, 240 MB of float64; the learner needs a few times that


class Debugged(NamedTuple):
    """flagged: (n,) the instances whose label is doubted. labels: as the data's, with those that are suggested.
    found: the owner's report, by file name."""

    flagged: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.generic]
    found: dict[str, bytes]

    def used(self, examples: Examples, how: str) -> Examples:
        """The examples that this device trains on."""
        x, y = examples
        if how == DROP:
            return x[~self.flagged], y[~self.flagged]
        return (x, self.labels) if how == MEND else examples


def is_debugged(plan: TrainingPlan) -> bool:
    """Not for evaluations, which are of the data as they are, nor for teaching, which judges instances itself."""
    return not plan.evaluate and plan.work not in (TEACH, CORRECT)


def debugged(model: Model, examples: Examples, request: Run) -> Debugged:
    """TrainingError for a loss without a learner, and for data that are too large for it."""
    if model.manifest.loss not in LEARNERS:
        raise TrainingError(
            f"no labels of the loss {model.manifest.loss!r} can be debugged",
            f"{OFF}; it knows {', '.join(LEARNERS)}",
        )
    path = Path(request.trusted_path)
    trusted = other_examples(request.data_source, path, request.reading, model.manifest, "trusted")
    if examples[1].size != len(examples[0]) and LEARNERS[model.manifest.loss] != RIDGE:
        raise TrainingError("examples with several labels each cannot be debugged", OFF)
    _check_size(len(examples[0]), features_seen(model))
    x, vouched = seen(model, examples[0]), seen(model, trusted[0])
    find = _numbers if LEARNERS[model.manifest.loss] == RIDGE else _classes
    return find(model, examples, x, (vouched, trusted[1]), request)


def features_seen(model: Model) -> int:
    """Numbers of an example as the learner sees it, without the intercept."""
    manifest = model.manifest
    return manifest.parameters[0].shape[0] if "represent" in manifest.signatures else manifest.facts.input_size


def _check_size(n: int, features: int) -> None:
    if features > MOST_FEATURES or n * features > MOST_NUMBERS:
        raise TrainingError(
            f"{n} examples of {features} features are too many to be debugged",
            f"{OFF}; it goes to {MOST_FEATURES} features and {MOST_NUMBERS} numbers",
        )


def _classes(model: Model, examples: Examples, x: Floats, trusted: Examples, request: Run) -> Debugged:
    given, vouched = (labels.reshape(-1).astype(np.int64) for labels in (examples[1], trusted[1]))
    count = max(2, model.manifest.num_classes or 0, 1 + int(max(given.max(), vouched.max())))
    chances = class_chances(x, given, count, (trusted[0], vouched), DECAY, PRICE, CONFIDENCE)
    suspicion = against(given, chances)
    suggested = chances.argmax(axis=1)
    flagged = (suspicion >= DOUBTFUL) & (suggested != given)
    names = model.manifest.class_names or [str(place) for place in range(count)]
    told = [names[place] for place in given], [names[place] for place in suggested]
    report = _report(request, flagged, suspicion, *told)
    labels = np.where(flagged, suggested, given).astype(examples[1].dtype).reshape(examples[1].shape)
    return Debugged(flagged, labels, files(report, examples[0], "labels", BY, EXPECTED))


def _numbers(model: Model, examples: Examples, x: Floats, trusted: Examples, request: Run) -> Debugged:
    """Each column of targets for itself, in its own deviations; the one that changes most is shown."""
    y, vouched = (part.astype(np.float64).reshape(len(part), -1) for part in (examples[1], trusted[1]))
    middle, spread = y.mean(axis=0), np.maximum(y.std(axis=0), SPREAD)
    columns = [
        changes(Data(x, own), Data(trusted[0], theirs), DECAY, PRICE, CONFIDENCE)
        for own, theirs in zip(((y - middle) / spread).T, ((vouched - middle) / spread).T)
    ]
    change = np.stack(columns, axis=1)
    worst, rows = np.abs(change).argmax(axis=1), np.arange(len(y))
    size = np.abs(change[rows, worst])
    flagged = size > CHANGED
    mended = y + np.where(np.abs(change) > CHANGED, change * spread, 0.0)
    told = [[f"{value:.6g}" for value in values[rows, worst]] for values in (y, mended)]
    report = _report(request, flagged, np.where(flagged, np.maximum(DOUBTFUL, far(size)), 0.0), *told)
    labels = mended.astype(examples[1].dtype).reshape(examples[1].shape)
    return Debugged(flagged, labels, files(report, examples[0], "labels", BY, EXPECTED))


class Doubted(Instance, frozen=True):
    """selected: whether it is not doubted."""

    @property
    def why(self) -> str:
        return "" if self.selected else "the instances you vouch for speak for another label"


def _report(
    request: Run, flagged: npt.NDArray[np.bool_], suspicion: Floats, labels: list[str], suggested: list[str]
) -> Report:
    instances = [
        Doubted(row, labels[row], suggested[row], float(suspicion[row]), not flagged[row], 0.0, 0.0)
        for row in range(len(labels))
    ]
    order = sorted(instances, key=lambda one: (one.selected, -one.suspicion, one.row))
    return Report(request.plan.task, request.round_id, tuple(order))
