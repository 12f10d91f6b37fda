"""The data of published experiments, from a folder of the user's: nothing is downloaded.

mnist.npz: the Keras layout (x_train, y_train, x_test, y_test; 28x28 uint8). spambase.csv: UCI Spambase, 57 features and
the class (0 or 1) in the last column, a line of names first or not.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from covey_models.datasets import Dataset, load_npz, split
from covey_protocol.errors import DataError

VARIABLE = "COVEY_DATA"
WHAT = {
    "mnist.npz": "MNIST as Keras has it (x_train, y_train, x_test, y_test)",
    "spambase.csv": "UCI Spambase: 57 features and the class in each line",
}
SPAMBASE_FEATURES = 57
SPAMBASE_TEST = 0.25


def folder_of(given: Path | None) -> Path | None:
    """--data, or the environment's folder."""
    return given if given is not None else Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def located(folder: Path | None, name: str) -> Path:
    """The file of this name. DataError says what it should hold and where to put it."""
    remedy = f"put {name} ({WHAT[name]}) into a folder and name it with --data DIR or {VARIABLE}"
    if folder is None:
        raise DataError(f"this needs {name}, and no data folder is given", remedy)
    path = folder / name
    if not path.is_file():
        raise DataError(f"there is no {path}", remedy)
    return path


def mnist(folder: Path | None) -> tuple[Dataset, Dataset]:
    """(train of 60,000, test of 10,000), pixels in [0, 1], (n, 28, 28, 1), in the order of the file."""
    path = located(folder, "mnist.npz")
    train = load_npz(path)
    with np.load(path) as arrays:
        if "x_test" not in arrays or "y_test" not in arrays:
            raise DataError(f"{path} holds no x_test and y_test", f"put {WHAT['mnist.npz']} there")
        x = arrays["x_test"].astype(np.float32)[..., None] / 255
        test = Dataset("mnist", x, arrays["y_test"].astype(np.int32), train.class_names, (), (0.0, 1.0))
    return train, test


def spambase(folder: Path | None, seed: int) -> tuple[Dataset, Dataset]:
    """(train, test) of the seed's split, three quarters and one. Features are log(1 + x), then standardised."""
    path = located(folder, "spambase.csv")
    try:
        with path.open() as file:
            skipped = int(not file.readline()[:1].isdigit())
        table = np.loadtxt(path, np.float64, delimiter=",", skiprows=skipped)
    except (OSError, ValueError) as exc:
        raise DataError(f"{path} cannot be read ({exc})", f"put {WHAT['spambase.csv']} there") from exc
    if table.ndim != 2 or table.shape[1] != SPAMBASE_FEATURES + 1:
        raise DataError(f"{path} holds a table of shape {table.shape}", f"put {WHAT['spambase.csv']} there")
    x = np.log1p(table[:, :-1])
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    y = table[:, -1].astype(np.int32)
    whole = Dataset("spambase", x, y, ("mail", "spam"), (), (float(x.min()), float(x.max())))
    return split(whole, SPAMBASE_TEST, seed)
