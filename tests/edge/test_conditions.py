"""What conditions read from a device, and when they hold: on made-up /sys and /proc trees, and on this machine's own.

The trees hold what real machines have in these files. Commands are programs on a PATH of the test's own that print
what the real ones are known to print; none of it was run on a phone.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import pytest

from covey_edge.conditions import CONDITIONS, TRAINING, Conditions, Sensors, Situation
from covey_edge.conditions_check import conditions
from covey_edge.config import ConditionSettings, load_agent
from covey_edge.hours import window_of
from covey_edge.preflight import OK, WARNING, Facts
from covey_edge.sensors import host, network, power, temperature, termux
from covey_edge.sensors.asking import Commands
from covey_protocol.errors import ConfigError
from covey_protocol.seals import SealingKey

SUPPLY, ZONE, CHIP = "sys/class/power_supply", "sys/class/thermal", "sys/class/hwmon"
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def supply(name: str, **values: str) -> dict[str, str]:
    return {f"{SUPPLY}/{name}/{key}": value for key, value in values.items()}


def mains(online: str) -> dict[str, str]:
    return supply("AC", type="Mains", online=online)


def battery(status: str, capacity: str = "80", name: str = "BAT0", **more: str) -> dict[str, str]:
    return supply(name, type="Battery", status=status, capacity=capacity, **more)


POWER: dict[str, tuple[dict[str, str], Optional[bool], Optional[int]]] = {
    "a laptop on mains charges": ({**mains("1"), **battery("Charging", "40")}, True, 40),
    "a laptop on battery does not": ({**mains("0"), **battery("Discharging", "40")}, False, 40),
    "a full one is on mains": ({**mains("1"), **battery("Full", "100")}, True, 100),
    "one held at a threshold is on mains": ({**mains("1"), **battery("Not charging", "80")}, True, 80),
    "a weak charger does not make up for a battery that empties": ({**mains("1"), **battery("Discharging")}, False, 80),
    "a battery of unknown state leaves it to the mains": ({**mains("1"), **battery("Unknown")}, True, 80),
    "a machine without a battery is on mains": (mains("1"), True, None),
    "of several supplies one is enough": ({**mains("0"), **supply("usb", type="USB", online="1")}, True, None),
    "a phone that charges without a cable": (
        {**supply("w", type="Wireless", online="1"), **battery("Charging", "7", "battery")},
        True,
        7,
    ),
    "the mouse's battery is not the machine's": (
        {**battery("Discharging", "5", "hidpp_battery_0", scope="Device"), **mains("1")},
        True,
        None,
    ),
    "the emptiest of two batteries counts": (
        {**battery("Charging", "90"), **battery("Charging", "20", "BAT1")},
        True,
        20,
    ),
    "a bay without a battery holds none": ({**mains("1"), **battery("Unknown", "0", present="0")}, True, None),
    "a level out of range is none": (battery("Full", "255"), True, None),
    "a Raspberry Pi shows nothing": ({}, None, None),
}


@pytest.mark.parametrize("case", POWER)
def test_power(case: str, tmp_path: Path) -> None:
    files, charging, percent = POWER[case]
    root = tree(tmp_path, files)
    assert (power.charging(root), power.battery_percent(root)) == (charging, percent)


def zone(number: int, kind: str, milli: str) -> dict[str, str]:
    return {f"{ZONE}/thermal_zone{number}/type": kind, f"{ZONE}/thermal_zone{number}/temp": milli}


TEMPERATURE: dict[str, tuple[dict[str, str], Optional[float]]] = {
    "a Raspberry Pi": (zone(0, "cpu-thermal", "61344"), 61.344),
    "a laptop's processor, not its battery or Wi-Fi": (
        {**zone(0, "acpitz", "90000"), **zone(1, "x86_pkg_temp", "55000"), **zone(2, "iwlwifi_1", "41000")},
        55.0,
    ),
    "the hottest of a phone's cores": ({**zone(0, "cpu-0-0", "40000"), **zone(1, "cpu-1-0", "47000")}, 47.0),
    "a phone's zone that says nothing of use": ({**zone(0, "cpu-0", "-273000"), **zone(1, "cpu-1", "30000")}, 30.0),
    "the only zone there is": (zone(0, "acpitz", "27800"), 27.8),
    "zones of which none is the processor's": ({**zone(0, "battery", "30000"), **zone(1, "pa0", "30000")}, None),
    "a PC without zones has chips": (
        {f"{CHIP}/hwmon1/name": "k10temp", f"{CHIP}/hwmon1/temp1_input": "48500", f"{CHIP}/hwmon0/name": "nvme"},
        48.5,
    ),
    "a file that holds no number": (zone(0, "cpu-thermal", "N/A"), None),
    "a virtual machine": ({}, None),
}


@pytest.mark.parametrize("case", TEMPERATURE)
def test_temperature(case: str, tmp_path: Path) -> None:
    files, degrees = TEMPERATURE[case]
    assert temperature.processor_c(tree(tmp_path, files)) == degrees


def test_a_sensor_that_cannot_be_read_is_no_sensor(tmp_path: Path) -> None:
    root = tree(tmp_path, zone(0, "cpu-thermal", "1"))
    (root / ZONE / "thermal_zone0/temp").unlink()
    (root / ZONE / "thermal_zone0/temp").mkdir()  # read() fails, as it does with EINVAL on some drivers
    assert temperature.processor_c(root) is None


def printing(folder: Path, **commands: str) -> Path:
    """A folder of programs that print these texts; with "sleep N" or "exit N" they do that."""
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        path = folder / name.replace("_", "-")
        body = text if text.startswith(("sleep", "exit")) else f"cat <<'END'\n{text}\nEND"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def only_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the test puts the commands that there are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("cat", "sleep"):
        (folder / name).symlink_to(next(p for p in (Path("/bin", name), Path("/usr/bin", name)) if p.exists()))
    return folder


def test_a_pi_that_is_throttled_now_says_by_what(tmp_path: Path) -> None:
    root = tree(tmp_path, {FIRMWARE: "50005"})
    assert temperature.throttled(root, lambda command: None) == ("under-voltage", "throttled")


def test_what_held_a_pi_back_earlier_does_not_count(tmp_path: Path) -> None:
    assert temperature.throttled(tree(tmp_path, {FIRMWARE: "50000"}), lambda command: None) == ()


def test_vcgencmd_is_asked_where_the_kernel_does_not_tell(tmp_path: Path, only_path: Path) -> None:
    printing(only_path, vcgencmd="throttled=0x8")
    assert temperature.throttled(tmp_path, Commands()) == ("soft temperature limit",)


@pytest.mark.parametrize(("alarm", "found"), [("1", ("under-voltage",)), ("0", ())])
def test_a_pi_without_both_has_an_alarm_of_its_voltage(alarm: str, found: tuple[str, ...], tmp_path: Path) -> None:
    root = tree(tmp_path, {f"{CHIP}/hwmon0/name": "rpi_volt", f"{CHIP}/hwmon0/in0_lcrit_alarm": alarm})
    assert temperature.throttled(root, lambda command: None) == found


def test_a_machine_that_is_no_pi_says_nothing_of_throttling(tmp_path: Path, only_path: Path) -> None:
    assert temperature.throttled(tmp_path, Commands()) is None


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t0000A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
{first}\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0"""
NETWORK: dict[str, tuple[dict[str, str], str, Optional[bool]]] = {
    "NetworkManager says yes": ({"busctl": "u 1"}, "eth0", True),
    "NetworkManager says no": ({"busctl": "u 2"}, "wwan0", False),
    "it guesses yes, of a phone's hotspot": ({"busctl": "u 3"}, "wlan0", True),
    "it guesses no": ({"busctl": "u 4"}, "eth0", False),
    "it does not know, nmcli neither": ({"busctl": "u 0", "nmcli": "GENERAL.METERED:unknown"}, "eth0", None),
    "busctl fails, nmcli knows": ({"busctl": "exit 1", "nmcli": "GENERAL.METERED:yes (guessed)"}, "wlan0", True),
    "nmcli says no": ({"nmcli": "GENERAL.METERED:no"}, "eth0", False),
    "without NetworkManager a modem is metered": ({}, "wwan0", True),
    "and a cable unknown": ({}, "eth0", None),
}


