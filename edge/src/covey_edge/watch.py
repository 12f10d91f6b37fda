"""What becomes of a round while a device's conditions come and go. Decides; the agent acts, and gives it the time.

Conditions are read at an invitation, while the device works, and while it may still join a round that it declined for
now, at most every `check_every_s`; an idle device reads nothing. Work that was paused goes on at the second look in a
row that finds everything well. docs/conditions.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from enum import Enum

from covey_edge.conditions import BEFORE, BY_SETTING, Conditions, Found, Situation

log = logging.getLogger("covey.agent")

GOOD_LOOKS = 2  # in a row, before paused work goes on
LEAST_LEFT = 0.1  # of a round's time: a device that is still paused then says that it will not deliver
JOIN_LOOK_S = 60.0  # at least, between looks of a device that waits to join: it is idle, and a round may last days
LOAD_S = 60.0  # time constant of the first number of /proc/loadavg


class Order(Enum):
    """What the agent is to do with the work under way."""

    NOTHING = "nothing"
    PAUSE = "pause"
    GO_ON = "go on"
    GIVE_UP = "give up"


class Watch:
    """For one device. clock: seconds, never backwards. threads: of the training child, as it shows in the load."""

    def __init__(self, conditions: Conditions, clock: Callable[[], float], threads: int = 1) -> None:
        self._conditions, self._clock, self._threads = conditions, clock, threads
        self._settings = conditions.settings
        self.paused = False
        self._good_looks = 0
        self._last_look = self._network_look = -math.inf
        self._own_load, self._load_at = 0.0, clock()
        self._found: dict[str, Found] = {}  # by setting; of each condition the newest
        self._against: list[Found] = []  # at the last look
        self._told_owner: tuple[tuple[str, object], ...] = ()

    # --- what the agent asks

    def refusal(self, need_mb: float = 0.0) -> str:
        """Why the device does not take part now, in the words that the coordinator hears; "" where it does."""
        self._look(BEFORE, need_mb)
        return self.reason

    def order(self, step: str, left_s: float, duration_s: float, *, busy: bool) -> Order:
        """For work under way at this step. left_s: of the round's duration_s. busy: whether the child computes."""
        if self._clock() - self._last_look < self._settings.check_every_s:
            return Order.NOTHING
        self._count_load(busy and not self.paused)
        self._look(step)
        if not self._against:
            return self._good()
        self._good_looks = 0
        waits = self._settings.when_lost == "pause" and all(BY_SETTING[one.setting].pausable for one in self._against)
        if not waits or left_s < LEAST_LEFT * duration_s:
            return Order.GIVE_UP
        if self.paused:
            return Order.NOTHING
        self.paused = True
        return Order.PAUSE

    def may_join(self, need_mb: Callable[[], float]) -> bool:
        """Whether everything is well now that was not when the round was declined; False where it is not yet looked."""
        if self._clock() - self._last_look < max(JOIN_LOOK_S, self._settings.check_every_s):
            return False
        return not self.refusal(need_mb())

    def holds_back(self) -> bool:
        """Whether an update waits for another network. Looks at that alone."""
        if not self._settings.unmetered:
            return False
        if self._clock() - self._network_look >= self._settings.check_every_s:
            self._network_look = self._clock()
            self._found["unmetered"] = self._conditions.found(BY_SETTING["unmetered"], Situation())
            self._tell_owner()
        return self._conditions.stands_against(self._found["unmetered"])

    def over(self) -> None:
        """The work is done, or given up."""
        self.paused, self._good_looks = False, 0

    # --- what it says

    @property
    def reason(self) -> str:
        """For the coordinator: what stood against the work at the last look, without numbers."""
        if not self._against:
            return ""
        kinds = dict.fromkeys(BY_SETTING[one.setting].told for one in self._against)
        return "this device's conditions do not hold" + (f": {', '.join(kinds)}" if self._settings.tell else "")

    def report(self) -> dict[str, str]:
        """For the owner: what the newest look found of every condition that is switched on; whether work is paused."""
        names = [one.setting for one in self._conditions.asked()]
        told = {name: _in_words(self._found[name]) if name in self._found else "not looked at yet" for name in names}
        return {**told, "work": "paused"} if self.paused else told

    # --- inside

    def _good(self) -> Order:
        self._good_looks += 1
        if not self.paused or self._good_looks < GOOD_LOOKS:
            return Order.NOTHING
        self.over()
        return Order.GO_ON

    def _look(self, step: str, need_mb: float = 0.0) -> None:
        self._count_load(False)
        lost = frozenset(name for name, one in self._found.items() if one.holds is False)
        found = self._conditions.look(step, Situation(need_mb, self._own_load, lost))
        self._last_look = self._clock()
        self._found.update({one.setting: one for one in found})
        self._against = [one for one in found if self._conditions.stands_against(one)]
        self._tell_owner()

    def _tell_owner(self) -> None:
        """A line for what has changed since the last one."""
        told = tuple((name, one.holds) for name, one in self._found.items() if one.holds is not True)
        if told == self._told_owner:
            return
        self._told_owner = told
        amiss = "; ".join(self._found[name].why for name, _ in told)
        log.info("conditions: %s", amiss or "all hold")

    def _count_load(self, busy: bool) -> None:
        """The kernel's mean of the load forgets with LOAD_S; so does this share of it, which is the child's."""
        now = self._clock()
        kept = math.exp(-(now - self._load_at) / LOAD_S)
        self._own_load, self._load_at = kept * self._own_load + (1 - kept) * self._threads * busy, now


def _in_words(found: Found) -> str:
    return f"{'unknown' if found.holds is None else 'holds' if found.holds else 'does not hold'}: {found.why}"
