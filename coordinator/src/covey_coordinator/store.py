"""What a run leaves on disk: stored updates and checkpoints, each durable before anyone is told about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from covey_edge.files import write_atomic


class RunStore:
    """One run's folder: ``updates/ROUND/DEVICE.f32`` and ``checkpoints/RUN/round-NNNNN.f32`` (float32)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store_update(self, round_id: str, device_id: str, data: bytes) -> Path:
        """Durable when this returns; StorageError if it cannot be."""
        path = self.folder / "updates" / round_id / f"{device_id}.f32"
        write_atomic(path, data, mode=0o600)  # an update can be inverted: see the inversion check
        return path

    def read_update(self, round_id: str, device_id: str) -> npt.NDArray[np.float32]:
        return np.frombuffer((self.folder / "updates" / round_id / f"{device_id}.f32").read_bytes(), "<f4")

    def save_checkpoint(self, run_id: str, number: int, parameters: npt.NDArray[np.float32]) -> Path:
        path = self.checkpoints(run_id) / f"round-{number:05d}.f32"
        write_atomic(path, parameters.astype("<f4").tobytes())
        return path

    def checkpoints(self, run_id: str) -> Path:
        return self.folder / "checkpoints" / run_id

    def newest_checkpoint(self, run_id: str, dimension: int) -> tuple[int, npt.NDArray[np.float32]] | None:
        """(round, parameters) of the newest checkpoint of `dimension` finite numbers; damaged ones are passed over."""
        for path in sorted(self.checkpoints(run_id).glob("round-*.f32"), reverse=True):
            data = path.read_bytes()
            if len(data) == 4 * dimension and np.isfinite(values := np.frombuffer(data, "<f4")).all():
                return int(path.stem.removeprefix("round-")), values.astype(np.float32)
        return None
