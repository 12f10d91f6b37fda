"""Partitions: whatever the labels, every example is on exactly one device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from covey_models import dirichlet, iid, label_shards, load
from covey_models.partitions import _top_up, by_user, quantity_skew, writer_like
from covey_models.styles import relative_to_class, style_features
from covey_protocol.errors import ConfigError

labels = st.lists(st.integers(0, 5), min_size=1, max_size=80)
seeds = st.integers(0, 2**32)
devices = st.integers(1, 12)


def assert_every_index_once(parts: list[Any], count: int) -> None:
    assert sorted(int(index) for part in parts for index in part) == list(range(count))


@settings(deadline=None)
@given(labels, devices, seeds)
def test_iid_deals_every_example_once_and_evenly(y: list[int], num_devices: int, seed: int) -> None:
    assume(num_devices <= len(y))
    parts = iid(y, num_devices, seed)
    assert_every_index_once(parts, len(y))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(labels, devices, st.sampled_from([1e-3, 0.1, 1.0, 1e4]), seeds, st.integers(0, 6))
def test_dirichlet_deals_every_example_once_and_enough_to_each(
    y: list[int], num_devices: int, alpha: float, seed: int, min_examples: int
) -> None:
    assume(num_devices * min_examples <= len(y))
    parts = dirichlet(y, num_devices, alpha, seed, min_examples)
    assert len(parts) == num_devices
    assert_every_index_once(parts, len(y))
    assert min(len(part) for part in parts) >= min_examples


@settings(deadline=None)
@given(labels, devices, st.integers(1, 4), seeds)
def test_shards_deal_every_example_once(y: list[int], num_devices: int, shards: int, seed: int) -> None:
    assume(num_devices * shards <= len(y))
    parts = label_shards(y, num_devices, shards, seed)
    assert len(parts) == num_devices
    assert_every_index_once(parts, len(y))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), devices, seeds)
def test_a_user_is_on_one_device_and_every_device_has_one(users: list[int], num_devices: int, seed: int) -> None:
    assume(num_devices <= len(set(users)))
    parts = by_user(users, num_devices, seed)
    assert_every_index_once(parts, len(users))
    homes = [{users[row] for row in part} for part in parts]
    assert sum(len(home) for home in homes) == len(set(users))
    assert all(homes)
    biggest = max(users.count(user) for user in users)
    assert max(map(len, parts)) - min(map(len, parts)) <= biggest  # nobody gets a second user while another waits


def test_users_by_name_and_number_are_divided_alike() -> None:
    numbers = np.repeat(np.arange(6), [5, 1, 4, 2, 2, 3])
    for a, b in zip(by_user(numbers, 3, 1), by_user([f"user {n}" for n in numbers], 3, 1)):
        np.testing.assert_array_equal(a, b)


def test_the_largest_user_is_placed_first_so_that_devices_come_out_alike() -> None:
    numbers = np.repeat(np.arange(6), [5, 1, 4, 2, 2, 3])
    for seed in range(20):
        assert sorted(map(len, by_user(numbers, 3, seed))) == [5, 6, 6]
    homes = {next(device for device, part in enumerate(by_user(numbers, 3, seed)) if 0 in part) for seed in range(20)}
    assert homes == {0, 1, 2}  # which device gets the largest is drawn


@settings(deadline=None)
@given(st.integers(1, 80), devices, st.sampled_from(["dirichlet", "power-law"]), seeds, st.integers(0, 4))
def test_quantity_skew_deals_every_example_once_and_enough_to_each(
    count: int, num_devices: int, law: str, seed: int, min_examples: int
) -> None:
    assume(num_devices * min_examples <= count)
    parts = quantity_skew(range(count), num_devices, law, 0.5, seed, min_examples)
    assert len(parts) == num_devices
    assert_every_index_once(parts, count)
    assert min(len(part) for part in parts) >= min_examples


def test_power_law_sizes_are_in_proportion_to_the_rank() -> None:
    sizes = sorted(map(len, quantity_skew(range(12_000), 4, "power-law", 1.0, 0, 0)), reverse=True)
    assert sizes == pytest.approx([5760, 2880, 1920, 1440], abs=1)
    even, uneven = (
        np.std([len(part) for part in quantity_skew(range(9000), 30, "dirichlet", alpha, 0)]) for alpha in (100, 0.1)
    )
    assert uneven > 5 * even


def test_quantity_skew_leaves_the_labels_as_they_are_on_the_whole() -> None:
    y = np.repeat([0, 1], 10_000)
    large = max(quantity_skew(y, 5, "power-law", 1.0, 0), key=len)
    assert y[large].mean() == pytest.approx(0.5, abs=0.03)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), devices, seeds, st.sampled_from([0.0, 0.3, 1.0]))
def test_handwriting_is_dealt_out_once_and_evenly(count: int, num_devices: int, seed: int, mixed: float) -> None:
    assume(num_devices <= count)
    random = np.random.default_rng(seed)
    parts = writer_like(random.random((count, 5, 4, 1)), random.integers(0, 3, count), num_devices, seed, mixed)
    assert_every_index_once(parts, count)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def stroke(slant: float, width: int) -> Any:
    """A stroke of this many pixels' width that leans to the right by slant pixels per row."""
    image = np.zeros((16, 16), np.float32)
    for row in range(3, 13):
        start = round(8 - width / 2 + slant * (8 - row))
        image[row, start : start + width] = 1.0
    return image


