"""The pieces of an audit, in the order in which they are begun: every kind early, repeats last.

A piece is one attack on one update, or one point of a curve. How much each does is fixed by the level, not by the
clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from covey_coordinator.aggregation.accounting import epsilon_spent
from covey_coordinator.audit import curves
from covey_coordinator.audit.bench import Bench, Case, chosen, one_step
from covey_coordinator.audit.curves import FEW
from covey_coordinator.audit.property import PropertyAudit
from covey_coordinator.audit.results import BARE, CURVES, MALICIOUS, ONE_EXAMPLE, PLAN, Pictures, Result, finite
from covey_coordinator.audit.updates import Floats, Protection
from covey_coordinator.inversion.contract import Attack, Stop
from covey_coordinator.inversion.registry import make_attack
from covey_coordinator.inversion.several_rounds import OnTheMean
from covey_coordinator.simulation.settings import PrivacySettings
from covey_edge.model_screening import suspicions
from covey_protocol.errors import UsageError
from covey_protocol.gaussian import epsilon_of, mu_of

Found = tuple[Result, Pictures | None]
MEMBERS = 200  # of each device that are asked about
ATTACKS = ("labels", "units", "inverting-gradients", "deep-leakage", "tarantola", "local-steps")
SWIFT = ("labels", "units", "inverting-gradients", "deep-leakage")  # about a second each
OF_SEVERAL = ("tarantola",)  # that take updates of several rounds as they are; others take their mean
MOST_STEPS = 200  # of all rounds together that are computed through: each adds to graphs that cannot be stopped
SERVER_SEES = "What a coordinator reads out of one step's update that chose the parameters it sent to be read."
AFTERWARDS = "The finished model, and examples with their labels."


@dataclass(frozen=True)
class Level:
    """minutes: of the budget, where none is given. evaluations, iterations, restarts, unrolled, newton: of
    attacks.

    samples: updates of each kind. curve: iterations of attacks at a curve's points. resolved: how many numbers the
    examples of an update may have for its resolution to be computed. attacks, on_curves: on updates and at the
    points of curves, of ATTACKS. played: updates of devices that the attacker on a property plays; played_against: that
    it judges.
    """

    name: str
    minutes: float
    evaluations: int
    iterations: int
    restarts: int
    unrolled: int
    newton: int
    curve: int
    samples: int
    resolved: int
    attacks: tuple[str, ...] = ATTACKS
    on_curves: tuple[str, ...] = ATTACKS
    played: int = 60
    played_against: int = 80


QUICK = Level(
    "quick",
    2.4,
    evaluations=150,
    iterations=300,
    restarts=1,
    unrolled=40,
    newton=40,
    curve=150,
    samples=3,
    resolved=600,
    on_curves=SWIFT,
)
FULL = Level(
    "full",
    60.0,
    evaluations=2000,
    iterations=2400,
    restarts=2,
    unrolled=600,
    newton=150,
    curve=1000,
    samples=10,
    resolved=50_000,
    played=200,
    played_against=200,
)


@dataclass(frozen=True)
class Piece:
    """kind: pieces of one kind cost alike. said: for the progress. needed: without it nothing can be said of what the
    plan's updates tell: an attack on the first of them, or on what devices have in common.
    """

    key: str
    kind: str
    said: str
    work: Callable[[Stop], Found]
    needed: bool = False


@dataclass(frozen=True)
class Weapon:
    """An attack as the audit uses it. name, settings: as the registry has it. exact: in float64.

    most: examples of an update beyond which it is not tried, 0 for any number. several_steps: only on updates of those.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    most: int = 0
    several_steps: bool = False

    def made(self) -> Attack:
        return make_attack(self.name, **self.settings)


def weapons(level: Level, iterations: int, names: Sequence[str]) -> tuple[Weapon, ...]:
    """iterations: of the attack that is tried on every update. names: which attacks, of ATTACKS."""
    descent = {"iterations": iterations, "restarts": level.restarts}
    unrolled = {"iterations": level.unrolled, "restarts": 1}
    all_of_them = (
        Weapon("labels"),
        Weapon("units"),
        Weapon("inverting-gradients", descent),
        Weapon("deep-leakage", {"evaluations": level.evaluations}, exact=True, most=FEW),
        Weapon("tarantola", {"starts": level.restarts, "iterations": level.newton}, exact=True, most=FEW),
        Weapon("local-steps", unrolled, several_steps=True),
    )
    return tuple(weapon for weapon in all_of_them if weapon.name in names)


