"""The agent's wheel on arm64, under user emulation: it trains on Debian's Python and reports to a real Mosquitto.

Slow, and skipped without root, mmdebstrap and qemu-user-static: see `arm64`.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from arm64 import PACKED, pack, require_emulation, userland
from brokers import RunningBroker
from environments import built_wheel
from reporting import one_round

from covey_coordinator.demo.devices import Shard
from covey_protocol.seals import SealingKey

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(7200)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    require_emulation()
    made = userland()
    pack(made, built_wheel(tmp_path))
    return made


@pytest.fixture
def inside(root: Path) -> Iterator[Path]:
    """A folder in the root, for one test."""
    folder = root / "srv" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def test_the_agent_trains_and_reports_on_arm64(
    root: Path, inside: Path, mosquitto: RunningBroker, digits_bundle: bytes, coordinator_key: SealingKey
) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    shard = Shard((x[:32] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[:32])
    reported = one_round(
        [str(shutil.which("chroot")), str(root), "/usr/bin/python3", "-m", "covey_edge"],
        inside,
        mosquitto,
        digits_bundle,
        coordinator_key,
        shard,
        seen_as=Path("/") / inside.relative_to(root) / "pi",
        environment={"PYTHONPATH": f"/{PACKED}", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
    )
    assert reported.outcome == "published"
    assert reported.change > 0.001
    assert "tflite_runtime 2.14.0 on Python 3.11." in reported.log
    print(f"\narm64: reported after {reported.seconds:.0f} s")
