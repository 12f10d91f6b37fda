"""Populations: every example on one device, corruption on whom it is meant for, and one copy of the data at most."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_models.corruption import CORRUPTIONS
from covey_models.datasets import Dataset, load
from covey_models.partitions import PARTITIONS
from covey_models.population import populate
from covey_protocol.errors import ConfigError, DataError


def numbered(count: int, classes: int = 3) -> Dataset:
    """Examples that are their own numbers, scaled to [0, 1]."""
    x = (np.arange(count, dtype=np.float32) / count)[:, None]
    y = (np.arange(count) % classes).astype(np.int32)
    users = np.arange(count) % 15
    return Dataset("numbered", x, y, tuple("abc")[:classes], ("number",), (0.0, 1.0), users)


DIGITS = load("digits")
DIGITS_WITH_USERS = Dataset(
    "digits", DIGITS.x, DIGITS.y, DIGITS.class_names, (), (0.0, 1.0), np.arange(len(DIGITS)) % 40
)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_devices_hold_exactly_the_rows_of_their_parts(kind: str) -> None:
    population = populate(DIGITS_WITH_USERS, devices=12, partition=kind, seed=3)
    copies = 3 if kind == "replicated" else 1
    held = sorted(int(row) for part in population.parts for row in part)
    assert held == sorted(list(range(len(DIGITS))) * copies)
    assert [device.device_id for device in population.devices] == [f"device-{n:03d}" for n in range(12)]
    for device, part in zip(population.devices, population.parts):
        np.testing.assert_array_equal(device.x, DIGITS.x[part])
        np.testing.assert_array_equal(device.y, DIGITS.y[part])
        assert (np.diff(part) > 0).all()  # sorted
        assert device.faults == ()
    np.testing.assert_array_equal(population.counts().sum(0), copies * np.bincount(DIGITS.y))


def faulty(fraction: float, devices: int, seed: int, listed: Any = None) -> set[str]:
    table = {"kind": "shift-labels", "fraction": fraction, **({} if listed is None else {"devices": listed})}
    population = populate(numbered(3 * devices), devices=devices, corruptions=[table], seed=seed)
    return {name for name, faults in population.faults().items() if faults == ("shift-labels",)}


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_the_fraction_is_kept_and_smaller_fractions_are_nested(
    devices: int, one: float, other: float, seed: int
) -> None:
    fewer, more = sorted((one, other))
    assert len(faulty(fewer, devices, seed)) == round(fewer * devices)
    assert faulty(fewer, devices, seed) <= faulty(more, devices, seed)
    assert faulty(0.0, devices, seed) == set()
    assert len(faulty(1.0, devices, seed)) == devices


def test_listed_devices_are_the_candidates_by_number_or_name() -> None:
    listed = [0, "device-004", 7, 4]
    assert faulty(1.0, 10, 0, listed) == {"device-000", "device-004", "device-007"}
    assert len(faulty(0.34, 10, 0, listed)) == 1
    assert faulty(0.34, 10, 0, listed) < faulty(0.67, 10, 0, listed)


def test_corruptions_follow_each_other_in_the_order_of_the_list() -> None:
    tables = [
        {"kind": "selected-classes", "classes": ["b"], "devices": [1]},
        {"kind": "targeted-flip", "source": "b", "target": "c", "devices": [1, 2], "probability": 1.0},
    ]
    devices = populate(numbered(90), devices=3, corruptions=tables).devices
    assert [device.faults for device in devices] == [(), ("selected-classes", "targeted-flip"), ("targeted-flip",)]
    assert set(devices[1].y) == {2}
    backwards = populate(numbered(90), devices=3, corruptions=tables[::-1]).devices
    assert set(backwards[1].y) == {0, 2}  # no b was left to select, so that nothing was selected
    assert backwards[1].faults == ("targeted-flip",)


def test_what_a_corruption_does_not_change_is_no_fault() -> None:
    shards = {"kind": "label-shards", "shards_per_device": 1}
    flip = {"kind": "targeted-flip", "source": 0, "target": 1, "fraction": 1.0}
    population = populate(numbered(30), devices=3, partition=shards, corruptions=[flip])
    assert [set(numbered(30).y[part]) == {0} for part in population.parts] == [
        bool(device.faults) for device in population.devices
    ]


def test_another_fraction_leaves_the_other_devices_and_corruptions_as_they_were() -> None:
    def made(fraction: float) -> list[Any]:
        noise = {"kind": "sensor-noise", "fraction": fraction, "std": 0.1}
        labels = {"kind": "random-labels", "fraction": 0.5}
        return populate(DIGITS, devices=10, corruptions=[noise, labels], seed=4).devices

    few, many = made(0.2), made(0.6)
    for before, after in zip(few, many):
        np.testing.assert_array_equal(before.y, after.y)
        if ("sensor-noise" in before.faults) == ("sensor-noise" in after.faults):
            np.testing.assert_array_equal(before.x, after.x)
    assert len({device.faults for device in many}) == 4  # two independent choices: all combinations occur


def test_devices_are_damaged_each_in_its_own_way() -> None:
    noise = {"kind": "sensor-noise", "fraction": 1.0, "std": 0.1}
    clean, noisy = (populate(DIGITS, devices=3, corruptions=tables, seed=4).devices for tables in ([], [noise]))
    first, second = (after.x[:99] - before.x[:99] for before, after in zip(clean[:2], noisy[:2]))
    inside = (np.abs(first) > 0) & (np.abs(second) > 0)  # what is cut off at the range says nothing
    assert abs(np.corrcoef(first[inside], second[inside])[0, 1]) < 0.5


def test_ten_thousand_devices_share_one_copy_that_nobody_can_write_to() -> None:
    data = numbered(30_000)
    devices = populate(data, devices=10_000, partition="dirichlet").devices
    assert devices[-1].device_id == "device-9999"
    assert [device.device_id for device in devices] == sorted(device.device_id for device in devices)
    assert len({id(device.x.base) for device in devices}) == 1
    assert not np.shares_memory(devices[0].x, data.x)
    with pytest.raises(ValueError, match="read-only"):
        devices[0].x[0] = 1.0
    assert data.x.flags.writeable


@pytest.mark.parametrize(("kinds", "name"), [
    *((PARTITIONS, name) for name in PARTITIONS), *((CORRUPTIONS, name) for name in CORRUPTIONS)
])  # fmt: skip
def test_every_kind_is_documented_with_its_settings_and_defaults(kinds: Any, name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulation-data.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    for field in dataclasses.fields(kinds[name]):
        assert f"`{field.name}`" in row
        if isinstance(field.default, (int, float)):
            assert f"`{field.name}` ({field.default})" in row


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nobody named": ({"corruptions": ["flip-labels"]}, "does not say whom it befalls"),
    "a fraction beyond 1": ({"corruptions": [{"kind": "flip-labels", "fraction": 1.01}]}, "fraction = 1.01"),
    "a fraction in words": ({"corruptions": [{"kind": "flip-labels", "fraction": "all"}]}, "fraction = 'all'"),
    "a share below 0": (
        {"corruptions": [{"kind": "flip-labels", "fraction": 1, "share": -0.1}]},
        "'flip-labels': share = -0.1",
    ),
    "a device there is not": ({"corruptions": [{"kind": "flip-labels", "devices": [20]}]}, "device 20.*0 to 19"),
    "an unknown device id": (
        {"corruptions": [{"kind": "flip-labels", "devices": ["device-20"]}]},
        "'device-20'.*device-019",
    ),
    "a bad setting that befalls nobody": (
        {"corruptions": [{"kind": "trigger", "target": 9, "fraction": 0}]},
        "no class 9",
    ),
    "a mistyped key": ({"corruptions": [{"kind": "flip-labels", "fractoin": 1, "fraction": 1}]}, "fractoin"),
    "no kind": ({"corruptions": [{"fraction": 1}]}, "a corruption says"),
    "an unknown partition": ({"partition": "dirichlett"}, "did you mean 'dirichlet'"),
    "a mistyped setting of a partition": ({"partition": {"kind": "dirichlet", "alhpa": 1}}, "did you mean 'alpha'"),
    "an unknown law": ({"partition": {"kind": "quantity-skew", "law": "normal"}}, "law = 'normal'"),
    "an empty device": (
        {"partition": {"kind": "quantity-skew", "law": "power-law", "alpha": 9, "min_examples": 0}},
        "without examples; set min_examples",
    ),
    "more devices than users": ({"partition": "by-user"}, "15 users for 20 devices"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables_are_refused(case: str) -> None:
    arguments, expected = WRONG[case]
    with pytest.raises(ConfigError, match=expected) as caught:
        populate(numbered(60), **arguments)
    assert caught.value.remedy


def test_data_without_users_cannot_be_divided_by_them() -> None:
    with pytest.raises(DataError, match="digits does not say whose"):
        populate(DIGITS, partition="by-user")


def test_handwriting_styles_need_pictures() -> None:
    with pytest.raises(DataError, match="grey images"):
        populate(numbered(60), partition="writer-like")
