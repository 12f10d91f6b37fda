"""Training steps rewritten into TFLite's builtin ops, one lowering function per TensorFlow op type."""

from __future__ import annotations

from covey_models.lowering import (  # noqa: F401  # importing registers
    activations,
    augmentation,
    convolution,
    gathers,
    layouts,
    local_response,
    loops,
    losses,
    mathematics,
    matmul,
    normalisation,
    optimizers,
    pooling,
    products,
    quantization,
    random,
    reductions,
    refusals,
    resize,
    shapes,
    variables,
    volumes,
)
from covey_models.lowering.registry import LOOPS, LOWERINGS, RANDOM, REFUSALS, Node, lowers, refuse
from covey_models.lowering.rewriter import Lowered, all_ops, describe, is_random, layer_of, lower, rewrite, seeded

__all__ = [
    "LOOPS",
    "LOWERINGS",
    "RANDOM",
    "REFUSALS",
    "Lowered",
    "Node",
    "all_ops",
    "describe",
    "is_random",
    "layer_of",
    "lower",
    "lowers",
    "refuse",
    "rewrite",
    "seeded",
]
