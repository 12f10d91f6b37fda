"""How a data set is divided among simulated devices: lists of index arrays, every example on exactly one device,
or, where shards are replicated on purpose, on as many as hold its shard.

Pure NumPy; the same seed gives the same partition. `partition` takes the table that an experiment's file holds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union

import numpy as np

from covey_models.styles import style_regions
from covey_models.tables import made
from covey_protocol.errors import ConfigError, DataError

if TYPE_CHECKING:
    from covey_models.datasets import Dataset

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
    """Of equally large parts the first gives. The heap may hold sizes that are no longer true; those are renewed."""
    heap = [(-len(part), number) for number, part in enumerate(parts)]
    heapq.heapify(heap)
    for part in parts:
        while len(part) < min_examples:
            size, number = heap[0]
            largest = parts[number]
            if len(largest) != -size:
                heapq.heapreplace(heap, (-len(largest), number))
                continue
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


def by_user(users: Sequence[Any] | Array, num_devices: int, seed: int) -> list[Array]:
    """All examples of a user on one device. Where there are more users, the largest left goes to whom has least.

    Users of equal size, and which device is whose, are in an order that the seed draws.
    """
    _, first, owner, sizes = np.unique(np.asarray(users), return_index=True, return_inverse=True, return_counts=True)
    if len(first) < num_devices:
        raise ConfigError(
            f"there are {len(first)} users for {num_devices} devices", f"take {len(first)} devices or fewer"
        )
    _check(len(owner), num_devices, 1)
    random = np.random.default_rng(seed)
    drawn, devices = random.permutation(len(sizes)), random.permutation(num_devices)
    loads = [(0, number) for number in range(num_devices)]  # a heap: the least loaded device is on top
    device_of = np.empty(len(sizes), np.int64)
    for user in drawn[np.argsort(-sizes[drawn], kind="stable")]:
        load, number = loads[0]
        device_of[user] = devices[number]
        heapq.heapreplace(loads, (load + int(sizes[user]), number))
    return _grouped(device_of[owner], num_devices)


def quantity_skew(
    y: Sequence[int] | Array, num_devices: int, law: str, alpha: float, seed: int, min_examples: int = 1
) -> list[Array]:
    """Labels as in IID, sizes unequal: each device gets min_examples and a share of the rest.

    law "dirichlet": shares from Dir(alpha, ..., alpha), small alpha is more unequal (Li, Diao, Chen and He 2022,
    arXiv:2102.02079, section 4.3; the least number is ours). law "power-law": the k-th largest share is proportional
    to k ** -alpha, on random devices (sizes by a power law as in Li et al. 2020, arXiv:1812.06127; the exponent is
    ours). Only the length of y matters.
    """
    count = len(y)
    _check(count, num_devices, min_examples)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"the alpha of the quantity skew is {alpha}", "give a positive number, such as 0.5 or 1")
    random = np.random.default_rng(seed)
    if law == "dirichlet":
        shares = random.dirichlet(np.full(num_devices, alpha))
    else:
        shares = random.permutation(np.arange(1, num_devices + 1) ** -float(alpha))
    rest = count - num_devices * min_examples
    ends = np.rint(np.cumsum(shares) / shares.sum() * rest).astype(np.int64)
    cuts = (ends + min_examples * np.arange(1, num_devices + 1))[:-1]
    return _parts(np.split(random.permutation(count), cuts))


def writer_like(x: Array, y: Array, num_devices: int, seed: int, mixed: float = 0.0) -> list[Array]:
    """Devices that differ in handwriting, not in which characters they hold: see `covey_models.styles`. Ours.

    For MNIST, whose writers are not told, in place of EMNIST's. mixed: this share of the examples, drawn at random,
    is dealt out evenly instead.
    """
    _check(len(y), num_devices, 1)
    if not 0.0 <= mixed <= 1.0:
        raise ConfigError(f"writer-like: mixed = {mixed}", "give a number from 0 to 1")
    random = np.random.default_rng(seed)
    regions = style_regions(x, y, num_devices)
    device_of = random.permutation(num_devices)[regions]
    chosen = random.permutation(len(y))[: round(mixed * len(y))]
    device_of[chosen] = random.permutation(device_of[chosen])  # sizes stay
    return _grouped(device_of, num_devices)


def _grouped(device_of: Array, num_devices: int) -> list[Array]:
    """(n,) device numbers -> the places of each device, sorted."""
    order = np.argsort(device_of, kind="stable")
    return _parts(np.split(order, np.cumsum(np.bincount(device_of, minlength=num_devices))[:-1]))


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


class Partition(Protocol):
    """A way to divide, with its settings."""

    def parts(self, dataset: Dataset, num_devices: int, seed: int) -> list[Array]: ...


@dataclass(frozen=True)
class Iid:
    """Shuffled and dealt out evenly."""

    def parts(self, dataset: Dataset, num_devices: int, seed: int) -> list[Array]:
        return iid(dataset.y, num_devices, seed)


@dataclass(frozen=True)
class LabelShards:
    """Few classes per device: `label_shards`."""

    shards_per_device: int = 2

    def parts(self, dataset: Dataset, num_devices: int, seed: int) -> list[Array]:
        return label_shards(dataset.y, num_devices, self.shards_per_device, seed)


@dataclass(frozen=True)
class DirichletLabels:
    """Label skew by degrees: `dirichlet`."""

    alpha: float = 1.0
    min_examples: int = 1

    def parts(self, dataset: Dataset, num_devices: int, seed: int) -> list[Array]:
        return dirichlet(dataset.y, num_devices, self.alpha, seed, self.min_examples)


@dataclass(frozen=True)
class ByUser:
    """The data set's own users: `by_user`."""

    def parts(self, dataset: Dataset, num_devices: int, seed: int) -> list[Array]:
        if dataset.users is None:
            raise DataError(
                f"{dataset.name} does not say whose its examples are",
                "give a CSV file a user column, an .npz file an array users, or choose another partition",
            )
        return by_user(dataset.users, num_devices, seed)


