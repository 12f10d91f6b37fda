"""Images as data sets: a folder with one sub-folder per class, or a table of path, label and user.

PNG, JPEG, PGM and PPM, read with Pillow, which comes with covey-coordinator (through matplotlib). All images are held
in memory, four bytes per pixel and channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from covey_models.csv_tables import PATH_NAME, Table, classes, filled, label_column, read_table, user_column
from covey_models.datasets import LARGEST_PIXEL, Dataset, Reading, require_classes
from covey_protocol.errors import ConfigError, DataError, MachineError

Array = np.ndarray[Any, Any]

SUFFIXES = (".png", ".jpg", ".jpeg", ".pgm", ".ppm")
FORMATS = ("PNG", "JPEG", "PPM")  # Pillow's names; PGM is of its PPM; others are not even tried
LIST_NAME = "labels.csv"
GREY_MODES = ("1", "L", "LA")


def load_folder(folder: Path, how: Reading = Reading()) -> Dataset:  # noqa: B008 - a frozen value
    """Images in one sub-folder per class, in the order of the sorted names; or those that its labels.csv lists.

    The sub-folders' names are the classes. All images have one size, or are brought to `how.size` (bilinear, which
    stretches). Grey where all are, else red, green and blue; [0, 1]. Hidden files are left out, others refused.
    """
    if (folder / LIST_NAME).exists():
        return load_listed(read_table(folder / LIST_NAME), how)
    how.only(str(folder), "size")
    class_folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not class_folders:
        raise DataError(f"{folder} has no sub-folders", f"make one per class, or a file {LIST_NAME} of path, label")
    paths, y = [], []
    for number, class_folder in enumerate(class_folders):
        found = sorted(entry for entry in class_folder.iterdir() if not entry.name.startswith("."))
        if not found:
            raise DataError(f"{class_folder} is empty", "put the images of this class there, or remove it")
        paths += found
        y += [number] * len(found)
    labels = np.array(y, np.int32)
    require_classes(folder, labels)
    names = tuple(entry.name for entry in class_folders)
    return Dataset(folder.name, read_images(paths, how.size), labels, names, (), (0.0, 1.0))


def load_listed(table: Table, how: Reading) -> Dataset:
    """Images that a table lists: path (from the table's folder), label, and user where there is such a column.

    The label is found as in `csv_tables.load_csv`.
    """
    how.only(str(table.path), "label", "users", "size")
    label, users = label_column(table, how), user_column(table, how)
    if label == PATH_NAME:
        raise DataError(f"{table.path} has no column for the class", "name one label")
    y, names = classes(table, label)
    x = read_images([table.path.parent / cell for cell in filled(table, PATH_NAME)], how.size)
    owners = None if users is None else np.array(table.columns[users])
    name = table.path.parent.resolve().name if table.path.name == LIST_NAME else table.path.stem
    return Dataset(name, x, y, names, (), (0.0, 1.0), owners)


def read_images(paths: Sequence[Path], size: Optional[tuple[int, int]] = None) -> Array:
    """(n, height, width, 1 or 3) float32 in [0, 1]. size: (height, width)."""
    if size is not None and min(size) < 1:
        raise ConfigError(f"size = {size}", "give a height and a width of at least 1")
    images = [_pixels(path, size) for path in paths]
    for path, image in zip(paths, images):
        if image.shape[:2] != images[0].shape[:2]:
            raise DataError(
                f"{path} is {image.shape[1]} x {image.shape[0]} pixels, {paths[0]} is {images[0].shape[1]} x "
                f"{images[0].shape[0]}",
                "bring them to one size, or say it: size = [height, width]",
            )
    channels = max(image.shape[2] for image in images)
    x = np.empty((len(images), *images[0].shape[:2], channels), np.float32)
    for place, image in enumerate(images):
        np.divide(image, LARGEST_PIXEL, out=x[place])  # a grey one among coloured ones is broadcast
    return x


def _pixels(path: Path, size: Optional[tuple[int, int]]) -> Array:
    """(height, width, 1 or 3) uint8. A transparent part loses its transparency, 16 bits become 8."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is no image by its name", f"give {', '.join(SUFFIXES)}")
    pillow = _pillow()
    try:
        with pillow.open(path, formats=FORMATS) as image:
            image.load()
            if image.mode.startswith("I"):
                image = pillow.fromarray((np.asarray(image, np.int64) >> 8).astype(np.uint8))
            flat = image.convert("L" if image.mode in GREY_MODES else "RGB")
            if size is not None and flat.size != (size[1], size[0]):
                flat = flat.resize((size[1], size[0]), pillow.Resampling.BILINEAR)
            pixels = np.asarray(flat, np.uint8)
    except FileNotFoundError as exc:
        raise DataError(f"there is no file {path}", "check the path") from exc
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as exc:
        raise DataError(f"{path} cannot be read as an image ({exc})", "replace or remove it") from exc
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as exc:
        raise MachineError("Pillow is not installed, which reads images", "pip install pillow") from exc
    return Image
