"""What an attacker believes of one example's inputs before the update: a Gaussian and a range. Pure NumPy.

Tarantola's N(m0, C_M). The plain one knows the declared range only. The others know what such inputs look like: that
neighbouring pixels are alike, or the mean and covariance of public examples. An attacker has public examples of most
things, so a number that rests on the plain prior is no bound on what somebody with a better one finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from covey_protocol.bundle import TensorSpec
from covey_protocol.errors import UsageError

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

MAX_CORRELATED = 4096  # inputs per example: the covariance and its root are then 128 MB each
SHRUNK = 0.05  # share of the plain variance in a covariance of few examples, which alone would be singular


@dataclass(frozen=True)
class Prior:
    """Of S numbers. mean: (S,), None for the middle of the range. root: (S, S), symmetric and regular, with C_M =
    root root; None for independent numbers of the spread of a uniform variable on the range."""

    low: float
    high: float
    mean: Optional[Vector] = None
    root: Optional[Matrix] = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UsageError(
                f"a prior on the range {self.low} to {self.high}", "declare the lowest and the highest input"
            )

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def spread(self) -> float:
        return (self.high - self.low) / math.sqrt(12)

    @property
    def range(self) -> tuple[float, float]:
        return self.low, self.high

    def center(self, examples: Matrix) -> Matrix:
        """m0 in the shape of these examples (n, S)."""
        mean = self.middle if self.mean is None else self.mean
        return np.broadcast_to(np.asarray(mean, np.float64), examples.shape).copy()

    def scaled(self, examples: Matrix) -> Matrix:
        """C_M^(1/2) times each of these (n, S)."""
        return examples * self.spread if self.root is None else examples @ self.root

    def unscaled(self, examples: Matrix) -> Matrix:
        """C_M^(-1/2) times each of these (n, S)."""
        if self.root is None:
            return examples / self.spread
        return np.asarray(np.linalg.solve(self.root, examples.T).T, np.float64)

    def variances(self, inputs: int) -> Vector:
        """(S,): the diagonal of C_M."""
        if self.root is None:
            return np.full(inputs, self.spread**2)
        return np.asarray(np.sum(self.root**2, axis=0), np.float64)


def plain_prior(spec: TensorSpec) -> Prior:
    """Independent numbers around the middle of the declared range; 0 to 1 where a bundle declares none."""
    low = 0.0 if spec.minimum is None else spec.minimum
    return Prior(low, spec.maximum if spec.maximum is not None else low + 1.0)


def smooth_prior(spec: TensorSpec, length: float = 1.0) -> Prior:
    """Pixels whose correlation falls as exp(-distance / length). length: in pixels, above 0.

    spec: of pictures (height, width) or (height, width, channels); channels are independent of each other.
    """
    if len(spec.shape) not in (2, 3) or not length > 0:
        raise UsageError(f"a smooth prior of length {length} for inputs of shape {spec.shape}", "it is for pictures")
    plain = plain_prior(spec)
    places = np.indices(spec.shape).reshape(len(spec.shape), -1).T.astype(np.float64)
    if len(spec.shape) == 3:
        places[:, 2] *= 1e6  # channels far apart
    _check_size(len(places))
    squares = np.sum(places**2, axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2.0 * places @ places.T, 0.0))
    return Prior(plain.low, plain.high, None, _root(plain.spread**2 * np.exp(-distances / length)))


def learned_prior(spec: TensorSpec, examples: npt.NDArray[Any], shrunk: float = SHRUNK) -> Prior:
    """Mean and covariance of public examples (m, *input shape), with a share `shrunk` of the plain covariance."""
    plain = plain_prior(spec)
    flat = np.asarray(examples, np.float64).reshape(len(examples), -1)
    _check_size(flat.shape[1])
    if len(flat) < 2 or not 0.0 < shrunk <= 1.0:
        raise UsageError(f"a prior of {len(flat)} examples, shrunk by {shrunk}", "give two and a share of 0 to 1")
    covariance = (1.0 - shrunk) * np.cov(flat, rowvar=False) + shrunk * plain.spread**2 * np.eye(flat.shape[1])
    return Prior(plain.low, plain.high, flat.mean(axis=0), _root(covariance))


def flat_examples(values: npt.NDArray[Any], shape: Sequence[int]) -> Matrix:
    """(N,) or (n, *shape) -> (n, S), float64."""
    return np.asarray(values, np.float64).reshape(-1, math.prod(shape))


def _root(covariance: Matrix) -> Matrix:
    values, vectors = np.linalg.eigh(covariance)
    if not values[0] > 0:
        raise UsageError("the prior's covariance is singular", "shrink it more, or take a shorter length")
    return np.asarray((vectors * np.sqrt(values)) @ vectors.T, np.float64)


def _check_size(inputs: int) -> None:
    if inputs > MAX_CORRELATED:
        raise UsageError(
            f"a covariance of {inputs} inputs is too large", f"take the plain prior beyond {MAX_CORRELATED}"
        )
