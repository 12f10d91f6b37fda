"""What this device did in its newest rounds, examples and all, kept for its owner: docs/captures.md. Never sent."""

from __future__ import annotations

from pathlib import Path

from covey_edge.config import Agent
from covey_edge.files import DISK, Disk
from covey_protocol.captures import RECORD_SUFFIX, DeviceRecord, sealed
from covey_protocol.messages import Invitation


class RecordFolder:
    """One file for each round, mode 600; the oldest go."""

    def __init__(self, folder: Path, disk: Disk = DISK) -> None:
        self._folder, self._disk = folder, disk

    def keep(self, agent: Agent, invitation: Invitation, work: bytes) -> None:
        """work: as the training child gave it, not looked at here. StorageError where it cannot be kept."""
        config = agent.config
        record = DeviceRecord(
            device_id=config.device_id,
            fleet=config.fleet,
            round_id=invitation.round_id,
            bundle_sha256=invitation.bundle.sha256,
            parameters_sha256=invitation.parameters.sha256,
            plan=invitation.plan,
            clip_norm=config.privacy.clip_norm,
            noise_multiplier=config.privacy.noise_multiplier,
            work=work,
            sealed_by=agent.key.public.raw,
        )
        path = self._folder / f"{invitation.round_id}{RECORD_SUFFIX}"
        self._disk.write(path, sealed(record, agent.key), mode=0o600)
        self._forget_all_but(config.capture.keep_records, path)

    def _forget_all_but(self, most: int, newest: Path) -> None:
        names = [name for name in self._disk.names(self._folder) if name.endswith(RECORD_SUFFIX)]
        older = [self._folder / name for name in names if name != newest.name]
        older.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in older[: max(0, len(older) + 1 - most)]:
            self._disk.remove(path)
