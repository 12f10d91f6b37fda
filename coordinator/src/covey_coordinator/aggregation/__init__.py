"""Robust aggregation: rules, the two doors to them, screening and server optimizers.

A *rule* turns the updates of one round into one aggregate, with a verdict and a score per device. Its definition is
written once, and there are two doors to it: a TFF aggregator (simulation, and pipelines with
TFF's clipping or differential privacy) and a direct call on a matrix (live rounds). Same updates, same bits.

Importing this package is cheap: neither TensorFlow nor TFF is imported until something that needs them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covey_coordinator.aggregation.engines import Engine, StepResult, make_engine
    from covey_coordinator.aggregation.factory import RuleFactory
    from covey_coordinator.aggregation.registry import RULE_NAMES, make_rule
    from covey_coordinator.aggregation.rules import Judgement, Rule
    from covey_coordinator.aggregation.screening import Screened, screen_updates
    from covey_coordinator.aggregation.worker import Worker

_PLACES = {
    "Engine": "covey_coordinator.aggregation.engines",
    "StepResult": "covey_coordinator.aggregation.engines",
    "make_engine": "covey_coordinator.aggregation.engines",
    "RuleFactory": "covey_coordinator.aggregation.factory",
    "RULE_NAMES": "covey_coordinator.aggregation.registry",
    "make_rule": "covey_coordinator.aggregation.registry",
    "Judgement": "covey_coordinator.aggregation.rules",
    "Rule": "covey_coordinator.aggregation.rules",
    "Screened": "covey_coordinator.aggregation.screening",
    "screen_updates": "covey_coordinator.aggregation.screening",
    "Worker": "covey_coordinator.aggregation.worker",
}

__all__ = [
    "RULE_NAMES",
    "Engine",
    "Judgement",
    "Rule",
    "RuleFactory",
    "Screened",
    "StepResult",
    "Worker",
    "make_engine",
    "make_rule",
    "screen_updates",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
