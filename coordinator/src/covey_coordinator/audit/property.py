"""Property inference in an audit: can one tell from an update that a device's data are all high in one thing?

The property has nothing to do with the task, so examples are divided within each class: those above its mean along one
direction have it. Devices with it and without are played with the agent's own training in this process, of examples
that the fleet holds; the attacker plays its own, of data that no device has, and never sees the devices' examples.

Clipping and noise go onto the sketch of an update, which is linear; a compression's rounding is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from covey_coordinator.audit.bench import Bench, chosen
from covey_coordinator.audit.data import AuditData, Part
from covey_coordinator.audit.settings import PropertySettings
from covey_coordinator.audit.updates import Protection
from covey_coordinator.inversion.contract import Stop
from covey_coordinator.inversion.grading import auc
from covey_coordinator.inversion.properties import Auxiliary, Played, PropertyInference
from covey_edge.runtime import Model
from covey_protocol.errors import ConfigError, UsageError

MOST = 500  # examples of the attacker's own that the direction is taken from
FEWEST = 2  # of either kind


def check_property(settings: PropertySettings, data: AuditData) -> None:
    """ConfigError where property.of names nothing of these data."""
    of, size = settings.of, int(data.average.size)
    if isinstance(of, int) and of >= size:
        raise ConfigError(f"property.of = {of}: an example has {size} numbers", f"choose 0 to {size - 1}")
    if isinstance(of, str) and of and of not in data.feature_names:
        known = ", ".join(data.feature_names[:20]) or "a number: these data have no names of features"
        raise ConfigError(f"property.of = {of!r} is no feature of {data.name}", f"choose from {known}")


@dataclass(frozen=True)
class Inference:
    """auc: of telling devices that have the property from those that have not. error: its standard error where nothing
    can be told. examples: of each played device. told: the property in words."""

    auc: float
    error: float
    examples: int
    told: str


class PropertyAudit:
    """Plays all devices once; clipping and noise are put on afterwards, so every point of a curve is cheap."""

    def __init__(self, bench: Bench, attackers: int, devices: int) -> None:
        """attackers: updates that the attacker plays. devices: that it is to judge, half of them with the property."""
        self._bench, self._attackers, self._devices = bench, attackers, devices
        self._played: tuple[Played, Played] | None = None

    @property
    def sees(self) -> str:
        return PropertyInference(1).sees

    @cached_property
    def told(self) -> str:
        of = self._bench.settings.property.of
        if of == "":
            return "high along the direction in which examples of one class differ most"
        return f"high in {of if isinstance(of, str) else f'number {of} of an example'}"

    def under(self, protection: Protection, rounds: int, stop: Stop) -> Inference:
        """rounds: in which a device repeats its training at the same parameters, with new noise; the attacker takes
        the mean. UsageError where the data do not divide, or the time is up before all are played."""
        attackers, devices = self._all_played(stop)
        clip_norm = protection.privacy.clip_norm
        noise = protection.noise_std / clip_norm / rounds**0.5 if protection.noise_std else 0.0
        rows = devices.protected(clip_norm, noise, np.random.default_rng([self._bench.seed, rounds, 5]))
        scores = attackers.classifier(clip_norm, noise).scored(rows)
        having, not_having = scores[devices.has], scores[~devices.has]
        error = ((len(scores) + 1) / (12 * len(having) * len(not_having))) ** 0.5
        return Inference(auc(having, not_having), float(error), self.examples, self.told)

    @cached_property
    def examples(self) -> int:
        """Of each played device: as many as the fleet's median device has, and no more than there are of a kind."""
        median = int(np.median([len(part) for part in self._bench.data.devices]))
        return max(1, min(median, *(int(kind.sum()) for kind in self._divided(self._fleet))))

    def _all_played(self, stop: Stop) -> tuple[Played, Played]:
        if self._played is None:
            bench, share = self._bench, self._bench.settings.property.share
            played = []
            for draw, (part, count) in enumerate(
                ((bench.data.test, self._attackers), (self._fleet, self._devices)), start=1
            ):
                inference = PropertyInference(self.examples, share, count)
                plan, start = bench.settings.plan(1), bench.child.initial
                kinds = self._auxiliary(part)
                played.append(inference.play(self._model, start, plan, kinds, seed=bench.seed, draw=draw, stop=stop))
            self._played = played[0], played[1]
        return self._played

    def _auxiliary(self, part: Part) -> Auxiliary:
        has, has_not = (part.take(kind) for kind in self._divided(part))
        return Auxiliary((has.x, has.y), (has_not.x, has_not.y))

    def _divided(self, part: Part) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which examples have it and which have not. Means of classes are the attacker's own; of a class that it does
        not know, the mean of all."""
        own = self._bench.data.test
        known, values = _flat(own) @ self._direction, _flat(part) @ self._direction
        level = np.full(len(part), known.mean())
        for one in np.unique(own.classes):
            level[part.classes == one] = known[own.classes == one].mean()
        has = values > level
        if min(has.sum(), (~has).sum()) < FEWEST:
            raise UsageError(f"almost no data differ in this: {self.told}", "name another property.of")
        return has, ~has

    @cached_property
    def _direction(self) -> npt.NDArray[np.float64]:
        of, data = self._bench.settings.property.of, self._bench.data
        if of != "":
            direction = np.zeros(data.average.size)
            direction[of if isinstance(of, int) else data.feature_names.index(of)] = 1.0
            return direction
        return _widest(data.test.first(MOST))

    @cached_property
    def _fleet(self) -> Part:
        return chosen(self._bench.data.devices, 0)

    @cached_property
    def _model(self) -> Model:
        return Model(self._bench.bundle)


def _flat(part: Part) -> npt.NDArray[np.float64]:
    return part.x.reshape(len(part), -1).astype(np.float64)


def _widest(part: Part) -> npt.NDArray[np.float64]:
    """(D,): the first principal direction within classes, its largest number positive."""
    rows = _flat(part)
    for one in np.unique(part.classes):
        rows[part.classes == one] -= rows[part.classes == one].mean(axis=0)
    _, vectors = np.linalg.eigh(rows @ rows.T)  # of few rows, for examples of any size
    direction = rows.T @ vectors[:, -1]
    return np.asarray(direction * np.sign(direction[np.argmax(np.abs(direction))]), np.float64)
