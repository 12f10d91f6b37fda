"""The folder of an audit: what was asked, and every result as it comes, so that one that is interrupted goes on.

audit.json              what was asked: bundle, plan, data, seed, level; another audit's folder is refused
results/KEY.json        `results.Result`, durable before the next one starts
results/KEY.npz         true and recovered examples of it, where there are any
report.html, results.json, verdict.json
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from covey_coordinator.audit.results import Pictures, Result
from covey_coordinator.held import alone_in
from covey_edge.files import make_folder, write_all_atomic, write_atomic
from covey_protocol.errors import ConfigError, StorageError

FORMAT = 1
NEEDED_BYTES = 64 * 1024 * 1024  # results, pictures and the training child's copies of the data


class Asked(Struct, frozen=True):
    """What makes two audits the same. bundle: sha256 of its file; data: of the arrays; plan: as JSON."""

    bundle: str
    data: str
    plan: str
    seed: int
    level: str
    format: int = FORMAT


class AuditFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def held(self, asked: Asked) -> Iterator[None]:
        """For this process alone, made where it is not there. ConfigError where it holds another audit."""
        try:
            make_folder(self.path)
            _require_space(self.path)
        except OSError as exc:
            raise StorageError(f"cannot use {self.path} ({exc.strerror})", "check its permissions") from exc
        with alone_in(self.path, "covey audit"):
            self._check(asked)
            yield

    def results(self) -> dict[str, Result]:
        """By key. A file that cannot be read is none."""
        found = {}
        for path in sorted((self.path / "results").glob("*.json")):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                result = msgspec.json.decode(path.read_bytes(), type=Result)
                found[result.key] = result
        return found

    def keep(self, result: Result, pictures: Pictures | None) -> None:
        """Durable when this returns; the pictures first."""
        if pictures is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, truth=pictures.truth, found=pictures.found)
            write_atomic(self._place(result.key, "npz"), buffer.getvalue(), mode=0o600)
        write_atomic(self._place(result.key, "json"), msgspec.json.encode(result), mode=0o600)

    def pictures(self, key: str) -> Pictures | None:
        with contextlib.suppress(OSError, ValueError, KeyError), self._place(key, "npz").open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            return Pictures(arrays["truth"], arrays["found"])
        return None

    def conclude(self, files: dict[str, bytes]) -> None:
        """The report and what belongs to it, all or the old ones. They show people's data: for the owner's eyes."""
        write_all_atomic({self.path / name: data for name, data in files.items()}, mode=0o600)

    def _place(self, key: str, ending: str) -> Path:
        return self.path / "results" / f"{key}.{ending}"

    def _check(self, asked: Asked) -> None:
        path = self.path / "audit.json"
        if not path.exists():
            others = [one for one in self.path.iterdir() if one.name != ".lock"]
            if others:
                raise ConfigError(f"{self.path} holds something else ({others[0].name})", "choose another --out")
            write_atomic(path, msgspec.json.format(msgspec.json.encode(asked), indent=1))
            return
        try:
            there = msgspec.json.decode(path.read_bytes(), type=Asked)
        except (OSError, msgspec.MsgspecError) as exc:
            raise ConfigError(f"{path} cannot be read ({exc})", "choose another --out") from exc
        other = [name for name in Asked.__struct_fields__ if getattr(there, name) != getattr(asked, name)]
        if other:
            raise ConfigError(
                f"{self.path} holds another audit: its {' and '.join(other)} differ{'s' if len(other) == 1 else ''}",
                "choose another --out, or ask for the same to go on",
            )


def _require_space(path: Path) -> None:
    free = shutil.disk_usage(path).free
    if free < NEEDED_BYTES:
        raise StorageError(f"{path} has {free // 2**20} MB left, an audit needs {NEEDED_BYTES // 2**20}", "free some")
