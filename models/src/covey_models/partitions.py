"""How a data set is divided among simulated devices: lists of index arrays, every example on exactly one device.

Pure NumPy; the same seed gives the same partition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from covey_protocol.errors import ConfigError

Array = np.ndarray[Any, Any]


def iid(y: Sequence[int] | Array, num_devices: int, seed: int) -> list[Array]:
    """Shuffled and dealt out evenly: sizes differ by at most one. Only the length of y matters."""
    count = len(y)
    _check(count, num_devices, 1)
    return _parts(np.array_split(np.random.default_rng(seed).permutation(count), num_devices))


def dirichlet(
    y: Sequence[int] | Array, num_devices: int, alpha: float, seed: int, min_examples: int = 1
) -> list[Array]:
    """Label skew: large alpha approaches IID, small alpha leaves each device few classes.

    Hsu, Qi and Brown 2019 (arXiv:1909.06335) draw each device's class shares from Dir(alpha * prior) and then
    sample examples. Here each class's shares over the devices are drawn from Dir(alpha, ..., alpha) instead (as
    Yurochkin et al. 2019, arXiv:1905.12022), so that every example is used exactly once and device sizes vary.
    A device left with fewer than min_examples gets random examples of the then largest devices.
    """
    labels = np.asarray(y)
    _check(len(labels), num_devices, min_examples)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"the Dirichlet alpha is {alpha}", "give a positive number, such as 0.1 or 1")
    random = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(num_devices)]
    for label in np.unique(labels):
        places = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(num_devices, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(places)).astype(int)
        for part, chunk in zip(parts, np.split(places, cuts)):
            part += chunk.tolist()
    _top_up(parts, min_examples, random)
    return _parts(parts)


def _top_up(parts: list[list[int]], min_examples: int, random: np.random.Generator) -> None:
    for part in parts:
        while len(part) < min_examples:
            largest = max(parts, key=len)
            part.append(largest.pop(int(random.integers(len(largest)))))


def label_shards(y: Sequence[int] | Array, num_devices: int, shards_per_device: int, seed: int) -> list[Array]:
    """Sorted by label, cut into num_devices * shards_per_device shards, each device gets random ones.

    The pathological non-IID partition of McMahan et al. 2017 (arXiv:1602.05629, section 3): with two shards most
    devices see two classes. Sizes differ where the shards do not divide the data evenly.
    """
    labels = np.asarray(y)
    if shards_per_device < 1:
        raise ConfigError(f"there are {shards_per_device} shards per device", "give 1 or more")
    _check(len(labels), num_devices, shards_per_device)
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = np.array_split(by_label, num_devices * shards_per_device)
    dealt = random.permutation(len(shards)).reshape(num_devices, shards_per_device)
    return _parts([np.concatenate([shards[shard] for shard in hand]) for hand in dealt])


def _check(count: int, num_devices: int, per_device: int) -> None:
    if num_devices < 1:
        raise ConfigError(f"there are {num_devices} devices", "give 1 or more")
    if per_device < 0:
        raise ConfigError(f"each device is to get {per_device} examples", "give 0 or more")
    if count < num_devices * per_device:
        raise ConfigError(
            f"{count} examples cannot give {num_devices} devices {per_device} each", "take fewer devices or more data"
        )


def _parts(parts: Sequence[Any]) -> list[Array]:
    """Sorted, so that a partition does not depend on the order in which it was made."""
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]
