"""Reproductions by name."""

from __future__ import annotations

from importlib import import_module

from covey_coordinator.aggregation.registry import suggest
from covey_coordinator.reproduce.contract import Reproduction
from covey_protocol.errors import ConfigError

MODULES = {  # name -> module of this package and the value in it
    "krum-spambase": "krum:SPAMBASE",
    "krum-batch-size": "krum:BATCH_SIZE",
    "alie-mnist": "alie:ALIE",
    "shejwalkar-mnist": "shejwalkar:SHEJWALKAR",
    "fltrust": "fltrust:FLTRUST",
    "draco": "draco:DRACO",
    "fedavg-2nn": "fedavg:FEDAVG",
    "fsvrg": "fsvrg:FSVRG",
    "super-teaching": "super_teaching:SUPER_TEACHING",
    "byzfl-heatmap": "heatmaps:BYZFL",
    "tff-image-classification": "image_classification:TUTORIAL",
    "comt": "comt:COMT_TABLES",
    "incomplete-data": "incomplete:INCOMPLETE",
    "teaching-regimes": "regimes:REGIMES",
    "model-inversion": "model_inversion:MODEL_INVERSION",
    "tree-inversion": "tree_inversion:TREE_INVERSION",
    "gradient-inversion": "gradient_inversion:GRADIENT_INVERSION",
}
NAMES = tuple(MODULES)


def reproduction_of(name: str) -> Reproduction:
    """The reproduction of this name. Raises ConfigError for an unknown one."""
    if name not in MODULES:
        raise ConfigError(f"there is no reproduction {name!r}", suggest(name, NAMES))
    module, _, value = MODULES[name].partition(":")
    found: Reproduction = getattr(import_module(f"covey_coordinator.reproduce.{module}"), value)
    return found
