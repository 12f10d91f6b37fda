"""Small learnings on real digits, that the tests of this folder share."""

from __future__ import annotations

from typing import Any

import numpy as np

from covey_coordinator.aggregation.registry import make_rule
from covey_coordinator.simulation.learning import DeviceData, Learning
from covey_models import datasets, zoo
from covey_protocol.messages import TrainingPlan

SIZES = (21, 8, 30, 17, 25, 12)  # with batches of 8: whole ones, ragged ones, and one of a single batch
BATCH = 8


def digits(sizes: tuple[int, ...] = SIZES) -> list[DeviceData]:
    """One device per size, each with different digits."""
    data, starts = datasets.load("digits"), np.cumsum((0, *sizes))
    return [
        DeviceData(f"device-{number:03d}", data.x[start : start + size], data.y[start : start + size])
        for number, (start, size) in enumerate(zip(starts, sizes))
    ]


def test_digits() -> tuple[Any, Any]:
    data = datasets.load("digits")
    return data.x[-300:], data.y[-300:]


test_digits.__test__ = False  # type: ignore[attr-defined]  # no test, whatever its name says


def softmax() -> Any:
    return zoo.build("softmax", (8, 8, 1), 10, 0)


def learning(**changes: Any) -> Learning:
    values: dict[str, Any] = {
        "model": softmax(),
        "plan": TrainingPlan(epochs=2, learning_rate=0.1, shuffle_seed=3),
        "rule": make_rule("mean"),
        "batch_size": BATCH,
    }
    return Learning(**{**values, **changes})
