"""What a disk holds after the power has gone: `os` below one folder, watched, and every state POSIX allows made real.

The rules (docs/adr/0039-power-cuts.md): the content of a file is sure as it was at its last fsync; later it may be
the old, the new, a part of the new, or zeros. Which names a folder holds is sure as of the folder's last fsync; each
later creation, removal and rename may have happened or not, one without the other. A rename is whole.

The files are real ones. Whoever writes around `os` (open() and its like) is found by `check_complete`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

State = Literal["least", "most", "mixed"]
REAL = {
    name: getattr(os, name)
    for name in ("open", "write", "fsync", "close", "replace", "rename", "unlink", "remove", "mkdir", "ftruncate")
}


class PowerCut(BaseException):
    """The power is gone: no code of the program runs any more."""


@dataclass(eq=False)
class Node:
    """A file or a folder. synced: what is sure of a file's content; written: what a program reads now."""

    folder: bool = False
    synced: bytes = b""
    written: bytes = b""


@dataclass(frozen=True)
class Change:
    """Of names: `new` is made of node, or `old` is gone, or both: a rename."""

    old: str = ""
    new: str = ""
    node: Optional[Node] = None

    def apply(self, names: dict[str, Node]) -> None:
        if self.old:
            names.pop(self.old, None)
        if self.new and self.node is not None:
            names[self.new] = self.node


