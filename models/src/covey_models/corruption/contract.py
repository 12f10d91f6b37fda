"""What a corruption is: a value that says what is done to the examples of one device."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Union

import numpy as np

from covey_models.names import no_such
from covey_protocol.errors import ConfigError

if TYPE_CHECKING:
    from covey_models.datasets import Dataset

Array = np.ndarray[Any, Any]
Examples = tuple[Array, Array]
OURS = "ours"


@dataclass(frozen=True)
class Setting:
    """What a corruption may need to know of the data set besides a device's examples.

    class_names and feature_names: empty where there are none; classes and attributes then go by number.
    """

    num_classes: int
    input_range: tuple[float, float]
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset) -> Setting:
        return cls(dataset.num_classes, dataset.input_range, dataset.class_names, dataset.feature_names)

    @property
    def span(self) -> float:
        return self.input_range[1] - self.input_range[0]

    def class_number(self, label: Union[int, str]) -> int:
        """Of a class's name or number."""
        if isinstance(label, str):
            return _place(label, self.class_names, "class")
        if not 0 <= label < self.num_classes:
            raise ConfigError(
                f"there is no class {label}", f"give a name, or a number from 0 to {self.num_classes - 1}"
            )
        return label

    def attribute_places(self, attributes: Sequence[Union[int, str]], size: int) -> Array:
        """Sorted places, in a flat example of `size` numbers, of attributes given by name or by number from 0."""
        places = [_place(a, self.feature_names, "attribute") if isinstance(a, str) else a for a in attributes]
        for place in places:
            if not 0 <= place < size:
                raise ConfigError(f"there is no attribute {place}", f"give a number from 0 to {size - 1}")
        return np.unique(np.asarray(places, np.int64))


def _place(name: str, names: Sequence[str], what: str) -> int:
    if not names:
        raise ConfigError(f"there is no {what} {name!r}: this data set has no names of them", "give its number from 0")
    if name not in names:
        raise no_such(what, name, names)
    return names.index(name)


class Corruption(abc.ABC):
    """Derived frozen dataclasses: their fields are the settings. A value says nothing of which devices it befalls."""

    reference: ClassVar[str] = OURS  # who described it first, or that it is ours
    default_share: ClassVar[float] = 1.0  # of a device's examples

    def check(self, setting: Setting, size: int) -> None:  # noqa: B027 - most need not look at the data set
        """Raises ConfigError where this data set, of `size` numbers in an example, has not what the settings name."""

    @abc.abstractmethod
    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        """New arrays; x (n, *shape) and y (n,) stay as they are. n >= 1; most keep n, subsets may have fewer."""


class OfAttributes(Corruption):
    """One that befalls the same attributes in all of a device's examples.

    attributes: names or numbers in a flat example; where there are none, `attribute_share` of all is drawn per device.
    Derived frozen dataclasses have both as fields.
    """

    attributes: tuple[Union[int, str], ...]
    attribute_share: float

    def check(self, setting: Setting, size: int) -> None:
        setting.attribute_places(self.attributes, size)

    def applied(self, x: Array, y: Array, setting: Setting, random: np.random.Generator) -> Examples:
        flat = x.reshape(len(x), -1).copy()
        places = setting.attribute_places(self.attributes, flat.shape[1])
        if not len(places):
            places = some_attributes(flat.shape[1], self.attribute_share, random)
        flat[:, places] = self.replaced(flat, places, setting, random)
        return flat.reshape(x.shape), y.copy()

    @abc.abstractmethod
    def replaced(self, flat: Array, places: Array, setting: Setting, random: np.random.Generator) -> Array:
        """What stands at these places instead, of the examples' (n, size) numbers: (n, places), or one row for all."""


def some_attributes(size: int, share: float, random: np.random.Generator) -> Array:
    """Sorted places of about this share of `size` attributes, at least one; a smaller share's are among a larger's."""
    return np.sort(random.permutation(size)[: max(1, round(share * size))])
