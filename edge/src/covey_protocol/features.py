"""What a linear or logistic model of machine teaching sees of an instance. Numpy alone; every device computes the same.

A model's own representation (the deep variant) comes from a bundle; its outputs are given to `Linear` as inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import ConfigError, DataError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Linear:
    """The numbers of an instance, and `intercept` as the last feature.

    lambda_w regularises the intercept's coefficient, too; it does so less, the larger `intercept` is (1 / its square).
    """

    intercept: float = 1.0

    def count(self, inputs: int) -> int:
        return inputs + 1

    def __call__(self, x: npt.NDArray[Any]) -> Array:
        """(n, ...) -> (n, F)."""
        return _with_intercept(_flat(x), self.intercept)


@dataclass(frozen=True)
class Fourier:
    """Random Fourier features of the Gaussian kernel exp(-|x - x'|^2 / (2 width^2)), and `intercept` as the last.

    sqrt(2 / features) cos(W x + b), W normal with deviation 1 / width, b uniform on [0, 2 pi), both from `seed`; the
    kernel is met to about 1 / sqrt(features). Source: Rahimi, Recht 2007 (NIPS), section 3, Algorithm 1.
    """

    features: int
    width: float
    seed: int = 0
    intercept: float = 1.0

    def __post_init__(self) -> None:
        if self.features < 1 or not 0 < self.width < np.inf:
            raise ConfigError(f"{self.features} Fourier features of width {self.width!r}", "choose both above 0")

    def count(self, inputs: int) -> int:
        return self.features + 1

    def __call__(self, x: npt.NDArray[Any]) -> Array:
        """(n, ...) -> (n, F)."""
        flat = _flat(x)
        random = np.random.default_rng([self.seed, flat.shape[1], self.features])
        directions = random.normal(0.0, 1 / self.width, (flat.shape[1], self.features))
        phases = random.uniform(0.0, 2 * np.pi, self.features)
        return _with_intercept(np.sqrt(2 / self.features) * np.cos(flat @ directions + phases), self.intercept)


Features = Union[Linear, Fourier]


def one_vs_rest(labels: npt.NDArray[Any], classes: int) -> Array:
    """(n,) 0 to classes - 1 -> (n, classes), 1 in the label's column and -1 elsewhere. Raises DataError for others."""
    told = np.asarray(labels)
    if told.ndim != 1 or not np.issubdtype(told.dtype, np.integer):
        raise DataError(f"labels of shape {told.shape} and type {told.dtype}", "give whole numbers, one per instance")
    if len(told) and not (told.min() >= 0 and told.max() < classes):
        raise DataError(f"labels from {told.min()} to {told.max()} of {classes} classes", "count from 0")
    return np.asarray(np.where(told[:, None] == np.arange(classes), 1.0, -1.0))


def _flat(x: npt.NDArray[Any]) -> Array:
    return np.asarray(x, np.float64).reshape(len(x), int(np.prod(np.shape(x)[1:])))


def _with_intercept(features: Array, intercept: float) -> Array:
    return np.column_stack([features, np.full(len(features), intercept)])
