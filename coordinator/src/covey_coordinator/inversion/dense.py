"""Analytic recovery from dense layers. Devices judge their own updates with the same functions, so they live there."""

from covey_protocol.leakage import (
    POWER_STEPS,
    DenseInput,
    DenseLayer,
    dense_layers,
    label_proportions,
    read_label,
    recover_input,
)

__all__ = [
    "POWER_STEPS",
    "DenseInput",
    "DenseLayer",
    "dense_layers",
    "label_proportions",
    "read_label",
    "recover_input",
]
