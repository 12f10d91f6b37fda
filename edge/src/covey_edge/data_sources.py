"""Reading the device's own data, and checking it against what the model expects.

Runs in the training child only. A source is a function path -> (x, y); other distributions add theirs by the entry
point group ``covey.data_sources``.

Labels out of range and NaN would train silently to nonsense, so they are refused here.
"""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from covey_protocol.bundle import Manifest, TensorSpec
from covey_protocol.errors import ConfigError, DataError

Examples = tuple[npt.NDArray[Any], npt.NDArray[Any]]
ENTRY_POINTS = "covey.data_sources"


def read_npz(path: Path) -> Examples:
    """Arrays `x` (n, ...) and `y` (n, ...) of an .npz file. Pickled objects are never loaded."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in ("x", "y") if name not in archive]
            if missing:
                raise DataError(
                    f"{path} has no array {' and '.join(missing)}", "save it with numpy.savez(path, x=..., y=...)"
                )
            return archive["x"], archive["y"]
    except FileNotFoundError as exc:
        raise DataError(f"{path} does not exist", "check data.path in agent.toml") from exc
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as exc:
        raise DataError(
            f"{path} is not a readable .npz file ({exc})", "save it with numpy.savez(path, x=..., y=...)"
        ) from exc


SOURCES: dict[str, Callable[[Path], Examples]] = {"npz": read_npz}


def source(name: str) -> Callable[[Path], Examples]:
    if name in SOURCES:
        return SOURCES[name]
    added = {point.name: point for point in _installed()}
    if name in added:
        loaded: Callable[[Path], Examples] = added[name].load()
        return loaded
    known = sorted({*SOURCES, *added})
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise ConfigError(f"data source {name!r} is not known", f"did you mean {close[0]!r}? known: {', '.join(known)}")


def _installed() -> list[EntryPoint]:
    points = entry_points()
    if hasattr(points, "select"):
        return list(points.select(group=ENTRY_POINTS))
    return list(points.get(ENTRY_POINTS, ()))  # Python 3.9


def load_examples(name: str, path: Path) -> Examples:
    """x and y of equal length and at least one example, all finite. DataError names the file and the first bad row."""
    x, y = source(name)(path)
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y):
        raise DataError(f"{path}: x holds {x.shape[:1]} examples and y {y.shape[:1]}", "they must have the same length")
    if not len(x):
        raise DataError(f"{path} holds no examples", "record some data first")
    for array, what in ((x, "x"), (y, "y")):
        if array.dtype.kind not in "fiub":
            raise DataError(f"{path}: {what} holds {array.dtype}, not numbers", "store numbers")
        _refuse_rows(~_finite_rows(array), f"{path}: {what} holds NaN or infinite values", "repair or drop those rows")
    return x, y


def check_examples(x: npt.NDArray[Any], y: npt.NDArray[Any], manifest: Manifest, path: Path) -> Examples:
    """x and y in the model's dtypes, if they fit its input and label specifications; else DataError."""
    return (
        _checked(x, manifest.input, f"{path}: x", "scale the data as the model's author states"),
        _checked(y, manifest.label, f"{path}: labels", "relabel or drop those rows"),
    )


def check_inputs(x: npt.NDArray[Any], manifest: Manifest) -> npt.NDArray[Any]:
    """Inputs alone, for answers: at least one, finite, in the model's dtype and range; else DataError."""
    if x.ndim < 1 or not len(x) or x.dtype.kind not in "fiub":
        raise DataError(f"x is {x.dtype} of shape {x.shape}, not a list of examples", "give numbers, one row or more")
    _refuse_rows(~_finite_rows(x), "x holds NaN or infinite values", "repair or drop those rows")
    return _checked(x, manifest.input, "x", "scale the data as the model's author states")


def _checked(array: npt.NDArray[Any], spec: TensorSpec, what: str, remedy: str) -> npt.NDArray[Any]:
    if array.shape[1:] != tuple(spec.shape):
        raise DataError(
            f"{what} has examples of shape {array.shape[1:]}, the model takes {tuple(spec.shape)}", "reshape the data"
        )
    if spec.dtype != "float32" and array.dtype.kind == "f":
        _refuse_rows(_any_per_row(array != np.floor(array)), f"{what} must be whole numbers", remedy)
    minimum, maximum = _bounds(spec)
    if minimum is not None:
        _refuse_rows(_any_per_row(array < minimum - 1e-6), f"{what} below {minimum:g}", remedy)
    if maximum is not None:
        _refuse_rows(_any_per_row(array > maximum + 1e-6), f"{what} above {maximum:g}", remedy)
    return np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))


def _bounds(spec: TensorSpec) -> tuple[Optional[float], Optional[float]]:
    """The specification's bounds, and where it has none those of its integers: 256 must not become 0 in uint8."""
    if spec.dtype == "float32":
        return spec.minimum, spec.maximum
    limits = np.iinfo(spec.dtype)
    minimum, maximum = float(limits.min), float(limits.max)
    return (
        minimum if spec.minimum is None else max(minimum, spec.minimum),
        maximum if spec.maximum is None else min(maximum, spec.maximum),
    )


def _finite_rows(array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    finite: npt.NDArray[np.bool_] = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    return finite


def _any_per_row(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    hit: npt.NDArray[np.bool_] = mask.reshape(len(mask), -1).any(axis=1)
    return hit


def _refuse_rows(bad: npt.NDArray[np.bool_], what: str, remedy: str) -> None:
    if bad.any():
        raise DataError(f"{what} in {int(bad.sum())} of {len(bad)} rows, first in row {int(np.argmax(bad))}", remedy)
