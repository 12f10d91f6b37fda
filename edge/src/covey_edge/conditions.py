"""When a device works: what its owner asks for ([conditions] in agent.toml) held against what the device tells.

docs/conditions.md has what is read where. `Conditions.look` reads and judges; what becomes of a round is `watch`'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Optional

from covey_edge.config import ConditionSettings
from covey_edge.hours import is_within
from covey_edge.sensors import host, network, power, temperature, termux
from covey_edge.sensors.asking import Ask, Commands

# how much better than asked a condition must be to hold again after it was lost, so that nothing flaps
MARGIN_C = 5.0
MARGIN_PERCENT = 5
MARGIN_SHARE = 0.2  # of memory, disk and load


class Situation(NamedTuple):
    """What a look depends on beside sensors. need_mb: what the round would put on the disk. own_load: of the load, what
    is this device's own training. lost: the settings of the conditions that did not hold at the last look."""

    need_mb: float = 0.0
    own_load: float = 0.0
    lost: frozenset[str] = frozenset()


class Found(NamedTuple):
    """One condition at one look. holds: None where it cannot be told. why: for the owner, with numbers."""

    setting: str
    holds: Optional[bool]
    why: str


class Sensors:
    """What this device tells of itself. root: "/" but in tests. ask: runs a command."""

    def __init__(
        self,
        state_dir: Path,
        root: Path = Path("/"),
        environment: Mapping[str, str] = os.environ,
        ask: Optional[Ask] = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state_dir, self._root = state_dir, root
        self._android = termux.is_termux(environment)
        self._ask: Ask = ask if ask is not None else Commands()
        self._clock = clock

    def charging(self) -> Optional[bool]:
        return termux.charging(self._ask) if self._android else power.charging(self._root)

    def battery_percent(self) -> Optional[int]:
        return termux.battery_percent(self._ask) if self._android else power.battery_percent(self._root)

    def processor_c(self) -> Optional[float]:
        return temperature.processor_c(self._root)

    def throttled(self) -> Optional[tuple[str, ...]]:
        return temperature.throttled(self._root, self._ask)

    def metered(self) -> Optional[bool]:
        return termux.metered(self._ask) if self._android else network.metered(self._root, self._ask)

    def minute_of_day(self) -> Optional[int]:
        return host.minute_of_day(self._clock())

    def free_disk_mb(self) -> Optional[float]:
        return host.free_disk_mb(self._state_dir)

    def free_memory_mb(self) -> Optional[float]:
        return host.free_memory_mb(self._root)

    def load(self) -> Optional[float]:
        return host.load(self._root)


# --- the conditions: whether each holds, and why in words. Only those that are asked for are looked at.

Verdict = tuple[Optional[bool], str]
UNKNOWN: Verdict = (None, "")


def _charging(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.charging()
    return UNKNOWN if value is None else (value, "on mains or charging" if value else "on battery")


def _battery(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.battery_percent()
    if value is None:
        return UNKNOWN
    least = min(100, asked.min_battery + MARGIN_PERCENT) if "min_battery" in now.lost else asked.min_battery
    return value >= least, f"the battery is at {value} %, needed are {least} %"


def _temperature(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.processor_c()
    if value is None:
        return UNKNOWN
    most = asked.max_temperature_c - (MARGIN_C if "max_temperature_c" in now.lost else 0.0)
    return value <= most, f"the processor has {value:.0f} C, allowed are {most:g} C"


def _unthrottled(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.throttled()
    return UNKNOWN if value is None else (not value, f"the firmware reports {', '.join(value) or 'nothing'}")


def _unmetered(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.metered()
    return UNKNOWN if value is None else (not value, f"the network is {'metered' if value else 'not metered'}")


def _quiet_hours(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.minute_of_day()
    if value is None:
        return UNKNOWN
    return not is_within(value, asked.quiet_hours, "quiet_hours"), f"it is {_clock(value)}"


def _hours(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.minute_of_day()
    return UNKNOWN if value is None else (is_within(value, asked.hours, "hours"), f"it is {_clock(value)}")


def _free_disk(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.free_disk_mb()
    least = _raised(asked.min_free_disk_mb, "min_free_disk_mb", now) + now.need_mb
    return UNKNOWN if value is None else (value >= least, f"{value:.0f} MiB of disk are free, needed are {least:.0f}")


def _free_memory(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.free_memory_mb()
    least = _raised(asked.min_free_memory_mb, "min_free_memory_mb", now)
    return UNKNOWN if value is None else (value >= least, f"{value:.0f} MiB of memory are free, needed are {least:.0f}")


def _load(asked: ConditionSettings, sensors: Sensors, now: Situation) -> Verdict:
    value = sensors.load()
    if value is None:
        return UNKNOWN
    others = max(0.0, value - now.own_load) / host.cores()
    most = asked.max_load * (1 - MARGIN_SHARE if "max_load" in now.lost else 1.0)
    return others <= most, f"other programs' load is {others:.2f} per core, allowed is {most:.2f}"


def _raised(least: float, setting: str, now: Situation) -> float:
    return least * (1 + MARGIN_SHARE if setting in now.lost else 1.0)


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


class Condition(NamedTuple):
    """told: all that the coordinator hears. before, fetching, training: at which steps of a round it counts; free disk
    is needed before, then its lack is an error of its own, and a network is not used while training. pausable: whether
    waiting helps; a child that is stopped frees no memory."""

    setting: str
    told: str
    judge: Callable[[ConditionSettings, Sensors, Situation], Verdict]
    fetching: bool = True
    training: bool = True
    pausable: bool = True


BEFORE, FETCHING, TRAINING = "before", "fetching", "training"
CONDITIONS = (
    Condition("charging", "not charging", _charging),
    Condition("min_battery", "battery low", _battery),
    Condition("max_temperature_c", "too warm", _temperature),
    Condition("unthrottled", "throttled", _unthrottled),
    Condition("unmetered", "metered network", _unmetered, training=False),
    Condition("quiet_hours", "not at this hour", _quiet_hours),
    Condition("hours", "not at this hour", _hours),
    Condition("min_free_disk_mb", "little free disk", _free_disk, fetching=False, training=False),
    Condition("min_free_memory_mb", "little free memory", _free_memory, pausable=False),
    Condition("max_load", "busy", _load),
)
BY_SETTING = {one.setting: one for one in CONDITIONS}


class Conditions:
    """The owner's conditions on this device. settings: of agent.toml."""

    def __init__(self, settings: ConditionSettings, sensors: Sensors) -> None:
        self.settings, self._sensors = settings, sensors

    def asked(self, step: str = BEFORE) -> list[Condition]:
        """Those that are switched on and count at this step of a round."""
        on = [one for one in CONDITIONS if getattr(self.settings, one.setting)]
        return [one for one in on if step == BEFORE or getattr(one, step)]

    def look(self, step: str, now: Situation) -> list[Found]:
        """What holds at this moment. Waits for commands: asking.COMMAND_TIMEOUT_S for each that hangs, once."""
        return [self.found(one, now) for one in self.asked(step)]

    def found(self, one: Condition, now: Situation) -> Found:
        holds, why = one.judge(self.settings, self._sensors, now)
        if holds is None:
            why = f'{one.setting} cannot be read here (unknown = "{self.settings.unknown}")'
        return Found(one.setting, holds, why)

    def stands_against(self, found: Found) -> bool:
        """Whether it keeps the device from working. What cannot be read does if its owner says so."""
        return found.holds is False or (found.holds is None and self.settings.unknown == "decline")
