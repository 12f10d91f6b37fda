"""Training steps rewritten into TFLite's builtin ops, one lowering function per TensorFlow op type."""

from __future__ import annotations

from covey_models.lowering import (
    activations,
    convolution,
    gathers,
    layouts,
    local_response,
    losses,
    mathematics,
    matmul,
    normalisation,
    optimizers,
    pooling,
    products,
    quantization,
    reductions,
    refusals,
    resize,
    shapes,
    variables,
    volumes,
)
from covey_models.lowering.registry import LOWERINGS, REFUSALS, Node, lowers, refuse
from covey_models.lowering.rewriter import Lowered, describe, layer_of, lower

THEMES = (  # importing a theme registers its lowerings
    activations,
    convolution,
    gathers,
    layouts,
    local_response,
    losses,
    mathematics,
    matmul,
    normalisation,
    optimizers,
    pooling,
    products,
    quantization,
    reductions,
    refusals,
    resize,
    shapes,
    variables,
    volumes,
)

__all__ = ["LOWERINGS", "REFUSALS", "Lowered", "Node", "describe", "layer_of", "lower", "lowers", "refuse"]
