"""The trusted data of a simulation: drawn from the training data before they are divided, or a file of the user's.

No device has an example that is trusted. What is drawn follows from the seed, and a smaller set is part of a larger.
No TensorFlow here.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
from msgspec import Meta, Struct

from covey_coordinator.records import Array
from covey_models import datasets
from covey_models.datasets import Dataset
from covey_protocol.errors import ConfigError

DRAWN = 5  # stream of random numbers of a seed; see `grid.simulation` and `covey_models.population` for the others


class TrustedSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """size: so many examples of the training data; 0 for none. path: a file or folder of the user's own instead.

    bias: so large a share of them is of one class that the seed draws, the rest of the others (as the root data of
    Cao et al. 2021, arXiv:2012.13995, section VI-A); 0 draws without a look at classes.
    """

    size: Annotated[int, Meta(ge=0)] = 0
    bias: Annotated[float, Meta(ge=0, le=1)] = 0.0
    path: str = ""

    @property
    def is_there(self) -> bool:
        return bool(self.size or self.path)


class Parted(NamedTuple):
    """trusted: None where none is asked for. left: of the training data."""

    trusted: Dataset | None
    left: Dataset


def check_trusted(settings: TrustedSettings) -> None:
    """ConfigError for settings that do not go together."""
    if settings.size and settings.path:
        raise ConfigError("[trusted] has both a size and a path", "leave one of them out")
    if settings.bias and not settings.size:
        raise ConfigError("[trusted] has a bias and no size", "say how many examples are to be drawn")


def parted(train: Dataset, settings: TrustedSettings, seed: int, data_dir: str | None = None) -> Parted:
    """Raises ConfigError where there are not enough examples, or a file holds other classes or another shape."""
    if settings.path:
        return Parted(_of_file(train, settings.path, data_dir), train)
    if not settings.size:
        return Parted(None, train)
    rows = drawn_rows(train.y, settings.size, settings.bias, seed)
    return Parted(train.take(rows), train.take(np.setdiff1d(np.arange(len(train)), rows)))


def drawn_rows(y: Array, size: int, bias: float, seed: int) -> Array:
    """(size,) places of examples of these labels (n,), sorted."""
    random = np.random.default_rng([seed, DRAWN])
    biased_class = random.choice(np.unique(y))
    order = random.permutation(len(y))
    if bias == 0.0:
        chosen = order[:size]
    else:
        of_class, of_others = order[y[order] == biased_class], order[y[order] != biased_class]
        most = round(bias * size)
        chosen = np.concatenate([of_class[:most], of_others[: size - most]])
    if len(chosen) < size or size >= len(y):
        raise ConfigError(
            f"trusted.size = {size}{f' with trusted.bias = {bias:g}' if bias else ''}: the training data have"
            f" {len(y)} examples, {np.count_nonzero(y == biased_class)} of the class that was drawn",
            "lower trusted.size",
        )
    return np.sort(chosen)


def _of_file(train: Dataset, path: str, data_dir: str | None) -> Dataset:
    found = datasets.load(path, data_dir)
    for what, own, asked in (
        ("examples of shape", found.input_shape, train.input_shape),
        ("classes", found.class_names, train.class_names),
    ):
        if own != asked:
            raise ConfigError(f"trusted.path = {path!r} has {what} {own}, the data have {asked}", "give one that fits")
    return found
