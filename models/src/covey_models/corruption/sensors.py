"""Noisy, stuck and drifting sensors; values stay within the range of the data set, as a real converter's do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np

from covey_models.corruption.contract import Array, Corruption, Examples, OfAttributes, Setting
from covey_models.tables import require_share
from covey_protocol.errors import ConfigError


def sensor_noise(
    x: Array, std: float, bias: float, input_range: tuple[float, float], random: np.random.Generator
) -> Array:
    """Gaussian noise and an offset, in the units of x, cut off at the range as a real converter does."""
    if std < 0:
        raise ConfigError(f"the noise's standard deviation is {std}", "give 0 or more")
    noisy = x + bias + std * random.standard_normal(x.shape)
    return noisy.clip(*input_range).astype(x.dtype)


def stuck_sensor(x: Array, random: np.random.Generator) -> Array:
    """A frozen frame: every example is the same one, drawn from x; labels stay as they were."""
    if len(x) == 0:
        return x.copy()
    return np.repeat(x[random.integers(len(x))][None], len(x), axis=0)


@dataclass(frozen=True)
class SensorNoise(Corruption):
    """Gaussian noise and an offset. std, bias: in the units of the data; std is half the range where it is None."""

    std: Optional[float] = None
    bias: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise ConfigError(f"sensor-noise: bias = {self.bias}", "give a finite number")
        if self.std is not None and not (self.std >= 0 and math.isfinite(self.std)):
            raise ConfigError(f"sensor-noise: std = {self.std}", "give 0 or more")

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        std = setting.span / 2 if self.std is None else self.std
        return sensor_noise(x, std, self.bias, setting.input_range, random), y.copy()


@dataclass(frozen=True)
class StuckSensor(Corruption):
    """A frozen frame: all examples are one of the device's own; labels stay."""

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        return stuck_sensor(x, random), y.copy()


@dataclass(frozen=True)
class StuckAttributes(OfAttributes):
    """Single attributes (pixels) stuck at what one random example of the device has there.

    attributes: names or numbers in a flat example; where there are none, `attribute_share` of all is drawn per device.
    """

    attributes: tuple[Union[int, str], ...] = ()
    attribute_share: float = 0.2

    def __post_init__(self) -> None:
        require_share("stuck-attributes: attribute_share", self.attribute_share, above_zero=True)

    def replaced(self, flat: Array, places: Array, setting: Setting, random: np.random.Generator) -> Array:
        return np.asarray(flat[random.integers(len(flat)), places])


@dataclass(frozen=True)
class DriftingSensor(Corruption):
    """An offset that grows evenly over the device's examples in their order, up to `bias` at the last.

    bias: in the units of the data; half the range where it is None.
    """

    bias: Optional[float] = None

    def __post_init__(self) -> None:
        if self.bias is not None and not math.isfinite(self.bias):
            raise ConfigError(f"drifting-sensor: bias = {self.bias}", "give a finite number")

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        bias = setting.span / 2 if self.bias is None else self.bias
        offsets = bias * np.arange(1, len(x) + 1) / len(x)
        drifted = x + offsets.reshape(-1, *([1] * (x.ndim - 1)))
        return drifted.clip(*setting.input_range).astype(x.dtype), y.copy()
