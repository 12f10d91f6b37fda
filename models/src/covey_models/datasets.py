"""Labelled data for simulations, demonstrations and devices: three sets that scikit-learn carries, and the user's own.

Own data are .npz archives (here), .csv tables (`csv_tables`) and folders of images (`image_folders`), by path or by
name from a data folder; MNIST is such an archive. Everything is checked on the way in, because out-of-range labels
and NaNs train silently to nonsense on a device. No TensorFlow here, and nothing is downloaded.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from covey_models.tables import checked
from covey_protocol.errors import ConfigError, DataError, MachineError

Array = np.ndarray[Any, Any]

STANDARD_DEVIATIONS = 5.0  # standardised features are clipped to this many: a bounded range that devices can check
LARGEST_PIXEL = 255
ENDINGS = (".npz", ".csv")
DATA_VARIABLE = "COVEY_DATA"


@dataclass(frozen=True)
class Dataset:
    """Examples and their classes.

    x: (n, *shape) float32, all finite, within input_range. y: (n,) int32 in 0 .. len(class_names) - 1.
    feature_names: one per number of a flat example, empty for images. input_range: inclusive bounds of all of x.
    users: (n,) whose each example is, numbers or text, where the source says it.
    """

    name: str
    x: Array
    y: Array
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    input_range: tuple[float, float]
    users: Optional[Array] = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Array) -> Dataset:
        """The examples at these places, in this order."""
        users = None if self.users is None else self.users[indices]
        return replace(self, x=self.x[indices], y=self.y[indices], users=users)


def digits() -> Dataset:
    """1797 handwritten digits, 8x8x1, scaled from 0..16 to [0, 1] (UCI, through scikit-learn)."""
    raw = _scikit_learn().load_digits()
    x = (raw.images[..., None] / 16.0).astype(np.float32)
    names = tuple(str(name) for name in raw.target_names)
    return Dataset("digits", x, raw.target.astype(np.int32), names, (), (0.0, 1.0))


def breast_cancer() -> Dataset:
    """569 tumours, 30 features, malignant or benign (Wisconsin diagnostic, through scikit-learn).

    Each feature is standardised with the mean and standard deviation of the whole set, then clipped to [-5, 5] (the
    few numbers beyond are outliers of up to 12). A test split therefore knows the training split's scale.
    """
    return _standard_table("breast-cancer", _scikit_learn().load_breast_cancer())


def wine() -> Dataset:
    """178 wines, 13 features, three growers (UCI, through scikit-learn); standardised as breast_cancer is."""
    return _standard_table("wine", _scikit_learn().load_wine())


def _standard_table(name: str, raw: Any) -> Dataset:
    standardised = (raw.data - raw.data.mean(0)) / raw.data.std(0)
    x = standardised.clip(-STANDARD_DEVIATIONS, STANDARD_DEVIATIONS).astype(np.float32)
    names, features = (tuple(str(name) for name in group) for group in (raw.target_names, raw.feature_names))
    bounds = (-STANDARD_DEVIATIONS, STANDARD_DEVIATIONS)
    return Dataset(name, x, raw.target.astype(np.int32), names, features, bounds)


def _scikit_learn() -> Any:
    try:
        from sklearn import datasets
    except ImportError as exc:
        raise MachineError("scikit-learn is not installed", "install covey-models with its dependencies") from exc
    return datasets


BUILT_IN: dict[str, Callable[[], Dataset]] = {"digits": digits, "breast-cancer": breast_cancer, "wine": wine}


@dataclass(frozen=True)
class Reading:
    """How a user's file is read. Each source takes some of these; see `csv_tables` and `image_folders`.

    label, users: the columns' names. nominal: columns to be one-hot although they hold numbers. ignore: columns to be
    left out. standardise: mean 0 and deviation 1 in every feature, clipped to [-5, 5]. size: (height, width) that
    images are brought to.
    """

    label: Optional[str] = None
    users: Optional[str] = None
    nominal: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    standardise: bool = False
    size: Optional[tuple[int, int]] = None

    def only(self, what: str, *names: str) -> None:
        """ConfigError for a setting that this source does not take."""
        for field in fields(self):
            if field.name not in names and getattr(self, field.name) != field.default:
                taken = f"it takes {', '.join(names)}" if names else "it takes none"
                raise ConfigError(f"{what} does not take {field.name}", taken)


def load(name: Union[str, Path], data_dir: Union[str, Path, None] = None, **reading: Any) -> Dataset:
    """A built-in data set by name, or the user's own by path, or by name from a data folder.

    name: of BUILT_IN; or a path that ends in .npz (`load_npz`) or .csv (`csv_tables.load_csv`), or of a folder of
    images (`image_folders.load_folder`). What is not found as it stands is looked for in data_dir, else in the folder
    that the environment variable COVEY_DATA names, also without its ending: "mnist" is mnist.npz there.
    reading: the settings of `Reading`. Of a source with a test part of its own this is the training part.
    """
    train, _ = _loaded(name, data_dir, Reading(**checked(Reading, f"data set {str(name)!r}", reading)))
    return train


def load_split(
    name: Union[str, Path],
    data_dir: Union[str, Path, None] = None,
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
    **reading: Any,
) -> tuple[Dataset, Dataset]:
    """(train, test): as the source divides them (.npz with x_test and y_test, MNIST), else as `split` does.

    test_fraction and seed are for sources that do not. With standardise, both parts are on the training part's scale.
    The rest as for `load`.
    """
    how = Reading(**checked(Reading, f"data set {str(name)!r}", reading))
    train, test = _loaded(name, data_dir, replace(how, standardise=False))
    if test is None:
        train, test = split(train, test_fraction, seed)
    return (standardised(train, train), standardised(test, train)) if how.standardise else (train, test)


def standardised(dataset: Dataset, scale: Dataset) -> Dataset:
    """Every feature less its mean over its standard deviation in `scale`, clipped to [-5, 5]; a constant one is 0."""
    if dataset.x.ndim != 2:
        raise ConfigError(f"{dataset.name} holds images and is not to be standardised", "leave standardise out")
    deviation = scale.x.std(0, dtype=np.float64)
    x = (dataset.x - scale.x.mean(0, dtype=np.float64)) / np.where(deviation > 0, deviation, 1.0)
    bounds = (-STANDARD_DEVIATIONS, STANDARD_DEVIATIONS)
    return replace(dataset, x=x.clip(*bounds).astype(np.float32), input_range=bounds)


def _loaded(
    name: Union[str, Path], data_dir: Union[str, Path, None], how: Reading
) -> tuple[Dataset, Optional[Dataset]]:
    if str(name) in BUILT_IN:
        how.only(str(name))
        return BUILT_IN[str(name)](), None
    path = find(name, data_dir)
    train, test = _read(path, how)
    return (standardised(train, train) if how.standardise else train), test


def _read(path: Path, how: Reading) -> tuple[Dataset, Optional[Dataset]]:
    if path.suffix == ".npz":
        how.only(str(path), "standardise")
        return load_npz_parts(path)
    if path.suffix == ".csv":
        from covey_models.csv_tables import load_csv

        return load_csv(path, how), None
    from covey_models.image_folders import load_folder

    return load_folder(path, how), None


def data_folder(data_dir: Union[str, Path, None]) -> Optional[Path]:
    """The folder given, else what COVEY_DATA names, else None. DataError where it is not there."""
    told = str(data_dir) if data_dir is not None else os.environ.get(DATA_VARIABLE, "")
    if not told:
        return None
    folder = Path(told).expanduser()
    if not folder.is_dir():
        whose = "the data folder" if data_dir is not None else f"the data folder of {DATA_VARIABLE}"
        raise DataError(f"{whose}, {folder}, is not there", "check the path")
    return folder


def find(name: Union[str, Path], data_dir: Union[str, Path, None] = None) -> Path:
    """The file or folder that `load` means by this name."""
    path = Path(name).expanduser()
    if (path.suffix in ENDINGS or path.is_dir()) and (path.exists() or path.is_absolute()):
        return path
    folder = data_folder(data_dir)
    for place in [] if folder is None else [folder / f"{path}{ending}" for ending in ("", *ENDINGS)]:
        if place.is_dir() or (place.exists() and place.suffix in ENDINGS):
            return place
    looked = f", also not in {folder}" if folder is not None else ""
    if path.suffix in ENDINGS:
        raise DataError(f"there is no file {path}{looked}", "check the path")
    known = f"choose one of {', '.join(BUILT_IN)} or give a .npz file, a .csv file or a folder of images"
    ours = f"; {path}.npz may lie in a data folder (--data or {DATA_VARIABLE})" if folder is None else ""
    raise DataError(f"there is no data set {str(name)!r}{looked}", known + ours)


def load_npz(path: Path) -> Dataset:
    """A user's own data: arrays x and y, or x_train and y_train; see `load_npz_parts`."""
    return load_npz_parts(path)[0]


