"""The data source `images`: a folder of pictures, one folder for each class in it or a table of labels beside them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt

from covey_edge.data_report import Tally
from covey_edge.image_decoding import Pixels, decoded, grey, resized, rgb
from covey_edge.source_options import ImagesOptions
from covey_edge.table_rows import NO_CODE, Table
from covey_protocol.errors import DATA, DataError

ENDINGS = (".png", ".pgm", ".ppm", ".pnm", ".jpg", ".jpeg")


class _File(NamedTuple):
    name: str  # in the folder
    label: Optional[float]  # None where it is none


def read_images(folder: Path, options: ImagesOptions) -> Table:
    """x (n, height, width, 1 or 3) in the order of the files' names. Pictures that cannot be read are left out."""
    if not folder.is_dir():
        raise DataError.at(folder, " is no folder", "check data.path in agent.toml")
    try:
        files = list(_labelled(folder, options) if options.labels else _in_folders(folder, options))
    except OSError as exc:
        raise DataError.at(folder, f" cannot be listed ({exc.strerror})", "check its permissions") from exc
    if not files:
        remedy = "put them into one folder for each class"
        raise DataError.at(folder, f" holds no images ({', '.join(ENDINGS)})", remedy)
    return _read(folder, files, options)


def _read(folder: Path, files: list[_File], options: ImagesOptions) -> Table:
    tally, labels, places = Tally(), list[float](), list[str]()
    x: Optional[npt.NDArray[Any]] = None
    for file in files:
        if file.label is None:
            tally.add(NO_CODE, file.name, "label")
            continue
        pixels = _pixels(folder / file.name, options, tally, file.name)
        if pixels is None:
            continue
        if x is None:
            x = np.empty((len(files), *pixels.shape), np.float32 if options.values == "unit" else np.uint8)
        if pixels.shape != x.shape[1:]:
            tally.add(f"not {x.shape[1]} x {x.shape[2]} pixels as the first (set options.size)", file.name)
            continue
        x[len(labels)] = pixels if options.values == "unit" else np.rint(pixels * 255)
        labels.append(file.label)
        places.append(file.name)
    images = x[: len(labels)] if x is not None else np.zeros((0, 1))
    return Table(images, np.array(labels), (), places, tally.left_out)


def _pixels(path: Path, options: ImagesOptions, tally: Tally, name: str) -> Optional[Pixels]:
    try:
        pixels = decoded(path.read_bytes())
    except OSError as exc:
        tally.add(f"cannot be read ({exc.strerror})", name)
        return None
    except DataError as exc:
        tally.add(exc.what, name)
        return None
    pixels = grey(pixels) if options.colour == "grey" else rgb(pixels)
    return resized(pixels, *options.size) if options.size else pixels


def _in_folders(folder: Path, options: ImagesOptions) -> Iterator[_File]:
    found = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    codes = _codes(folder, found, options)
    for name in found:
        for file in sorted(os.listdir(folder / name)):
            if file.lower().endswith(ENDINGS):
                yield _File(f"{name}/{file}", codes[name])


def _codes(folder: Path, found: list[str], options: ImagesOptions) -> dict[str, float]:
    """Numbers of the folders. Never their order here: a device that lacks a class would number all others otherwise."""
    if not options.classes:
        if not all(name.isdecimal() for name in found):
            raise DataError.at(
                folder,
                " has folders that are no numbers, and options.classes does not say which classes they are",
                "name all classes of the model there, in its order, the same on every device",
            )
        return {name: float(name) for name in found}
    unknown = [name for name in found if name not in options.classes]
    if unknown:
        what = "that is none of options.classes"
        told = f"{DATA} has a folder {what}"
        raise DataError(f"{folder} has a folder {unknown[0]!r} {what}", "add or move it", told=told)
    return {name: float(place) for place, name in enumerate(options.classes)}


def _labelled(folder: Path, options: ImagesOptions) -> Iterator[_File]:
    """From a table of two columns, `file` and `label`."""
    table, codes = folder / options.labels, {name: float(place) for place, name in enumerate(options.classes)}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise DataError.at(table, " lacks the columns file and label", "name them in its first line")
            for row in reader:
                yield _File(str(row["file"]), _label(row["label"], codes))
    except (OSError, UnicodeError, csv.Error) as exc:
        told = f"{DATA} has no readable table of labels"
        raise DataError(f"{table} is no readable table ({exc})", "check options.labels", told=told) from exc


def _label(text: Optional[str], codes: dict[str, float]) -> Optional[float]:
    text = (text or "").strip()
    if codes:
        return codes.get(text)
    try:
        return float(text)
    except ValueError:
        return None


def images_state(folder: Path, options: ImagesOptions) -> tuple[object, ...]:
    """Changes with every file that comes, goes or is replaced."""
    latest, count = 0, 0
    for place, _, files in os.walk(folder):
        latest = max(latest, os.stat(place).st_mtime_ns)
        for name in files:
            latest, count = max(latest, os.stat(os.path.join(place, name)).st_mtime_ns), count + 1
    return latest, count