def test_style_features_know_slant_and_thickness() -> None:
    upright, right, left, thick = style_features(
        np.stack([stroke(0, 2), stroke(0.5, 2), stroke(-0.5, 2), stroke(0, 5)])
    )
    assert upright[0] == pytest.approx(0, abs=1e-9)
    assert right[0] == pytest.approx(0.5, abs=0.06)  # pixels round the slant
    assert left[0] == pytest.approx(-0.5, abs=0.06)
    assert thick[1] > 1.8 * upright[1]
    assert thick[3] == pytest.approx(2.5 * upright[3])
    assert (style_features(np.zeros((1, 16, 16, 1))) == 0).all()


def test_handwriting_styles_separate_the_hands_and_not_the_characters() -> None:
    digits = load("digits")
    styles = np.stack([relative_to_class(column, digits.y) for column in style_features(digits.x).T], 1)
    spread = {
        name: np.std([styles[part].mean(0) for part in parts], axis=0).mean()
        for name, parts in (
            ("iid", iid(digits.y, 20, 0)),
            ("styles", writer_like(digits.x, digits.y, 20, 0)),
            ("half", writer_like(digits.x, digits.y, 20, 0, mixed=0.5)),
        )
    }
    assert spread["iid"] < 0.05 < 0.1 < spread["half"] < 0.15 < 0.2 < spread["styles"]
    counts = [np.bincount(digits.y[part], minlength=10) for part in writer_like(digits.x, digits.y, 20, 0)]
    assert np.ptp(counts, axis=0).max() <= 2


def test_ranks_are_within_the_class_and_equal_values_share_theirs() -> None:
    values, y = np.array([5.0, 1.0, 7.0, 7.0, 3.0, 3.0]), np.array([0, 0, 1, 1, 0, 0])
    np.testing.assert_allclose(relative_to_class(values, y), [7 / 8, 1 / 8, 0.5, 0.5, 0.5, 0.5])


def slow_top_up(parts: list[list[int]], min_examples: int, random: Any) -> None:
    """What `_top_up` does, as it reads without the heap."""
    for part in parts:
        while len(part) < min_examples:
            largest = max(parts, key=len)
            part.append(largest.pop(int(random.integers(len(largest)))))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 5), seeds)
def test_topping_up_takes_of_the_largest_and_the_heap_changes_nothing(sizes: list[int], least: int, seed: int) -> None:
    assume(sum(sizes) >= least * len(sizes))
    fast, slow = ([list(range(size)) for size in sizes] for _ in range(2))
    _top_up(fast, least, np.random.default_rng(seed))
    slow_top_up(slow, least, np.random.default_rng(seed))
    assert fast == slow


def mean_classes(y: Any, parts: list[Any]) -> float:
    return float(np.mean([len(np.unique(y[part])) for part in parts]))


def test_small_alpha_and_few_shards_leave_devices_few_classes() -> None:
    y = load("digits").y
    assert mean_classes(y, iid(y, 20, 0)) > 9.9
    assert mean_classes(y, dirichlet(y, 20, 1e4, 0)) > 9.9
    assert mean_classes(y, dirichlet(y, 20, 0.1, 0)) < 6
    assert mean_classes(y, label_shards(y, 20, 2, 0)) < 4


@pytest.mark.parametrize("make", [
    lambda y, seed: iid(y, 5, seed),
    lambda y, seed: dirichlet(y, 5, 0.5, seed),
    lambda y, seed: label_shards(y, 5, 2, seed),
    lambda y, seed: by_user(np.arange(len(y)) % 9, 5, seed),
    lambda y, seed: quantity_skew(y, 5, "dirichlet", 0.5, seed),
    lambda y, seed: quantity_skew(y, 5, "power-law", 0.5, seed),
    lambda y, seed: writer_like(load("digits").x, y, 5, seed),
])  # fmt: skip
def test_the_seed_decides_the_partition(make: Any) -> None:
    y = load("digits").y
    first, again, other = make(y, 1), make(y, 1), make(y, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize(("make", "expected"), [
    (lambda: iid([0, 1], 0, 0), "0 devices"),
    (lambda: iid([0, 1], 3, 0), "2 examples cannot give 3 devices"),
    (lambda: dirichlet([0, 1] * 5, 3, 0.0, 0), "alpha is 0.0"),
    (lambda: dirichlet([0, 1] * 5, 3, float("nan"), 0), "alpha is nan"),
    (lambda: dirichlet([0, 1] * 5, 3, 1.0, 0, min_examples=4), "cannot give 3 devices 4 each"),
    (lambda: dirichlet([0, 1] * 5, 3, 1.0, 0, min_examples=-1), "-1 examples"),
    (lambda: label_shards([0, 1] * 5, 3, 0, 0), "0 shards"),
    (lambda: label_shards([0, 1] * 5, 3, 4, 0), "cannot give"),
    (lambda: by_user([0, 1] * 5, 3, 0), "2 users for 3 devices"),
    (lambda: by_user([0, 1] * 5, 0, 0), "0 devices"),
    (lambda: quantity_skew([0] * 9, 3, "power-law", -1.0, 0), "alpha of the quantity skew is -1"),
    (lambda: quantity_skew([0] * 9, 3, "dirichlet", 1.0, 0, 4), "cannot give 3 devices 4 each"),
    (lambda: writer_like(np.zeros((2, 3, 3)), np.zeros(2), 3, 0), "cannot give 3 devices"),
    (lambda: writer_like(np.zeros((2, 3, 3)), np.zeros(2), 2, 0, mixed=2.0), "mixed = 2"),
])  # fmt: skip
def test_impossible_partitions_are_refused(make: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make()