def pieces(bench: Bench, level: Level) -> list[Piece]:
    """All of them, none twice."""
    of_property = PropertyAudit(bench, level.played, level.played_against)
    first = [
        *_on_updates(bench, level, range(1)),
        *_of_the_fleet(bench),
        *_joined(bench, level),
        *_properties(bench, of_property),
        *_malicious(bench),
    ]
    points = _curves(bench, level, of_property)
    return [*first, *points, *_on_updates(bench, level, range(1, level.samples))]


# ---- attacks on single updates


def _on_updates(bench: Bench, level: Level, samples: range) -> Iterator[Piece]:
    for sample in samples:
        for case in _cases(bench, sample):
            yield from _attacks_on(bench, case, f"{case.name}-{sample}", level, level.iterations, level.attacks)
            yield from _resolution(bench, case, f"{case.name}-{sample}", level)


def _cases(bench: Bench, sample: int) -> Iterator[Case]:
    """One update of the plan, and the same device's worst case with and without its protection."""
    devices = bench.smallest_first
    device, plan = devices[sample % len(devices)], bench.settings.plan(1)
    protected = bench.protection
    yield Case(ONE_EXAMPLE, device, 1, one_step(plan), protected, skip=sample)
    if protected.noise_std:
        yield Case(BARE, device, 1, one_step(plan), Protection(), skip=sample)
    yield Case(PLAN, device, 0, plan, protected)


def _attacks_on(
    bench: Bench, case: Case, place: str, level: Level, iterations: int, names: Sequence[str]
) -> Iterator[Piece]:
    size, steps = _size(bench, case), _steps(bench, case)
    for weapon in weapons(level, iterations, names):
        if (weapon.most and size > weapon.most) or (weapon.several_steps and (steps == 1 or case.rounds > 1)):
            continue
        if weapon.name in OF_SEVERAL and _too_long(bench, case):
            continue
        key = _key(place, weapon.name)
        joined = f"/{case.rounds}" if case.rounds > 1 and weapon.name in OF_SEVERAL else ""
        yield Piece(
            key,
            f"{weapon.name}/{case.name}/{iterations}/{_bucket(size)}{joined}",
            f"{weapon.name} on {place}",
            _attack_work(bench, key, case, weapon),
            needed=case.name == PLAN and place.endswith("-0"),
        )


def _attack_work(bench: Bench, key: str, case: Case, weapon: Weapon) -> Callable[[Stop], Found]:
    def made() -> Attack:
        return OnTheMean(weapon.made()) if case.rounds > 1 and weapon.name not in OF_SEVERAL else weapon.made()

    name = _named(weapon.name, case)
    return lambda stop: bench.attack(key, case, name, made, stop, exact=weapon.exact)


def _named(name: str, case: Case) -> str:
    """As the report calls it. Of a curve every point is another number of rounds."""
    return f"{name}, {case.rounds} rounds joined" if case.rounds > 1 and case.name != CURVES else name


def _resolution(bench: Bench, case: Case, place: str, level: Level) -> Iterator[Piece]:
    key, size = _key(place, "resolution"), _size(bench, case)
    if size * bench.data.average.size > level.resolved or _too_long(bench, case):
        return
    kind = f"resolution/{case.name}/{_bucket(size)}/{case.rounds}"
    yield Piece(key, kind, f"resolution of {place}", lambda stop: _resolved(bench, key, case, stop))


def _resolved(bench: Bench, key: str, case: Case, stop: Stop) -> Found:
    sees, name = "The update, its labels and the settings of its noise; no attack is run.", _named("resolution", case)
    try:
        found = curves.resolution(bench, case, stop)
    except UsageError as exc:
        return _without(bench, key, case, name, sees, exc, stop), None
    metrics = {"resolved_share": found.share, "expected_psnr_db": found.here_psnr_db, "bits": found.bits}
    told = bench.result(key, case, name, sees=sees, metrics=finite(metrics), seconds=found.seconds, cut=stop())
    return told, None


def _without(bench: Bench, key: str, case: Case, name: str, sees: str, exc: UsageError, stop: Stop) -> Result:
    """What gave no number: it does not apply here, or the time was up."""
    late = stop()
    return bench.result(key, case, name, sees=sees, refused="" if late else str(exc), cut=late)


