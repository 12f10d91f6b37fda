"""What becomes of work while conditions come and go: decisions on a clock of the test's own and a made-up /sys."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from covey_edge.conditions import FETCHING, TRAINING, Conditions, Sensors
from covey_edge.config import ConditionSettings
from covey_edge.sensors import host
from covey_edge.watch import Order, Watch

NOTHING, PAUSE, GO_ON, GIVE_UP = Order.NOTHING, Order.PAUSE, Order.GO_ON, Order.GIVE_UP


class Bench:
    """A device whose battery, memory and load a test sets. Every look is 10 s after the last."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root, self.now, self.network = root, 1000.0, "u 2"
        self.asked: list[str] = []
        self.battery("Charging")
        values = {"charging": True, "min_free_disk_mb": 0, **settings}
        sensors = Sensors(root, root, {}, self._ask)
        self.watch = Watch(Conditions(ConditionSettings(**values), sensors), lambda: self.now)

    def _ask(self, command: Any) -> str:
        self.asked.append(command[0])
        return self.network

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def battery(self, status: str) -> None:
        self.write("sys/class/power_supply/BAT0/type", "Battery")
        self.write("sys/class/power_supply/BAT0/status", status)

    def look(self, step: str = TRAINING, left_s: float = 500.0, after_s: float = 10.0, busy: bool = True) -> Order:
        self.now += after_s
        return self.watch.order(step, left_s, 1000.0, busy=busy)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_work_goes_on_while_everything_holds(bench: Bench) -> None:
    assert bench.watch.refusal() == ""
    assert [bench.look() for _ in range(3)] == [NOTHING] * 3


def test_work_is_paused_once_and_goes_on_at_the_second_good_look(bench: Bench) -> None:
    bench.battery("Discharging")
    assert [bench.look(), bench.look()] == [PAUSE, NOTHING]
    bench.battery("Charging")
    assert bench.look() == NOTHING
    bench.battery("Discharging")  # a loose contact
    assert bench.look() == NOTHING
    bench.battery("Charging")
    assert [bench.look(), bench.look(), bench.look()] == [NOTHING, GO_ON, NOTHING]


def test_between_looks_nothing_is_read(bench: Bench) -> None:
    assert bench.look() == NOTHING
    bench.battery("Discharging")
    assert [bench.look(after_s=3.0) for _ in range(3)] == [NOTHING] * 3
    assert bench.look(after_s=1.0) == PAUSE


def test_a_paused_device_gives_up_when_the_rounds_time_is_nearly_over(bench: Bench) -> None:
    bench.battery("Discharging")
    assert bench.look(left_s=200.0) == PAUSE
    assert bench.look(left_s=100.0) == NOTHING
    assert bench.look(left_s=99.0) == GIVE_UP
    assert bench.watch.reason == "this device's conditions do not hold: not charging"


def test_an_owner_may_want_work_aborted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, when_lost="abort")
    bench.battery("Discharging")
    assert bench.look() == GIVE_UP


def test_waiting_frees_no_memory(tmp_path: Path) -> None:
    bench = Bench(tmp_path, min_free_memory_mb=100)
    bench.write("proc/meminfo", "MemAvailable: 1024 kB")
    assert bench.look() == GIVE_UP
    assert bench.watch.reason == "this device's conditions do not hold: little free memory"


def test_a_network_counts_while_fetching_and_not_while_training(tmp_path: Path) -> None:
    bench = Bench(tmp_path, unmetered=True)
    bench.network = "u 1"
    assert bench.look(TRAINING) == NOTHING
    assert bench.asked == []
    assert bench.look(FETCHING) == PAUSE


def test_an_update_waits_for_a_network_that_is_not_metered(tmp_path: Path) -> None:
    bench = Bench(tmp_path, unmetered=True)
    bench.network = "u 1"
    assert bench.watch.holds_back()
    bench.network = "u 2"
    bench.now += 9.0
    assert bench.watch.holds_back()  # not asked again for every message
    bench.now += 1.0
    assert not bench.watch.holds_back()
    assert len(bench.asked) == 2


def test_without_that_condition_the_network_is_not_asked(bench: Bench) -> None:
    assert not bench.watch.holds_back()
    assert bench.asked == []


def test_a_device_that_waits_to_join_looks_once_a_minute(bench: Bench) -> None:
    bench.battery("Discharging")
    assert "not charging" in bench.watch.refusal()
    bench.battery("Charging")
    bench.now += 59.0
    asked: list[str] = []

    def need_mb() -> float:
        asked.append("the disk")
        return 0.0

    assert not bench.watch.may_join(need_mb)
    assert asked == []
    bench.now += 1.0
    assert bench.watch.may_join(need_mb)


def test_the_coordinator_hears_kinds_and_no_numbers(tmp_path: Path) -> None:
    bench = Bench(tmp_path, min_battery=50, quiet_hours=("00:00-12:00", "12:00-24:00"))
    bench.write("sys/class/power_supply/BAT0/capacity", "12")
    bench.battery("Discharging")
    reason = bench.watch.refusal()
    assert reason == "this device's conditions do not hold: not charging, battery low, not at this hour"
    silent = Bench(tmp_path, tell=False)
    silent.battery("Discharging")
    assert silent.watch.refusal() == "this device's conditions do not hold"


def test_the_owners_log_has_a_line_for_what_changed_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(tmp_path, max_temperature_c=70.0)
    for status in ("Charging", "Charging", "Discharging", "Discharging", "Charging", "Charging"):
        bench.battery(status)
        bench.look()
    assert [record.getMessage() for record in caplog.records] == [
        'conditions: max_temperature_c cannot be read here (unknown = "allow")',
        'conditions: on battery; max_temperature_c cannot be read here (unknown = "allow")',
        'conditions: max_temperature_c cannot be read here (unknown = "allow")',
    ]


def test_the_owner_can_ask_how_every_condition_stands(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_temperature_c=70.0)
    assert bench.watch.report() == {"charging": "not looked at yet", "max_temperature_c": "not looked at yet"}
    bench.battery("Discharging")
    bench.look()
    assert bench.watch.report() == {
        "work": "paused",
        "charging": "does not hold: on battery",
        "max_temperature_c": 'unknown: max_temperature_c cannot be read here (unknown = "allow")',
    }


def test_a_device_does_not_flap_over_the_load_that_it_makes_itself(tmp_path: Path) -> None:
    """A child that computes comes into the load over a minute, and goes out of it over another one."""
    import math

    bench = Bench(tmp_path, charging=False, max_load=0.4 / host.cores())
    orders, load, training = [], 0.2, True  # others: 0.2
    for _ in range(24):
        kept = math.exp(-10 / 60)
        load = kept * load + (1 - kept) * (0.2 + training)
        bench.write("proc/loadavg", f"{load:.2f} 0 0 1/2 3")
        orders.append(bench.look())
        training = not bench.watch.paused
    assert set(orders) == {NOTHING}
    for others in (1.0, 0.2):  # others come, then go: paused once, and once it goes on
        for _ in range(20):
            load = kept * load + (1 - kept) * (others + training)
            bench.write("proc/loadavg", f"{load:.2f} 0 0 1/2 3")
            orders.append(bench.look())
            training = not bench.watch.paused
    assert [order for order in orders if order is not NOTHING] == [PAUSE, GO_ON]
