"""The processor's temperature, and what a Raspberry Pi's firmware says of voltage and throttling."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from covey_edge.sensors.asking import Ask, read_number, read_text

PROCESSOR = ("cpu", "soc", "pkg", "core")  # in the names of thermal zones: cpu-thermal, soc_thermal, x86_pkg_temp
CHIPS = ("coretemp", "k10temp", "cpu_thermal", "zenpower")
PLAUSIBLE_C = (-40.0, 150.0)  # phones have zones that say 0 K or 2^31
# bits of get_throttled, as vcgencmd's documentation has them; from bit 16 on: since the machine was started
THROTTLED = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")


def processor_c(root: Path) -> Optional[float]:
    """Degrees Celsius of the hottest zone of the processor; of the only zone where there is one."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    named = [one for one in zones if any(word in (read_text(one / "type") or "").lower() for word in PROCESSOR)]
    files = [one / "temp" for one in named or (zones if len(zones) == 1 else [])]
    for chip in () if files else sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if read_text(chip / "name") in CHIPS:
            files += sorted(chip.glob("temp*_input"))
    degrees = [value / 1000 for value in map(read_number, files) if value is not None]
    return max((one for one in degrees if PLAUSIBLE_C[0] < one < PLAUSIBLE_C[1]), default=None)


def throttled(root: Path, ask: Ask) -> Optional[tuple[str, ...]]:
    """What holds a Raspberry Pi back now; empty for nothing. What was earlier does not count."""
    flags = _firmware_flags(root)
    if flags is None:
        flags = _hexadecimal((ask(["vcgencmd", "get_throttled"]) or "").rpartition("=")[2])
    if flags is not None:
        return tuple(name for bit, name in enumerate(THROTTLED) if flags >> bit & 1)
    alarms = [read_number(one / "in0_lcrit_alarm") for one in _voltage_chips(root)]
    known = [alarm for alarm in alarms if alarm is not None]
    return ((THROTTLED[0],) if any(known) else ()) if known else None


def _firmware_flags(root: Path) -> Optional[int]:
    for path in sorted((root / "sys/devices/platform").glob("soc*/soc*:firmware/get_throttled")):
        return _hexadecimal(read_text(path) or "")
    return None


def _hexadecimal(text: str) -> Optional[int]:
    try:
        return int(text, 16)
    except ValueError:
        return None


def _voltage_chips(root: Path) -> list[Path]:
    return [one for one in sorted((root / "sys/class/hwmon").glob("hwmon*")) if read_text(one / "name") == "rpi_volt"]
