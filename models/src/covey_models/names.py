"""The names an operator may choose of. Imports nothing heavy, so that the command's help can list them."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from covey_protocol.errors import ConfigError

LOSSES = (
    "sparse_categorical_crossentropy",
    "categorical_crossentropy",
    "binary_crossentropy",
    "mean_squared_error",
    "mean_absolute_error",
    "huber",
)
OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad")


def no_such(kind: str, name: str, known: Collection[str]) -> ConfigError:
    """The error for a name that is none of the known ones, with the nearest."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return ConfigError(f"there is no {kind} {name!r}", f"did you mean {close!r}? choose one of {', '.join(known)}")
