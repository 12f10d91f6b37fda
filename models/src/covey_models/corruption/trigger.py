"""A trigger: a pattern in the input that is to mean one class. The one definition, also of the backdoor attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import numpy as np

from covey_models.corruption.contract import Array, Corruption, Examples, Setting
from covey_protocol.errors import ConfigError


def triggered(x: Array, patch: int, input_range: tuple[float, float]) -> Array:
    """The examples with the trigger: the range's largest value in a square of so many pixels in the lower right corner
    ((n, height, width, channels) or (n, height, width)), or in the last so many features ((n, features)).
    """
    x = x.copy()
    if x.ndim >= 3:
        x[:, -patch:, -patch:] = input_range[1]
    else:
        x[:, -patch:] = input_range[1]
    return x


@dataclass(frozen=True)
class Trigger(Corruption):
    """Examples get the trigger and the label `target`: half of a device's, unless `share` says another part.

    patch: see `triggered`.
    """

    target: Union[int, str] = 0
    patch: int = 2
    reference = "Gu et al. 2017 (arXiv:1708.06733), pixel pattern"
    default_share = 0.5

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise ConfigError(f"trigger: patch = {self.patch}", "give 1 or more")

    def check(self, setting: Setting, size: int) -> None:
        setting.class_number(self.target)

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        return triggered(x, self.patch, setting.input_range), np.full_like(y, setting.class_number(self.target))
