"""Property inference: does this device have data of a kind that has nothing to do with what the model learns?

The attacker has examples of its own with the property and without, and the bundle. It plays devices: trains from the
parameters of the round on batches of either kind, with the device's own training code and runtime, and fits a linear
classifier to the updates. Then it scores the devices' real updates.

Source: Melis et al. 2019 (arXiv:1805.04049), section 4.2 and 6 (batch properties, passive). Deviations: a ridge
classifier on whole updates (large ones sketched) in place of random forests on max-pooled gradients; no active attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.linkability import sketch
from covey_edge.runtime import Model
from covey_edge.trainer import protect, train
from covey_protocol.errors import UsageError
from covey_protocol.messages import TrainingPlan

Array = npt.NDArray[Any]
Examples = tuple[Array, Array]  # x (n, ...), y (n, ...)
SIZE = 65536  # numbers kept of an update: a larger one is sketched
STEADY = 0.1  # of the mean deviation of a number over the updates is added to its own, before it is divided by that
RIDGE = 0.1  # of the mean eigenvalue


@dataclass(frozen=True)
class Auxiliary:
    """The attacker's own examples, with the property and without. It needs no example of any device."""

    with_property: Examples
    without: Examples


@dataclass(frozen=True)
class PropertyInference:
    """examples: how many a device is taken to have; share: of them that have the property, on a device that has it.
    updates: how many are played, half of them with the property. clip_norm, noise_multiplier: of the devices, which the
    classifier is then made for: the adaptive attacker of clipping and noise."""

    examples: int
    share: float = 1.0
    updates: int = 60
    clip_norm: float = 0.0
    noise_multiplier: float = 0.0

    @property
    def sees(self) -> str:
        return "An update, the parameters, the bundle and the plan; examples like the devices' own of both kinds."

    def fit(
        self, model: Model, parameters: npt.NDArray[np.float32], plan: TrainingPlan, auxiliary: Auxiliary, *, seed: int
    ) -> Classifier:
        """model: the bundle's, in this process; its parameters are overwritten. Takes `updates` local trainings."""
        if self.updates < 4:
            raise UsageError(f"{self.updates} played updates", "play at least four")
        rng = np.random.default_rng(seed)
        rows, labels = [], []
        for number in range(self.updates):
            has = number % 2 == 0
            x, y = self._drawn(auxiliary, has, rng)
            update = trained(model, parameters, (x, y), plan, f"played-{number}")
            rows.append(sketch(protect(update, self.clip_norm, 0.0), seed, SIZE))
            labels.append(1.0 if has else -1.0)
        noise = (self.clip_norm * self.noise_multiplier) ** 2 * max(1.0, len(parameters) / SIZE)
        return _fitted(np.stack(rows).astype(np.float64), np.array(labels), seed, noise)

    def _drawn(self, auxiliary: Auxiliary, has: bool, rng: np.random.Generator) -> Examples:
        count = round(self.share * self.examples) if has else 0
        parts = [_some(auxiliary.with_property, count, rng), _some(auxiliary.without, self.examples - count, rng)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


@dataclass(frozen=True)
class Classifier:
    """A linear score of an update or its sketch: above 0, the device has the property."""

    direction: npt.NDArray[np.float64]
    offset: float
    seed: int

    def scores(self, updates: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """(n,): of updates (d,)."""
        rows = np.stack([sketch(update, self.seed, SIZE) for update in updates]).astype(np.float64)
        return np.asarray(rows @ self.direction - self.offset)


def _fitted(rows: npt.NDArray[np.float64], labels: npt.NDArray[np.float64], seed: int, noise: float) -> Classifier:
    """Ridge regression of the labels +1 and -1 on standardised rows, in its dual form: rows are fewer than columns.

    noise: the variance that each number will have beside what is seen here. It is in the scale and in the ridge, which
    is what fitting on infinitely many noised copies of the rows would give, and better than fitting on one of each.
    """
    mean, spread = rows.mean(0), rows.std(0)
    scale = np.sqrt((spread + STEADY * spread.mean()) ** 2 + noise) + np.finfo(float).tiny
    centred = (rows - mean) / scale
    gram = centred @ centred.T
    ridge = RIDGE * np.trace(gram) / len(rows) + len(rows) * noise * np.mean(scale**-2) + np.finfo(float).tiny
    direction = centred.T @ np.linalg.solve(gram + ridge * np.eye(len(rows)), labels - labels.mean()) / scale
    return Classifier(direction, float(mean @ direction), seed)


def _some(examples: Examples, count: int, rng: np.random.Generator) -> Examples:
    x, y = examples
    if count and not len(x):
        raise UsageError("no auxiliary examples of one kind", "give some with the property and some without")
    places = rng.choice(len(x), count, replace=count > len(x)) if count else np.zeros(0, np.int64)
    return x[places], y[places]


def trained(
    model: Model, parameters: npt.NDArray[np.float32], examples: Examples, plan: TrainingPlan, name: str
) -> npt.NDArray[np.float32]:
    """The update (d,) that a device of this name makes of these examples: its own code, in this process."""
    model.set_parameters(parameters)
    train(model, examples, plan, name)
    return model.parameters() - parameters
