"""What a simulation leaves behind: one record per round, one result per run. Plain values, written as JSON."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

HEALTHY: tuple[str, ...] = ()
# A fleet's difference from a simulation after one round, in lengths of the round's update: of the median round, and of
# any, because a ReLU whose input lies within rounding of 0 flips now and then (docs/simulation-report.md)
ONE_ROUND, ONE_KINK = 1e-5, 1e-2


class Judged(Struct, frozen=True):
    """What the rule said of one device in one round. score: larger is more suspicious; see the rule."""

    accepted: bool
    score: float


class RoundRecord(Struct, frozen=True):
    """One round. number: from 1; 0 is the model before any.

    loss: mean training loss over the cohort's examples, None in round 0. evaluation: "loss" and "accuracy" on the
    central test data, empty where the round was not evaluated. device_evaluation: the same over devices' own data
    ("accuracy_mean", "accuracy_median", "accuracy_worst"), where asked. verdicts: of the cohort, by device id.
    """

    number: int
    loss: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    device_evaluation: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, Judged] = field(default_factory=dict)
    measurements: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class RunResult(Struct, frozen=True):
    """One run of an experiment: one point of the sweep with one seed.

    key: unique in its experiment, a folder's name. varied: sweep key -> value. faults: device id -> names of what is
    wrong with it (corruptions, an attack), empty where it is healthy: the truth that verdicts are held against.
    counts: device id -> examples per class, after corruption. devices: device id -> its final evaluation.
    """

    key: str
    seed: int
    varied: dict[str, Any] = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)
    faults: dict[str, tuple[str, ...]] = field(default_factory=dict)
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    devices: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


class RoundAgreement(Struct, frozen=True):
    """One round of a fleet beside the simulation's. Differences are Euclidean lengths, over that of the fleet's update.

    An update shorter than 1.2 % of the parameters counts as that long: see `agreement.measure`.

    one_round: after this round alone, from the fleet's own model before it. all_rounds: after all rounds until this
    one, each on its own. fleet, simulation: accuracy on central test data. same_verdicts: of one_round.
    """

    number: int
    one_round: float
    all_rounds: float
    fleet: float
    simulation: float
    same_verdicts: bool
