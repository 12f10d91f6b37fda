"""Devices whose examples are no fair sample: copies of a few, or only those that somebody selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

import numpy as np

from covey_models.corruption.contract import Array, Corruption, Examples, Setting
from covey_models.tables import require_share
from covey_protocol.errors import ConfigError


@dataclass(frozen=True)
class Duplicates(Corruption):
    """As many examples as before, but copies of a random `kept` share of them (at least one)."""

    kept: float = 0.1

    def __post_init__(self) -> None:
        require_share("duplicates: kept", self.kept, above_zero=True)

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        kept = random.permutation(len(y))[: max(1, round(self.kept * len(y)))]
        places = np.resize(kept, len(y))
        return x[places], y[places]


@dataclass(frozen=True)
class SelectedClasses(Corruption):
    """Only the examples of these classes (names or numbers). A device that has none of them stays as it is."""

    classes: tuple[Union[int, str], ...]

    def __post_init__(self) -> None:
        if not self.classes:
            raise ConfigError("selected-classes: classes is empty", "name at least one class")

    def check(self, setting: Setting, size: int) -> None:
        for label in self.classes:
            setting.class_number(label)

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        places = np.flatnonzero(np.isin(y, [setting.class_number(label) for label in self.classes]))
        return (x[places], y[places]) if len(places) else (x.copy(), y.copy())


@dataclass(frozen=True)
class SelectedRange(Corruption):
    """Only the `kept` share (at least one) of the examples with the largest or smallest value of one attribute.

    attribute: a name or a number in a flat example. Of equal values the earlier examples stay.
    """

    attribute: Union[int, str]
    side: Literal["largest", "smallest"] = "largest"
    kept: float = 0.5

    def __post_init__(self) -> None:
        require_share("selected-range: kept", self.kept, above_zero=True)

    def check(self, setting: Setting, size: int) -> None:
        setting.attribute_places([self.attribute], size)

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        flat = x.reshape(len(x), -1)
        values = flat[:, setting.attribute_places([self.attribute], flat.shape[1])[0]]
        order = np.argsort(-values if self.side == "largest" else values, kind="stable")
        places = np.sort(order[: max(1, round(self.kept * len(y)))])
        return x[places], y[places]
