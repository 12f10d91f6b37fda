"""Android, through the commands of the package termux-api. Written from what they are known to print, not run there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

from covey_edge.sensors.asking import Ask, told


def is_termux(environment: Mapping[str, str]) -> bool:
    return "TERMUX_VERSION" in environment or "/com.termux/" in environment.get("PREFIX", "")


def charging(ask: Ask) -> Optional[bool]:
    """Plugged in, and not discharging all the same (a weak charger)."""
    said = told(ask, "termux-battery-status")
    plugged, status = said.get("plugged"), said.get("status")
    if not isinstance(plugged, str):
        return None
    return plugged.startswith("PLUGGED") and status != "DISCHARGING"


def battery_percent(ask: Ask) -> Optional[int]:
    level = told(ask, "termux-battery-status").get("percentage")
    return round(level) if isinstance(level, (int, float)) and 0 <= level <= 100 else None


def metered(ask: Ask) -> Optional[bool]:
    """Wi-Fi is taken for unmetered, mobile data for metered: Android's own mark of a network is not told.

    A connected Wi-Fi counts first, as it does for Android.
    """
    wifi = told(ask, "termux-wifi-connectioninfo")
    if wifi.get("supplicant_state") == "COMPLETED":
        return False
    mobile = told(ask, "termux-telephony-deviceinfo").get("data_state")
    return True if mobile == "connected" else None
