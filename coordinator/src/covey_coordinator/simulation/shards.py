"""How devices' examples reach the simulated devices in a TFF worker.

On this machine they lie in files that the worker reads, one pair per device: sending them with every round would cost
more than training on them. Workers that do not see this machine's disk get them as arguments.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from covey_coordinator.simulation.learning import Array
from covey_protocol.errors import StorageError

Tensor = Any
Pair = tuple[Array, Array]


class Shards(ABC):
    """Sets of examples, numbered. All have x of (n, *shape) and y of (n, *label_shape) in the same dtypes."""

    def __init__(self, x: tf.TensorSpec, y: tf.TensorSpec) -> None:
        """x, y: of any number of examples."""
        self._x, self._y = x, y

    @property
    @abstractmethod
    def value_type(self) -> Any:
        """The TFF type of what stands for one set."""

    @abstractmethod
    def add(self, pair: Pair) -> int:
        """Keep a set; its number."""

    @abstractmethod
    def value(self, number: int) -> Any:
        """What stands for the set of this number, as an argument of a TFF computation."""

    @abstractmethod
    def read(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """In a graph: the examples that a value stands for."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held."""


class FileShards(Shards):
    """Sets as raw numbers in a folder of their own, which goes with `close`."""

    def __init__(self, x: tf.TensorSpec, y: tf.TensorSpec) -> None:
        super().__init__(x, y)
        self._folder = tempfile.TemporaryDirectory(prefix="covey-shards-")
        self._count = 0

    @property
    def value_type(self) -> Any:
        return tff.TensorType(np.int32)

    def add(self, pair: Pair) -> int:
        number, self._count = self._count, self._count + 1
        for kind, array, spec in zip("xy", pair, (self._x, self._y)):
            path = Path(self._folder.name) / f"{number}.{kind}"
            try:
                np.ascontiguousarray(array, spec.dtype.as_numpy_dtype).tofile(path)
            except OSError as exc:
                raise StorageError(
                    f"a device's examples cannot be written to {path} ({exc.strerror})",
                    "free space there, or set TMPDIR to a folder on another disk",
                ) from exc
        return number

    def value(self, number: int) -> Any:
        return np.int32(number)

    def read(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(value, "x", self._x), self._read(value, "y", self._y)

    def _read(self, number: Tensor, kind: str, spec: tf.TensorSpec) -> Tensor:
        path = tf.strings.join([f"{self._folder.name}/", tf.strings.as_string(number), f".{kind}"])
        numbers = tf.io.decode_raw(tf.io.read_file(path), spec.dtype)
        return tf.reshape(numbers, [-1, *spec.shape[1:]])

    def close(self) -> None:
        self._folder.cleanup()


class SentShards(Shards):
    """Sets that stay in this process and travel as arguments."""

    def __init__(self, x: tf.TensorSpec, y: tf.TensorSpec) -> None:
        super().__init__(x, y)
        self._pairs: list[Pair] = []

    @property
    def value_type(self) -> Any:
        types = [tff.TensorType(spec.dtype.as_numpy_dtype, spec.shape) for spec in (self._x, self._y)]
        return tff.types.to_type(OrderedDict(zip("xy", types)))

    def add(self, pair: Pair) -> int:
        self._pairs.append(pair)
        return len(self._pairs) - 1

    def value(self, number: int) -> Any:
        return OrderedDict(
            (kind, np.ascontiguousarray(array, spec.dtype.as_numpy_dtype))
            for kind, array, spec in zip("xy", self._pairs[number], (self._x, self._y))
        )

    def read(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value["x"], value["y"]

    def close(self) -> None:
        self._pairs.clear()
