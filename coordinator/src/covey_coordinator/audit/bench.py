"""What the pieces of an audit share: the child that trains, the attacker's model, and updates that were made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from covey_coordinator.audit.data import AuditData, Part
from covey_coordinator.audit.results import Pictures, Result, finite
from covey_coordinator.audit.settings import PlanSettings
from covey_coordinator.audit.updates import Attacked, Fleet, Floats, Protection, Round, TrainingChild, attacked
from covey_coordinator.inversion.contract import Attack, AttackedModel, Finding, Stop
from covey_coordinator.inversion.grading import MISSING, Grade, grade
from covey_coordinator.inversion.metrics import mse, psnr
from covey_edge.runtime import Model
from covey_protocol.bundle import Bundle
from covey_protocol.errors import ConfigError, UsageError
from covey_protocol.messages import TrainingPlan

GALLERY = 500  # others that a recovered example could be taken for
SHOWN = 8  # examples of an update that are kept as pictures
CLEAR_DB = 30.0  # above it the eye sees the same picture


@dataclass(frozen=True)
class Case:
    """Which update: of the first `examples` (0 for all) of a device, under a plan and a protection.

    name: as in `results`. parameters: (d,) that were sent; None for the bundle's own. rounds: of the fleet, in each of
    which the device sends such an update; the attacker joins them.
    """

    name: str
    device: int
    examples: int
    plan: TrainingPlan
    protection: Protection
    parameters: Floats | None = None
    curve: str = ""
    at: float = 0.0
    skip: int = 0  # examples of the device that are passed over
    rounds: int = 1


@dataclass(frozen=True)
class Bench:
    bundle: Bundle
    settings: PlanSettings
    data: AuditData
    child: TrainingChild
    seed: int

    @cached_property
    def model(self) -> AttackedModel:
        return self._model("float32")

    @cached_property
    def exact_model(self) -> AttackedModel:
        return self._model("float64")

    def _model(self, dtype: str) -> AttackedModel:
        import tensorflow as tf

        from covey_coordinator.inversion.bundle_model import BundleModel

        return BundleModel(self.bundle, tf.as_dtype(dtype))

    @property
    def protection(self) -> Protection:
        return Protection(self.settings.privacy)

    @cached_property
    def smallest_first(self) -> list[int]:
        """Devices by how many examples they hold: the fewest examples hide each other least."""
        return sorted(range(len(self.data.devices)), key=lambda one: (len(self.data.devices[one]), one))

    @cached_property
    def own_length(self) -> float:
        """Median length of the devices' updates in the first round, before any protection."""
        rounds = Fleet(self.child, self.data, Protection(), self.seed).rounds(self.settings.plan, 1)
        return float(np.median([np.linalg.norm(one.update) for one in next(rounds).seen]))

    @property
    def clip_norm(self) -> float:
        """The plan's; where it has none, so that noise can be shown, the length of its updates in two digits."""
        return self.settings.privacy.clip_norm or float(f"{self.own_length:.2g}")

    @cached_property
    def trained(self) -> tuple[Round, ...]:
        """The rounds of the fleet under the plan, the last without updates: the finished model."""
        fleet = Fleet(self.child, self.data, self.protection, self.seed)
        return tuple(fleet.rounds(self.settings.plan, self.settings.fleet.rounds))

    def accuracy(self, parameters: Floats) -> float:
        """On the part of the data that no device holds."""
        self._runtime.set_parameters(parameters)
        return self._runtime.evaluate(self.data.test.x, self.data.test.y)[1]

    @cached_property
    def _runtime(self) -> Model:
        return Model(self.bundle)

    def updates(self, case: Case) -> tuple[Attacked, ...]:
        """One for each of the case's rounds, all of the same examples."""
        return tuple(self._update(case, number) for number in range(1, case.rounds + 1))

    def _update(self, case: Case, number: int) -> Attacked:
        key = (case.device, case.examples, case.skip, case.plan, case.protection, id(case.parameters), number)
        if key not in self._updates:
            part = self.data.devices[case.device]
            if case.skip:
                part = part.take(slice(case.skip % len(part), None))
            device, plan = (case.device, self.data.device_ids()[case.device]), case.plan
            received = self.child.initial if case.parameters is None else case.parameters
            if number > 1:
                received = self.trained[number - 1].parameters
                plan = msgspec.structs.replace(self.settings.plan(number), epochs=plan.epochs)
            self._updates[key] = attacked(
                self.child, device, part.first(case.examples), received, plan, case.protection, self.seed, number
            )
        return self._updates[key]

    @cached_property
    def _updates(self) -> dict[Any, Attacked]:
        return {}

    # ---- one attack on one update

    def attack(
        self, key: str, case: Case, name: str, made: Callable[[], Attack], stop: Stop, *, exact: bool = False
    ) -> tuple[Result, Pictures | None]:
        """Run it and hold what it found against the truth. What it cannot do here is `refused` in its own words.

        name: as the report calls it. Of a case of several rounds the attack is given all updates.
        """
        updates, attack = self.updates(case), made()
        update, seen = updates[0], [one.seen for one in updates]
        model, held = self.exact_model if exact else self.model, seen[0] if case.rounds == 1 else seen
        try:
            found = attack.run(model, held, seed=self.seed, stop=stop)  # type: ignore[arg-type] # if it takes several
        except (UsageError, ConfigError) as exc:
            return self.result(key, case, name, sees=attack.sees, refused=str(exc)), None
        return self.graded(key, case, replace(found, attack=name), update, cut=stop())

    def graded(
        self, key: str, case: Case, found: Finding, update: Attacked, *, cut: bool = False
    ) -> tuple[Result, Pictures | None]:
        truth = update.truth
        gallery = self.data.test.x[:GALLERY]
        graded = grade(found, truth.x, truth.classes, self.data.input_range, gallery)
        metrics = {**_metrics(graded), "guess_db": self.guess_db(truth)}
        pictures = _pictures(graded, found, truth)
        result = self.result(
            key,
            case,
            found.attack,
            sees=found.sees,
            metrics=finite(metrics),
            seconds=found.seconds,
            iterations=found.iterations,
            cut=cut,
            notes=found.notes,
            pictures=pictures is not None,
        )
        return result, pictures

    def guess_db(self, truth: Part) -> float:
        """The best PSNR among these examples of somebody who has no update and guesses the average everywhere."""
        return max(psnr(mse(one, self.data.average), self.data.input_range) for one in truth.x)

    def result(self, key: str, case: Case, name: str, **told: Any) -> Result:
        part = self.data.devices[case.device]
        return Result(
            key=key,
            case=case.name,
            name=name,
            device=self.data.device_ids()[case.device],
            examples=min(case.examples or len(part), len(part)),
            curve=case.curve,
            at=case.at,
            **told,
        )