@pytest.mark.parametrize("case", NETWORK)
def test_network(case: str, tmp_path: Path, only_path: Path) -> None:
    commands, first, metered = NETWORK[case]
    printing(only_path, **commands)
    root = tree(tmp_path, {"proc/net/route": ROUTES.format(first=first)})
    assert network.default_interface(root) == first
    assert network.metered(root, Commands()) is metered


def test_a_device_without_a_network_does_not_know(tmp_path: Path, only_path: Path) -> None:
    assert network.metered(tmp_path, Commands()) is None


def test_memory_and_load_are_the_kernels_words(tmp_path: Path) -> None:
    root = tree(
        tmp_path, {"proc/meminfo": "MemTotal: 999 kB\nMemAvailable:     2048 kB", "proc/loadavg": "1.50 1 1 2/9 8"}
    )
    assert (host.free_memory_mb(root), host.load(root)) == (2.0, 1.5)
    assert (host.free_memory_mb(tmp_path / "no"), host.load(tmp_path / "no")) == (None, None)


def test_this_machine_tells_what_it_has(tmp_path: Path) -> None:
    """The real readers on the real files: nothing raises, and what every Linux has is there."""
    sensors = Sensors(tmp_path / "state" / "not" / "made")
    assert sensors.charging() in (True, False, None)
    assert sensors.throttled() in (None, ()) or sensors.throttled()
    degrees, percent, memory, load = (
        sensors.processor_c(),
        sensors.battery_percent(),
        sensors.free_memory_mb(),
        sensors.load(),
    )
    assert degrees is None or 0 < degrees < 120
    assert percent is None or 0 <= percent <= 100
    assert memory is not None
    assert memory > 1
    assert load is not None
    assert sensors.free_disk_mb() == pytest.approx(host.free_disk_mb(tmp_path), rel=0.1)
    assert sensors.metered() in (True, False, None)


