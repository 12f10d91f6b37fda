"""The files of a demo's devices: keys, agent.toml and each device's own data. Nobody else reads the data."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from covey_edge.files import write_atomic
from covey_protocol.seals import PublicKey, SealingKey


@dataclass(frozen=True)
class Shard:
    """One device's own examples. x (n, ...), y (n, ...), as the model takes them."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]


@dataclass(frozen=True)
class DeviceFiles:
    """Where one device lives. public: its key as the coordinator's roster holds it."""

    device_id: str
    folder: Path
    public: PublicKey

    @property
    def config(self) -> Path:
        return self.folder / "agent.toml"

    def write_data(self, shard: Shard) -> None:
        """Replace the device's data in one go; the agent sees them in its next round."""
        buffer = io.BytesIO()
        np.savez(buffer, x=shard.x, y=shard.y)
        write_atomic(self.folder / "data.npz", buffer.getvalue(), mode=0o600)


def make_device(
    device_id: str,
    folder: Path,
    fleet: str,
    broker: dict[str, str],
    coordinator: PublicKey,
    shard: Shard,
    replica: str = "",
    **tables: Mapping[str, object],
) -> DeviceFiles:
    """Write everything one agent needs. broker: the [broker] table of its agent.toml; tables: further ones.

    Its training has the same priority as all else: a fleet at a desk has nobody to step back for.
    replica: the name of a shard that other devices hold, too.
    """
    key = SealingKey.generate()
    write_atomic(folder / "device.pem", key.pem(), mode=0o600)
    config = {
        "device_id": device_id,
        "fleet": fleet,
        "state_dir": "state",
        "broker": broker,
        "identity": {"key_file": "device.pem", "coordinator_key": coordinator.hex()},
        "data": {"source": "npz", "path": "data.npz", **({"replica": replica} if replica else {})},
        **tables,
        "training": {"nice": 0, **tables.get("training", {})},
    }
    write_atomic(folder / "agent.toml", _toml(config).encode(), mode=0o600)
    files = DeviceFiles(device_id, folder, key.public)
    files.write_data(shard)
    return files


def _toml(config: Mapping[str, object]) -> str:
    """TOML of strings and of one level of tables; a JSON string, number or true is one of TOML."""
    quoted = {name: msgspec.json.encode(value).decode() for name, value in config.items() if isinstance(value, str)}
    lines = [f"{name} = {value}" for name, value in quoted.items()]
    for table, values in config.items():
        if isinstance(values, Mapping):
            lines += ["", f"[{table}]"]
            lines += [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in values.items()]
    return "\n".join(lines) + "\n"