def _metrics(graded: Grade) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {"label_recovery": graded.label_rate, "identified": graded.identified}
    came_out = graded.matched != MISSING
    if came_out.any():
        metrics["psnr_db"] = float(graded.psnr_db[came_out].max())
        metrics["mean_psnr_db"] = float(np.minimum(graded.psnr_db[came_out], 200.0).mean())
        metrics["mse"] = float(graded.mse[came_out].min())
        metrics["clear_share"] = float(np.mean(np.nan_to_num(graded.psnr_db, nan=0.0) > CLEAR_DB))
        if graded.ssim is not None:
            metrics["ssim"] = float(graded.ssim[came_out].max())
    return metrics


def _pictures(graded: Grade, found: Finding, truth: Part) -> Pictures | None:
    """The examples that came out best."""
    if found.inputs is None or not (graded.matched != MISSING).any():
        return None
    order = np.argsort(np.where(np.isfinite(graded.mse), graded.mse, np.inf), kind="stable")[:SHOWN]
    order = order[graded.matched[order] != MISSING]
    return Pictures(truth.x[order], np.asarray(found.inputs)[graded.matched[order]])


def one_step(plan: TrainingPlan) -> TrainingPlan:
    """The same plan with a single pass, as for a worst case."""
    return msgspec.structs.replace(plan, epochs=1)


def chosen(parts: Sequence[Part], most: int) -> Part:
    """All of the devices' examples together, at most so many of each."""
    return Part(*(np.concatenate([getattr(one.first(most), name) for one in parts]) for name in ("x", "y", "classes")))