# --- commands


def test_a_command_that_hangs_is_left_alone_for_a_while(only_path: Path) -> None:
    printing(only_path, hangs="sleep 60")
    now = [0.0]
    ask = Commands(lambda: now[0], timeout_s=0.1)
    assert ask(["hangs"]) is None
    printing(only_path, hangs="better")
    assert ask(["hangs"]) is None
    now[0] = 601.0
    assert ask(["hangs"]) == "better"


def test_a_command_that_fails_or_is_not_there_says_nothing(only_path: Path) -> None:
    printing(only_path, fails="exit 3")
    assert (Commands()(["fails"]), Commands()(["is-not-there"])) == (None, None)


# --- Android

BATTERY = (
    '{{"health": "GOOD", "percentage": {0}, "plugged": "{1}", "status": "{2}", "temperature": 31.2, "current": -7}}'
)
WIFI = '{{"bssid": "02:00:00:00:00:00", "ip": "192.168.0.7", "ssid": "<unknown ssid>", "supplicant_state": "{0}"}}'
TELEPHONY = '{{"data_enabled": "true", "data_state": "{0}", "network_type": "lte", "phone_type": "gsm"}}'
TERMUX = {"TERMUX_VERSION": "0.118.0", "PREFIX": "/data/data/com.termux/files/usr"}


