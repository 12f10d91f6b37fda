"""Kits of this source with the lock's real wheels, fetched once into COVEY_CACHE or .bench of the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from environments import ROOT

from covey_coordinator.demo.devices import Shard
from covey_deploy import installer
from covey_deploy.agent_wheel import agent_wheel
from covey_deploy.kit import make_kit
from covey_deploy.targets import Target
from covey_deploy.wheelhouse import Wheelhouse, lock_file, pinned
from covey_protocol.seals import SealingKey

MAKER = SealingKey.from_seed(b"maker of kits".ljust(32, b"."))
CACHE = Path(os.environ.get("COVEY_CACHE", ROOT / ".bench")) / "wheels"


def real_kit(target: Target) -> bytes:
    wheels = Wheelhouse(CACHE).wheels(pinned(lock_file().read_text(), target), target)
    return make_kit(target, {**wheels, **dict([agent_wheel()])}, MAKER)


def unpacked(kit: bytes, folder: Path) -> Path:
    """The folder with a kit's files, as it lies on a card."""
    for name, content in installer.members(kit):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def digits(count: int) -> Shard:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Shard((x[:count] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[:count])
