"""Clipping and Gaussian noise on one update: the only definition of both in covey.

The device clips and noises with these functions before its update leaves it, and the inversion check on the
desktop uses the same ones, so what the check shows is what the device sends. Source: DP-FedAvg, McMahan et
al. 2018 (arXiv:1710.06963), flat clipping, there with the noise added once by the server to the average. Here
a device adds the whole noise to its own update (it trusts no server), so noise_multiplier is per update and
not per average.

This file does not account for the privacy spent: epsilon and delta belong to the ledger. Floating-point
Gaussian noise is not exact differential privacy either (Mironov 2012); that gap is far below what the checks
here can see.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import UsageError

Array = npt.NDArray[np.float32]

# float32 rounding moves a norm by up to 6e-8 of itself; scaling by this keeps the clipped norm at or below clip_norm
BELOW_ROUNDING = 1.0 - 1.5e-7


def clip(update: Array, clip_norm: float) -> Array:
    """The update, scaled down to Euclidean norm clip_norm where it is longer, else unchanged.

    update: (d,) finite; clip_norm: positive, in the update's own unit (parameter values). Returns a new (d,)
    float32 whose norm, summed in float64, is at most clip_norm. The direction never changes, which is why
    clipping alone hides nothing from whoever looks at the direction only.
    Raises UsageError for a clip_norm that is not positive and finite, and for an update with NaN or infinity
    (no scaling bounds those: drop such an update before).
    Source: McMahan et al. 2018 (arXiv:1710.06963), FlatClip in Algorithm 1: min(1, S / |update|) * update.
    """
    _check_scale("clip_norm", clip_norm)
    if clip_norm == 0:
        raise UsageError("clip_norm is 0", "give a positive norm")
    values = np.asarray(update, dtype=np.float32)
    wide = values.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    if not math.isfinite(norm):
        raise UsageError("the update to clip holds NaN or infinity", "drop updates that are not finite before clipping")
    if norm <= clip_norm:
        return values.copy()
    wide *= clip_norm / norm * BELOW_ROUNDING
    return wide.astype(np.float32)


def add_gaussian_noise(update: Array, clip_norm: float, noise_multiplier: float, rng: np.random.Generator) -> Array:
    """The update plus independent normal noise of standard deviation noise_multiplier * clip_norm on every number.

    update: (d,), already clipped to clip_norm (not checked again here). noise_multiplier: dimensionless, 0
    means none. rng: a seeded generator in tests; on a device it must be seeded by the operating system and
    its state kept secret, since whoever knows the seed subtracts the noise. Returns a new (d,) float32.
    Raises UsageError for a negative or non-finite clip_norm or noise_multiplier.
    Source: McMahan et al. 2018 (arXiv:1710.06963), sigma = z * S, added by the device instead of the server.
    """
    _check_scale("clip_norm", clip_norm)
    _check_scale("noise_multiplier", noise_multiplier)
    values = np.asarray(update, dtype=np.float32)
    noise = rng.standard_normal(values.shape, dtype=np.float32)
    noise *= np.float32(noise_multiplier * clip_norm)
    noise += values
    return noise


def _check_scale(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{name} is {value}", "give a finite number that is not negative")
