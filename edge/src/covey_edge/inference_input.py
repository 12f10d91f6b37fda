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

from covey_edge.config import DataSettings, TaskData
from covey_edge.source_options import CsvOptions, ImagesOptions
from covey_edge.strict import as_struct
from covey_protocol.bundle import Manifest
from covey_protocol.errors import DataError

STDIN = "-"
ENDINGS = "an .npz, .npy, .csv or .json file, or an image"
IMAGES = (b"\x89P", b"P2", b"P3", b"P5", b"P6", b"\xff\xd8")  # PNG, PGM and PPM, JPEG


def read_inputs(name: str, manifest: Manifest, data: DataSettings | TaskData) -> npt.NDArray[Any]:
    """(n, ...) of a file, by its content; flat rows get the model's shape. DataError names the file and the remedy.

    data: how this device reads what it trains on: a table is read by the options of a `csv` source, an image by those
    of `images`, so that the same columns and colours come out.
    """
    where = "standard input" if name == STDIN else name
    if data.source == "csv" and name.endswith(".csv"):
        x = _as_trained(Path(name), as_struct(data.options, CsvOptions, "[data.options]"))
    else:
        try:
            content = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
        except OSError as exc:
            remedy = f"give {ENDINGS}, or - for standard input"
            raise DataError(f"{where} cannot be read ({exc.strerror})", remedy) from exc
        x = _image(content, where, manifest, data) if content[:2] in IMAGES else _array(content, where)
    shape = tuple(manifest.input.shape)
    if x.ndim == 2 and len(shape) != 1 and x.shape[1] == math.prod(shape):
        return x.reshape(-1, *shape)
    return x[np.newaxis] if x.shape == shape else x


def _as_trained(path: Path, options: CsvOptions) -> npt.NDArray[Any]:
    """The inputs of a table, with or without the columns of labels."""
    from covey_edge.csv_source import column_names, read_csv

    if not options.columns:
        names = tuple(name for name in column_names(path, options) if name not in options.labels)
        options = msgspec.structs.replace(options, columns=names)
    codes = {name: codes for name, codes in options.codes.items() if name in options.columns}
    table = read_csv(path, msgspec.structs.replace(options, label=(), codes=codes))
    if table.left_out:  # answers must stand beside their rows
        worst = table.left_out[0]
        raise DataError(f"{path}: {worst.what} in {worst.count} rows, first in line {worst.first[0]}", "mend them")
    return table.x


def _image(content: bytes, where: str, manifest: Manifest, data: DataSettings | TaskData) -> npt.NDArray[Any]:
    """One picture, (1, height, width, channels), as [data] reads them; else in the model's size and channels."""
    from covey_edge.image_decoding import decoded, grey, resized, rgb

    shape = tuple(manifest.input.shape)
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise DataError(f"{where} is an image, and the model takes examples of shape {shape}", f"give {ENDINGS}")
    try:
        pixels = decoded(content)
    except DataError as exc:
        raise DataError(f"{where}: {exc.what}", exc.remedy) from exc
    pixels = resized(grey(pixels) if shape[2] == 1 else rgb(pixels), shape[0], shape[1])
    of_images = as_struct(data.options, ImagesOptions, "[data.options]") if data.source == "images" else None
    whole = of_images.values == "bytes" if of_images is not None else manifest.input.dtype != "float32"
    return np.rint(pixels * 255)[np.newaxis] if whole else pixels[np.newaxis]


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
