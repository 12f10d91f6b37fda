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

from covey_coordinator.inversion.contract import Stop
from covey_coordinator.inversion.linkability import sketch
from covey_edge.runtime import Model
from covey_edge.trainer import train
from covey_protocol.errors import UsageError
from covey_protocol.messages import TrainingPlan

Array = npt.NDArray[Any]
Examples = tuple[Array, Array]  # x (n, ...), y (n, ...)
SIZE = 65536  # numbers kept of an update: a larger one is sketched
LEAST = 4  # played updates
STEADY = 0.1  # of the mean deviation of a number over the updates is added to its own, before it is divided by that
RIDGE = 0.1  # of the mean eigenvalue


@dataclass(frozen=True)
class Auxiliary:
    """The attacker's own examples, with the property and without. It needs no example of any device."""

    with_property: Examples
    without: Examples


@dataclass(frozen=True)
class Played:
    """Updates of devices that were played, before clipping and noise; large ones sketched.

    rows: (n, min(d, SIZE)). norms: (n,), of the updates themselves. has: (n,) bool. dimension: d. seed: of the sketch.
    """

    rows: npt.NDArray[np.float64]
    norms: npt.NDArray[np.float64]
    has: npt.NDArray[np.bool_]
    dimension: int
    seed: int

    def protected(
        self, clip_norm: float, noise_multiplier: float = 0.0, rng: np.random.Generator | None = None
    ) -> npt.NDArray[np.float64]:
        """(n, min(d, SIZE)): as devices send them, 0 for no clipping. A sketch is linear, so clipping and noise go
        through it."""
        shorter = np.minimum(1.0, clip_norm / np.maximum(self.norms, 1e-30)) if clip_norm else np.ones(len(self.norms))
        rows = self.rows * shorter[:, None]
        if rng is None or not noise_multiplier:
            return rows
        return np.asarray(
            rows + noise_of(clip_norm, noise_multiplier, self.dimension) * rng.standard_normal(rows.shape)
        )

    def classifier(self, clip_norm: float = 0.0, noise_multiplier: float = 0.0) -> Classifier:
        """Made for devices with this clipping and noise: the adaptive attacker of both."""
        noise = noise_of(clip_norm, noise_multiplier, self.dimension) ** 2
        return _fitted(self.protected(clip_norm), np.where(self.has, 1.0, -1.0), self.seed, noise)


def noise_of(clip_norm: float, noise_multiplier: float, dimension: int) -> float:
    """Standard deviation of the noise in each number of a sketch, or of an update that is none."""
    return float(clip_norm * noise_multiplier * max(1.0, dimension / SIZE) ** 0.5)


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
        played = self.play(model, parameters, plan, auxiliary, seed=seed)
        return played.classifier(self.clip_norm, self.noise_multiplier)

    def play(
        self,
        model: Model,
        parameters: npt.NDArray[np.float32],
        plan: TrainingPlan,
        auxiliary: Auxiliary,
        *,
        seed: int,
        draw: int = 0,
        stop: Stop | None = None,
    ) -> Played:
        """The updates alone. draw: of the devices' examples, beside the seed; those of another draw have the same
        sketch. stop: asked before each; UsageError where it ends the work before all are played."""
        if self.updates < LEAST:
            raise UsageError(f"{self.updates} played updates", f"play at least {LEAST}")
        rng = np.random.default_rng([seed, draw] if draw else seed)
        rows, norms, has = [], [], []
        for number in range(self.updates):
            if stop is not None and stop():
                raise UsageError("the time was up before all devices were played", "give more time")
            has.append(number % 2 == 0)
            x, y = self._drawn(auxiliary, has[-1], rng)
            update = trained(model, parameters, (x, y), plan, f"played-{draw}-{number}" if draw else f"played-{number}")
            rows.append(sketch(update, seed, SIZE))
            norms.append(float(np.linalg.norm(update.astype(np.float64))))
        return Played(np.stack(rows).astype(np.float64), np.array(norms), np.array(has), len(parameters), seed)

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
        return self.scored(np.stack([sketch(update, self.seed, SIZE) for update in updates]).astype(np.float64))

    def scored(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(n,): of rows as in `Played`."""
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
