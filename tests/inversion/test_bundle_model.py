"""A bundle read back computes what the bundle computes on a device's runtime, and can be differentiated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from covey_coordinator.inversion.bundle_model import BundleModel, batches_of
from covey_edge.runtime import Model
from covey_edge.trainer import train
from covey_models import build, export
from covey_protocol.bundle import Bundle, read_bundle
from covey_protocol.messages import TrainingPlan

BATCH, COUNT = 4, 11
Examples = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = build("small-cnn", (8, 8, 1), 10, seed=3)
    return read_bundle(export(model, name="digits", batch_size=BATCH, optimizer="adam", clip=True, proximal=True))


@pytest.fixture(scope="module")
def examples() -> Examples:
    random = np.random.default_rng(0)
    return random.random((COUNT, 8, 8, 1)).astype(np.float32), random.integers(0, 10, COUNT).astype(np.int32)


def close(found: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1e-3, np.abs(wanted).max()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, BATCH, COUNT])
def test_the_gradient_is_the_devices(bundle: Bundle, examples: Examples, dtype: str, count: int) -> None:
    device, x, y = Model(bundle), examples[0][:count], examples[1][:count]
    found = BundleModel(bundle, dtype).gradient(device.parameters(), x, y)
    assert found.dtype.name == dtype
    close(found, device.gradient(x, y))


def test_an_update_is_the_devices_own_with_optimizer_clipping_and_fedprox(bundle: Bundle, examples: Examples) -> None:
    plan = TrainingPlan(2, 0.01, shuffle_seed=7, gradient_clip_norm=0.5, proximal_weight=0.1, max_examples=10)
    device = Model(bundle)
    received = device.parameters()
    train(device, (examples[0][:10], examples[1][:10]), plan, "device-1")
    batches = batches_of(*examples, plan, "device-1", bundle.manifest)
    found = BundleModel(bundle).update(received, batches, plan, device_id="device-1")
    close(found, device.parameters() - received, 1e-5)
