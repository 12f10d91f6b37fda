"""Opening a bundle the way a device does, and data that fits it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from covey_protocol.bundle import Bundle

BATCH = 8


def opened(bundle: Bundle) -> dict[str, Callable[..., Any]]:
    """The entry points of a bundle in a fresh interpreter of the runtime that devices have."""
    from tflite_runtime.interpreter import Interpreter

    interpreter = Interpreter(model_content=bundle.model, num_threads=1)
    return {name: interpreter.get_signature_runner(name) for name in bundle.manifest.signatures}


def batch_of(bundle: Bundle, seed: int = 0) -> dict[str, Any]:
    """A random batch that fits the manifest, all weights one."""
    random = np.random.default_rng(seed)
    size, spec = bundle.manifest.batch_size, bundle.manifest
    y = random.integers(0, spec.num_classes, size) if spec.num_classes else random.standard_normal(size)
    return {
        "x": random.random((size, *spec.input.shape)).astype(np.float32),
        "y": y.astype(spec.label.dtype),
        "example_weight": np.ones(size, np.float32),
    }


def parameters(entry_points: dict[str, Callable[..., Any]]) -> Any:
    return entry_points["get_parameters"]()["parameters"].copy()
