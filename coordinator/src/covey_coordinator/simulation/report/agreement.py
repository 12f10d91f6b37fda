"""The page that holds a fleet against its simulation: two curves of accuracy, and how far the models lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
from jinja2 import Template

from covey_coordinator.report.html import page_environment
from covey_coordinator.simulation.report import drawings, words
from covey_coordinator.simulation.report.frame import share_floor
from covey_coordinator.simulation.report.html import MAX_CURVE_ROUNDS
from covey_coordinator.simulation.report.points import Band, thinned
from covey_coordinator.simulation.results import ONE_KINK, ONE_ROUND, RoundAgreement
from covey_edge.files import write_atomic

PAGE, NUMBERS = "agreement.html", "agreement.json"
LEAST_DRAWN = 1e-12  # equal bits have no place on a logarithmic axis


def write_agreement(folder: Path, title: str, found: Sequence[RoundAgreement]) -> Path:
    """FOLDER/agreement.json, and the page, whose path this is."""
    write_atomic(folder / NUMBERS, msgspec.json.format(msgspec.json.encode(found), indent=1))
    write_atomic(folder / PAGE, render(title, found).encode("utf-8"))
    return folder / PAGE


def sentence(found: Sequence[RoundAgreement]) -> str:
    """The outcome in one sentence."""
    if not found:
        return "The fleet finished no round, so there is nothing to compare."
    differences = [one.one_round for one in found]
    typical, most = float(np.median(differences)), max(differences)
    holds = "agree" if typical <= ONE_ROUND and most <= ONE_KINK else "do not agree"
    others = sum(not one.same_verdicts for one in found)
    judged = f"other verdicts in {words.counted(others, 'round')}" if others else "the same verdicts in every round"
    return (
        f"Fleet and simulation {holds}: after one round from the same model they differ by {typical:.1e} of the "
        f"round’s update in the median (allowed: {ONE_ROUND:.0e}) and by {most:.1e} at most "
        f"(allowed: {ONE_KINK:.0e}), with {judged}; each on its own, by {found[-1].all_rounds:.1e} after "
        f"{words.counted(len(found), 'round')}."
    )


def render(title: str, found: Sequence[RoundAgreement]) -> str:
    """The page as text."""
    numbers = thinned(range(len(found)), MAX_CURVE_ROUNDS)
    shown = [found[number] for number in numbers]
    return _template().render(
        title=title,
        sentence=sentence(found),
        accuracy=_accuracy(shown) if shown else "",
        difference=_difference(shown) if shown else "",
        rows=shown,
        left_out=len(found) - len(shown),
    )


def _accuracy(shown: Sequence[RoundAgreement]) -> str:
    values = {"fleet": [one.fleet for one in shown], "simulation": [one.simulation for one in shown]}
    limits = share_floor([v for column in values.values() for v in column]), 1.0
    return drawings.curves(_lines(shown, values), "accuracy", limits)


def _difference(shown: Sequence[RoundAgreement]) -> str:
    values = {
        "one round": [max(one.one_round, LEAST_DRAWN) for one in shown],
        "all rounds": [max(one.all_rounds, LEAST_DRAWN) for one in shown],
        "allowed": [ONE_ROUND for _ in shown],
    }
    every = [v for column in values.values() for v in column]
    return drawings.curves(_lines(shown, values), "difference", drawings.whole_powers(min(every), max(every)), log=True)


def _lines(shown: Sequence[RoundAgreement], values: dict[str, list[float]]) -> list[drawings.Line]:
    rounds = [one.number for one in shown]
    return [
        drawings.Line(index, name, Band(rounds, column, column, column))
        for index, (name, column) in enumerate(values.items())
    ]


@lru_cache(maxsize=1)
def _template() -> Template:
    return page_environment("covey_coordinator.simulation.report").get_template("agreement.html.jinja")
