"""Clipping bounds the norm and keeps the direction; noise is noise of exactly the stated size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from covey_protocol.errors import UsageError
from covey_protocol.privacy import add_gaussian_noise, clip

updates = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))
norms = st.floats(1e-3, 1e3)


def norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


@given(update=updates, clip_norm=norms)
def test_a_clipped_update_is_never_longer_than_the_clip_norm(update, clip_norm):
    assert norm(clip(update, clip_norm)) <= clip_norm


@given(update=updates, clip_norm=norms)
def test_clipping_keeps_short_updates_as_they_are_and_long_ones_in_direction(update, clip_norm):
    clipped = clip(update, clip_norm)
    if norm(update) <= clip_norm:
        np.testing.assert_array_equal(clipped, update)
    else:
        np.testing.assert_allclose(clipped * (norm(update) / clip_norm), update, rtol=1e-6, atol=1e-30)
        assert norm(clipped) >= clip_norm * (1 - 1e-6)


@given(update=updates, clip_norm=norms)
def test_clipping_twice_is_clipping_once(update, clip_norm):
    once = clip(update, clip_norm)
    np.testing.assert_array_equal(clip(once, clip_norm), once)


def test_clipping_and_noise_leave_the_callers_array_alone():
    update = np.array([3.0, 4.0], np.float32)
    clip(update, 1.0)[:] = 0
    clip(update, 9.0)[:] = 0
    add_gaussian_noise(update, 1.0, 1.0, np.random.default_rng(0))[:] = 0
    np.testing.assert_array_equal(update, [3.0, 4.0])


def test_both_return_float32_for_float64_updates_too():
    update = np.array([3.0, 4.0])
    assert clip(update, 1.0).dtype == np.float32
    assert add_gaussian_noise(update, 1.0, 0.5, np.random.default_rng(0)).dtype == np.float32


def test_the_largest_float32_numbers_do_not_overflow():
    huge = np.full(4, 3e38, np.float32)
    np.testing.assert_allclose(clip(huge, 2.0), 1.0, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused(bad):
    with pytest.raises(UsageError, match="NaN or infinity"):
        clip(np.array([1.0, bad], np.float32), 1.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_clip_norm_that_bounds_nothing_is_refused(bad):
    with pytest.raises(UsageError, match="clip_norm"):
        clip(np.ones(2, np.float32), bad)


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
def test_a_noise_multiplier_that_is_no_size_is_refused(bad):
    with pytest.raises(UsageError, match="noise_multiplier"):
        add_gaussian_noise(np.ones(2, np.float32), 1.0, bad, np.random.default_rng(0))


def test_noise_has_mean_zero_and_the_stated_standard_deviation():
    count, deviation = 200_000, 0.5 * 3.0
    update = np.linspace(-1, 1, count, dtype=np.float32)
    noise = add_gaussian_noise(update, 3.0, 0.5, np.random.default_rng(1)) - update
    # five standard errors: wrong once in 1.7 million seeds, and the seed is fixed
    assert abs(noise.mean(dtype=np.float64)) < 5 * deviation / np.sqrt(count)
    assert abs(noise.std(dtype=np.float64) / deviation - 1) < 5 / np.sqrt(2 * count)


def test_noise_is_bell_shaped_and_independent_between_numbers():
    noise = add_gaussian_noise(np.zeros(200_000, np.float32), 2.0, 1.0, np.random.default_rng(2)) / 2.0
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.005
    assert abs((np.abs(noise) < 2).mean() - 0.9545) < 0.003
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.012


def test_the_same_seed_gives_the_same_noise_and_another_seed_another():
    update = np.zeros(8, np.float32)
    first, again, other = (add_gaussian_noise(update, 1.0, 1.0, np.random.default_rng(s)) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == other)


def test_no_noise_means_the_update_itself():
    update = np.array([0.25, -1.0], np.float32)
    np.testing.assert_array_equal(add_gaussian_noise(update, 1.0, 0.0, np.random.default_rng(0)), update)
