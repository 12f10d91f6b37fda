"""The attacks on updates by name, as `covey audit` and `covey replay` call them. Imported when they are used."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from covey_coordinator.inversion.contract import Attack
from covey_protocol.errors import ConfigError

_HERE = "covey_coordinator.inversion"
# name -> (module, class, its settings); cheap ones first
ATTACKS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "labels": ("labels", "LabelRecovery", {}),
    "units": ("trap_weights", "UnitReading", {}),
    "imprint": ("imprint", "Imprint", {}),
    "sparse-imprint": ("imprint", "Imprint", {"sparse": True}),
    "deep-leakage": ("deep_leakage", "DeepLeakage", {}),
    "inverting-gradients": ("inverting_gradients", "InvertingGradients", {}),
    "local-steps": ("local_steps", "LocalSteps", {}),
    "tarantola": ("tarantola", "Tarantola", {}),
}
CHEAP = ("labels", "units")


def make_attack(name: str, **settings: Any) -> Attack:
    """ConfigError for an unknown name, naming the nearest, and for settings that the attack does not have."""
    if name not in ATTACKS:
        close = difflib.get_close_matches(name, ATTACKS, n=1, cutoff=0.0)
        raise ConfigError(f"there is no attack {name!r}", f"did you mean {close[0]!r}? All: {', '.join(ATTACKS)}")
    module, kind, given = ATTACKS[name]
    try:
        made: Attack = getattr(import_module(f"{_HERE}.{module}"), kind)(**{**given, **settings})
    except TypeError as exc:
        raise ConfigError(f"attack {name!r}: {exc}", "look at its class for its settings") from exc
    return made
