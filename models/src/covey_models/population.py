"""The devices of a simulation with their data: a data set divided among them, and some of it corrupted.

Randomness comes from the seed alone, in streams: the partition, which devices a corruption befalls, and what it does
on each device. So another fraction or share leaves everything else as it was.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from covey_models.corruption import Corruption, Setting, corrupt, make_corruption
from covey_models.datasets import Dataset
from covey_models.partitions import Replicated, make_partition, partition
from covey_models.tables import converted, require_share
from covey_protocol.errors import ConfigError

Array = np.ndarray[Any, Any]
Table = Union[str, Mapping[str, Any]]

CHOSEN, DAMAGE = 2, 4  # streams of random numbers of one seed; `covey grid` chooses its corrupted devices with 2, too


class Device(NamedTuple):
    """One device. x: (n, *shape), y: (n,), n >= 1, read-only. faults: the corruptions that changed its data.

    replica: the name of the shard that other devices hold, too, "" for data of its own; see `order_name`.
    """

    device_id: str
    x: Array
    y: Array
    faults: tuple[str, ...] = ()
    replica: str = ""

    @property
    def order_name(self) -> str:
        """Whose order of examples it takes, as an agent with this data.replica."""
        return self.replica or self.device_id


@dataclass(frozen=True)
class Population:
    """devices: in the order of their numbers and names. parts: whose rows of the data set each device was given,
    before corruption.
    """

    devices: list[Device]
    parts: list[Array]
    num_classes: int

    def counts(self) -> Array:
        """(devices, classes) whole numbers: examples per class, after corruption."""
        return np.stack([np.bincount(device.y, minlength=self.num_classes) for device in self.devices])

    def faults(self) -> dict[str, tuple[str, ...]]:
        """device id -> the names of what is wrong with its data, empty where nothing is."""
        return {device.device_id: device.faults for device in self.devices}


@dataclass(frozen=True)
class Placed:
    """A corruption and whom it befalls.

    fraction: of the devices (of `devices`, where they are listed). devices: numbers or ids, None is all.
    share: of the examples of such a device; None is the corruption's own.
    """

    name: str
    corruption: Corruption
    fraction: float = 1.0
    devices: Optional[tuple[Union[int, str], ...]] = None
    share: Optional[float] = None


def populate(
    dataset: Dataset, *, devices: int = 20, partition: Table = "iid", corruptions: Sequence[Table] = (), seed: int = 0
) -> Population:
    """Divide the data set, then corrupt in the order of the list.

    partition: a table {"kind": name, **settings} (`partitions.PARTITIONS`). corruptions: tables
    {"kind": name, "fraction": of devices, "devices": list, "share": of their examples, **settings}
    (`corruption.CORRUPTIONS`); one of fraction and devices must be there. The data set is copied once, ordered by
    device, and the devices hold views of that copy; a corrupted device has arrays of its own.
    Raises ConfigError for what is wrong with a table, also where it befalls nobody.
    """
    setting, size = Setting.of(dataset), int(np.prod(dataset.input_shape))
    placed = [place(table) for table in corruptions]
    for one in placed:
        one.corruption.check(setting, size)
    parts = divided(dataset, devices, partition, seed)
    ids = device_ids(devices)
    people = _named(_handed_out(dataset, parts, ids), partition)
    for position, one in enumerate(placed):
        for number in chosen_devices(one, ids, position, seed):
            random = np.random.default_rng([seed, DAMAGE, position, int(number)])
            people[number] = _damaged(people[number], one, setting, random)
    return Population(people, parts, dataset.num_classes)


def device_ids(devices: int) -> list[str]:
    """device-000, device-001 and so on; they sort as they count."""
    digits = max(3, len(str(devices - 1)))
    return [f"device-{number:0{digits}d}" for number in range(devices)]


def place(table: Table) -> Placed:
    """A corruption's table, with `fraction`, `devices` and `share` beside the corruption's own settings."""
    settings = {"kind": table} if isinstance(table, str) else dict(table) if isinstance(table, Mapping) else {}
    where = {key: settings.pop(key) for key in ("fraction", "devices", "share") if key in settings}
    corruption = make_corruption(settings or table)
    name = str(settings["kind"])
    if "fraction" not in where and "devices" not in where:
        raise ConfigError(f"the corruption {name!r} does not say whom it befalls", "set fraction (0 to 1) or devices")
    types = typing.get_type_hints(Placed)
    told = {key: converted(value, types[key], f"the corruption {name!r}: {key}") for key, value in where.items()}
    for key in ("fraction", "share"):
        if told.get(key) is not None:
            require_share(f"the corruption {name!r}: {key}", told[key])
    return Placed(name, corruption, **told)


def divided(dataset: Dataset, devices: int, table: Table, seed: int) -> list[Array]:
    """The partition, refused where a device is left without examples."""
    parts = partition(dataset, devices, table, seed)
    empty = [number for number, part in enumerate(parts) if not len(part)]
    if empty:
        raise ConfigError(
            f"the partition leaves {len(empty)} of {devices} devices without examples", "set min_examples to 1 or more"
        )
    return parts


def chosen_devices(placed: Placed, ids: Sequence[str], position: int, seed: int) -> Array:
    """Sorted numbers. Those of a smaller fraction are among those of a larger; lists and positions draw by themselves.

    position: in the list of corruptions. The first one befalls whom `covey grid` corrupts with this seed.
    """
    candidates = np.arange(len(ids)) if placed.devices is None else _listed(placed, ids)
    drawn = np.random.default_rng([seed, CHOSEN, position] if position else [seed, CHOSEN]).permutation(candidates)
    return np.sort(drawn[: round(placed.fraction * len(candidates))])


def _listed(placed: Placed, ids: Sequence[str]) -> Array:
    numbers = {name: number for number, name in enumerate(ids)}
    found = [numbers.get(device) if isinstance(device, str) else device for device in placed.devices or ()]
    for device, number in zip(placed.devices or (), found):
        if number is None or not 0 <= number < len(ids):
            raise ConfigError(
                f"the corruption {placed.name!r} names the device {device!r}",
                f"there are {len(ids)}: 0 to {len(ids) - 1}, or {ids[0]} to {ids[-1]}",
            )
    return np.unique(np.asarray(found, np.int64))


def _named(people: list[Device], table: Table) -> list[Device]:
    """With the names of their shards, where these are replicated."""
    made = make_partition(table)
    if not isinstance(made, Replicated):
        return people
    return [one._replace(replica=name) for one, name in zip(people, made.replica_names(len(people)))]


def _handed_out(dataset: Dataset, parts: Sequence[Array], ids: Sequence[str]) -> list[Device]:
    order = np.concatenate(parts)
    x, y = dataset.x[order], dataset.y[order]
    x.flags.writeable = y.flags.writeable = False
    ends = np.cumsum([len(part) for part in parts])
    return [
        Device(name, x[end - len(part) : end], y[end - len(part) : end]) for name, part, end in zip(ids, parts, ends)
    ]


def _damaged(device: Device, placed: Placed, setting: Setting, random: np.random.Generator) -> Device:
    """Named as a fault only where it changed something: a device without the class that is flipped is healthy."""
    x, y = corrupt(placed.corruption, device.x, device.y, setting, random, placed.share)
    if np.array_equal(x, device.x) and np.array_equal(y, device.y):
        return device
    x.flags.writeable = y.flags.writeable = False
    return device._replace(x=x, y=y, faults=(*device.faults, placed.name))
