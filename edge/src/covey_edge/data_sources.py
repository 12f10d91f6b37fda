"""Reading the device's own data, and checking it against what the model expects.

Runs in the training child only. A source is a function path, options -> x, y; other distributions add theirs by the
entry point group ``covey.data_sources``. What is done with what it gives is in `examples`.

Labels out of range and NaN would train silently to nonsense, so they are found here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt

from covey_edge.source_options import OPTIONS, NpzOptions, check_together
from covey_edge.strict import as_struct
from covey_edge.table_rows import Table
from covey_protocol.bundle import Manifest, TensorSpec
from covey_protocol.errors import DATA, ConfigError, DataError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Examples = tuple[npt.NDArray[Any], npt.NDArray[Any]]
ENTRY_POINTS = "covey.data_sources"


def read_npz(path: Path, options: NpzOptions = NpzOptions()) -> Examples:  # noqa: B008  # frozen
    """Two arrays (n, ...) of an .npz file, `x` and `y` where the options name no others. Pickled objects are never
    loaded."""
    remedy = f"save it with numpy.savez(path, {options.x}=..., {options.y}=...)"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in (options.x, options.y) if name not in archive]
            if missing:
                raise DataError(
                    f"{path} has no array {' and '.join(missing)}", remedy, told=f"{DATA} lacks an array that is named"
                )
            return archive[options.x], archive[options.y]
    except FileNotFoundError as exc:
        raise DataError.at(path, " does not exist", "check data.path in agent.toml") from exc
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as exc:
        told = f"{DATA} is not a readable .npz file"
        raise DataError(f"{path} is not a readable .npz file ({exc})", remedy, told=told) from exc


def source(name: str) -> Callable[..., Any]:
    """The function of this name. Those of this distribution are loaded when they are asked for."""
    if name == "npz":
        return read_npz
    if name in OPTIONS:
        built_in: Callable[..., Any] = getattr(importlib.import_module(f"covey_edge.{name}_source"), f"read_{name}")
        return built_in
    added = {point.name: point for point in _installed()}
    if name in added:
        loaded: Callable[..., Any] = added[name].load()
        return loaded
    known = sorted({*OPTIONS, *added})
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise ConfigError(f"data source {name!r} is not known", f"did you mean {close[0]!r}? known: {', '.join(known)}")


def _installed() -> list[EntryPoint]:
    from importlib.metadata import entry_points  # 3 MB, which npz needs not

    points = entry_points()
    if hasattr(points, "select"):
        return list(points.select(group=ENTRY_POINTS))
    return list(points.get(ENTRY_POINTS, ()))  # Python 3.9


def options_of(name: str, options: dict[str, Any]) -> Any:
    """The options as the source's parameter `options` wants them: its Struct, else the dictionary; None where it has
    no such parameter. ConfigError for options that it does not know."""
    function = source(name)
    if "options" not in inspect.signature(function).parameters:
        if options:
            raise ConfigError(f"data source {name!r} takes no options", "leave [data.options] out")
        return None
    try:
        kind = get_type_hints(function).get("options")
    except NameError as exc:
        raise ConfigError(
            f"data source {name!r}: its annotations cannot be read ({exc})", "import what they name"
        ) from exc
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return options
    made = as_struct(options, kind, "[data.options]")
    check_together(made, "[data.options]")
    return made


def read_source(name: str, path: Path, options: dict[str, Any]) -> Table:
    """What the source gives, with x and y numbers and of equal length, and at least one row. Else DataError."""
    given = _given(name, path, options_of(name, options))
    table = given if isinstance(given, Table) else Table(*given)
    x, y = table.x, table.y
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y):
        lengths = f": x holds {x.shape[:1]} examples and y {y.shape[:1]}"
        raise DataError.at(path, lengths, "they must have the same length")
    if not len(x) and not table.left_out:
        raise DataError.at(path, " holds no examples", "; ".join([*table.notes, "record some data first"]))
    for array, what in ((x, "x"), (y, "y")):
        if array.dtype.kind not in "fiub":
            told = f"{DATA}: {what} does not hold numbers"
            raise DataError(f"{path}: {what} holds {array.dtype}, not numbers", "store numbers", told=told)
    return table


def _given(name: str, path: Path, options: Any) -> Any:
    """Whatever goes wrong in a source that is not ours is a DataError."""
    read = source(name)
    try:
        return read(path) if options is None else read(path, options)
    except (DataError, MemoryError):
        raise
    except Exception as exc:
        if name in OPTIONS:
            raise
        import traceback

        traceback.print_exc()  # the child's stderr is the agent's
        what = f"{path}: data source {name!r} failed with {type(exc).__name__}"
        raise DataError(what, "the log has its message", told=f"{DATA} failed") from exc


def state_of(name: str, path: Path, options: dict[str, Any]) -> object:
    """Equal as long as the data are what they were when they were read; a function's are never known to be.

    DataError where there are none.
    """
    if name == "python":
        return object()
    watched = {"images": "images_state", "sqlite": "sqlite_state"}.get(name)
    try:
        if watched:
            state = getattr(importlib.import_module(f"covey_edge.{name}_source"), watched)
            return state(path, options_of(name, options))
        stat = path.stat()
    except OSError as exc:
        raise DataError.at(path, f" cannot be read ({exc.strerror})", "check data.path in agent.toml") from exc
    return stat.st_mtime_ns, stat.st_size


class Fault(NamedTuple):
    """rows: (n,), those that it befalls. what: without the file's name."""

    what: str
    rows: npt.NDArray[np.bool_]
    remedy: str


