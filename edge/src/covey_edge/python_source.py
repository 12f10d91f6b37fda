"""The data source `python`: a function of the owner's, `my_data.py:read` or `package.module:read`.

It is called in the training child, with the agent's rights and its files; only agent.toml can name it. What goes wrong
in it is told to the owner with the line; its own message, which may hold data, is in this device's log. Others hear
only that it failed, unless it raises a DataError that says what they may hear.
"""

from __future__ import annotations

import importlib
import importlib.util
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from covey_edge.source_options import PythonOptions
from covey_edge.table_rows import Table
from covey_protocol.errors import DATA, DataError

MODULE = "covey_owner_data"


def read_python(path: Path, options: PythonOptions) -> Table:
    """path: FILE.py:FUNCTION, or FOLDER/MODULE:FUNCTION, where the module may also be an installed one.

    The function gets options.arguments by name, and returns x and y of equal length, one entry for each example.
    """
    place, _, name = str(path).rpartition(":")
    if not place or not name.isidentifier():
        raise DataError.at(path, " names no function", 'write path = "my_data.py:read" or "module:read"')
    try:
        given = _function(Path(place), name)(**options.arguments)
    except DataError:
        raise
    except (Exception, SystemExit) as exc:
        traceback.print_exc()  # the child's stderr is the agent's
        what = f"{path} failed with {type(exc).__name__}{_line(exc)}"
        raise DataError(what, "the log has its message", told=f"{DATA} failed") from exc
    return _table(path, given)


def _function(place: Path, name: str) -> Callable[..., Any]:
    module = _from_file(place) if place.suffix == ".py" else _imported(place)
    function = getattr(module, name, None)
    if not callable(function):
        told = f"{DATA} lacks the function that is named"
        raise DataError(f"{place} has no function {name!r}", "check data.path in agent.toml", told=told)
    checked: Callable[..., Any] = function
    return checked


def _from_file(file: Path) -> Any:
    """Executed anew at each reading, so that a change needs no restart."""
    try:
        mode = file.stat().st_mode
    except OSError as exc:
        raise DataError.at(file, f" cannot be read ({exc.strerror})", "check data.path in agent.toml") from exc
    if mode & stat.S_IWOTH:
        raise DataError.at(file, " can be changed by everybody on this device", f"run `chmod o-w {file.name}`")
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if spec is None or spec.loader is None:
        raise DataError.at(file, " is no Python file", "check data.path in agent.toml")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module


def _imported(place: Path) -> Any:
    folder = str(place.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(place.name)


def _line(exc: BaseException) -> str:
    """Where in the owner's code: the last line that is not ours."""
    frames = [one for one in traceback.extract_tb(exc.__traceback__) if one.filename != __file__]
    own = [one for one in frames if not one.filename.startswith("<frozen")]
    return f" in line {own[-1].lineno} of {Path(own[-1].filename).name}" if own else ""


def _table(path: Path, given: Any) -> Table:
    remedy = "return x and y, arrays with one entry for each example"
    if not isinstance(given, tuple) or len(given) != 2:
        raise DataError(f"{path} returned {type(given).__name__}, not a pair", remedy, told=f"{DATA} returned no pair")
    try:
        return Table(np.asarray(given[0]), np.asarray(given[1]))
    except ValueError as exc:
        raise DataError.at(path, " returned what is no array", remedy) from exc
