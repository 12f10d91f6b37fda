"""What the results come to: means over seeds, the worst attack per rule. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from covey_coordinator.grid.settings import NO_ATTACK, GridSettings, Plan


class Panel(NamedTuple):
    """One fraction of corrupted devices: arrays (rules, attacks), NaN where the rule refuses or nothing is there yet.

    accuracy: mean over seeds after the last round. spread: largest minus smallest over seeds. refused: the rule's
    precondition does not hold. interrupted: rounds were refused, and the model stood still in these. backdoor: success
    of the trigger.
    """

    fraction: float
    num_hostile: int
    attacks: tuple[str, ...]
    accuracy: Any
    spread: Any
    refused: Any
    interrupted: Any
    backdoor: Any

    def worst(self) -> Any:
        """(rules,): the least accuracy over all attacks, NaN where a rule refuses."""
        known = np.where(np.isnan(self.accuracy), np.inf, self.accuracy).min(axis=1, initial=np.inf)
        return np.where(np.isinf(known), np.nan, known)

    def worst_backdoor(self) -> Any:
        """(rules,): the greatest success of a trigger, NaN where there was no backdoor or the rule refuses."""
        known = np.where(np.isnan(self.backdoor), -np.inf, self.backdoor).max(axis=1, initial=-np.inf)
        return np.where(np.isinf(known), np.nan, known)


def panels_of(plan: Plan, results: Sequence[dict[str, Any]]) -> list[Panel]:
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        grouped.setdefault((result["num_hostile"], result["rule"], result["attack"]), []).append(result)
    return [_panel(plan, fraction, grouped) for fraction in plan.settings.fractions]


def _panel(plan: Plan, fraction: float, grouped: dict[tuple[Any, ...], list[dict[str, Any]]]) -> Panel:
    hostile = plan.num_hostile(fraction)
    attacks = tuple(plan.attacks) if hostile else (NO_ATTACK,)
    shape = (len(plan.rules), len(attacks))
    accuracy, spread, backdoor = (np.full(shape, np.nan) for _ in range(3))
    refused, interrupted = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, rule in enumerate(plan.rules):
        for column, attack in enumerate(attacks):
            found = grouped.get((hostile, rule, attack), [])
            ran = [one for one in found if not one["refused"]]
            refused[row, column] = len(ran) < len(found)
            if ran:
                values = [one["accuracy"] for one in ran]
                accuracy[row, column], spread[row, column] = np.mean(values), max(values) - min(values)
                interrupted[row, column] = any(one["rounds_refused"] for one in ran)
            successes = [one["backdoor_success"] for one in ran if one["backdoor_success"] is not None]
            if successes:
                backdoor[row, column] = np.mean(successes)
    return Panel(fraction, hostile, attacks, accuracy, spread, refused, interrupted, backdoor)


def summary_of(plan: Plan, panels: Sequence[Panel]) -> dict[str, Any]:
    """Worst accuracy, the attack that caused it, and backdoor success, per rule and fraction. Plain JSON values."""
    found: dict[str, Any] = {}
    for row, rule in enumerate(plan.rules):
        found[rule] = [
            {
                "fraction": panel.fraction,
                "worst_accuracy": _plain(panel.worst()[row]),
                "worst_attack": _worst_attack(panel, row),
                "backdoor_success": _plain(panel.worst_backdoor()[row]),
            }
            for panel in panels
        ]
    return found


def _worst_attack(panel: Panel, row: int) -> str | None:
    values = panel.accuracy[row]
    return None if np.isnan(values).all() else panel.attacks[int(np.nanargmin(values))]


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def table_lines(plan: Plan, panels: Sequence[Panel]) -> list[str]:
    """The summary for a terminal: worst accuracy, and the greatest success of a backdoor, per rule and fraction."""
    told = f"by share of corrupted devices (mean of {seeds(plan.settings)})"
    lines = _table(f"worst accuracy over all attacks, {told}", plan, panels, [panel.worst() for panel in panels])
    backdoors = [panel for panel in panels if not np.isnan(panel.worst_backdoor()).all()]
    if backdoors:
        title = f"how often a backdoor's trigger works, {told}; the accuracy does not show it"
        lines += ["", *_table(title, plan, backdoors, [panel.worst_backdoor() for panel in backdoors])]
    return lines


def _table(title: str, plan: Plan, panels: Sequence[Panel], columns: Sequence[Any]) -> list[str]:
    width = max([4, *map(len, plan.rules)])
    lines = [title, f"{'rule':<{width}}" + "".join(f"{panel.fraction:>8.0%}" for panel in panels)]
    for row, rule in enumerate(plan.rules):
        values = [column[row] for column in columns]
        cells = [f"{value:>8.1%}" if not np.isnan(value) else f"{'refuses':>8}" for value in values]
        lines.append(f"{rule:<{width}}{''.join(cells)}")
    return lines


def seeds(settings: GridSettings) -> str:
    """How many, in words: 1 seed, 2 seeds."""
    return f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}"