@pytest.mark.parametrize(
    ("percent", "plugged", "status", "charging"),
    [
        (71, "UNPLUGGED", "DISCHARGING", False),
        (71, "PLUGGED_AC", "CHARGING", True),
        (100, "PLUGGED_USB", "FULL", True),
        (3, "PLUGGED_USB", "DISCHARGING", False),
    ],
)
def test_a_phones_battery(only_path: Path, percent: int, plugged: str, status: str, charging: bool) -> None:
    printing(only_path, **{"termux-battery-status": BATTERY.format(percent, plugged, status)})
    sensors = Sensors(Path("/"), environment=TERMUX)
    assert (sensors.charging(), sensors.battery_percent()) == (charging, percent)


@pytest.mark.parametrize(
    ("wifi", "mobile", "metered"),
    [
        ("COMPLETED", "connected", False),
        ("DISCONNECTED", "connected", True),
        ("DISCONNECTED", "disconnected", None),
    ],
)
def test_a_phones_network(only_path: Path, wifi: str, mobile: str, metered: Optional[bool]) -> None:
    commands = {
        "termux-wifi-connectioninfo": WIFI.format(wifi),
        "termux-telephony-deviceinfo": TELEPHONY.format(mobile),
    }
    printing(only_path, **commands)
    assert Sensors(Path("/"), environment=TERMUX).metered() is metered


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"error": "Please grant the following permission"}'])
def test_a_phone_that_does_not_answer_is_unknown(only_path: Path, text: str) -> None:
    names = ("termux-battery-status", "termux-wifi-connectioninfo", "termux-telephony-deviceinfo")
    printing(only_path, **dict.fromkeys(names, text))
    sensors = Sensors(Path("/"), environment=TERMUX)
    assert (sensors.charging(), sensors.battery_percent(), sensors.metered()) == (None, None, None)


def test_a_phone_is_known_by_its_environment() -> None:
    assert termux.is_termux(TERMUX)
    assert termux.is_termux({"PREFIX": "/data/data/com.termux/files/usr"})
    assert not termux.is_termux({"PREFIX": "/usr"})


# --- hours


@pytest.fixture
def zurich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone with summer time, in POSIX form: needs no time zone database."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str, **asked: Any) -> bool:
    """Whether the device works at this moment of UTC."""
    import calendar

    moment = calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M"))
    sensors = Sensors(Path("/"), clock=lambda: float(moment))
    settings = ConditionSettings(min_free_disk_mb=0, **asked)
    (found,) = Conditions(settings, sensors).look(TRAINING, Situation())
    assert found.holds is not None
    return found.holds


def test_quiet_hours_go_over_midnight(zurich: None) -> None:
    quiet = {"quiet_hours": ("22:00-07:00",)}
    assert [at(f"2026-01-15 {utc}", **quiet) for utc in ("20:59", "21:00", "23:30", "05:59", "06:00")] == [
        True, False, False, False, True,
    ]  # fmt: skip


def test_hours_are_those_in_which_it_works(zurich: None) -> None:
    hours = {"hours": ("09:00-12:00", "13:00-17:00")}
    assert [at(f"2026-01-15 {utc}", **hours) for utc in ("07:59", "08:00", "11:30", "12:00", "16:00")] == [
        False, True, False, True, False,
    ]  # fmt: skip


def test_summer_time_moves_the_hours_with_the_clock_on_the_wall(zurich: None) -> None:
    quiet = {"quiet_hours": ("22:00-07:00",)}
    assert at("2026-07-15 20:30", **quiet) is False  # 22:30 in summer
    assert at("2026-01-15 20:30", **quiet) is True  # 21:30 in winter


def test_the_hour_that_comes_twice_is_quiet_twice_and_the_one_that_is_skipped_never(zurich: None) -> None:
    quiet = {"quiet_hours": ("02:00-03:00",)}
    autumn = [at(f"2026-10-25 {utc}", **quiet) for utc in ("00:30", "01:30", "02:30")]  # 2:30, 2:30 again, 3:30
    assert autumn == [False, False, True]
    spring = [at(f"2026-03-29 {utc}", **quiet) for utc in ("00:30", "00:59", "01:00", "01:30")]  # 1:30, 1:59, 3:00
    assert spring == [True, True, True, True]


