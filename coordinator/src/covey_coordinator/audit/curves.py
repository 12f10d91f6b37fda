"""The trade-offs: one setting changed at a time, what an update then tells and what is left of accuracy.

This is their only definition: the suite attacks these points, and `benchmarks/defences.py` draws docs/trade-off.png of
them. A point is an update (`case_at`), its resolution, and the accuracy of the whole fleet under the same change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from covey_coordinator.audit.bench import Bench, Case, one_step
from covey_coordinator.audit.results import CURVES
from covey_coordinator.audit.updates import Fleet, Floats, Protection
from covey_coordinator.simulation.settings import PrivacySettings

if TYPE_CHECKING:
    from covey_coordinator.inversion.contract import Stop
    from covey_coordinator.inversion.resolution import Leakage

FEW = 4  # examples of one update that exact attacks are tried on
NOISE, CLIP, EXAMPLES, EPOCHS, ROUNDS = "noise_multiplier", "clip_norm", "examples", "epochs", "rounds"
NAMES = (NOISE, EPOCHS, EXAMPLES, CLIP, ROUNDS)  # in the order in which they are begun


def values(bench: Bench, name: str) -> list[float]:
    """At which the curve is measured, in that order: the ends first, then between; the plan's own is among them.

    Rounds beyond the plan's are left out, and all of them where devices add no noise: then the first tells the example.
    """
    told: Sequence[float] = getattr(bench.settings.curves, name)
    settings = bench.settings
    own = {
        NOISE: settings.privacy.noise_multiplier,
        EPOCHS: settings.training.epochs,
        ROUNDS: settings.fleet.rounds,
    }.get(name)
    if not told or (name == ROUNDS and not bench.protection.noise_std):
        return []
    found = sorted({float(value) for value in (*told, *([] if own is None else [own]))})
    if name == ROUNDS:
        found = [value for value in found if value <= settings.fleet.rounds]
    return list(dict.fromkeys([found[0], found[-1], *found]))


def case_at(bench: Bench, name: str, at: float) -> Case:
    """One step on one example where noise, clipping or rounds vary; so many examples in one pass; FEW in so many
    passes.
    """
    device, plan = bench.smallest_first[-1], one_step(bench.settings.plan(1))
    examples, rounds = 1, 1
    if name == EXAMPLES:
        examples = int(at)
    elif name == EPOCHS:
        examples, plan = FEW, msgspec.structs.replace(plan, epochs=int(at))
    elif name == ROUNDS:
        rounds = int(at)
    return Case(CURVES, device, examples, plan, protection_at(bench, name, at), curve=name, at=at, rounds=rounds)


def protection_at(bench: Bench, name: str, at: float) -> Protection:
    told = bench.settings.privacy
    if name == NOISE:
        return Protection(PrivacySettings(bench.clip_norm, at, told.by, told.delta))
    if name == CLIP:
        norm = float(f"{at * bench.own_length:.2g}")
        return Protection(PrivacySettings(norm, told.noise_multiplier, told.by, told.delta))
    return bench.protection


def accuracy_at(bench: Bench, name: str, at: float) -> float:
    """After the fleet's rounds under the plan with this one change."""
    data, settings = bench.data, bench.settings
    if name == ROUNDS:
        return bench.accuracy(bench.trained[int(at)].parameters)
    if name == EXAMPLES:
        data = replace(data, devices=tuple(part.first(int(at)) for part in data.devices))

    def plan_of(number: int) -> Any:
        plan = settings.plan(number)
        return msgspec.structs.replace(plan, epochs=int(at)) if name == EPOCHS else plan

    fleet = Fleet(bench.child, data, protection_at(bench, name, at), bench.seed)
    last: Floats = np.zeros(0, np.float32)
    for one in fleet.rounds(plan_of, settings.fleet.rounds):
        last = one.parameters
    return bench.accuracy(last)


def resolution(bench: Bench, case: Case, stop: Stop | None = None) -> Leakage:
    """What the case's updates together resolve of its examples. UsageError where it cannot be computed."""
    from covey_coordinator.inversion.resolution import leakage_number

    made = bench.updates(case)
    truth = made[0].truth
    seen = [one.seen for one in made]
    return leakage_number(bench.exact_model, seen, truth.x, truth.y, seed=bench.seed, stop=stop)
