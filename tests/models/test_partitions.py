"""Partitions: whatever the labels, every example is on exactly one device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from covey_models import dirichlet, iid, label_shards, load
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
])  # fmt: skip
def test_impossible_partitions_are_refused(make: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make()
