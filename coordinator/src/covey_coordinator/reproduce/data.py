"""The data of published experiments, from a folder of the user's: nothing is downloaded.

mnist.npz: the Keras layout (x_train, y_train, x_test, y_test; 28x28 uint8). spambase.csv: UCI Spambase, a line of
names, 57 features and the class (0 or 1) in the last column. abalone.csv (UCI) and cpusmall.csv (Delve): a line of
names, 8 or 12 features and the target in the last column. att_faces.npz: the faces of AT&T Laboratories Cambridge,
which ask to be credited.
"""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from covey_models.csv_tables import load_csv, read_table
from covey_models.datasets import DATA_VARIABLE, Dataset, load_npz_parts, split
from covey_protocol.errors import DataError

Floats = npt.NDArray[np.float64]

WHAT = {
    "att_faces.npz": "AT&T's (ORL's) faces: images (400, 112, 92) uint8, subject (400,), ten of each of 40 people",
    "mnist.npz": "MNIST as Keras has it (x_train, y_train, x_test, y_test)",
    "spambase.csv": "UCI Spambase: a line of names, then 57 features and the class in each line",
    "abalone.csv": "UCI Abalone: a line of names, then sex (M, F or I), 7 numbers and the rings in each line",
    "cpusmall.csv": "Delve's CPU activity, small: a line of names, then 12 features and usr in each line",
}
SPAMBASE_FEATURES = 57
SPAMBASE_TEST = 0.25
FACE, FACES_TO_TRAIN = (112, 92), 7
REGRESSION_FEATURES = {"abalone.csv": 8, "cpusmall.csv": 12}
SEXES = {"M": 1.0, "F": 2.0, "I": 3.0}  # as LIBSVM's copy of the table has them


def located(folder: Path | None, name: str) -> Path:
    """The file of this name. DataError says what it should hold and where to put it."""
    remedy = f"put {name} ({WHAT[name]}) into a folder and name it with --data DIR or {DATA_VARIABLE}"
    if folder is None:
        raise DataError(f"this needs {name}, and no data folder is given", remedy)
    path = folder / name
    if not path.is_file():
        raise DataError(f"there is no {path}", remedy)
    return path


def mnist(folder: Path | None) -> tuple[Dataset, Dataset]:
    """(train of 60,000, test of 10,000), pixels in [0, 1], (n, 28, 28, 1), in the order of the file."""
    path = located(folder, "mnist.npz")
    train, test = load_npz_parts(path)
    if test is None:
        raise DataError(f"{path} holds no x_test and y_test", f"put {WHAT['mnist.npz']} there")
    return train, test


def spambase(folder: Path | None, seed: int) -> tuple[Dataset, Dataset]:
    """(train, test) of the seed's split, three quarters and one. Features are log(1 + x), then standardised."""
    path = located(folder, "spambase.csv")
    table = load_csv(path)
    if table.input_shape != (SPAMBASE_FEATURES,) or table.num_classes != 2 or table.x.min() < 0:
        raise DataError(
            f"{path} holds {table.num_classes} classes and {table.input_shape} features",
            f"put {WHAT['spambase.csv']} there",
        )
    x = np.log1p(table.x.astype(np.float64))
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    bounds = (float(x.min()), float(x.max()))
    return split(dataclasses.replace(table, x=x, input_range=bounds), SPAMBASE_TEST, seed)


def faces(folder: Path | None, seed: int) -> tuple[Dataset, Dataset]:
    """(train, test): 7 and 3 pictures of each of 40 people, drawn by the seed; (n, 112, 92) in [0, 1]."""
    path = located(folder, "att_faces.npz")
    try:
        with np.load(path) as file:
            images, subject = file["images"], file["subject"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise DataError(f"{path} cannot be read ({exc})", f"put {WHAT['att_faces.npz']} there") from exc
    people = np.unique(subject)
    if images.shape != (len(subject), *FACE) or images.dtype != np.uint8 or len(subject) != 10 * len(people):
        raise DataError(f"{path} holds images of shape {images.shape}", f"put {WHAT['att_faces.npz']} there")
    y = np.searchsorted(people, subject).astype(np.int32)
    names = tuple(f"person {number + 1}" for number in range(len(people)))
    whole = Dataset("faces", (images / 255).astype(np.float32), y, names, (), (0.0, 1.0))
    random = np.random.default_rng(seed)
    orders = [random.permutation(np.flatnonzero(y == person)) for person in range(len(people))]
    return (
        whole.take(np.concatenate([order[:FACES_TO_TRAIN] for order in orders])),
        whole.take(np.concatenate([order[FACES_TO_TRAIN:] for order in orders])),
    )


@functools.lru_cache(maxsize=4)
def regression_table(folder: Path | None, name: str) -> tuple[Floats, Floats]:
    """(x (n, d), y (n,)) of abalone.csv or cpusmall.csv, as they stand in the file."""
    path = located(folder, name)
    columns = list(read_table(path).columns.values())
    try:
        cells = [[float(SEXES.get(cell, cell)) for cell in column] for column in columns]
    except ValueError as exc:
        raise DataError(f"{path} holds what is no number ({exc})", f"put {WHAT[name]} there") from exc
    if len(cells) != REGRESSION_FEATURES[name] + 1:
        raise DataError(f"{path} has {len(cells)} columns", f"put {WHAT[name]} there")
    table = np.asarray(cells, np.float64).T
    return table[:, :-1], table[:, -1]
