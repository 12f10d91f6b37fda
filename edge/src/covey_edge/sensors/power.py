"""Mains, charging and the battery's level, from /sys/class/power_supply (ABI/testing/sysfs-class-power)."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from covey_edge.sensors.asking import read_number, read_text

STORES = ("Battery", "UPS")
CHARGED = ("Charging", "Full", "Not charging")  # "Not charging": plugged in, and not charged beyond a threshold


def _supplies(root: Path) -> list[Path]:
    """Of this machine; not the batteries of its mouse and keyboard."""
    every = sorted((root / "sys/class/power_supply").glob("*"))
    return [one for one in every if read_text(one / "scope") != "Device"]


def _batteries(root: Path) -> list[Path]:
    every = [one for one in _supplies(root) if read_text(one / "type") in STORES]
    return [one for one in every if read_text(one / "present") != "0"]


def charging(root: Path) -> Optional[bool]:
    """Whether the machine lives on mains (also USB or wireless) or its battery is charged.

    A battery that discharges is not charged, also where a weak charger is plugged in. A machine that shows neither
    battery nor mains, as a Raspberry Pi, says nothing.
    """
    batteries = [read_text(one / "status") for one in _batteries(root)]
    if "Discharging" in batteries:
        return False
    if any(status in CHARGED for status in batteries):
        return True
    sources = [one for one in _supplies(root) if read_text(one / "type") not in STORES]
    online = [read_number(one / "online") for one in sources]
    known = [value for value in online if value is not None]
    return any(known) if known else None


def battery_percent(root: Path) -> Optional[int]:
    """Of the emptiest battery."""
    levels = [read_number(one / "capacity") for one in _batteries(root)]
    return min((level for level in levels if level is not None and 0 <= level <= 100), default=None)
