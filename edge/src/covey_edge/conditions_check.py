"""The conditions of this device as `covey agent check` tells them: what would stand against a round now."""

from __future__ import annotations

from collections.abc import Iterator

from covey_edge.conditions import BEFORE, Conditions, Found, Sensors, Situation
from covey_edge.preflight import OK, WARNING, Facts, Finding


def conditions(facts: Facts) -> Iterator[Finding]:
    """One finding for each that is switched on. None is wrong: conditions come and go."""
    settings = facts.agent.config.conditions
    looked = Conditions(settings, Sensors(facts.agent.state_dir)).look(BEFORE, Situation())
    for found in looked:
        yield _finding(found, unknown_declines=settings.unknown == "decline")


def _finding(found: Found, *, unknown_declines: bool) -> Finding:
    if found.holds:
        return Finding("conditions", OK, f"{found.setting} holds: {found.why}")
    if found.holds is False:
        return Finding("conditions", WARNING, f"{found.setting} does not hold now: {found.why}")
    remedy = "every round is declined: leave the condition out" if unknown_declines else "it does nothing here"
    return Finding("conditions", WARNING, found.why, remedy)
