"""What goes wrong with one device's data: wrong labels, noisy and stuck sensors, or an owner who lies.

Pure NumPy on arrays; randomness arrives as a seeded generator; the inputs are never changed in place. Attacks on
updates rather than on data are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from covey_protocol.errors import ConfigError

Array = np.ndarray[Any, Any]


def flip_labels(y: Array, num_classes: int) -> Array:
    """y -> C - 1 - y (Yin et al. 2018, arXiv:1803.01498, section 7). An odd C leaves the middle class as it is."""
    return (num_classes - 1 - y).astype(y.dtype)


def shift_labels(y: Array, num_classes: int) -> Array:
    """y -> (y + 1) mod C: every label is wrong, consistently."""
    return ((y + 1) % num_classes).astype(y.dtype)


def random_labels(y: Array, num_classes: int, random: np.random.Generator) -> Array:
    """Labels that say nothing: uniform over all classes, so one in C is right by chance."""
    return random.integers(0, num_classes, y.shape).astype(y.dtype)


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
class Setting:
    """What a corruption may need to know besides the examples. std and bias default to half the range and to 0."""

    num_classes: int
    input_range: tuple[float, float]
    std: Optional[float] = None
    bias: float = 0.0


Corruption = Callable[[Array, Array, Setting, np.random.Generator], "tuple[Array, Array]"]


def _noisy(x: Array, y: Array, setting: Setting, random: np.random.Generator) -> tuple[Array, Array]:
    low, high = setting.input_range
    std = (high - low) / 2 if setting.std is None else setting.std
    return sensor_noise(x, std, setting.bias, setting.input_range, random), y.copy()


CORRUPTIONS: dict[str, Corruption] = {
    "flip-labels": lambda x, y, setting, random: (x.copy(), flip_labels(y, setting.num_classes)),
    "shift-labels": lambda x, y, setting, random: (x.copy(), shift_labels(y, setting.num_classes)),
    "random-labels": lambda x, y, setting, random: (x.copy(), random_labels(y, setting.num_classes, random)),
    "sensor-noise": _noisy,
    "stuck-sensor": lambda x, y, setting, random: (stuck_sensor(x, random), y.copy()),
}


def corrupt(name: str, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> tuple[Array, Array]:
    """One device's (x, y) under a corruption chosen by name."""
    if name not in CORRUPTIONS:
        raise ConfigError(f"there is no corruption {name!r}", f"choose one of {', '.join(CORRUPTIONS)}")
    return CORRUPTIONS[name](x, y, setting, random)
