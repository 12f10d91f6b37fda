"""A user's own Python files, in which models, losses and optimizers are functions: MODULE.py:FUNCTION.

Importing this file imports nothing heavy; running a user's file imports TensorFlow first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from covey_protocol.errors import ConfigError


class UserCode:
    """The user's Python files, each run once; a file may import what lies beside it."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, Any]] = {}

    def function(self, source: str) -> Any:
        """The function that MODULE.py:FUNCTION names."""
        path, separator, function = source.rpartition(":")
        if not separator or not path.endswith(".py"):
            raise ConfigError(f"{source!r} does not name a function", "write it as MODULE.py:FUNCTION")
        if not Path(path).is_file():
            raise ConfigError(f"there is no file {path}", "check the path")
        if path not in self._names:
            self._names[path] = self._run(path)
        if not callable(self._names[path].get(function)):
            raise ConfigError(f"{path} has no function {function!r}", "name a function of that file")
        return self._names[path][function]

    def built(self, source: str) -> Any:
        """What that function returns."""
        build = self.function(source)
        try:
            return build()
        except Exception as exc:  # whatever the user's code raises
            what = f"{source} fails with {type(exc).__name__}: {exc}"
            raise ConfigError(what, "call it in Python to see where") from exc

    def _run(self, path: str) -> dict[str, Any]:
        import runpy
        import sys

        from covey_models._tensorflow import import_tensorflow

        import_tensorflow()  # first and quietly, before the user's own import
        sys.path.insert(0, str(Path(path).resolve().parent))
        try:
            return runpy.run_path(path)
        except Exception as exc:  # whatever the user's code raises
            what = f"{path} fails with {type(exc).__name__}: {exc}"
            raise ConfigError(what, "run it in Python to see where") from exc
        finally:
            sys.path.pop(0)
