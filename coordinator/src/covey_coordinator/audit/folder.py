"""The folder of an audit: what was asked, and every result as it comes, so that one that is interrupted goes on.

audit.json              what was asked: bundle, plan, data, seed, level, and of which covey; another's folder is refused
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
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from covey_coordinator.audit.results import Pictures, Result
from covey_edge.files import make_folder, write_all_atomic, write_atomic
from covey_edge.held import alone_in
from covey_protocol.errors import ConfigError, StorageError

FORMAT = 2
NEEDED_BYTES = 64 * 1024 * 1024  # results, pictures and the training child's copies of the data


class Asked(Struct, frozen=True):
    """What makes two audits the same. bundle: sha256 of its file; data: of the arrays; plan: setting -> value. covey:
    the versions of covey and of TensorFlow that measure: results of two are not to be mixed.
    """

    bundle: str
    data: str
    plan: dict[str, Any]
    seed: int
    level: str
    covey: str = ""
    format: int = FORMAT

    def differences(self, other: Asked) -> list[str]:
        """In words; `other` is what is asked now."""
        found = []
        for name in ("bundle", "data"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"the {name} (sha256 {getattr(self, name)[:12]}, now {getattr(other, name)[:12]})")
        for name in sorted({*self.plan, *other.plan}):
            then, now = self.plan.get(name), other.plan.get(name)
            if then != now:
                found.append(f"plan.{name} ({_worded(then)}, now {_worded(now)})")
        for name in ("seed", "level", "covey"):
            then, now = getattr(self, name), getattr(other, name)
            if then != now:
                found.append(
                    f"the {'version of covey' if name == 'covey' else name} ({_worded(then)}, now {_worded(now)})"
                )
        return found


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
        there = self._read(path)
        if other := there.differences(asked):
            raise ConfigError(
                f"{self.path} holds another audit: {'; '.join(other)}",
                "choose another --out, or ask for the same, with the same covey, to go on",
            )

    def _read(self, path: Path) -> Asked:
        try:
            raw = path.read_bytes()
            told = msgspec.json.decode(raw, type=_Format).format
            if told != FORMAT:
                raise ConfigError(
                    f"{path} has format {told}, this covey writes {FORMAT}",
                    "choose another --out: it starts anew there",
                )
            return msgspec.json.decode(raw, type=Asked)
        except (OSError, msgspec.MsgspecError) as exc:
            raise ConfigError(f"{path} cannot be read ({exc})", "choose another --out") from exc


class _Format(Struct):
    format: int = 0


def _worded(value: object) -> str:
    return "not set" if value in (None, "") else str(value)


def _require_space(path: Path) -> None:
    free = shutil.disk_usage(path).free
    if free < NEEDED_BYTES:
        raise StorageError(f"{path} has {free // 2**20} MB left, an audit needs {NEEDED_BYTES // 2**20}", "free some")
