"""A bundle's TFLite file read back into differentiable TensorFlow functions (docs/lowering.md, ADR 29)."""

from covey_models.importing import mathematics, movement, products
from covey_models.importing.graph import ReadBack, Soft, State
from covey_models.importing.registry import IMPORTERS

__all__ = ["IMPORTERS", "ReadBack", "Soft", "State", "mathematics", "movement", "products"]
