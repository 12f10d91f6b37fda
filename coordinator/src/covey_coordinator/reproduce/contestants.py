"""The methods that learn from mostly corrupted devices and few trusted instances, and how all of them are tuned.

Every method gets the same number of settings to try, spread over its ranges (log-uniform; a Latin hypercube, the same
in every run), and is judged on the same instances: the validation set of the papers, which is clean and larger than
the trusted set, or cross-validation on the trusted instances alone, which is all an honest user has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from covey_coordinator.grid.simulation import stream
from covey_coordinator.reproduce.majority import FOLDS, World
from covey_coordinator.teaching import baselines
from covey_coordinator.teaching.baselines import Problem
from covey_coordinator.teaching.fitting import LOGISTIC, RIDGE, Data, Floats, joined, loss, score
from covey_coordinator.teaching.reference import comt
from covey_coordinator.teaching.tuning import drawn
from covey_protocol import teaching

Settings = Mapping[str, float]
DRAWS = 71  # stream of random numbers
UNTUNED_DECAY = 1e-3
COMT_ROUNDS, COMT_TOLERANCE = 60, 1e-3
MOST_FOLDS = 3
BOTH = (RIDGE, LOGISTIC)
DECAY = (1e-6, 10.0)
SHARE = (1e-3, 0.99)


class Method(NamedTuple):
    """fit: (problem, settings) -> theta. ranges: of what is tuned. kinds: of problems that it is for."""

    fit: Callable[[Problem, Settings], Floats]
    ranges: Mapping[str, tuple[float, float]]
    kinds: tuple[str, ...] = BOTH


def taught(problem: Problem, settings: Settings) -> Floats:
    """CoMT with the constants that `teaching.tuning` draws for these data; draw 0 is the middle of its ranges."""
    devices, trusted = ([(part.x, part.y) for part in parts] for parts in (problem.devices, problem.trusted))
    kind, draw = teaching.Problem(problem.kind), int(settings["draw"])
    random = stream(draw, DRAWS) if draw else None
    base = teaching.Settings(rounds=COMT_ROUNDS, tolerance=COMT_TOLERANCE)
    return comt(devices, trusted, kind, drawn(kind, devices, trusted, random, base)).theta


COMT = "CoMT"
METHODS: dict[str, Method] = {
    "trusted only": Method(baselines.trusted_only, {"decay": DECAY}),
    "devices only": Method(baselines.noisy_only, {"decay": DECAY}),
    "trusted + noisy": Method(baselines.trusted_and_noisy, {"decay": DECAY}),
    "weighted": Method(baselines.weighted, {"decay": DECAY, "share": SHARE}),
    "centred": Method(baselines.centred, {"decay": DECAY, "share": SHARE}, (RIDGE,)),
    "best devices": Method(baselines.best_devices, {"decay": DECAY, "share": SHARE, "kept": (0.05, 1.0)}),
    "sign-corrected": Method(baselines.sign_corrected, {"decay": DECAY, "share": SHARE}, (LOGISTIC,)),
    "median": Method(baselines.coordinate_median, {"decay": DECAY}),
    "geometric median": Method(baselines.geometric_median, {"decay": DECAY}),
    "RSA": Method(baselines.rsa, {"decay": DECAY, "penalty": (1e-3, 1.0), "rate": (0.02, 1.0)}),
    "REWLS": Method(baselines.rewls, {"decay": DECAY}, (RIDGE,)),
    "robust logistic": Method(baselines.robust_logistic, {"decay": DECAY}, (LOGISTIC,)),
    "FLTrust": Method(baselines.fltrust, {"decay": DECAY, "rate": (0.003, 0.3)}),
    "DUTI": Method(baselines.debugged, {"decay": DECAY, "price": (1e-3, 10.0), "confidence": (1.0, 1e3)}),
    COMT: Method(taught, {}),  # its settings depend on one another and on the data: draws of its own, as many
}


def candidates(name: str, budget: int) -> list[dict[str, float]]:
    """The settings that are tried, log-uniform in the method's ranges: in each range one in each of `budget` strata.
    CoMT's are draws of `teaching.tuning`."""
    if name == COMT:
        return [{"draw": float(number)} for number in range(budget)]
    random = stream(sum(name.encode()), DRAWS)
    columns = {}
    for setting, (low, high) in METHODS[name].ranges.items():
        places = (random.permutation(budget) + 0.5) / budget
        columns[setting] = low * (high / low) ** places
    return [{setting: float(values[place]) for setting, values in columns.items()} for place in range(budget)]


def tuned(name: str, world: World, by: str, budget: int) -> tuple[Floats, dict[str, float]]:
    """(theta, the settings chosen). by: `validation`, `trusted` (cross-validation on these alone), or `nothing`: decay
    1e-3, for methods without other settings."""
    method = METHODS[name]
    if by == "nothing":
        chosen = {"decay": UNTUNED_DECAY}
        return method.fit(world.problem, chosen), chosen
    judge = _on_validation if by == "validation" else _on_trusted
    tried = candidates(name, budget)
    chosen = tried[int(max(range(budget), key=lambda place: judge(method, world, tried[place])))]
    return method.fit(world.problem, chosen), chosen


def _on_validation(method: Method, world: World, settings: Settings) -> tuple[float, float]:
    return _judged(world.problem.kind, [(world.validation, _fit(method, world.problem, settings))])


def _on_trusted(method: Method, world: World, settings: Settings) -> tuple[float, float]:
    """Each fold of the trusted instances predicted by the method that does not have them."""
    owner = np.repeat(np.arange(len(world.problem.trusted)), [len(part.y) for part in world.problem.trusted])
    trusted = world.problem.all_trusted
    fold = np.empty(len(trusted.y), int)
    order = stream(0, FOLDS).permutation(len(trusted.y))
    ranked = order[np.argsort(trusted.y[order] > 0, kind="stable")] if world.problem.kind == LOGISTIC else order
    folds = min(MOST_FOLDS, len(trusted.y))
    fold[ranked] = np.arange(len(trusted.y)) % folds
    parts = []
    for number in range(folds):
        kept = [trusted.take((owner == place) & (fold != number)) for place in range(len(world.problem.trusted))]
        parts.append((trusted.take(fold == number), _fit(method, world.problem._replace(trusted=kept), settings)))
    return _judged(world.problem.kind, parts)


def _fit(method: Method, problem: Problem, settings: Settings) -> Floats | None:
    """None where it diverged."""
    with np.errstate(all="ignore"):
        try:
            theta = method.fit(problem, settings)
        except np.linalg.LinAlgError:
            return None
    return theta if np.isfinite(theta).all() else None


def _judged(kind: str, parts: list[tuple[Data, Floats | None]]) -> tuple[float, float]:
    """(score of all predictions together, - their mean loss), the second for ties of an AUC of few instances."""
    found = [(part, part.x @ theta) for part, theta in parts if theta is not None]
    if len(found) < len(parts):
        return (-np.inf, -np.inf)
    whole, predicted = joined([part for part, _ in found]), np.concatenate([z for _, z in found])
    losses = -loss(kind, Data(predicted[:, None], whole.y), np.ones(1))
    return (score(kind, whole.y, predicted), losses) if kind == LOGISTIC else (losses, losses)
