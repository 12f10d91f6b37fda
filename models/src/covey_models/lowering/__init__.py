"""Training steps rewritten into TFLite's builtin ops, one lowering function per TensorFlow op type."""

from __future__ import annotations

from covey_models.lowering import activations, convolution, losses, matmul, normalisation, pooling, shapes, variables
from covey_models.lowering.registry import LOWERINGS, REFUSALS, Node, lowers, refuse
from covey_models.lowering.rewriter import Lowered, describe, layer_of, lower

THEMES = (activations, convolution, losses, matmul, normalisation, pooling, shapes, variables)  # importing registers

__all__ = ["LOWERINGS", "REFUSALS", "Lowered", "Node", "describe", "layer_of", "lower", "lowers", "refuse"]
