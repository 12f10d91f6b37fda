"""An engine's state as bytes: what the rule and the server optimizer remember, and which device has which place.

The nest's structure is not stored: it comes from the engine that loads, and every array must fit it in dtype and shape.
Both doors' states have the same arrays, so a state saved by one can be loaded by the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from covey_protocol.errors import StorageError


class _Array(msgspec.Struct, frozen=True, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class _Saved(msgspec.Struct, frozen=True):
    description: str
    places: list[str]
    arrays: list[_Array]


def pack_state(description: str, places: Sequence[str], nest: Any) -> bytes:
    """description: the settings the state belongs to. places: device ids in the order of their places."""
    import tensorflow as tf

    arrays = [_packed(np.asarray(leaf)) for leaf in tf.nest.flatten(nest)]
    return msgspec.msgpack.encode(_Saved(description, list(places), arrays))


def unpack_state(data: bytes, description: str, like: Any) -> tuple[list[str], Any] | None:
    """(places, nest with the structure and leaf types of `like`); None where the state is of other settings.

    Raises StorageError for bytes that are no saved state.
    """
    import tensorflow as tf

    try:
        saved = msgspec.msgpack.decode(data, type=_Saved)
    except msgspec.MsgspecError as exc:
        raise StorageError(f"a saved state cannot be read ({exc})", "delete it; the state then starts afresh") from exc
    if saved.description != description:
        return None
    leaves = tf.nest.flatten(like)
    if len(leaves) != len(saved.arrays):
        raise StorageError(f"a saved state has {len(saved.arrays)} arrays, the engine {len(leaves)}", "delete it")
    return saved.places, tf.nest.pack_sequence_as(like, [_unpacked(*pair) for pair in zip(saved.arrays, leaves)])


def _packed(array: Any) -> _Array:
    return _Array(array.dtype.str, array.shape, array.tobytes())


def _unpacked(saved: _Array, like: Any) -> Any:
    """The saved array as what `like` is: an array or number of NumPy, or a tensor."""
    import tensorflow as tf

    shape, dtype = tuple(np.shape(like)), np.asarray(like).dtype
    if saved.shape != shape or saved.dtype != dtype.str or len(saved.data) != dtype.itemsize * int(np.prod(shape)):
        raise StorageError(f"a saved state holds {saved.dtype}{saved.shape} instead of {dtype.str}{shape}", "delete it")
    array = np.frombuffer(saved.data, dtype).reshape(shape).copy()
    if tf.is_tensor(like):
        return tf.convert_to_tensor(array)
    return array if isinstance(like, np.ndarray) else array[()]
