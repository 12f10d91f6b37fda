"""covey's coordinator as a library: ``import covey_coordinator as cc``.

Importing this package is cheap; each name below loads its module, and with it TensorFlow where needed, on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Coordinator": "coordinator",
    "Timing": "coordinator",
    "Fleet": "fleet",
    "RunStore": "store",
    "make_rule": "aggregation.registry",
    "make_engine": "aggregation.engines",
    "RuleFactory": "aggregation.factory",
    "Worker": "aggregation.worker",
    "screen_updates": "aggregation.screening",
    "first_inversion_check": "inversion.check",
    "write_report": "report.html",
    "serve": "serve",
    "simulate": "simulation.api",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
