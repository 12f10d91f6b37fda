"""A device's store with a real bundle in it, for the tests of what an owner does with models."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Optional

import msgspec
import numpy as np

from covey_edge.model_store import Kept, ModelStore, Scale, Version
from covey_edge.runtime import Model
from covey_protocol.bundle import read_bundle
from covey_protocol.seals import SealingKey


def digits(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x[start:stop] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[start:stop].astype(np.int32)


def parameters_of(bundle: bytes, scale: float = 1.0) -> np.ndarray:
    return Model(read_bundle(bundle)).parameters() * np.float32(scale)


def keep(
    state_dir: Path,
    bundle: bytes,
    parameters: np.ndarray,
    key: SealingKey,
    number: int = 1,
    scale: Optional[Scale] = None,
) -> Version:
    """As the agent does after a round; returns the version, which is in use then."""
    data = parameters.astype("<f4").tobytes()
    names = [hashlib.sha256(one).hexdigest() for one in (bundle, data)]
    sealed_by = (key.public.hex(),)
    new = Version("federated", names[0], names[1], sealed_by, number, f"r.{number}", 0, scale=scale)
    store = ModelStore(state_dir)
    with store.changing():
        kept = store.load() or Kept(new, new)
        kept = msgspec.structs.replace(kept.using(new), federated=new)
        store.commit(kept, dict(zip(new.files, (bundle, data))))
    return new
