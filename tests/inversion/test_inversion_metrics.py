"""MSE and PSNR are what their names say, and refuse what would make them lie."""

from __future__ import annotations

import math

import numpy as np
import pytest

from covey_coordinator.inversion.metrics import mse, psnr
from covey_protocol.errors import UsageError


def test_an_error_of_a_tenth_of_the_range_everywhere_is_20_db():
    truth = np.zeros((4, 4, 1), np.float32)
    assert mse(truth, truth + 0.1) == pytest.approx(0.01)
    assert psnr(0.01, (0.0, 1.0)) == pytest.approx(20.0)


def test_psnr_does_not_depend_on_the_unit_of_the_inputs():
    assert psnr(0.01 * 255**2, (0, 255)) == pytest.approx(psnr(0.01, (0, 1)))


def test_a_perfect_copy_is_infinitely_good_and_nan_stays_nan():
    assert psnr(0.0, (0, 1)) == math.inf
    assert math.isnan(psnr(mse(np.ones(2), np.array([1.0, np.nan])), (0, 1)))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(UsageError, match="shapes"):
        mse(np.zeros((8, 8, 1)), np.zeros((8, 8)))


@pytest.mark.parametrize("bad", [(1.0, 1.0), (1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)])
def test_a_range_without_width_is_refused(bad):
    with pytest.raises(UsageError, match="range"):
        psnr(0.1, bad)
