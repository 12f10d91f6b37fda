"""Examples for `covey infer`, from a file or standard input. What they hold is checked by `inference`."""

from __future__ import annotations

import csv
import io
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from covey_protocol.bundle import Manifest
from covey_protocol.errors import DataError

STDIN = "-"
ENDINGS = "an .npz, .npy, .csv or .json file"


def read_inputs(name: str, manifest: Manifest) -> npt.NDArray[Any]:
    """(n, ...) of a file, by its content; flat rows get the model's shape. DataError names the file and the remedy."""
    where = "standard input" if name == STDIN else name
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except OSError as exc:
        raise DataError(f"{where} cannot be read ({exc.strerror})", f"give {ENDINGS}, or - for standard input") from exc
    x = _array(data, where)
    shape = tuple(manifest.input.shape)
    if x.ndim == 2 and len(shape) != 1 and x.shape[1] == math.prod(shape):
        return x.reshape(-1, *shape)
    return x[np.newaxis] if x.shape == shape else x


def _array(data: bytes, where: str) -> npt.NDArray[Any]:
    try:
        if data.startswith(b"PK"):
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                if "x" not in archive:
                    raise DataError(f"{where} has no array x", "save it with numpy.savez(path, x=...)")
                found: npt.NDArray[Any] = archive["x"]
                return found
        if data.startswith(b"\x93NUMPY"):
            return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
        text = data.decode()
        if text.lstrip().startswith("["):
            return np.asarray(msgspec.json.decode(data))
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, msgspec.DecodeError) as exc:
        raise DataError(f"{where} cannot be read ({str(exc)[:100]})", f"give {ENDINGS}") from exc
    return _table(text, where)


def _table(text: str, where: str) -> npt.NDArray[Any]:
    """Numbers with commas between them, one example in a row; a first row without any number is a heading."""
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if rows and not any(_is_number(cell) for cell in rows[0]):
        rows = rows[1:]
    if not rows:
        raise DataError(f"{where} holds no examples", "one row of numbers for each example")
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]) or not all(_is_number(cell) for cell in row):
            raise DataError(
                f"{where}: row {number} holds {','.join(row)[:60]!r}, not {len(rows[0])} numbers",
                "one row of numbers for each example, without labels",
            )
    return np.array(rows, dtype=np.float64)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
