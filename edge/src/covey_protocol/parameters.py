"""The parameters of a model on the wire: an ordered list of named tensors and one flat float32 vector.

This file does not know TensorFlow or TFLite; it only fixes the order, shapes and the flat form that
`get_parameters` and `set_parameters` of a training bundle use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from covey_protocol.errors import BundleError

MAX_UPDATE_NORM = 1e18  # squares must stay finite in float32 (below 1.8e19): adaptive optimizers keep them for ever


class ParameterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a model.

    name: unique in its bundle, Keras' path (``conv2d/kernel``). shape: static. trainable: False for state that is
    averaged but not trained (BatchNorm's moving statistics).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    trainable: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def total_size(specs: Sequence[ParameterSpec]) -> int:
    """d: how many float32 numbers the flat vector of these parameters holds."""
    return sum(spec.size for spec in specs)


def offsets(specs: Sequence[ParameterSpec]) -> dict[str, slice]:
    """Where each named tensor lies in the flat vector."""
    places: dict[str, slice] = {}
    start = 0
    for spec in specs:
        if spec.name in places:
            raise BundleError(f"parameter {spec.name!r} occurs twice", "export the model again")
        places[spec.name] = slice(start, start + spec.size)
        start += spec.size
    return places