def test_a_clock_that_was_never_set_is_no_clock(zurich: None) -> None:
    sensors = Sensors(Path("/"), clock=lambda: 3600.0)
    assert sensors.minute_of_day() is None


@pytest.mark.parametrize(
    "text", ["22-7", "22:00", "22:00-07:60", "24:00-01:00", "08:00-08:00", "08:00-24:01", "8:00-9:00"]
)
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no window of the day"):
        window_of(text, "quiet_hours")


def test_a_window_may_end_with_the_day() -> None:
    assert window_of("18:00-24:00", "hours").holds(1439)


# --- when they hold

ALL = {
    "charging": True,
    "min_battery": 30,
    "max_temperature_c": 70.0,
    "unthrottled": True,
    "unmetered": True,
    "quiet_hours": ("22:00-22:01",),
    "hours": ("00:00-24:00",),
    "min_free_disk_mb": 1,
    "min_free_memory_mb": 10,
    "max_load": 0.5,
}


def test_every_condition_has_a_setting_and_is_off_but_for_the_disk() -> None:
    assert set(ALL) == {one.setting for one in CONDITIONS}
    on = [one.setting for one in Conditions(ConditionSettings(), Sensors(Path("/"))).asked()]
    assert on == ["min_free_disk_mb"]


def fine(root: Path) -> Path:
    memory, load = f"MemAvailable: {20 * 1024} kB", f"{0.2 * host.cores():.2f} 0 0 1/2 3"
    files = {**mains("1"), **battery("Charging", "50"), **zone(0, "cpu-thermal", "50000"), FIRMWARE: "0"}
    return tree(root, {**files, "proc/meminfo": memory, "proc/loadavg": load})


NOW = Situation()


def looked(root: Path, now: Situation = NOW, ask: str = "u 2", **changes: Any) -> dict[str, Optional[bool]]:
    settings = ConditionSettings(**{**ALL, **changes})
    noon = time.mktime((2026, 5, 5, 12, 0, 0, 0, 0, -1))
    sensors = Sensors(root, root, {}, lambda command: ask, lambda: noon)
    return {one.setting: one.holds for one in Conditions(settings, sensors).look("before", now)}


def test_a_device_that_is_well_holds_every_condition(tmp_path: Path) -> None:
    assert looked(fine(tmp_path)) == dict.fromkeys(ALL, True)


LOST: dict[str, dict[str, str]] = {
    "charging": {**mains("0"), **battery("Discharging", "50")},
    "min_battery": battery("Charging", "29"),
    "max_temperature_c": zone(0, "cpu-thermal", "70100"),
    "unthrottled": {FIRMWARE: "4"},
    "min_free_memory_mb": {"proc/meminfo": "MemAvailable: 9000 kB"},
    "max_load": {"proc/loadavg": f"{0.6 * host.cores():.2f} 0 0 1/2 3"},
}


@pytest.mark.parametrize("setting", LOST)
def test_what_is_amiss_is_found_alone(setting: str, tmp_path: Path) -> None:
    found = looked(tree(fine(tmp_path), LOST[setting]))
    assert [name for name, holds in found.items() if not holds] == [setting]


def test_the_other_conditions_are_found_amiss_too(tmp_path: Path) -> None:
    root = fine(tmp_path)
    cases: dict[str, dict[str, Any]] = {
        "unmetered": {"ask": "u 1"},
        "quiet_hours": {"quiet_hours": ("11:00-13:00",)},
        "hours": {"hours": ("13:00-14:00",)},
        "min_free_disk_mb": {"now": Situation(need_mb=1e9)},
    }
    for setting, changes in cases.items():
        assert [name for name, holds in looked(root, **changes).items() if not holds] == [setting]