def load_npz_parts(path: Path) -> tuple[Dataset, Optional[Dataset]]:
    """(data, None) of arrays x and y; (train, test) of x_train, y_train, x_test and y_test (the layout of Keras).

    x: (n, *shape), one example per row. Integers must lie in 0..255, are scaled to [0, 1], and get a channel axis
    where they are (n, height, width); floats stay as they are, and input_range is what occurs ([0, 1] if within).
    y: (n,) or (n, 1), classes numbered from 0. class_names and feature_names may be arrays of text; users (or
    users_train and users_test), (n,) numbers or text, says whose each example is. Anything else is ignored.
    """
    arrays = _arrays(path)
    x_name, y_name = _names(path, arrays)
    train = _part(path, arrays, x_name, y_name, "users" if x_name == "x" else "users_train")
    require_classes(path, train.y)
    if x_name == "x" or "x_test" not in arrays or "y_test" not in arrays:
        return train, None
    test = _part(path, arrays, "x_test", "y_test", "users_test", len(train))
    if not len(test):
        raise DataError(f"{path}: x_test is empty", "put examples there, or leave x_test and y_test out")
    if test.x.shape[1:] != train.x.shape[1:]:
        raise DataError(
            f"{path}: x_train has examples of shape {train.x.shape[1:]}, x_test of {test.x.shape[1:]}",
            "give both parts the same shape",
        )
    names = max(train.class_names, test.class_names, key=len)
    low, high = (pick(train.input_range[end], test.input_range[end]) for end, pick in ((0, min), (1, max)))
    train, test = (replace(part, class_names=names, input_range=(low, high)) for part in (train, test))
    return train, test