def not_finite(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Iterator[Fault]:
    for array, what in ((x, "x"), (y, "y")):
        yield Fault(f"{what} holds NaN or infinite values", ~_finite_rows(array), "repair or drop those rows")


def label_faults(y: npt.NDArray[Any], manifest: Manifest) -> Iterator[Fault]:
    yield from _faults(y, manifest.label, "labels", "relabel or drop those rows")


def input_faults(x: npt.NDArray[Any], manifest: Manifest) -> Iterator[Fault]:
    yield from _faults(x, manifest.input, "x", "scale the data as the model's author states")


def check_shapes(x: npt.NDArray[Any], y: npt.NDArray[Any], manifest: Manifest, path: Path) -> None:
    """DataError where one example is not what the model takes."""
    for array, spec, what in ((x, manifest.input, "x"), (y, manifest.label, "labels")):
        if array.shape[1:] != tuple(spec.shape):
            raise DataError.at(
                path,
                f": {what} has examples of shape {array.shape[1:]}, the model takes {tuple(spec.shape)}",
                "reshape the data",
            )


def load_examples(name: str, path: Path) -> Examples:
    """x and y of equal length and at least one example, all finite. DataError names the file and the first bad row.

    With the source's own options; for programs on a desk.
    """
    x, y = read_source(name, path, {})[:2]
    _refuse(not_finite(x, y), path)
    return x, y


def check_examples(x: npt.NDArray[Any], y: npt.NDArray[Any], manifest: Manifest, path: Path) -> Examples:
    """x and y in the model's dtypes, if they fit its input and label specifications; else DataError."""
    check_shapes(x, y, manifest, path)
    for faults in (input_faults(x, manifest), label_faults(y, manifest)):
        _refuse(faults, path)
    return as_the_model_takes(x, manifest.input), as_the_model_takes(y, manifest.label)


def as_the_model_takes(array: npt.NDArray[Any], spec: TensorSpec) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))


def refusal(fault: Fault, path: Path, place: str = "") -> DataError:
    """place: where the first bad row is, "" for its index. It is not told: the id of a row may say whose it is."""
    first = place or f"row {int(np.argmax(fault.rows))}"
    bad, rows = int(fault.rows.sum()), len(fault.rows)
    what = f": {fault.what} in {bad} of {rows} rows"
    return DataError(f"{path}{what}, first in {first}", fault.remedy, told=f"{DATA}{what}")


def _refuse(faults: Iterator[Fault], path: Path) -> None:
    for fault in faults:
        if fault.rows.any():
            raise refusal(fault, path)


def _faults(array: npt.NDArray[Any], spec: TensorSpec, what: str, remedy: str) -> Iterator[Fault]:
    if spec.dtype != "float32" and array.dtype.kind == "f":
        yield Fault(f"{what} must be whole numbers", _any_per_row(array != np.floor(array)), remedy)
    minimum, maximum = _bounds(spec)
    if minimum is not None:
        yield Fault(f"{what} below {minimum:g}", _any_per_row(array < minimum - 1e-6), remedy)
    if maximum is not None:
        yield Fault(f"{what} above {maximum:g}", _any_per_row(array > maximum + 1e-6), remedy)


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
