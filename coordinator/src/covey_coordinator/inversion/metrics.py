"""How close a recovered input is to the true one. Pure NumPy.

SSIM and identification rates are not here yet.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import UsageError


def mse(truth: npt.NDArray[Any], recovered: npt.NDArray[Any]) -> float:
    """Mean squared difference per element, on the inputs' own scale.

    truth, recovered: the same shape, any real dtype; summed in float64. NaN anywhere gives NaN.
    Raises UsageError if the shapes differ (broadcasting would compare the wrong elements) or are empty.
    """
    if truth.shape != recovered.shape or truth.size == 0:
        raise UsageError(f"cannot compare inputs of shapes {truth.shape} and {recovered.shape}")
    difference = truth.astype(np.float64) - recovered.astype(np.float64)
    return float(np.mean(difference**2))


def psnr(mean_squared_error: float, input_range: tuple[float, float]) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / mse), with the declared input range as the peak.

    Infinite for an error of exactly 0, NaN for NaN. As a guide: above 30 dB the eye sees the same picture,
    near 10 dB it sees none. Raises UsageError for a negative error or a range without width.
    """
    low, high = input_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"the input range {input_range} has no width", "declare (lowest, highest) of the inputs")
    if math.isnan(mean_squared_error):
        return math.nan
    if mean_squared_error < 0:
        raise UsageError(f"a mean squared error cannot be {mean_squared_error}")
    if mean_squared_error == 0:
        return math.inf
    return 10.0 * math.log10((high - low) ** 2 / mean_squared_error)
