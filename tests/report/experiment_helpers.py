"""An experiment's results as a real one leaves them: rules against attacks over fractions of corrupted devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import msgspec
import numpy as np

from covey_coordinator.simulation.results import Judged, RoundRecord, RunResult

RULES = ("mean", "median", "multi-krum")
ATTACKS = ("label-flip", "alie", "sign-flip")
FRACTIONS = (0.1, 0.2, 0.3)
# how much of the accuracy is lost per corrupted share
HARM = {
    "mean": {"label-flip": 0.6, "alie": 1.2, "sign-flip": 2.6},
    "median": {"label-flip": 0.3, "alie": 1.1, "sign-flip": 0.2},
}


def run(
    rule: str,
    attack: str,
    fraction: float,
    seed: int,
    *,
    rounds: int = 12,
    devices: int = 10,
    cohort: int = 0,
    every: int = 1,
    classes: int = 10,
) -> RunResult:
    """cohort: devices in a round, 0 for all. every: rounds between evaluations."""
    random = np.random.default_rng([seed, len(rule), len(attack), round(100 * fraction)])
    ids = [f"device-{number:03d}" for number in range(devices)]
    corrupted = set(random.choice(ids, round(fraction * devices), replace=False).tolist())
    final = 0.96 - HARM.get(rule, {}).get(attack, 0.1) * fraction + 0.01 * random.normal()
    records = [RoundRecord(0, None, {"accuracy": 0.1, "loss": 2.303})]
    for number in range(1, rounds + 1):
        accuracy = 0.1 + (final - 0.1) * (1 - math.exp(-4 * number / rounds)) + 0.006 * random.normal()
        accuracy = float(np.clip(accuracy, 0.02, 1))
        evaluated = number % every == 0 or number == rounds
        evaluation = {"accuracy": accuracy, "loss": -math.log(accuracy)} if evaluated else {}
        chosen = sorted(random.choice(ids, cohort or devices, replace=False).tolist())
        verdicts = {device_id: _judged(rule, attack, device_id in corrupted, random) for device_id in chosen}
        measured = {"num_accepted": float(sum(one.accepted for one in verdicts.values())), "aggregate_norm": 0.4}
        records.append(RoundRecord(number, 2.3 * (1 - accuracy) + 0.05, evaluation, {}, verdicts, measured, 0.4))
    counts = {one: tuple(int(c) for c in random.dirichlet([0.6] * classes) * random.integers(60, 160)) for one in ids}
    own = {one: {"accuracy": float(np.clip(final - 0.3 * random.random() ** 3, 0, 1)), "loss": 0.3} for one in ids}
    return RunResult(
        key=f"{rule}-{attack}-{fraction}-{seed}",
        seed=seed,
        varied={"aggregation.rule": rule, "attack.attack": attack, "attack.fraction": fraction},
        rounds=records,
        faults={one: ((attack,) if one in corrupted else ()) for one in ids},
        counts=counts,
        devices=own,
        seconds=3.5,
    )


def _judged(rule: str, attack: str, corrupted: bool, random: np.random.Generator) -> Judged:
    shift = {"sign-flip": 3.0, "label-flip": 1.4, "alie": -0.8}.get(attack, 0.5) * corrupted
    score = float(random.normal() + shift)
    if rule == "mean":
        return Judged(True, score)
    return Judged(score < 1.3 if rule == "multi-krum" else score < 2.2, score)


def experiment(seeds: Sequence[int] = (0, 1, 2), **settings: Any) -> list[RunResult]:
    return [run(*values, seed, **settings) for *values, seed in product(RULES, ATTACKS, FRACTIONS, seeds)]


class Large:
    """A thousand runs, made anew whenever they are looked at: ten rules, ten attacks, five fractions, two seeds.

    They share their rounds, of which there are a hundred, with 20 of 40 devices.
    """

    def __init__(self) -> None:
        self._patterns = [
            run("multi-krum", "label-flip", 0.2, seed, rounds=100, devices=40, cohort=20) for seed in (0, 1)
        ]

    def __iter__(self) -> Iterator[RunResult]:
        names = (f"number {number} of ten with a name of usual length" for number in range(10))
        for rule, attack, fraction, seed in product(*[[*names]] * 2, (0.05, 0.1, 0.15, 0.2, 0.25), range(2)):
            varied = {"rule": rule, "attack": attack, "fraction": fraction}
            yield msgspec.structs.replace(self._patterns[seed], key=f"{varied}-{seed}", varied=varied)


SETTINGS = {
    "data.name": "digits",
    "partition.kind": "dirichlet",
    "partition.alpha": "1",
    "devices": "10",
    "rounds": "12",
    "training.epochs": "2",
    "training.learning_rate": "0.1",
    "model": "mlp",
}
