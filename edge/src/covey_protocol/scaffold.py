"""SCAFFOLD, the arithmetic of one device. Source: Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1, option II.

Every device keeps a control c_i, the coordinator their average c. Numpy alone; the coordinator's part is in
covey_coordinator.algorithms.combining. Each device takes the same number of steps, so that c follows from the
aggregate of the updates alone, and a device sends nothing but its update (the paper sends c_i's change, too).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


def correction(fleet: Numbers, own: Numbers) -> Numbers:
    """c - c_i, which is added to every step's gradient. (d,) each."""
    return fleet - own


def next_control(fleet: Numbers, own: Numbers, update: Numbers, steps: int, rate: float) -> Numbers:
    """c_i+ = c_i - c + (x - y_i) / (K eta), y_i - x being the update as it was trained, before clipping and noise."""
    return np.asarray(own - fleet - update / own.dtype.type(steps * rate))


def batches(n: int, size: int, steps: int, order: np.random.Generator) -> Iterator[Rows]:
    """So many batches of passes over n examples, each pass in an order of its own."""
    left = steps
    while left:
        rows = order.permutation(n)
        for start in range(0, n, size)[:left]:
            yield rows[start : start + size]
            left -= 1
