"""Corruptions: seeded, within the range, shape and type kept, and the clean data untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_models.corruption import (
    CORRUPTIONS,
    Setting,
    corrupt,
    flip_labels,
    random_labels,
    sensor_noise,
    shift_labels,
    stuck_sensor,
)  # fmt: skip
from covey_protocol.errors import ConfigError

CLASSES = 5
SETTING = Setting(num_classes=CLASSES, input_range=(-1.0, 2.0))


def examples() -> tuple[Any, Any]:
    random = np.random.default_rng(5)
    return random.uniform(-1, 2, (40, 4, 4, 1)).astype(np.float32), random.integers(0, CLASSES, 40).astype(np.int32)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_keeps_shape_type_and_range_and_leaves_its_input_alone(name: str) -> None:
    x, y = examples()
    clean_x, clean_y = x.copy(), y.copy()
    new_x, new_y = corrupt(name, x, y, SETTING, np.random.default_rng(0))
    np.testing.assert_array_equal(x, clean_x)
    np.testing.assert_array_equal(y, clean_y)
    assert (new_x.shape, new_x.dtype, new_y.shape, new_y.dtype) == (x.shape, x.dtype, y.shape, y.dtype)
    assert new_x.min() >= -1.0
    assert new_x.max() <= 2.0
    assert set(new_y) <= set(range(CLASSES))
    assert not (np.array_equal(new_x, x) and np.array_equal(new_y, y))
    assert not np.shares_memory(new_x, x)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides_the_corruption(name: str) -> None:
    x, y = examples()
    first, again = (corrupt(name, x, y, SETTING, np.random.default_rng(1)) for _ in range(2))
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)


@given(st.integers(2, 20), st.data())
def test_flipping_twice_gives_the_labels_back_and_shifting_changes_all(num_classes: int, data: Any) -> None:
    y = np.array(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1)), np.int32)
    np.testing.assert_array_equal(flip_labels(flip_labels(y, num_classes), num_classes), y)
    assert (flip_labels(y, num_classes) + y == num_classes - 1).all()
    shifted = shift_labels(y, num_classes)
    assert (shifted != y).all()
    assert set(shifted) <= set(range(num_classes))


def test_random_labels_are_right_by_chance_only() -> None:
    y = np.zeros(20_000, np.int32)
    share = (random_labels(y, CLASSES, np.random.default_rng(0)) == y).mean()
    assert share == pytest.approx(1 / CLASSES, abs=0.015)  # 5 standard deviations


def test_sensor_noise_has_the_stated_mean_and_deviation() -> None:
    x = np.zeros((500, 100), np.float32)
    noise = sensor_noise(x, std=0.3, bias=0.1, input_range=(-9.0, 9.0), random=np.random.default_rng(0))
    assert noise.mean() == pytest.approx(0.1, abs=0.007)  # 5 standard errors
    assert noise.std() == pytest.approx(0.3, abs=0.005)


def test_a_stuck_sensor_repeats_one_real_frame() -> None:
    x, _ = examples()
    stuck = stuck_sensor(x, np.random.default_rng(0))
    assert (stuck == stuck[0]).all()
    assert any(np.array_equal(stuck[0], frame) for frame in x)
    assert stuck_sensor(x[:0], np.random.default_rng(0)).shape == (0, 4, 4, 1)


def test_unknown_names_and_negative_deviations_are_refused() -> None:
    x, y = examples()
    with pytest.raises(ConfigError, match=r"no corruption 'rust'.*flip-labels"):
        corrupt("rust", x, y, SETTING, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="standard deviation is -1"):
        sensor_noise(x, -1, 0, (0, 1), np.random.default_rng(0))
