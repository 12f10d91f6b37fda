"""Private names of TensorFlow are used in one file alone, so that another version is one file's work."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import covey_models

SOURCES = sorted(Path(covey_models.__file__).parent.rglob("*.py"))
ALLOWED = "_tensorflow.py"
PRIVATE_MODULES = ("tensorflow.python", "tensorflow.lite.python", "tensorflow.core", "keras.src")
OWN = ("self", "cls")  # private names of one's own objects
NAMED_TUPLE = ("_replace", "_asdict", "_fields", "_make")  # public, with an underscore so that no field is called so


def private_names(source: str) -> Iterator[str]:
    """Imports of private TensorFlow modules, strings that name one, and private attributes of other objects."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, ast.Attribute):
            if _is_private(node):
                yield f"line {node.lineno}: .{node.attr}"
            continue
        else:
            continue
        yield from (f"line {node.lineno}: {name}" for name in names if name.startswith(PRIVATE_MODULES))


def _is_private(node: ast.Attribute) -> bool:
    of_one_self = isinstance(node.value, ast.Name) and node.value.id in OWN
    private = node.attr.startswith("_") and not node.attr.endswith("__") and node.attr not in NAMED_TUPLE
    return private and not of_one_self


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_private_names_of_tensorflow_stay_in_one_file(path: Path) -> None:
    found = list(private_names(path.read_text(encoding="utf-8")))
    if path.name == ALLOWED:
        assert found, "nothing private is left here: this test and the file's comment can go"
    else:
        assert not found


@pytest.mark.parametrize(
    "line",
    [
        "from tensorflow.python.framework import ops",
        "import tensorflow.lite.python.schema_py_generated as schema",
        "module = importlib.import_module('tensorflow.python.framework.kernels')",
        "graph._get_function(name)",
        "model._flatten_layers()",
    ],
)
def test_a_private_name_is_found(line: str) -> None:
    assert list(private_names(line))


def test_public_and_own_names_are_not_found() -> None:
    assert not list(private_names("import tensorflow as tf\ntf.raw_ops.Inv(x=x)\nself._held = node.op\nx.__doc__"))
