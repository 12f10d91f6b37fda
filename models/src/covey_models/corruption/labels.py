"""Wrong labels: an owner who lies, an annotator who does not look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import numpy as np

from covey_models.corruption.contract import Array, Corruption, Examples, Setting
from covey_models.tables import require_share
from covey_protocol.errors import ConfigError


def flip_labels(y: Array, num_classes: int) -> Array:
    """y -> C - 1 - y (Yin et al. 2018, arXiv:1803.01498, section 7). An odd C leaves the middle class as it is."""
    return (num_classes - 1 - y).astype(y.dtype)


def shift_labels(y: Array, num_classes: int) -> Array:
    """y -> (y + 1) mod C: every label is wrong, consistently."""
    return ((y + 1) % num_classes).astype(y.dtype)


def random_labels(y: Array, num_classes: int, random: np.random.Generator) -> Array:
    """Labels that say nothing: uniform over all classes, so one in C is right by chance."""
    return random.integers(0, num_classes, y.shape).astype(y.dtype)


@dataclass(frozen=True)
class FlipLabels(Corruption):
    """Labels l -> C - 1 - l."""

    reference = "Yin et al. 2018 (arXiv:1803.01498), section 7"

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        return x.copy(), flip_labels(y, setting.num_classes)


@dataclass(frozen=True)
class ShiftLabels(Corruption):
    """Labels l -> l + 1 mod C."""

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        return x.copy(), shift_labels(y, setting.num_classes)


@dataclass(frozen=True)
class RandomLabels(Corruption):
    """Labels uniform over all classes: symmetric label noise."""

    reference = "Zhang et al. 2017 (arXiv:1611.03530), random labels"

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        return x.copy(), random_labels(y, setting.num_classes, random)


@dataclass(frozen=True)
class TargetedFlip(Corruption):
    """Each example of class `source` gets the label `target` with this probability; the other classes stay.

    A device without examples of that class stays as it is.
    """

    source: Union[int, str]
    target: Union[int, str]
    probability: float = 1.0
    reference = "Tolpegin et al. 2020 (arXiv:2007.08432), section 3"

    def __post_init__(self) -> None:
        require_share("targeted-flip: probability", self.probability)

    def check(self, setting: Setting, size: int) -> None:
        if setting.class_number(self.source) == setting.class_number(self.target):
            raise ConfigError(f"targeted-flip turns class {self.source!r} into itself", "name two classes")

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        chosen = (y == setting.class_number(self.source)) & (random.random(y.shape) < self.probability)
        return x.copy(), np.where(chosen, setting.class_number(self.target), y).astype(y.dtype)