def _part(
    path: Path, arrays: dict[str, Array], x_name: str, y_name: str, users_name: str, limit: Optional[int] = None
) -> Dataset:
    """limit: classes are numbered below it, None is the number of examples: one wild label must not make a million."""
    y = _labels(path, y_name, arrays[y_name])
    x, bounds = _examples(path, x_name, arrays[x_name])
    if len(x) != len(y):
        raise DataError(f"{path}: {x_name} has {len(x)} examples, {y_name} has {len(y)}", "give one label per example")
    if len(y) and y.max() >= max(len(y) if limit is None else limit, 2):
        raise DataError(f"{path}: {y_name} holds class {y.max()}, with {len(y)} examples", "number the classes from 0")
    class_names = _texts(path, arrays, "class_names", int(y.max(initial=-1)) + 1)
    features = _texts(path, arrays, "feature_names", x.shape[1]) if x.ndim == 2 and "feature_names" in arrays else ()
    return Dataset(path.stem, x, y, class_names, features, bounds, _users(path, arrays, users_name, len(y)))


def require_classes(path: Path, y: Array) -> None:
    """DataError unless there are two examples of two classes."""
    if len(y) < 2 or len(np.unique(y)) < 2:
        raise DataError(
            f"{path} holds {len(y)} examples of {len(np.unique(y))} classes",
            "give at least two examples of two classes",
        )


def _users(path: Path, arrays: dict[str, Array], name: str, count: int) -> Optional[Array]:
    if name not in arrays:
        return None
    users = arrays[name]
    if users.shape != (count,) or users.dtype.kind not in "iuUS":
        raise DataError(
            f"{path}: {name} is {users.dtype} of shape {users.shape}", f"give {count} whole numbers or texts"
        )
    return users