def _size(bench: Bench, case: Case) -> int:
    held = len(bench.data.devices[case.device])
    return min(case.examples or held, held)


def _steps(bench: Bench, case: Case) -> int:
    return -(-_size(bench, case) // bench.bundle.manifest.batch_size) * case.plan.epochs


def _too_long(bench: Bench, case: Case) -> bool:
    """Of rounds that are joined as they are."""
    return case.rounds > 1 and case.rounds * _steps(bench, case) > MOST_STEPS


def _bucket(size: int) -> int:
    """Updates of up to twice as many examples cost alike."""
    return (size - 1).bit_length()


def _key(place: str, name: str) -> str:
    return f"{place}-{name}".replace(" ", "-").replace(",", "")


# ---- the fleet over rounds, and the model it makes


def _of_the_fleet(bench: Bench) -> Iterator[Piece]:
    case = Case(PLAN, 0, 0, bench.settings.plan(1), bench.protection)
    yield Piece("fleet-accuracy", "fleet", "rounds of the fleet", lambda _: _accuracy_of_plan(bench, case))
    yield Piece("fleet-linkability", "linkability", "linkability over rounds", lambda _: _linked(bench, case))
    yield Piece("fleet-membership", "membership", "membership in the finished model", lambda _: _members(bench, case))


def _accuracy_of_plan(bench: Bench, case: Case) -> Found:
    accuracy = bench.accuracy(bench.trained[-1].parameters)
    metrics = {"accuracy": accuracy, "accuracy_before": bench.accuracy(bench.child.initial)}
    privacy = bench.settings.privacy
    if privacy.noise_multiplier:
        metrics["epsilon"] = _epsilon(privacy, bench.settings.fleet.rounds)
    return bench.result("fleet-accuracy", case, "accuracy", metrics=metrics), None


def _epsilon(privacy: PrivacySettings, rounds: int) -> float:
    """Of a device that takes part in all rounds: its own noise against the coordinator, or the sum's against others."""
    if privacy.by == "device":
        return epsilon_of(mu_of({privacy.noise_multiplier: rounds}), privacy.delta)
    return epsilon_spent(privacy.noise_multiplier, rounds, 1.0, privacy.delta)


def _linked(bench: Bench, case: Case) -> Found:
    from covey_coordinator.inversion.linkability import linkability, sketch

    seen = [one for fleet_round in bench.trained for one in fleet_round.seen]
    rows = np.stack([sketch(one.update, bench.seed) for one in seen])
    found = linkability(rows, [one.device_id for one in seen], [one.round_number for one in seen])
    metrics = {"linkability_auc": found.auc, "reidentified": found.identified, "chance": found.chance}
    told = bench.result(
        "fleet-linkability",
        case,
        "linkability",
        sees="Updates of several rounds without names.",
        metrics=finite(metrics),
    )
    return told, None


def _members(bench: Bench, case: Case) -> Found:
    from covey_coordinator.inversion.membership import best, membership

    inside, outside = chosen(bench.data.devices, MEMBERS), bench.data.test
    last = bench.trained[-1].parameters
    asked = [
        membership(bench.exact_model, last, (inside.x, inside.y), (outside.x, outside.y), attack=attack)
        for attack in ("threshold", "regression")
        if attack == "threshold" or bench.bundle.manifest.num_classes
    ]
    found = best(asked)
    metrics = {
        "membership_auc": max(one.auc for one in asked),
        "membership_auc_error": found.auc_error,
        "membership_tpr": found.tpr_at_0_1_percent_fpr,
        "membership_advantage": found.advantage,
    }
    told = bench.result(
        "fleet-membership",
        case,
        f"membership ({found.attack})",
        sees=AFTERWARDS,
        metrics=finite(metrics),
        notes=found.notes,
    )
    return told, None


# ---- what the rounds of one device tell together, and what it has in common


def _joined(bench: Bench, level: Level) -> Iterator[Piece]:
    """The plan's own updates of all rounds of the device with the fewest examples."""
    rounds = bench.settings.fleet.rounds
    case = Case(PLAN, bench.smallest_first[0], 0, bench.settings.plan(1), bench.protection, rounds=rounds)
    yield from _attacks_on(bench, case, "rounds-0", level, level.iterations, level.attacks)
    yield from _resolution(bench, case, "rounds-0", level)


def _properties(bench: Bench, audit: PropertyAudit) -> Iterator[Piece]:
    case = Case(PLAN, 0, 0, bench.settings.plan(1), bench.protection)
    rounds = bench.settings.fleet.rounds
    for count in (1, rounds) if bench.protection.noise_std else (1,):
        yield _property(bench, audit, replace(case, rounds=count), "fleet")


def _property(bench: Bench, audit: PropertyAudit, case: Case, place: str) -> Piece:
    key, name = _key(place, f"property-{case.rounds}"), _named("property", case)
    share = bench.settings.property.share

    def work(stop: Stop) -> Found:
        try:
            found = audit.under(case.protection, case.rounds, stop)
        except UsageError as exc:
            return _without(bench, key, case, name, audit.sees, exc, stop), None
        metrics = {"property_auc": found.auc, "property_auc_error": found.error}
        notes = (f"The property: {share:.0%} of a device's {found.examples} examples are {found.told}.",)
        told = bench.result(key, case, name, sees=audit.sees, metrics=finite(metrics), notes=notes, cut=stop())
        return told, None

    return Piece(key, f"property/{case.name}", f"{name} of {place}", work, needed=case.name == PLAN)


# ---- what a malicious server would get


def _malicious(bench: Bench) -> Iterator[Piece]:
    for name in ("imprint", "trap weights"):
        key = _key("malicious", name)
        yield Piece(key, key, f"a malicious server: {name}", _hostile(bench, key, name))


def _hostile(bench: Bench, key: str, name: str) -> Callable[[Stop], Found]:
    def work(stop: Stop) -> Found:
        from covey_coordinator.inversion.imprint import Imprint, imprinted
        from covey_coordinator.inversion.trap_weights import UnitReading, trapped

        device = bench.smallest_first[-1]
        batch = bench.bundle.manifest.batch_size
        case = Case(MALICIOUS, device, batch, one_step(bench.settings.plan(1)), bench.protection)
        chooses, reads = (imprinted, Imprint) if name == "imprint" else (trapped, UnitReading)
        specs, auxiliary = bench.bundle.manifest.parameters, bench.data.test.x
        try:
            parameters = chooses(specs, bench.child.initial, auxiliary, seed=bench.seed)
        except UsageError as exc:
            return bench.result(key, case, name, sees=SERVER_SEES, refused=str(exc)), None
        case = replace(case, parameters=parameters)
        result, pictures = bench.attack(key, case, name, reads, stop)
        notes = (_screened(bench, case, parameters), *result.notes)
        return msgspec.structs.replace(result, notes=notes), pictures

    return work


def _screened(bench: Bench, case: Case, parameters: Floats) -> str:
    """What a device's own look at these parameters says (privacy.screen_models of its agent.toml)."""
    examples = bench.data.devices[case.device].x
    grave = [one for one in suspicions(bench.bundle.manifest, parameters, examples) if one.grave]
    if grave:
        return f"Devices with the usual settings refuse these parameters ({grave[0].pattern})."
    return "Devices do not recognise these parameters as hostile."


# ---- curves: what leaks, and what is left of accuracy


def _curves(bench: Bench, level: Level, of_property: PropertyAudit) -> Iterator[Piece]:
    """Curve after curve would leave the last without a point: the first values of all, then the second ones."""
    points = {name: curves.values(bench, name) for name in curves.NAMES}
    for place in range(max(map(len, points.values()))):
        for name, values in points.items():
            if place < len(values):
                yield from _point(bench, level, name, values[place], of_property)


def _point(bench: Bench, level: Level, name: str, at: float, of_property: PropertyAudit) -> Iterator[Piece]:
    place = f"{name} {at:g}"
    key = _key(f"curve-{place}", "accuracy")
    yield Piece(key, f"fleet/{name}", f"accuracy at {place}", lambda _: _accuracy_at(bench, key, name, at))
    case = curves.case_at(bench, name, at)
    yield from _attacks_on(bench, case, f"curve-{place}", level, level.curve, level.on_curves)
    yield from _resolution(bench, case, f"curve-{place}", level)
    if name in (curves.NOISE, curves.ROUNDS):
        yield _property(bench, of_property, case, f"curve-{place}")


def _accuracy_at(bench: Bench, key: str, name: str, at: float) -> Found:
    metrics = finite({"accuracy": curves.accuracy_at(bench, name, at)})
    return bench.result(key, curves.case_at(bench, name, at), "accuracy", metrics=metrics), None
