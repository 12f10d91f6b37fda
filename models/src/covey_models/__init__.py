"""covey's models: Keras training steps exported to TFLite bundles of builtin ops, data sets, partitions, corruption.

Importing this package imports neither TensorFlow nor scikit-learn nor NumPy; what needs them imports them when used.
"""

from __future__ import annotations

import importlib
from typing import Any

from covey_models.export import export  # the function: it must win over the submodule of the same name

_HOMES = {
    "Dataset": "datasets",
    "load": "datasets",
    "load_split": "datasets",
    "split": "datasets",
    "build": "zoo",
    "default_for": "zoo",
    "iid": "partitions",
    "dirichlet": "partitions",
    "label_shards": "partitions",
    "Population": "population",
    "populate": "population",
}

__all__ = [
    "Dataset",
    "Population",
    "build",
    "default_for",
    "dirichlet",
    "export",
    "iid",
    "label_shards",
    "load",
    "load_split",
    "populate",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
