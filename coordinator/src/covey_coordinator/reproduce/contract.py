"""What a reproduction is: a paper's protocol, its numbers, ours, and the claims that either bears out. Plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Outcome = dict[str, Any]  # of one run, as JSON: "curve" [[round, value], ...] and what the reproduction reads out of it
Values = Mapping[str, float]  # case -> its measured number


class Case(NamedTuple):
    """One row of the table. settings: plain JSON values, all that decides the outcome beside the seed and the data.

    published: the paper's number in the unit of the table, None where it has none. note: shown beside the row.
    """

    label: str
    settings: dict[str, Any]
    published: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper's, or one that its numbers make. holds: on the measured numbers of one seed, or on means.

    A case that did not run makes it a KeyError: the claim is not tested then. comes_out: False for one that is known
    not to hold in runs of ours, where a paper says it or a reader would expect it.
    """

    sentence: str
    holds: Callable[[Values], bool]
    comes_out: bool = True


class Verdict(NamedTuple):
    """holds: on the means over seeds; None where the cases it needs did not run. in_seeds: in how many it holds."""

    sentence: str
    holds: bool | None
    in_seeds: int
    seeds: int

    @property
    def text(self) -> str:
        if self.holds is None:
            return "not tested in this form"
        said = "holds" if self.holds else "does not hold"
        if self.seeds == 1:
            return f"{said} (one seed)"
        return f"{said} (mean of {self.seeds} seeds; alone in {self.in_seeds} of {self.seeds})"


class Measured:
    """The outcomes of all runs: case -> one per seed, in the order of the seeds."""

    def __init__(self, outcomes: Mapping[str, Sequence[Outcome]], value: Callable[[Outcome], float]) -> None:
        self.outcomes = {label: list(found) for label, found in outcomes.items()}
        self._value = value

    def values(self, label: str) -> list[float]:
        return [self._value(outcome) for outcome in self.outcomes[label]]

    def mean(self, label: str) -> float:
        """inf where a seed never got there."""
        values = self.values(label)
        return sum(values) / len(values)

    def range(self, label: str) -> tuple[float, float]:
        values = self.values(label)
        return min(values), max(values)

    @property
    def seeds(self) -> int:
        return max((len(found) for found in self.outcomes.values()), default=0)

    def of_seed(self, number: int) -> dict[str, float]:
        return {label: self.values(label)[number] for label, found in self.outcomes.items() if number < len(found)}

    def means(self) -> dict[str, float]:
        return {label: self.mean(label) for label in self.outcomes}

    def judged(self, claim: Claim) -> Verdict:
        try:
            holds = bool(claim.holds(self.means()))
            alone = sum(bool(claim.holds(self.of_seed(number))) for number in range(self.seeds))
        except KeyError:
            return Verdict(claim.sentence, None, 0, self.seeds)
        return Verdict(claim.sentence, holds, alone, self.seeds)


@dataclass(frozen=True)
class Reproduction:
    """One published experiment.

    engine: which of covey's engines runs it. measure: what the numbers of the table are, with the paper's convention
    (last, best). protocol: ours, in sentences. deviations: from the paper's. source: where its numbers stand.
    full_time: how long the full form takes, and how that is known. needs: files that a data folder must hold.
    cases: of the quick form or the full. run: one case with one seed; (settings, seed, data folder) -> outcome.
    value: the table's number of an outcome. figure: a PNG of everything measured. found: a sentence about everything
    measured, for what is no column of the table. seeds: of the full form. remarks: what is known of the numbers that do
    not come out, from our own runs.
    """

    name: str
    title: str
    paper: str
    source: str
    engine: str
    measure: str
    protocol: tuple[str, ...]
    deviations: tuple[str, ...]
    full_time: str
    cases: Callable[[bool], Sequence[Case]]
    claims: Sequence[Claim]
    run: Callable[[dict[str, Any], int, Path | None], Outcome]
    value: Callable[[Outcome], float]
    figure: Callable[[Sequence[Case], Measured], bytes]
    found: Callable[[Measured], str] = lambda measured: ""
    needs: tuple[str, ...] = ()
    seeds: int = 3
    in_percent: bool = True
    remarks: tuple[str, ...] = ()

    def shown(self, value: float | None) -> str:
        if value is None:
            return ""
        if not math.isfinite(value):
            return "never"
        return f"{100 * value:.1f}%" if self.in_percent else f"{value:.4g}"
