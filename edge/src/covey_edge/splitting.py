"""Which of a device's examples are held out: for evaluation rounds, and to judge a personal copy of a model.

A keyed hash of an example's inputs decides, so an example stays on its side however the data grow, are sorted or are
read anew, and copies of one example lie on one side. The label is not hashed: to correct it moves nothing. What the
source gives is hashed, before any normalisation; other columns or another size of images are other examples.

The key is this device's own (`split.key` in the state folder, mode 600), so nobody else can tell the sides apart, or
choose examples that all fall on one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from covey_edge.files import sync_folder, write_atomic
from covey_protocol.errors import DataError, StorageError

KEY_NAME = "split.key"
KEY_BYTES = 32
BLOCK_BYTES = 2**20  # of numbers that are converted at a time


def split_key(state_dir: Path, *, make: bool = True) -> bytes:
    """The device's key, made and durable at the first call. Two processes that make it at once get the same one.

    Without make one of zeros stands for a key that is not there yet: for a look that changes nothing.

    DataError where it is damaged: another key would hold out examples that models were trained on.
    """
    path = state_dir / KEY_NAME
    if not path.exists():
        if not make:
            return bytes(KEY_BYTES)
        _make_key(path)
    try:
        key = path.read_bytes()
    except OSError as exc:
        raise StorageError(f"{path} cannot be read ({exc.strerror})", "check its permissions") from exc
    if len(key) != KEY_BYTES:
        raise DataError(
            f"{path} is damaged: it is not known any more which examples are held out",
            "delete it to split anew; some examples that were trained on are then held out",
            told="this device does not know any more which of its examples are held out",
        )
    return key


def _make_key(path: Path) -> None:
    own = path.with_name(f".{KEY_NAME}.{os.getpid()}.tmp")
    write_atomic(own, os.urandom(KEY_BYTES), mode=0o600)
    try:
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(own, path)
        sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(f"cannot write {path} ({exc.strerror})", "free some space or check permissions") from exc
    finally:
        own.unlink()


def holdout_of(x: npt.NDArray[Any], holdout: float, key: bytes) -> npt.NDArray[np.bool_]:
    """(n,): which examples are held out. x: (n, ...), numbers as the source gives them. holdout: their share, 0 to 1.

    Of n different examples about n * holdout are, with a standard deviation of sqrt(n * holdout * (1 - holdout)). A
    larger share holds out more, and none less. Examples that are equal in float32 count as equal.
    """
    limit = int(holdout * 2**64)
    hashes = (hashlib.blake2b(row, key=key, digest_size=8).digest() for row in _rows(x))
    return np.fromiter((int.from_bytes(one, "little") < limit for one in hashes), np.bool_, count=len(x))


def _rows(x: npt.NDArray[Any]) -> Iterator[bytes]:
    """The bytes of each example: float32 little-endian, with one zero."""
    flat = x.reshape(len(x), -1)
    size = max(1, BLOCK_BYTES // max(1, 4 * flat.shape[1]))
    for start in range(0, len(flat), size):
        with np.errstate(over="ignore"):
            block = flat[start : start + size].astype("<f4") + np.float32(0)  # -0.0 becomes 0.0
        yield from (row.tobytes() for row in block)
