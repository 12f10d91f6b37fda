"""Federated SVRG, the arithmetic of one device: which batches, how fast, scaled by how rare a feature is.

Numpy alone, and one definition for live devices, the simulation and the reference: whoever calls brings the gradient.
Source: Konecny, McMahan, Ramage, Richtarik 2016 (arXiv:1610.02527), Algorithms 3 (naive) and 4; sections 3.6.2, 3.6.3.
Algorithm 4 is written for steps on one example. Here a step is one batch: with n_k examples in batches of b, its n_k
steps are ceil(n_k / b), and b = 1 gives the paper's. What the server does: covey_coordinator.algorithms.combining.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Union

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
# parameters (d,), the rows of a batch, the number of the step -> gradient (d,) of the batch's mean loss
Gradient = Callable[[Numbers, Rows, int], Numbers]


def order_of(shuffle_seed: int, device_id: str) -> np.random.Generator:
    """What the order of a device's examples in one round is drawn from (docs/protocol.md, section 4)."""
    return np.random.default_rng([shuffle_seed, zlib.crc32(device_id.encode())])


def step_seed(shuffle_seed: int, device_id: str, step: int) -> int:
    """The seed (0 to 2^31 - 1) of what the model draws in one step of a round, counted from 0 (docs/protocol.md)."""
    entropy = [shuffle_seed, zlib.crc32(device_id.encode()), step]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0]) & 0x7FFFFFFF


def passes(n: int, size: int, epochs: int, order: np.random.Generator) -> Iterator[Rows]:
    """The batches of so many passes over n examples, each in an order of its own; the last of a pass may be smaller."""
    for _ in range(epochs):
        rows = order.permutation(n)
        yield from (rows[start : start + size] for start in range(0, n, size))


def drawn(n: int, size: int, steps: int, order: np.random.Generator) -> Iterator[Rows]:
    """So many batches, every example of them drawn with replacement: the naive form's."""
    for _ in range(steps):
        yield order.integers(n, size=size)


def local_rate(rate: float, n: int, size: int) -> float:
    """h_k = h / n_k: a pass goes as far on a device with few examples as on one with many."""
    return rate / -(-n // size)


def shares(x: Numbers) -> npt.NDArray[np.float64]:
    """phi_k: (n, ...) examples -> (F,), for each number of an example the share of examples where it is not 0."""
    return np.asarray(np.count_nonzero(x.reshape(len(x), -1), axis=0) / len(x))


def per_parameter(values: Numbers, units: int, d: int) -> npt.NDArray[np.float32]:
    """(F,) one value per feature -> (d,) one per parameter, of a model whose first tensor is the kernel (F, units).

    What multiplies no feature (biases, all later layers) gets 1: it is "in every example", so nothing is scaled there.
    """
    full = np.ones(d, np.float32)
    full[: len(values) * units] = np.repeat(values, units)
    return full


def scales(fleet: Numbers, own: Numbers) -> npt.NDArray[np.float32]:
    """The diagonal of S_k = phi / phi_k; 1 where the device has no example with the feature (phi_k = 0).

    There the batches' gradients say nothing, and the fleet's gradient alone moves the parameter; so it does where the
    fleet's share is 0, as it can be after hostile devices were taken out of it.
    """
    return np.divide(fleet, own, out=np.ones(len(own), np.float32), where=own > 0, casting="unsafe")


def local_steps(
    start: Numbers,
    full: Numbers,
    gradient: Gradient,
    batches: Iterator[Rows],
    rate: float,
    scale: Union[Numbers, None] = None,
) -> Numbers:
    """w_k after the batches: w <- w - rate (S (grad f_B(w) - grad f_B(start)) + full), in the dtype of `start`.

    full: (d,), the gradient of the whole fleet at `start`. scale: the diagonal of S_k, None for the identity. Both
    gradients of a step get its number, so that a model with Dropout drops the same units in both.
    """
    factor = start.dtype.type(rate)
    w = start
    for step, rows in enumerate(batches):
        change = gradient(w, rows, step) - gradient(start, rows, step)
        w = w - factor * ((change if scale is None else scale * change) + full)
    return w
