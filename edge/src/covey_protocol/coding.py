"""DRACO's cyclic code: what each of n devices sends of the 2s + 1 shards it holds. NumPy alone; float64 throughout.

Device j holds the shards j, j + 1, ..., j + 2s (mod n) and sends one combination of their vectors. From the n rows, of
which s may be anything, the coordinator finds the exact sum over all shards (covey_coordinator.coding.cyclic).

Source: Chen et al. 2018 (arXiv:1803.09877), section 4.2. The code is theirs: the rows of W span a band of n - 2s
frequencies of the DFT, so that 2s frequencies of any n honest rows are zero. Where they ask that the *first* frequency
of the band gives the sum of the shards, we ask it of its middle one. This turns coefficients of changing signs and of
size up to 1e5 (n = 45, s = 5) into ones of one sign that sum to n, the largest 10.8, and with n odd it makes them real:
a row is then d float64 numbers, with n even d complex128 ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_protocol.errors import ConfigError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CyclicCode:
    """n: devices, and as many shards. s: how many devices may send anything. Raises ConfigError unless 0 <= 2s < n."""

    n: int
    s: int

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.s < self.n:
            raise ConfigError(
                f"a cyclic code for {self.n} devices and {self.s} liars", f"take at least {2 * self.s + 1} devices"
            )

    @property
    def load(self) -> int:
        """How many shards a device holds."""
        return 2 * self.s + 1

    def shards(self, device: int) -> list[int]:
        """The shards of this device, in the order of `encode`."""
        return [(device + place) % self.n for place in range(self.load)]

    @cached_property
    def coefficients(self) -> Array:
        """(2s + 1,): float64 for odd n, complex128 for even n; the same for every device. They sum to n.

        A combination of n - 2s neighbouring frequencies that is zero at the n - 2s - 1 shards a device does not hold is
        the product of so many factors |sin(pi (u - v) / n)|; these are the reciprocals of the products of the others.
        """
        places = np.arange(self.load)
        sines = np.abs(np.sin(np.pi * (places[:, None] - places[None, :]) / self.n))
        np.fill_diagonal(sines, 1.0)
        sizes = 1.0 / sines.prod(axis=1)
        if self.n % 2:
            return np.asarray(sizes * (self.n / sizes.sum()))
        turned = sizes * np.exp(
            -1j * np.pi * (places - self.s) / self.n
        )  # an even band has no middle: half a step aside
        return np.asarray(turned * (self.n / turned.sum()))

    @property
    def frequencies(self) -> Array:
        """(n - 2s,) int64: those that honest rows have; 0 is the one that holds the sum."""
        width = self.n - 2 * self.s
        return np.arange(width) - (width - 1) // 2

    def encode(self, parts: Iterable[Array]) -> Array:
        """(d,) vectors of the device's shards, in the order of `shards` -> (d,) its row. Raises ConfigError.

        One vector is held at a time beside the row.
        """
        row, count = np.zeros(()), 0
        for count, part in enumerate(parts, 1):
            if count <= self.load:
                row = row + self.coefficients[count - 1] * np.asarray(part, np.float64)
        if count != self.load:
            raise ConfigError(f"{count} vectors for a code of {self.load}", "give one of each shard it holds")
        return row


def weighed(update: Array, num_examples: int) -> Array:
    """(d,) a shard's mean update -> (d + 1,) float64: times its number of examples, and that number behind it.

    So the sum over the shards holds both parts of the weighted mean, and nobody can lie about the number alone.
    """
    return np.append(np.asarray(update, np.float64) * num_examples, float(num_examples))


def as_numbers(row: Array) -> Array:
    """A row as it travels: its real parts, then its imaginary parts where it is complex; float64."""
    return np.concatenate([row.real, row.imag]) if np.iscomplexobj(row) else row


def as_rows(code: CyclicCode, numbers: Array) -> Array:
    """(n, ...) what `as_numbers` made of them -> (n, d) the rows; complex128 for even n."""
    if code.n % 2:
        return numbers
    half = numbers.shape[1] // 2
    return np.asarray(numbers[:, :half] + 1j * numbers[:, half:])