MARGINS: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # still lost; holds again
    "min_battery": (battery("Charging", "34"), battery("Charging", "35")),
    "max_temperature_c": (zone(0, "cpu-thermal", "66000"), zone(0, "cpu-thermal", "65000")),
    "min_free_memory_mb": ({"proc/meminfo": "MemAvailable: 12200 kB"}, {"proc/meminfo": "MemAvailable: 12300 kB"}),
    "max_load": (
        {"proc/loadavg": f"{0.42 * host.cores():.2f} 0 0 1/2 3"},
        {"proc/loadavg": f"{0.38 * host.cores():.2f} 0 0 1/2 3"},
    ),
}


@pytest.mark.parametrize("setting", MARGINS)
def test_what_was_lost_holds_again_only_with_a_margin(setting: str, tmp_path: Path) -> None:
    lost = Situation(lost=frozenset([setting]))
    near, clear = MARGINS[setting]
    assert looked(tree(fine(tmp_path), near))[setting] is True
    assert looked(tree(fine(tmp_path), near), lost)[setting] is False
    assert looked(tree(fine(tmp_path), clear), lost)[setting] is True


def test_a_battery_that_must_be_full_may_be_full_again(tmp_path: Path) -> None:
    root = tree(fine(tmp_path), battery("Full", "100"))
    assert looked(root, Situation(lost=frozenset(["min_battery"])), min_battery=100)["min_battery"] is True


def test_the_devices_own_training_is_no_load_of_others(tmp_path: Path) -> None:
    cores = host.cores()
    root = tree(fine(tmp_path), {"proc/loadavg": f"{0.4 * cores + 1:.2f} 0 0 1/2 3"})
    assert looked(root)["max_load"] is (0.4 * cores + 1 <= 0.5 * cores)
    assert looked(root, Situation(own_load=1.0))["max_load"] is True


def test_what_cannot_be_read_is_said_and_the_owner_decides(tmp_path: Path) -> None:
    for unknown, stands in (("allow", False), ("decline", True)):
        settings = ConditionSettings(charging=True, min_free_disk_mb=0, unknown=unknown)  # type: ignore[arg-type]
        known = Conditions(settings, Sensors(tmp_path, tmp_path, {}))
        (found,) = known.look("before", Situation())
        assert found.holds is None
        assert found.why == f'charging cannot be read here (unknown = "{unknown}")'
        assert known.stands_against(found) is stands


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []

    def ask(command: Sequence[str]) -> None:
        asked.append(command)

    sensors = Sensors(tmp_path, tmp_path, {}, ask)
    Conditions(ConditionSettings(charging=True), sensors).look("before", Situation())
    assert asked == []
    Conditions(ConditionSettings(unmetered=True), sensors).look(TRAINING, Situation())  # training needs no network
    assert asked == []


def test_covey_agent_check_tells_what_would_stand_against_a_round_now(tmp_path: Path) -> None:
    key = SealingKey.from_seed(bytes(32))
    (tmp_path / "device.pem").write_bytes(key.pem())
    top = 'device_id = "pi"\nfleet = "home"\n[broker]\nurl = "mqtt://localhost"\n[data]\npath = "data.npz"\n'
    identity = f'[identity]\nkey_file = "device.pem"\ncoordinator_key = "{key.public.hex()}"\n'
    asked = '[conditions]\nhours = ["00:00-24:00"]\nmin_free_disk_mb = 1000000000\nunthrottled = true\n'
    (tmp_path / "agent.toml").write_text(f"{top}{identity}{asked}")
    found = list(conditions(Facts(load_agent(tmp_path / "agent.toml"))))
    assert [(one.check, one.level) for one in found] == [
        ("conditions", WARNING), ("conditions", OK), ("conditions", WARNING),
    ]  # fmt: skip
    assert "unthrottled cannot be read here" in found[0].what
    assert found[1].what.startswith("hours holds: it is ")
    assert "min_free_disk_mb does not hold now" in found[2].what


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= host.cores() <= (os.cpu_count() or 1)
