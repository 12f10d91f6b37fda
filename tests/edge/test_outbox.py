"""The outbox keeps what it promises, also where the power is cut between any two calls to the operating system."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from covey_edge import files
from covey_edge.files import write_all_atomic, write_atomic
from covey_edge.outbox import Entry, NumberFile, Outbox
from covey_protocol.blobs import blob_ref
from covey_protocol.messages import Offer

UPDATE = b"update"
OFFER = Offer("r.1", blob_ref(UPDATE), 3)
ENTRY = Entry(OFFER, UPDATE)
OTHER = Entry(Offer("r.2", blob_ref(b"later"), 3), b"later")


def test_the_outbox_gives_back_what_it_keeps(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.keep(ENTRY)
    outbox.keep(OTHER)
    again = Outbox(tmp_path)
    assert again.offers() == [OFFER, OTHER.offer]
    assert again.update(OFFER) == UPDATE
    assert again.update(Offer("r.1", blob_ref(b"another"), 3)) is None
    again.forget("r.1")
    again.forget("r.1")
    assert outbox.offers() == [OTHER.offer]
    assert outbox.update(OFFER) is None


def test_what_crashes_left_of_unfinished_writes_is_swept_away(tmp_path: Path) -> None:
    Outbox(tmp_path).keep(ENTRY)
    left = tmp_path / "outbox" / ".r.2.msgpack.4711.tmp"
    left.write_bytes(b"half")
    assert Outbox(tmp_path).offers() == [OFFER]
    assert not left.exists()


def test_an_update_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    Outbox(tmp_path).keep(ENTRY)
    (path,) = (tmp_path / "outbox").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "nonsense": lambda data: b"\x00nonsense",
    "half a file": lambda data: data[: len(data) // 2],
    "a flipped bit of the update": lambda data: data.replace(b"update", b"updatf"),
    "an empty file": lambda data: b"",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_set_aside_not_deleted(what: str, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.keep(ENTRY)
    outbox.keep(OTHER)
    path = tmp_path / "outbox" / "r.1.msgpack"
    path.write_bytes(DAMAGE[what](path.read_bytes()))
    damaged = path.read_bytes()
    assert outbox.update(OFFER) is None
    assert outbox.offers() == [OTHER.offer]
    assert (tmp_path / "outbox.damaged").read_bytes() == damaged
    assert not path.exists()


def test_the_one_entry_of_an_older_agent_is_taken_up(tmp_path: Path) -> None:
    old = {"invitation": {"round_id": "r.1"}, "offer": msgspec.to_builtins(OFFER), "update": UPDATE}
    old["offer"]["update"]["sha256"] = OFFER.update.sha256  # as bytes, not base64
    (tmp_path / "outbox.msgpack").write_bytes(msgspec.msgpack.encode(old))
    assert Outbox(tmp_path).offers() == [OFFER]
    assert Outbox(tmp_path).update(OFFER) == UPDATE
    assert not (tmp_path / "outbox.msgpack").exists()


def test_a_damaged_file_of_an_older_agent_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "outbox.msgpack").write_bytes(b"\x00nonsense")
    assert Outbox(tmp_path).offers() == []
    assert (tmp_path / "outbox.damaged").read_bytes() == b"\x00nonsense"


# --- power cuts


class PowerCut(BaseException):
    pass


@dataclass
class Machine:
    """The calls that `files` makes, on a disk of which only what was synced is sure to survive.

    Content is durable after fsync of the file, names after fsync of the folder; until then either the old or the new
    may survive, in any combination. cut_at: the call before which the power goes.
    """

    cut_at: int = 10**9
    names: dict[str, int] = field(default_factory=lambda: {"/": 0})  # path -> inode, as the running system sees it
    synced_names: dict[str, int] = field(default_factory=lambda: {"/": 0})
    content: dict[int, bytes] = field(default_factory=dict)
    synced_content: dict[int, bytes] = field(default_factory=dict)
    calls: int = 0
    open_files: dict[int, str] = field(default_factory=dict)

    def step(self) -> None:
        if self.calls >= self.cut_at:
            raise PowerCut
        self.calls += 1

    def open(self, path: Any, flags: int, mode: int = 0) -> int:
        self.step()
        name = str(path)
        if flags & os.O_CREAT:
            inode = self.names.setdefault(name, len(self.content) + 1000)
            self.content[inode] = b"" if flags & os.O_TRUNC else self.content.get(inode, b"")
        elif name not in self.names:
            raise FileNotFoundError(2, "No such file", name)
        descriptor = len(self.open_files) + 3
        self.open_files[descriptor] = name
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        self.step()
        piece = bytes(data[:7])  # short writes happen
        self.content[self.names[self.open_files[descriptor]]] += piece
        return len(piece)

    def fsync(self, descriptor: int) -> None:
        self.step()
        name = self.open_files[descriptor]
        inode = self.names[name]
        if inode in self.content:
            self.synced_content[inode] = self.content[inode]
            return
        inside = lambda path: path != name and str(Path(path).parent) == name  # noqa: E731
        kept = {path: node for path, node in self.synced_names.items() if not inside(path)}
        self.synced_names = kept | {path: node for path, node in self.names.items() if inside(path)}

    def close(self, descriptor: int) -> None:
        pass

    def replace(self, old: Any, new: Any) -> None:
        self.step()
        self.names[str(new)] = self.names.pop(str(old))

    def unlink(self, path: Any) -> None:
        self.step()
        del self.names[str(path)]

    def mkdir(self, path: Any) -> None:
        self.step()
        self.names[str(path)] = -len(self.names)

    def survivors(self) -> Iterator[dict[str, bytes]]:
        """Every disk that may be found after the power cut."""
        changed = sorted(path for path in {**self.names, **self.synced_names} if self._differs(path))
        for choice in range(2 ** len(changed)):
            names = dict(self.synced_names)
            for bit, path in enumerate(changed):
                if choice >> bit & 1:
                    names.pop(path, None)
                    if path in self.names:
                        names[path] = self.names[path]
            reachable = {path: node for path, node in names.items() if self._whole_path(path, names)}
            for synced in (True, False):  # content that was not synced: lost, or as it was written
                source = self.synced_content if synced else {**self.content, **self.synced_content}
                yield {path: source.get(node, b"") for path, node in reachable.items() if node >= 1000}

    def _differs(self, path: str) -> bool:
        return self.names.get(path) != self.synced_names.get(path)

    def _whole_path(self, path: str, names: dict[str, int]) -> bool:
        return all(str(parent) in names for parent in Path(path).parents)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """Puts such a machine under `covey_edge.files`."""

    def use(made: Machine) -> None:
        calls = {
            name: getattr(made, name) for name in ("open", "write", "fsync", "close", "replace", "unlink", "mkdir")
        }
        path = SimpleNamespace(
            isdir=lambda path: made.names.get(str(path), 1000) <= 0, exists=lambda path: str(path) in made.names
        )
        flags = {name: getattr(os, name) for name in ("O_RDONLY", "O_WRONLY", "O_CREAT", "O_TRUNC")}
        monkeypatch.setattr(files, "os", SimpleNamespace(path=path, getpid=os.getpid, **calls, **flags))

    return use


PLACE = Path("/state/deep/file")


def test_a_power_cut_at_any_call_leaves_the_old_file_or_the_new_one(
    machine: Callable[[Machine], None],
) -> None:
    checked = 0
    for cut_at in range(100):
        made = Machine()
        machine(made)
        write_atomic(PLACE, b"the old content")
        made.cut_at = made.calls + cut_at
        done = True
        try:
            write_atomic(PLACE, b"the new content, which is longer")
        except PowerCut:
            done = False
        found = {disk.get(str(PLACE)) for disk in made.survivors()}
        assert found <= ({b"the new content, which is longer"} | (set() if done else {b"the old content"}))
        checked += 1
        if done:
            break
    assert checked > 8  # open, several writes, two syncs, the replacement


def test_what_was_written_survives_with_the_folders_that_were_made_for_it(
    machine: Callable[[Machine], None],
) -> None:
    made = Machine()
    machine(made)
    write_atomic(PLACE, b"content")
    assert {disk.get(str(PLACE)) for disk in made.survivors()} == {b"content"}


FILES = {PLACE.with_name(name): name.encode() * 5 for name in ("one", "two")} | {Path("/other/three"): b"three"}


def test_files_written_together_are_each_old_or_new_after_a_power_cut_and_all_new_at_the_end(
    machine: Callable[[Machine], None],
) -> None:
    cuts = 0
    for cut_at in range(100):
        made = Machine()
        machine(made)
        write_all_atomic(dict.fromkeys(FILES, b"old"))
        made.cut_at = made.calls + cut_at
        done = True
        try:
            write_all_atomic(FILES)
        except PowerCut:
            done = False
        for path, data in FILES.items():
            found = {disk.get(str(path)) for disk in made.survivors()}
            assert found <= ({data} | (set() if done else {b"old"}))
        if done:
            break
        cuts += 1
    assert cuts > 12  # three times open, writes, sync and replacement; two folders


def test_files_written_together_cost_one_sync_of_their_folder(machine: Callable[[Machine], None]) -> None:
    made = Machine()
    machine(made)
    write_atomic(PLACE, b"makes the folders")
    synced: list[str] = []
    fsync = made.fsync

    def noting(descriptor: int) -> None:
        synced.append(made.open_files[descriptor])
        fsync(descriptor)

    made.fsync = noting  # type: ignore[method-assign]
    machine(made)
    write_all_atomic({PLACE.with_name(f"{number}"): b"x" for number in range(5)})
    assert synced.count(str(PLACE.parent)) == 1
    assert len(synced) == 6


FORGOTTEN = {
    "the file's sync": lambda self, descriptor: self.names[self.open_files[descriptor]] in self.content,
    "the folders' syncs": lambda self, descriptor: self.names[self.open_files[descriptor]] not in self.content,
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_the_model_of_the_disk_notices_without(what: str, machine: Callable[[Machine], None]) -> None:
    made = Machine()
    fsync = made.fsync
    made.fsync = lambda descriptor: None if FORGOTTEN[what](made, descriptor) else fsync(descriptor)  # type: ignore
    machine(made)
    write_atomic(PLACE, b"content")
    assert {disk.get(str(PLACE)) for disk in made.survivors()} != {b"content"}


def test_reserved_numbers_are_durable_and_nonsense_counts_as_none(tmp_path: Path) -> None:
    numbers = NumberFile(tmp_path / "sequence")
    assert numbers.load() == 0
    numbers.store(17)
    assert NumberFile(tmp_path / "sequence").load() == 17
    (tmp_path / "sequence").write_bytes(b"\xff\x00")
    assert numbers.load() == 0
