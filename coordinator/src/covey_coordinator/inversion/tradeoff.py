"""Leakage against accuracy: what clip norm, noise, batch and local steps do to both, for one model and its data.

Leakage is the resolution of one device's update (`resolution`); accuracy is that of a short simulation in this process
with the same local training, clipping and noise: plain FedAvg, no rule, no lost devices. It ranks settings; for the
accuracy of a real plan there is `covey simulate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from covey_coordinator.inversion.contract import AttackedModel, Progress, Seen, Stop
from covey_coordinator.inversion.forward import local_training
from covey_coordinator.inversion.priors import Prior
from covey_coordinator.inversion.resolution import Leakage, leakage_number, planned
from covey_protocol.errors import UsageError
from covey_protocol.messages import TrainingPlan
from covey_protocol.privacy import add_gaussian_noise, clip

Numbers = npt.NDArray[Any]
Examples = tuple[Numbers, Numbers]

PROBES, STEPS = 4, 32  # of Lanczos' method: enough for a curve
EVALUATED_AT_ONCE = 256


@dataclass(frozen=True)
class Setting:
    """clip_norm: of the update, 0 for none. noise_multiplier: of the device's own noise, per clip_norm. examples: that
    a device trains on in a round. batch_size: of its steps, 0 for all its examples at once. epochs: passes over them.
    learning_rate: of its steps."""

    clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    examples: int = 1
    batch_size: int = 0
    epochs: int = 1
    learning_rate: float = 0.1

    @property
    def noise_std(self) -> float:
        return self.noise_multiplier * self.clip_norm

    @property
    def local_steps(self) -> int:
        return self.epochs * -(-self.examples // self.batch)

    @property
    def batch(self) -> int:
        return self.batch_size or self.examples


@dataclass(frozen=True)
class Point:
    """One setting's place: leakage of the first batches drawn (one each), accuracy after the simulation, None where
    none was asked for."""

    setting: Setting
    leakages: tuple[Leakage, ...]
    accuracy: Optional[float] = None

    @property
    def resolved_per_example(self) -> float:
        """Numbers, mean over draws and examples."""
        return float(np.mean([one.per_example.mean() for one in self.leakages]))

    @property
    def share(self) -> float:
        return float(np.mean([one.share for one in self.leakages]))

    @property
    def psnr_db(self) -> float:
        """Expected at the very inputs, mean over draws."""
        return float(np.mean([one.here_psnr_db for one in self.leakages]))

    @property
    def bits_per_example(self) -> float:
        return float(np.mean([one.bits / len(one.per_example) for one in self.leakages]))


def swept(base: Setting, **values: Sequence[float]) -> list[Setting]:
    """The base with each of these values of each of these fields, one field at a time."""
    changes: list[dict[str, Any]] = [{name: value} for name, some in values.items() for value in some]
    return [replace(base, **change) for change in changes]


def trade_off(
    model: AttackedModel,
    parameters: Numbers,
    data: Examples,
    settings: Sequence[Setting],
    *,
    held_out: Optional[Examples] = None,
    prior: Optional[Prior] = None,
    devices: int = 10,
    rounds: int = 10,
    draws: int = 1,
    seed: int = 0,
    stop: Optional[Stop] = None,
    progress: Optional[Progress] = None,
) -> list[Point]:
    """A point for every setting, in their order; fewer where `stop` asked for an end.

    model: in float64. parameters: (d,) that a device would receive. data: (x, y) of the fleet, drawn from with `seed`;
    devices of the simulation hold disjoint parts of it. held_out: what accuracy is measured on, None leaves the
    simulation out. draws: batches whose leakage is measured.
    """
    points: dict[Setting, Point] = {}  # the same setting is in several curves
    for order, setting in enumerate(settings):
        if stop is not None and stop():
            return [points[one] for one in settings[:order]]
        if setting not in points:
            leakages = tuple(_leakages(model, parameters, data, setting, prior, draws, seed))
            reached = None
            if held_out is not None:
                reached = accuracy(model, simulated(model, parameters, data, setting, devices, rounds, seed), held_out)
            points[setting] = Point(setting, leakages, reached)
        if progress is not None:
            progress(order + 1, len(settings))
    return [points[one] for one in settings]


def simulated(
    model: AttackedModel,
    parameters: Numbers,
    data: Examples,
    setting: Setting,
    devices: int = 10,
    rounds: int = 10,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """(d,): the parameters after so many rounds of FedAvg.

    Each device holds an equal part of the data and trains on `examples` of it, drawn anew each round; the device clips
    and noises as an agent does. Deterministic.
    """
    x, y = data
    parts = np.array_split(np.random.default_rng([seed, 1]).permutation(len(x)), devices)
    if min(map(len, parts)) < setting.examples:
        raise UsageError(
            f"{len(x)} examples for {devices} devices that train on {setting.examples} each",
            "give more data, or fewer devices or examples",
        )
    rng = np.random.default_rng([seed, 2])
    current = np.asarray(parameters, np.float32)
    plan, training = _plan(setting), None
    for _ in range(rounds):
        total = np.zeros(len(current), np.float64)
        for part in parts:
            rows = rng.choice(part, setting.examples, replace=False)
            training = training or local_training(model, plan, y[rows], batch_size=setting.batch)
            update = training.values(x[rows].ravel(), current, y[rows], 0.0).astype(np.float32)
            total += _protected(update, setting, rng)
        current = (current + total / devices).astype(np.float32)
    return current


def accuracy(model: AttackedModel, parameters: Numbers, held_out: Examples) -> float:
    """Share of examples whose most probable class is their label's."""
    import tensorflow as tf

    if model.manifest.num_classes is None:
        raise UsageError("accuracy of a model without classes", "leave held_out out")
    x, y = held_out
    start = tf.constant(parameters, model.dtype)
    found = [
        np.argmax(np.asarray(model.outputs(start, tf.constant(x[rows], model.dtype))), axis=-1).ravel()
        for rows in (slice(first, first + EVALUATED_AT_ONCE) for first in range(0, len(x), EVALUATED_AT_ONCE))
    ]
    true = np.asarray(y)
    if true.size == len(x) * model.manifest.num_classes and true.ndim > 1:
        true = np.argmax(true, axis=-1)
    return float(np.mean(np.concatenate(found) == true.ravel()))


def _leakages(
    model: AttackedModel,
    parameters: Numbers,
    data: Examples,
    setting: Setting,
    prior: Optional[Prior],
    draws: int,
    seed: int,
) -> Iterator[Leakage]:
    x, y = data
    rng = np.random.default_rng([seed, 3])
    received = np.asarray(parameters, np.float32)
    for draw in range(draws):
        rows = rng.permutation(len(x))[: setting.examples]  # smaller settings see a part of the larger ones' examples
        seen = Seen(received, received, _plan(setting), setting.examples, setting.noise_std, setting.clip_norm)
        seen = planned(model, seen, x[rows], y[rows], setting.batch)
        yield leakage_number(
            model,
            seen,
            x[rows],
            y[rows],
            prior=prior,
            seed=seed + draw,
            probes=PROBES,
            steps=STEPS,
            batch_size=setting.batch,
        )


def _plan(setting: Setting) -> TrainingPlan:
    return TrainingPlan(epochs=setting.epochs, learning_rate=setting.learning_rate)


def _protected(update: npt.NDArray[np.float32], setting: Setting, rng: np.random.Generator) -> Numbers:
    if not setting.clip_norm:
        return update
    return add_gaussian_noise(clip(update, setting.clip_norm), setting.clip_norm, setting.noise_multiplier, rng)
