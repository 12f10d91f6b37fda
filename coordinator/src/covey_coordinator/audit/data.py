"""The user's data as the devices of an audit hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_coordinator.audit.settings import PlanSettings
from covey_edge.data_sources import check_examples
from covey_models.datasets import STANDARD_DEVIATIONS, Dataset, load_split
from covey_models.partitions import partition
from covey_protocol.bundle import Manifest
from covey_protocol.errors import DataError

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """Examples as a device's trainer takes them. classes: (n,) int64, what the labels say."""

    x: Numbers
    y: Numbers
    classes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.x)

    def first(self, count: int) -> Part:
        """All where count is 0."""
        return self if not count else Part(self.x[:count], self.y[:count], self.classes[:count])

    def take(self, rows: Any) -> Part:
        return Part(self.x[rows], self.y[rows], self.classes[rows])


@dataclass(frozen=True)
class AuditData:
    """test: was on no device. input_range: what PSNR is measured against. average: the mean example of the test part,
    what somebody guesses who knows such data and has no update. feature_names: of a table, else empty.
    """

    name: str
    class_names: tuple[str, ...]
    input_range: tuple[float, float]
    devices: tuple[Part, ...]
    test: Part
    average: Numbers
    feature_names: tuple[str, ...] = ()

    def device_ids(self) -> list[str]:
        return [f"device-{number:02d}" for number in range(len(self.devices))]


def read_data(settings: PlanSettings, manifest: Manifest, seed: int, data_dir: Path | None = None) -> AuditData:
    """Raises DataError or ConfigError for data that cannot be read, do not fit the model, or are too few."""
    told = settings.data
    name = told.path or told.set
    train, test = load_split(name, data_dir, test_fraction=told.test_fraction, seed=seed, **told.reading())
    held = _fitting(train, manifest, name)
    fleet = settings.fleet
    shards = partition(train, fleet.devices, dict(fleet.partition), seed)
    rng = np.random.default_rng([seed, 1])
    devices = tuple(held.take(rng.permutation(rows)).first(fleet.examples) for rows in shards)
    if any(not len(part) for part in devices):
        raise DataError(f"{name}: a device is left without examples", "give more data, or lower fleet.devices")
    kept = _fitting(test, manifest, name)
    average, bounds = kept.x.astype(np.float64).mean(axis=0), _range(manifest, train)
    return AuditData(train.name, train.class_names, bounds, devices, kept, average, train.feature_names)


def _fitting(data: Dataset, manifest: Manifest, name: str) -> Part:
    if manifest.num_classes is not None and data.num_classes > max(manifest.num_classes, 2):
        raise DataError(
            f"{name} has {data.num_classes} classes, the model {manifest.num_classes}", "give the data it is made for"
        )
    x, y = check_examples(data.x, _labels(data.y, manifest), manifest, Path(name))
    return Part(x, y, data.y.astype(np.int64))


def _labels(classes: Numbers, manifest: Manifest) -> Numbers:
    """As the model takes them: numbers, one column, or one-hot."""
    shape = tuple(manifest.label.shape)
    if len(shape) == 1 and shape[0] > 1:
        if classes.max() >= shape[0]:
            raise DataError(f"there is a class {classes.max()}, the model takes {shape[0]}", "check the labels")
        return np.eye(shape[0], dtype=np.float32)[classes]
    return classes.reshape(len(classes), *shape) if shape in ((), (1,)) else classes


def _range(manifest: Manifest, data: Dataset) -> tuple[float, float]:
    """The model's own where it states one: what an attacker knows. DataError where it states none and the data lie
    beyond standardised ones: attacks would search in the wrong place, and all would seem well."""
    low, high = manifest.input.minimum, manifest.input.maximum
    if low is not None and high is not None and low < high:
        return low, high
    if max(map(abs, data.input_range)) > STANDARD_DEVIATIONS:
        raise DataError(
            f"{manifest.name} declares no input range, and {data.name} lies in {data.input_range[0]:g} to "
            f"{data.input_range[1]:g}, where attacks do not search",
            "export the model with --input-range, or say `standardise = true` in [data] if it takes such tables",
        )
    return data.input_range
