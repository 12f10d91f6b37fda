"""Gradient descent, Federated SVRG and its naive form on sparse logistic regression, in numpy alone.

What live rounds and the simulation are held against, and what `covey reproduce fsvrg` draws. All devices take part in
every round. The inner steps are covey_protocol.svrg's, the server's are `combining`'s.

order: (round, from 1; device, from 0) -> what the order of its examples is drawn from; without one by `seed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.algorithms.combining import boosted, boosts
from covey_coordinator.algorithms.sparse_logistic import Posts, gradient
from covey_protocol.svrg import Rows, drawn, local_rate, local_steps, order_of, passes, scales

Numbers = npt.NDArray[np.float64]
Order = Callable[[int, int], np.random.Generator]


def by_seed(seed: int) -> Order:
    return lambda number, device: order_of(seed + number, f"device-{device:03d}")


def full_gradient(w: Numbers, devices: list[Posts], decay: float) -> Numbers:
    """grad f = sum_k n_k / n grad F_k."""
    sizes = np.array([len(one) for one in devices])
    return np.asarray(sizes @ np.stack([gradient(w, one, decay) for one in devices]) / sizes.sum())


def gradient_descent(devices: list[Posts], decay: float, rate: float) -> Iterator[Numbers]:
    """The parameters after each round, from zeros."""
    w = np.zeros(devices[0].features + 1)
    while True:
        w = w - rate * full_gradient(w, devices, decay)
        yield w


def fsvrg(
    devices: list[Posts],
    decay: float,
    rate: float,
    *,
    batch: int = 1,
    seed: int = 0,
    order: Order | None = None,
    scaled: bool = True,
) -> Iterator[Numbers]:
    """Algorithm 4: h_k = h / n_k, S_k, updates weighted by n_k / n, A. The parameters after each round, from zeros.

    scaled: False for S_k = A = I.
    """
    own = np.stack([one.shares() for one in devices])
    sizes = np.array([len(one) for one in devices], np.float64)
    fleet, boost = sizes @ own / sizes.sum(), boosts(own)
    if not scaled:
        own, boost = np.ones_like(own), np.ones_like(boost)
        fleet = own[0]
    scale = [scales(fleet, one) for one in own]

    def local(w: Numbers, full: Numbers, k: int, drawn_from: np.random.Generator) -> Numbers:
        steps, pace = passes(len(devices[k]), batch, 1, drawn_from), local_rate(rate, len(devices[k]), batch)
        return local_steps(w, full, _gradient_of(devices[k], decay), steps, pace, scale[k])

    return _rounds(devices, decay, local, sizes / sizes.sum(), boost, order or by_seed(seed))


def fsvrg_naive(
    devices: list[Posts],
    decay: float,
    rate: float,
    steps: int,
    *,
    batch: int = 1,
    seed: int = 0,
    order: Order | None = None,
) -> Iterator[Numbers]:
    """Algorithm 3: the same rate and number of steps everywhere, examples drawn with replacement, a plain average."""

    def local(w: Numbers, full: Numbers, k: int, drawn_from: np.random.Generator) -> Numbers:
        return local_steps(
            w, full, _gradient_of(devices[k], decay), drawn(len(devices[k]), batch, steps, drawn_from), rate
        )

    equal = np.full(len(devices), 1.0 / len(devices))
    return _rounds(devices, decay, local, equal, np.ones(devices[0].features + 1), order or by_seed(seed))


Local = Callable[[Numbers, Numbers, int, np.random.Generator], Numbers]


def _rounds(
    devices: list[Posts], decay: float, local: Local, weights: Numbers, boost: npt.NDArray[Any], order: Order
) -> Iterator[Numbers]:
    w, number = np.zeros(devices[0].features + 1), 0
    while True:
        number += 1
        full = full_gradient(w, devices, decay)
        ends = [local(w, full, k, order(number, k)) for k in range(len(devices))]
        w = boosted(w, weights @ (np.stack(ends) - w), boost)
        yield w


def _gradient_of(posts: Posts, decay: float) -> Callable[[Numbers, Rows, int], Numbers]:
    return lambda w, rows, step: gradient(w, posts.taken(rows), decay)
