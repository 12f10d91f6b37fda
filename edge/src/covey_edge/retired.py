"""Which keys of a peer are retired: never taken again, whatever a configuration says later. One small file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from covey_edge.files import DISK, Disk
from covey_protocol.errors import StorageError
from covey_protocol.seals import PublicKey


class RetiredKeys:
    """Peer -> the keys that it has moved on from, as JSON. Read once; StorageError where it cannot be read."""

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self._path, self._disk = path, disk
        data = disk.read(path)
        if data is None and path.exists():
            raise StorageError(f"{path} cannot be read", "check its permissions")
        try:
            self._keys = msgspec.json.decode(data, type=dict[str, list[str]]) if data is not None else {}
        except msgspec.DecodeError as exc:
            raise StorageError(
                f"{path} is damaged ({exc}): which old keys are not to be taken is not known",
                "restore it, or pin only newest keys and remove it",
            ) from exc

    def of(self, name: str) -> frozenset[PublicKey]:
        return frozenset(PublicKey.from_hex(text) for text in self._keys.get(name, ()))

    def retire(self, name: str) -> Callable[[Sequence[PublicKey]], None]:
        """What a KeyRing of this peer calls: durable when it returns."""

        def add(keys: Sequence[PublicKey]) -> None:
            known = self._keys.get(name, [])
            more = {**self._keys, name: known + [key.hex() for key in keys if key.hex() not in known]}
            self._disk.write(self._path, msgspec.json.format(msgspec.json.encode(more), indent=1), mode=0o600)
            self._keys = more

        return add
