"""The models that a device keeps for its owner: state_dir/models, or state_dir/models/TASK.

    model.json          which one is used, which others there are, how they scored: the one file that is replaced
    SHA256.covey        bundles as the coordinator sealed them
    SHA256.f32          flat parameter vectors, federated and personal, float32 little-endian

Files named by their hash never change, and model.json names only files that are durable. So at any moment, also after a
power cut, what model.json names is whole; what it does not name is left from an interrupted change and is swept by the
next. Readers take no lock. Writers (the agent, `covey infer rollback`) take one, which the system frees when they die.

Nothing in here leaves the device.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Optional

import msgspec
from msgspec import Meta, Struct

from covey_edge.files import DISK, Disk, sync_folder
from covey_protocol.errors import StorageError

POINTER = "model.json"
LOCK = ".lock"
HISTORY = 100  # score lines kept; 20 KB
REFUSED = 32  # models the owner has rolled back from, remembered
_Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Kind = Literal["federated", "personal"]


class Scale(Struct, frozen=True, forbid_unknown_fields=True):
    """How the inputs of this device are normalised: as [data] normalise says, by the statistics in this file of
    state_dir."""

    how: Literal["standard", "range"]
    statistics: str


class Version(Struct, frozen=True, forbid_unknown_fields=True):
    """One model. bundle, parameters: sha256 of the files. sealed_by: keys of which one sealed the bundle. number,
    round_id: of the round that brought the federated parameters; of a personal model, of those it was tuned from, and
    base: their sha256. made_ms: Unix time. scale: of the inputs, None where they go in as they are."""

    kind: Kind
    bundle: _Hex
    parameters: _Hex
    sealed_by: tuple[_Hex, ...]
    number: int
    round_id: str
    made_ms: int
    base: str = ""
    scale: Optional[Scale] = None

    def __str__(self) -> str:
        tuned = "personal model, tuned from round" if self.kind == "personal" else "federated model of round"
        return f"{tuned} {self.number} ({self.round_id})"

    @property
    def files(self) -> tuple[str, str]:
        return f"{self.bundle}.covey", f"{self.parameters}.f32"


class Scored(Struct, frozen=True, forbid_unknown_fields=True):
    """One comparison on the held-out data. scores: model -> (mean loss, accuracy), None for what is not finite;
    decision: what came of it."""

    at_ms: int
    number: int
    examples: int
    scores: dict[str, tuple[Optional[float], Optional[float]]]
    decision: str


class Kept(Struct, frozen=True, forbid_unknown_fields=True):
    """model.json. used: the model that applications get; previous: the one used before, for a rollback. federated: the
    newest that was let in; personal: this device's own. refused: parameters the owner has rolled back from."""

    used: Version
    federated: Version
    personal: Optional[Version] = None
    previous: Optional[Version] = None
    refused: tuple[str, ...] = ()
    history: tuple[Scored, ...] = ()

    @property
    def files(self) -> set[str]:
        versions = (self.used, self.federated, self.personal, self.previous)
        return {name for version in versions if version is not None for name in version.files}

    def using(self, version: Version) -> Kept:
        """With `version` in use, and the one used until now as the previous one."""
        if version == self.used:
            return self
        # the same parameters under a newer round's number are the same model: nothing to roll back to
        same = version.parameters == self.used.parameters and version.bundle == self.used.bundle
        return msgspec.structs.replace(self, used=version, previous=self.previous if same else self.used)

    def noting(self, scored: Scored) -> Kept:
        return msgspec.structs.replace(self, history=(*self.history, scored)[-HISTORY:])

    def rolled_back(self) -> Kept:
        """The previous model in use again, and the one used until now refused; a second time undoes the first.

        StorageError where there is none.
        """
        back = self.previous
        if back is None:
            raise StorageError("there is no model from before to go back to", "the first one is the one in use")
        undoes = back.parameters in self.refused
        refused = [one for one in self.refused if one != back.parameters]
        refused += [] if undoes else [self.used.parameters]
        return msgspec.structs.replace(
            self,
            used=back,
            previous=self.used,
            federated=back if back.kind == "federated" else self.federated,
            personal=back if back.kind == "personal" else self.personal,
            refused=tuple(refused[-REFUSED:]),
        )


class ModelStore:
    """One task's models. Raises StorageError where the disk refuses, or holds what cannot be read."""

    def __init__(self, state_dir: Path, task: str = "", disk: Disk = DISK) -> None:
        self.state_dir, self.folder = state_dir, state_dir / "models" / task
        self._disk = disk

    @property
    def pointer(self) -> Path:
        return self.folder / POINTER

    def load(self) -> Optional[Kept]:
        """None where nothing is kept."""
        data = self._disk.read(self.pointer)
        if data is None and not self.pointer.exists():
            return None
        try:
            return msgspec.json.decode(data or b"", type=Kept)
        except msgspec.MsgspecError as exc:
            raise StorageError(
                f"{self.pointer} cannot be read ({exc})", "delete it; the next round brings a model again"
            ) from exc

    def path(self, name: str) -> Path:
        return self.folder / name

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """While another program changes the store, wait."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise StorageError(f"{self.folder} cannot be written ({exc.strerror})", "check its permissions") from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def stage(self, name: str, source: Path) -> Path:
        """The file `source`, which never changes, under `name` in the store; not durable until `commit`.

        A second name for the same bytes where the file system has that (no copy, no space), else a copy. A damaged file
        of that name is replaced.
        """
        target = self.path(name)
        if target.exists():
            if os.path.samefile(source, target) or self._is_whole(name):
                return target
            self._disk.remove(target)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
        except FileExistsError:
            pass
        except OSError:  # another file system, or one without links: FAT, Android's shared storage
            data = self._disk.read(source)
            if data is None:
                raise StorageError(f"{source} cannot be read", "the next round brings it again") from None
            self._disk.write(target, data, mode=0o600)
        return target

    def _is_whole(self, name: str) -> bool:
        return hashlib.sha256(self._disk.read(self.path(name)) or b"").hexdigest() == name.split(".")[0]

    def commit(self, kept: Kept, new: Mapping[str, bytes]) -> None:
        """Replace model.json, after what it names is durable, and drop what it does not name. Within `changing`.

        new: files to be written, by name. StorageError where one that `kept` names is not here; then nothing changes.
        """
        self._disk.write_all({self.path(name): data for name, data in new.items()}, mode=0o600)
        missing = sorted(name for name in kept.files if not self.path(name).exists())
        if missing:
            raise StorageError(f"{self.path(missing[0])} is not there", "the next round brings a model again")
        try:
            sync_folder(self.folder)
        except OSError as exc:
            raise StorageError(f"cannot write {self.folder} ({exc.strerror})", "check its permissions") from exc
        self._disk.write(self.pointer, msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n", mode=0o600)
        self.sweep(kept)

    def sweep(self, kept: Kept) -> None:
        """Drop what `kept` does not name."""
        self._disk.sweep(self.folder)
        for name in self._disk.names(self.folder):
            if name.endswith((".covey", ".f32")) and name not in kept.files:
                self._disk.remove(self.path(name))

    def read(self, version: Version) -> tuple[bytes, bytes]:
        """(bundle, parameters), checked against their hashes. FileNotFoundError where a writer was faster."""
        found = []
        for name in version.files:
            data = self.path(name).read_bytes()
            if hashlib.sha256(data).hexdigest() != name.split(".")[0]:
                raise StorageError(
                    f"{self.path(name)} is damaged", "go back to the model before: `covey infer rollback`"
                )
            found.append(data)
        return found[0], found[1]