def _arrays(path: Path) -> dict[str, Array]:
    """All arrays of an .npz file. Pickled objects are never loaded: they would run code."""
    remedy = "write it with numpy.savez(path, x=..., y=...) from plain arrays of numbers"
    try:
        with path.open("rb") as file:  # numpy leaves a file open that it opened itself and could not read
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                return {name: archive[name] for name in archive.files}
    except FileNotFoundError as exc:
        raise DataError(f"there is no file {path}", "check the path") from exc
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as exc:
        raise DataError(f"{path} cannot be read as an .npz archive ({exc})", remedy) from exc
    raise DataError(f"{path} is not an .npz archive", remedy)


def _names(path: Path, arrays: dict[str, Array]) -> tuple[str, str]:
    for x_name, y_name in (("x", "y"), ("x_train", "y_train")):
        if x_name in arrays and y_name in arrays:
            return x_name, y_name
    held = ", ".join(sorted(arrays)) or "nothing"
    raise DataError(f"{path} holds {held[:200]}, but not x and y", "name the arrays x and y (or x_train and y_train)")


def _examples(path: Path, name: str, x: Array) -> tuple[Array, tuple[float, float]]:
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise DataError(f"{path}: {name} has shape {x.shape}", "give one row of numbers per example")
    if x.dtype.kind in "bui":
        return _scaled(path, name, x), (0.0, 1.0)
    if x.dtype.kind != "f":
        raise DataError(f"{path}: {name} holds {x.dtype}, not numbers", "convert it to float32 or uint8")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite and is refused here
        x = x.astype(np.float32)
    broken = ~np.isfinite(x).all(tuple(range(1, x.ndim)))
    if broken.any():
        raise DataError(
            f"{path}: {int((~np.isfinite(x)).sum())} numbers of {name} are NaN or infinite, the first in row "
            f"{int(broken.argmax())}",
            "remove or fill in those examples",
        )
    return x, occurring_range(x)


def occurring_range(x: Array) -> tuple[float, float]:
    """[0, 1] where all of x is within, else from the least to the largest number."""
    low, high = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
    if low >= 0.0 and high <= 1.0:
        return 0.0, 1.0
    return low, high if high > low else low + 1.0


def _scaled(path: Path, name: str, x: Array) -> Array:
    if len(x) and (int(x.min()) < 0 or int(x.max()) > LARGEST_PIXEL):
        raise DataError(
            f"{path}: {name} holds integers from {x.min()} to {x.max()}; 0 to {LARGEST_PIXEL} are read as pixels",
            "convert other quantities to float32",
        )
    scaled = x.astype(np.float32) / (1 if x.dtype.kind == "b" else LARGEST_PIXEL)
    return scaled[..., None] if x.ndim == 3 else scaled


def _labels(path: Path, name: str, y: Array) -> Array:
    remedy = "give one class number per example, counted from 0"
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"{path}: {name} has shape {y.shape}, not (examples,)", remedy)
    if y.dtype.kind not in "buif":
        raise DataError(f"{path}: {name} holds {y.dtype}, not numbers", remedy)
    wrong = ~((y >= 0) & (y < 2**31)) if y.dtype.kind != "f" else ~((y >= 0) & (y < 2**31) & (np.mod(y, 1) == 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise DataError(f"{path}: label {y[first]} in row {first} of {name} is not a class number", remedy)
    return y.astype(np.int32)


def _texts(path: Path, arrays: dict[str, Array], name: str, count: int) -> tuple[str, ...]:
    """Optional names; numbers where there are none."""
    if name not in arrays:
        return tuple(str(number) for number in range(count))
    texts = tuple(str(text) for text in np.ravel(arrays[name]))
    if len(texts) < count:
        raise DataError(
            f"{path}: {name} has {len(texts)} entries, {count} are needed", "give one each, or leave it out"
        )
    return texts


def split(dataset: Dataset, test_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, test), shuffled, with about test_fraction of every class in the test part.

    Each class keeps at least one example on either side if it has two.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError(f"the test fraction is {test_fraction}", "give a number between 0 and 1")
    random = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(dataset.y):
        places = random.permutation(np.flatnonzero(dataset.y == label))
        count = min(max(round(test_fraction * len(places)), 1), len(places) - 1)
        test.append(places[:count])
        train.append(places[count:])
    train_part, test_part = (dataset.take(random.permutation(np.concatenate(part))) for part in (train, test))
    return train_part, test_part
