"""Attributes that are missing: lost per example, broken on a device, or hidden by its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

import numpy as np

from covey_models.corruption.contract import Array, Corruption, Examples, OfAttributes, Setting
from covey_models.tables import require_share

Fill = Literal["mean", "zero", "low"]


def filling(x: Array, fill: Fill, input_range: tuple[float, float]) -> Array:
    """(m,) values for what is missing in x (n, m): the device's own means, 0 (or the range's nearest), or its low."""
    if fill == "mean":
        return np.asarray(x.mean(0, dtype=np.float64).clip(*input_range))
    value = input_range[0] if fill == "low" else min(max(0.0, input_range[0]), input_range[1])
    return np.full(x.shape[1], value)


@dataclass(frozen=True)
class MissingAttributes(Corruption):
    """Every attribute of every example is missing with this probability, independently (missing completely at random).

    fill: "mean" (of the device's own examples, before the loss), "zero", or "low" (the least value of the range).
    """

    probability: float = 0.3
    fill: Fill = "mean"
    reference = "Rubin 1976 (Biometrika 63:581), missing completely at random"

    def __post_init__(self) -> None:
        require_share("missing-attributes: probability", self.probability)

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        flat = x.reshape(len(x), -1)
        missing = random.random(flat.shape) < self.probability
        filled = np.where(missing, filling(flat, self.fill, setting.input_range), flat)
        return filled.astype(x.dtype).reshape(x.shape), y.copy()


@dataclass(frozen=True)
class HiddenAttributes(OfAttributes):
    """The same attributes are missing in all of a device's examples.

    attributes: names or numbers in a flat example, chosen by the owner to hide; where there are none,
    `attribute_share` of all is drawn per device. fill: as for missing-attributes.
    """

    attributes: tuple[Union[int, str], ...] = ()
    attribute_share: float = 0.2
    fill: Fill = "mean"

    def __post_init__(self) -> None:
        require_share("hidden-attributes: attribute_share", self.attribute_share, above_zero=True)

    def replaced(self, flat: Array, places: Array, setting: Setting, random: np.random.Generator) -> Array:
        return filling(flat[:, places], self.fill, setting.input_range)