class PoweredDisk:
    """on_step: called with words before every operation; may raise PowerCut. full: whether there is no space."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.on_step: Callable[[str], None] = lambda what: None
        self.full: Callable[[], bool] = lambda: False
        self._names: dict[str, Node] = {}
        self._sure: dict[str, Node] = {}
        self._pending: list[tuple[str, Change]] = []  # folder whose fsync makes it sure, what
        self._open: dict[int, tuple[str, Node]] = {}
        self.adopt()

    def adopt(self) -> None:
        """What is in the folder now is sure."""
        self._names, self._pending, self._open = {self.folder: Node(folder=True)}, [], {}
        for path in sorted(Path(self.folder).rglob("*")):
            data = b"" if path.is_dir() else path.read_bytes()
            self._names[str(path)] = Node(path.is_dir(), data, data)
        self._sure = dict(self._names)

    # --- what a program does

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """os goes through this disk while the block runs."""
        mine: dict[str, Callable[..., Any]] = {
            "open": self._do_open,
            "write": self._do_write,
            "fsync": self._do_fsync,
            "close": self._do_close,
            "replace": self._do_rename,
            "rename": self._do_rename,
            "unlink": self._do_unlink,
            "remove": self._do_unlink,
            "mkdir": self._do_mkdir,
            "ftruncate": self._do_ftruncate,
        }
        try:
            for name, function in mine.items():
                setattr(os, name, function)
            yield
        finally:
            for name, function in REAL.items():
                setattr(os, name, function)
            for descriptor in list(self._open):
                with contextlib.suppress(OSError):
                    REAL["close"](descriptor)
            self._open = {}

    def _inside(self, path: Any) -> str:
        """The path as text, "" where it is none of ours."""
        text = os.fspath(path) if not isinstance(path, int) else ""
        return text if isinstance(text, str) and (text == self.folder or text.startswith(self.folder + "/")) else ""

    def _need_space(self, name: str) -> None:
        if self.full():
            raise OSError(errno.ENOSPC, "No space left on device", name)

    def _do_open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        name = self._inside(path)
        new = bool(name) and bool(flags & os.O_CREAT) and name not in self._names
        if name and flags & (os.O_CREAT | os.O_TRUNC):
            self.on_step(f"open {self._short(name)}")
            if new:
                self._need_space(name)
        descriptor: int = REAL["open"](path, flags, mode, **more)
        if not name:
            return descriptor
        if new:
            self._change(Change(new=name, node=Node()))
        node = self._names[name]
        if flags & os.O_TRUNC:
            node.written = b""
        self._open[descriptor] = (name, node)
        return descriptor

    def _do_write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self._open:
            return int(REAL["write"](descriptor, data))
        name, node = self._open[descriptor]
        self.on_step(f"write {self._short(name)}")
        self._need_space(name)
        count = int(REAL["write"](descriptor, data))
        node.written += bytes(data[:count])  # all our files are written from their end on
        return count

    def _do_ftruncate(self, descriptor: int, size: int) -> None:
        REAL["ftruncate"](descriptor, size)
        if descriptor in self._open:
            node = self._open[descriptor][1]
            node.written = node.written[:size]

    def _do_fsync(self, descriptor: int) -> None:
        if descriptor not in self._open:
            REAL["fsync"](descriptor)
            return
        name, node = self._open[descriptor]  # the real one would only cost time
        self.on_step(f"fsync {self._short(name)}")
        node.synced = node.written
        if node.folder:
            for place, change in self._pending:
                if place == name:
                    change.apply(self._sure)
            self._pending = [(place, change) for place, change in self._pending if place != name]
        self.on_step(f"synced {self._short(name)}")

    def _do_close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        REAL["close"](descriptor)

    def _do_rename(self, old: Any, new: Any, **more: Any) -> None:
        source, target = self._inside(old), self._inside(new)
        if not source or not target:
            REAL["replace"](old, new, **more)
            return
        self.on_step(f"rename {self._short(target)}")
        REAL["replace"](old, new)
        self._change(Change(source, target, self._names[source]))

    def _do_unlink(self, path: Any, **more: Any) -> None:
        name = self._inside(path)
        if name:
            self.on_step(f"unlink {self._short(name)}")
        REAL["unlink"](path, **more)
        if name:
            self._change(Change(old=name))

    def _do_mkdir(self, path: Any, mode: int = 0o777, **more: Any) -> None:
        name = self._inside(path)
        if name:
            self.on_step(f"mkdir {self._short(name)}")
            self._need_space(name)
        REAL["mkdir"](path, mode, **more)
        if name:
            self._change(Change(new=name, node=Node(folder=True)))

    def _change(self, change: Change) -> None:
        change.apply(self._names)
        self._pending.append((os.path.dirname(change.new or change.old), change))

    def _short(self, name: str) -> str:
        return name[len(self.folder) + 1 :]

    # --- what is sure, and what may be

    def sure(self, path: Path) -> Optional[bytes]:
        """The content that this file has whatever happens now; None where it may be missing or another one."""
        node = self._sure.get(str(path))
        moved = any(str(path) in (change.old, change.new) for _, change in self._pending)
        if node is None or moved or node.synced != node.written:
            return None
        return node.synced

    def at_least(self, path: Path) -> bytes:
        """What a file that only grows begins with, whatever happens now; b"" where it may be missing."""
        node = self._sure.get(str(path))
        return node.synced if node is not None and node is self._names.get(str(path)) else b""

    def lose_power(self, state: State, rng: random.Random) -> None:
        """The folder as it is found afterwards. least: nothing that was not synced is there; most: all is."""
        names = dict(self._sure)
        for _, change in self._pending:
            if state == "most" or (state == "mixed" and rng.random() < 0.5):
                change.apply(names)
        there = {name: node for name, node in names.items() if self._reachable(name, names)}
        self._put({name: None if node.folder else _found(node, state, rng) for name, node in there.items()})

    def _reachable(self, name: str, names: dict[str, Node]) -> bool:
        return name == self.folder or (os.path.dirname(name) in names and self._reachable(os.path.dirname(name), names))

    def _put(self, files: dict[str, Optional[bytes]]) -> None:
        for path in Path(self.folder).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for name, data in sorted(files.items()):
            if data is None:
                Path(name).mkdir(exist_ok=True)
            else:
                Path(name).write_bytes(data)
        self.adopt()

    def check_complete(self) -> None:
        """AssertionError where a file was written in a way that was not watched."""
        there = {str(path): b"" if path.is_dir() else path.read_bytes() for path in Path(self.folder).rglob("*")}
        known = {name: node.written for name, node in self._names.items() if name != self.folder}
        strange = {name for name in {*there, *known} if there.get(name) != known.get(name)}
        assert not strange, f"written around the watched disk: {sorted(map(self._short, strange))}"


def _found(node: Node, state: State, rng: random.Random) -> bytes:
    if state == "least":
        return node.synced
    if state == "most" or node.synced == node.written:
        return node.written
    sure = len(node.synced) if node.written.startswith(node.synced) else 0  # of a file that only grows
    torn = node.written[: rng.randrange(sure, len(node.written) + 1)]
    zeros = node.written[:sure] + bytes(len(node.written) - sure)
    return rng.choice([node.synced, node.written, torn, zeros])
