"""What compression does to robust rules: accuracy, and who is turned away, per rule, attack and form of the updates.

The grid's simulation (docs/attacks.md: digits, 20 devices, Dirichlet alpha 1, 30 rounds, 10 steps each) with updates
that travel as they do live: honest devices encode with the seed of their round and name and withhold what top-k leaves
out; the coordinator decodes before it screens and judges. Attackers know every honest update as the coordinator decodes
it, craft from these, and send the result in the same form, because nothing else decodes; they withhold nothing.
Run: python benchmarks/compressed_rules.py [--quick] [--seeds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covey_coordinator.libraries import prepare

prepare()

import numpy as np

from covey_coordinator.aggregation.engines import make_engine
from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.aggregation.rules import Rule
from covey_coordinator.attacks.contract import Attack
from covey_coordinator.attacks.plain import NoAttack
from covey_coordinator.attacks.registry import make_attack
from covey_coordinator.grid.settings import GridSettings
from covey_coordinator.grid.simulation import Attackers, Fleet, World, corrupted_devices, flat, world_of
from covey_coordinator.records import ACCEPTED
from covey_protocol.compression import decode, encode
from covey_protocol.errors import RuleError
from covey_protocol.forms import NONE, ROTATED_4BIT, ROTATED_8BIT, TOP_K, WITHHOLDING, Compression, update_seed

FORMS = {
    "none": Compression(NONE),
    "rotated-8bit": Compression(ROTATED_8BIT),
    "rotated-4bit": Compression(ROTATED_4BIT),
    "top-k 10%": Compression(TOP_K, 0.1),
    "top-k 1%": Compression(TOP_K, 0.01),
}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("mean", {}),
    "median": ("median", {}),
    "trimmed-mean": ("trimmed-mean", {}),
    "multi-krum": ("multi-krum", {}),
    "geometric-median": ("geometric-median", {}),
    "nnm, trimmed-mean": ("trimmed-mean", {"before": ["nnm"]}),
}
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "nobody": ("none", {}),
    "sign-flip": ("sign-flip", {}),
    "ipm": ("ipm", {"epsilon": 10.0}),
    "alie": ("alie", {}),
    "min-max": ("min-max", {}),
}
FRACTION = 0.2  # of corrupted devices; the rules are told the true number, also where nobody attacks


@dataclass(frozen=True)
class Result:
    """accuracy: at the end, in percent. caught, wronged: shares of the attackers' and the honest updates rejected."""

    accuracy: float
    caught: float
    wronged: float
    rounds_refused: int


class Run:
    """One fleet, attacked, for all rounds."""

    def __init__(self, settings: GridSettings, rule: Rule, attack: Attack, form: Compression, seed: int) -> None:
        self._settings, self._form = settings, form
        self._world: World = world_of(settings.data, settings.model, settings.devices, settings.alpha, seed)
        attackers = 0 if isinstance(attack, NoAttack) else round(FRACTION * settings.devices)
        self._hostile = corrupted_devices(settings.devices, attackers, seed)
        self._fleet = Fleet(self._world, settings, attack, self._hostile, seed)
        self._engine = make_engine("direct", rule, self._world.specs)
        self._attackers = Attackers(attack, self._hostile, self._fleet.sizes, rule, self._engine, seed)
        self._ids = [f"device-{number:04d}" for number in range(settings.devices)]
        self._withheld = np.zeros((settings.devices, len(self._world.initial)), np.float32)
        self._parameters = self._world.initial

    def result(self) -> Result:
        rejected = np.zeros(self._settings.devices)
        refused = 0
        for number in range(self._settings.rounds):
            updates = self._decoded(self._fleet.updates(self._parameters, number), number)
            try:
                step = self._engine.step(self._parameters, updates, self._fleet.sizes, self._ids)
            except RuleError:
                refused += 1
                continue
            self._parameters = step.parameters
            rejected += [verdict.status != ACCEPTED for verdict in step.verdicts]
        test = self._world.test
        right = self._world.network.predicted(self._parameters, flat(test.x)) == test.y
        share = rejected / max(1, self._settings.rounds - refused)
        honest = np.delete(share, self._hostile)
        caught = float(share[self._hostile].mean()) if len(self._hostile) else float("nan")
        return Result(100 * float(right.mean()), caught, float(honest.mean()), refused)

    def _decoded(self, updates: np.ndarray, number: int) -> np.ndarray:
        """(n, d) as the coordinator decodes what honest devices and attackers send in this round."""
        hostile = set(self._hostile.tolist())
        for row in range(len(updates)):
            if row not in hostile:
                whole = updates[row] + self._withheld[row]
                updates[row] = self._travelled(whole, number, row)
                if self._form.name in WITHHOLDING:
                    self._withheld[row] = whole - updates[row]
        if hostile:
            crafted_rows = self._attackers.crafted(updates, self._parameters, number)
            for row, crafted in zip(self._hostile, crafted_rows):
                updates[row] = self._travelled(crafted, number, int(row))
        return updates

    def _travelled(self, update: np.ndarray, number: int, row: int) -> np.ndarray:
        if self._form.name == NONE:
            return update
        seed = update_seed(f"run.{number}.0", self._ids[row])
        return decode(encode(update, self._form, seed), self._form, seed, len(update))


def made_rule(label: str, devices: int) -> Rule:
    name, settings = RULES[label]
    return make_rule(name, 0 if name == "mean" else round(FRACTION * devices), **settings)


def measured(settings: GridSettings, rule: str, attack: str, form: str, seed: int) -> Result:
    name, more = ATTACKS[attack]
    with np.errstate(all="ignore"):  # attacked models overflow; the engine refuses what is not finite
        return Run(settings, made_rule(rule, settings.devices), make_attack(name, **more), FORMS[form], seed).result()


def row(label: str, cells: Sequence[Sequence[Result]]) -> str:
    """Per form: mean accuracy (the worst), then the shares of attackers and of honest updates that were rejected."""
    texts = []
    for results in cells:
        accuracy = [one.accuracy for one in results]
        caught, wronged = (np.mean([getattr(one, name) for one in results]) for name in ("caught", "wronged"))
        told = "" if wronged == 0 and not caught > 0 else f"; {_percent(float(caught))}, {_percent(float(wronged))}"
        texts.append(f"{np.mean(accuracy):.0f} ({min(accuracy):.0f}){told}")
    return f"| {label} | " + " | ".join(texts) + " |"


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, three rounds, two attacks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every single run into this file")
    chosen = parser.parse_args()
    settings = GridSettings(rounds=3 if chosen.quick else 30)
    attacks = ["nobody", "sign-flip"] if chosen.quick else list(ATTACKS)
    seeds = range(1 if chosen.quick else chosen.seeds)
    runs = []
    print(f"digits, {settings.devices} devices, {round(FRACTION * settings.devices)} of them attack,", end=" ")
    print(f"{settings.rounds} rounds, {len(seeds)} seeds: accuracy, mean (worst);", end=" ")
    print("percent of the attackers' and of the honest updates rejected, where the rule rejects any")
    print("| rule, attack | " + " | ".join(FORMS) + " |\n|---|" + "---|" * len(FORMS))
    for rule in RULES:
        for attack in attacks:
            cells = [[measured(settings, rule, attack, form, seed) for seed in seeds] for form in FORMS]
            print(row(f"{rule}, {attack}", cells), flush=True)
            for form, results in zip(FORMS, cells):
                runs += [{"rule": rule, "attack": attack, "form": form, **vars(one)} for one in results]
    if chosen.json:
        chosen.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