@dataclass(frozen=True)
class QuantitySkew:
    """Unequal sizes: `quantity_skew`."""

    law: Literal["dirichlet", "power-law"] = "dirichlet"
    alpha: float = 1.0
    min_examples: int = 1

    def parts(self, dataset: Dataset, num_devices: int, seed: int) -> list[Array]:
        return quantity_skew(dataset.y, num_devices, self.law, self.alpha, seed, self.min_examples)


@dataclass(frozen=True)
class WriterLike:
    """One style of handwriting per device: `writer_like`."""

    mixed: float = 0.0

    def parts(self, dataset: Dataset, num_devices: int, seed: int) -> list[Array]:
        return writer_like(dataset.x, dataset.y, num_devices, seed, self.mixed)


@dataclass(frozen=True)
class Replicated:
    """Every shard on `replicas` neighbouring devices, for coded redundancy; `of` says how the shards are made."""

    replicas: int = 3
    of: Union[str, Mapping[str, Any]] = "iid"

    def parts(self, dataset: Dataset, num_devices: int, seed: int) -> list[Array]:
        if self.replicas < 1 or num_devices % self.replicas:
            raise ConfigError(
                f"{num_devices} devices are not groups of {self.replicas} replicas",
                "choose replicas that divide the number of devices",
            )
        shards = partition(dataset, num_devices // self.replicas, self.of, seed)
        return [shard for shard in shards for _ in range(self.replicas)]

    def replica_names(self, num_devices: int) -> list[str]:
        """Of every device the name of its shard."""
        return [f"shard-{number // self.replicas:03d}" for number in range(num_devices)]


PARTITIONS: dict[str, type[Partition]] = {
    "iid": Iid,
    "label-shards": LabelShards,
    "dirichlet": DirichletLabels,
    "by-user": ByUser,
    "quantity-skew": QuantitySkew,
    "writer-like": WriterLike,
    "replicated": Replicated,
}


def make_partition(table: Union[str, Mapping[str, Any]]) -> Partition:
    """Of a table {"kind": name, **its settings}, or of a name for the defaults. Raises ConfigError naming the key."""
    return made(PARTITIONS, "partition", table)


def partition(dataset: Dataset, num_devices: int, table: Union[str, Mapping[str, Any]], seed: int) -> list[Array]:
    """The data set divided as the table says: num_devices sorted index arrays."""
    return make_partition(table).parts(dataset, num_devices, seed)
