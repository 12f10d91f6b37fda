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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

State = Literal["least", "most", "mixed"]
REAL = {
    name: getattr(os, name)
    for name in (
        *("open", "write", "fsync", "close", "ftruncate"),
        *("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "utime", "listdir", "scandir"),
    )
}


class PowerCut(BaseException):
    """The power is gone: no code of the program runs any more."""


@dataclass(eq=False)
class Node:
    """A file or a folder. synced: what is sure of a file's content; written: what a program reads now.

    names, sure: of a folder, what a program finds in it now, and what is there whatever happens; pending: the changes
    between the two. changed: the time of the last change, in ns.
    """

    folder: bool = False
    synced: bytes = b""
    written: bytes = b""
    names: dict[str, Node] = field(default_factory=dict)
    sure: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    changed: int = 0

    def change(self, change: Change) -> None:
        change.apply(self.names)
        self.pending.append(change)


@dataclass(frozen=True)
class Change:
    """Of names in a folder: `new` is made of node, or `old` is gone, or both: a rename."""

    old: str = ""
    new: str = ""
    node: Optional[Node] = None

    def apply(self, names: dict[str, Node]) -> None:
        if self.old:
            names.pop(self.old, None)
        if self.new and self.node is not None:
            names[self.new] = self.node


class PoweredDisk:
    """on_step: called with words before every operation; may `cut`. full: whether there is no space. now: the
    time that files bear, in ns; no two the same, and folders are read in the order of names, so that lives can be
    repeated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.on_step: Callable[[str], None] = lambda what: None
        self.full: Callable[[], bool] = lambda: False
        self.now: Callable[[], int] = lambda: 0
        self._changes = 0
        self._gone = False
        self._root = Node(folder=True)
        self._open: dict[int, tuple[str, Node]] = {}
        self.adopt()

    def adopt(self) -> None:
        """What is in the folder now is sure."""
        self._root, self._open = _read(Path(self.folder)), {}

    def cut(self) -> None:
        """The power is gone: also what a program would put right while the exception passes does not happen."""
        self._gone = True
        raise PowerCut

    def _step(self, what: str) -> None:
        if self._gone:
            raise PowerCut
        self.on_step(what)

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
            "utime": self._do_utime,
            "listdir": lambda *path: sorted(REAL["listdir"](*path)),
            "scandir": _Sorted,
            "rmdir": lambda path, **more: self._do_unlink(path, how="rmdir", **more),
            "ftruncate": self._do_ftruncate,
        }
        try:
            for name, function in mine.items():
                setattr(os, name, function)
            yield
        finally:
            for name, function in REAL.items():
                setattr(os, name, function)
            self.close_all()

    def close_all(self) -> None:
        """As the kernel does when a program has been killed."""
        for descriptor in list(self._open):
            with contextlib.suppress(OSError):
                REAL["close"](descriptor)
        self._open = {}

    def _inside(self, path: Any, dir_fd: Optional[int] = None) -> str:
        """The path as text, "" where it is none of ours."""
        text = os.fspath(path) if not isinstance(path, int) else ""
        if not isinstance(text, str):
            return ""
        if dir_fd is not None:  # as shutil.rmtree goes through a tree
            return f"{self._open[dir_fd][0]}/{text}" if dir_fd in self._open else ""
        return text if text == self.folder or text.startswith(self.folder + "/") else ""

    def _find(self, name: str) -> Optional[Node]:
        node: Optional[Node] = self._root
        for leaf in self._leaves(name):
            node = node.names.get(leaf) if node is not None else None
        return node

    def _leaves(self, name: str) -> list[str]:
        return [leaf for leaf in self._short(name).split("/") if leaf]

    def _around(self, name: str) -> Node:
        """The folder that this is in."""
        node = self._find(os.path.dirname(name))
        assert node is not None
        return node

    def _need_space(self, name: str) -> None:
        if self.full():
            raise OSError(errno.ENOSPC, "No space left on device", name)

    def _do_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: Optional[int] = None) -> int:
        name = self._inside(path, dir_fd)
        new = bool(name) and bool(flags & os.O_CREAT) and self._find(name) is None
        if name and flags & (os.O_CREAT | os.O_TRUNC):
            self._step(f"open {self._short(name)}")
            if new:
                self._need_space(name)
        descriptor: int = REAL["open"](path, flags, mode, dir_fd=dir_fd)
        if not name:
            return descriptor
        if new:
            self._around(name).change(Change(new=os.path.basename(name), node=Node()))
        node = self._find(name)
        assert node is not None, f"written around the watched disk: {self._short(name)}"
        if flags & os.O_TRUNC:
            node.written = b""
        if new:
            self._date(descriptor, node)
        self._open[descriptor] = (name, node)
        return descriptor

    def _do_write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self._open:
            return int(REAL["write"](descriptor, data))
        name, node = self._open[descriptor]
        self._step(f"write {self._short(name)}")
        self._need_space(name)
        count = int(REAL["write"](descriptor, data))
        node.written += bytes(data[:count])  # all our files are written from their end on
        self._date(descriptor, node)
        return count

    def _date(self, place: Any, node: Node) -> None:
        self._changes += 1
        node.changed = self.now() + self._changes
        REAL["utime"](place, ns=(node.changed, node.changed))

    def _do_utime(self, path: Any, *times: Any, **more: Any) -> None:
        name = self._inside(path)
        node = self._find(name) if name and not times and not more else None
        if node is not None:
            self._date(path, node)
        else:
            REAL["utime"](path, *times, **more)

    def _do_ftruncate(self, descriptor: int, size: int) -> None:
        if descriptor in self._open and self._gone:
            raise PowerCut
        REAL["ftruncate"](descriptor, size)
        if descriptor in self._open:
            node = self._open[descriptor][1]
            node.written = node.written[:size]

    def _do_fsync(self, descriptor: int) -> None:
        if descriptor not in self._open:
            REAL["fsync"](descriptor)
            return
        name, node = self._open[descriptor]  # the real one would only cost time
        self._step(f"fsync {self._short(name)}")
        node.synced = node.written
        if node.folder:
            node.sure, node.pending = dict(node.names), []
        self._step(f"synced {self._short(name)}")

    def _do_close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        REAL["close"](descriptor)

    def _do_rename(self, old: Any, new: Any, **more: Any) -> None:
        source, target = self._inside(old), self._inside(new)
        if not source or not target:
            REAL["replace"](old, new, **more)
            return
        assert os.path.dirname(source) == os.path.dirname(target), "renamed into another folder"
        self._step(f"rename {self._short(target)}")
        REAL["replace"](old, new)
        self._around(target).change(Change(os.path.basename(source), os.path.basename(target), self._find(source)))

    def _do_unlink(self, path: Any, how: str = "unlink", *, dir_fd: Optional[int] = None) -> None:
        name = self._inside(path, dir_fd)
        if name:
            self._step(f"{how} {self._short(name)}")
        REAL[how](path, dir_fd=dir_fd)
        if name:
            self._around(name).change(Change(old=os.path.basename(name)))

    def _do_mkdir(self, path: Any, mode: int = 0o777, **more: Any) -> None:
        name = self._inside(path)
        if name:
            self._step(f"mkdir {self._short(name)}")
            self._need_space(name)
        REAL["mkdir"](path, mode, **more)
        if name:
            self._around(name).change(Change(new=os.path.basename(name), node=Node(folder=True)))

    def _short(self, name: str) -> str:
        return name[len(self.folder) + 1 :]

    # --- what is sure, and what may be

    def sure(self, path: Path) -> Optional[bytes]:
        """The content that this file has whatever happens now; None where it may be missing or another one."""
        node: Optional[Node] = self._root
        for leaf in self._leaves(str(path)):
            if node is None or any(leaf in (change.old, change.new) for change in node.pending):
                return None
            node = node.sure.get(leaf)
        return node.synced if node is not None and node.synced == node.written else None

    def at_least(self, path: Path) -> bytes:
        """What a file that only grows begins with, whatever happens now; b"" where it may be missing."""
        node: Optional[Node] = self._root
        for leaf in self._leaves(str(path)):
            node = node.sure.get(leaf) if node is not None else None
        return node.synced if node is not None and node is self._find(str(path)) else b""

    def lose_power(self, state: State, rng: random.Random) -> None:
        """The folder as it is found afterwards. least: nothing that was not synced is there; most: all is."""
        self._gone = False
        left = dict(self._left(self.folder, self._root, state, rng))
        there = dict(_below(self.folder, self._root))
        same = {name for name, (node, data) in left.items() if _is(there.get(name), node, data)}
        for path in sorted(Path(self.folder).rglob("*"), reverse=True):  # also what was written around us
            if str(path) not in same:
                (os.rmdir if path.is_dir() else os.unlink)(path)
        for name, (node, data) in left.items():
            if name not in same and node.folder:
                os.mkdir(name)
            elif name not in same:
                Path(name).write_bytes(data)
                os.utime(name, ns=(node.changed, node.changed))
        self.adopt()

    def _left(
        self, place: str, folder: Node, state: State, rng: random.Random
    ) -> Iterator[tuple[str, tuple[Node, bytes]]]:
        """What is below a folder, by path, with the content that is found; folders come before what is in them."""
        names = dict(folder.sure)
        for change in folder.pending:
            if state == "most" or (state == "mixed" and rng.random() < 0.5):
                change.apply(names)
        for leaf, node in sorted(names.items()):
            name = f"{place}/{leaf}"
            yield name, (node, b"" if node.folder else _found(node, state, rng))
            yield from self._left(name, node, state, rng)

    def check_complete(self) -> None:
        """AssertionError where a file was written in a way that was not watched."""
        there, known = (
            {name: (one.folder, one.written) for name, one in _below("", node)}
            for node in (_read(Path(self.folder)), self._root)
        )
        strange = sorted(name for name in {*there, *known} if there.get(name) != known.get(name))
        assert not strange, f"written around the watched disk: {strange}"


class _Sorted:
    """os.scandir in the order of names."""

    def __init__(self, *path: Any) -> None:
        with REAL["scandir"](*path) as entries:
            self._entries = iter(sorted(entries, key=lambda entry: str(entry.name)))

    def __enter__(self) -> _Sorted:
        return self

    def __exit__(self, *given: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return self._entries

    def __next__(self) -> Any:
        return next(self._entries)

    def close(self) -> None:
        pass


def _read(path: Path) -> Node:
    """A file or a folder of the real disk, taken as sure."""
    if not path.is_dir():
        data = path.read_bytes()
        return Node(False, data, data, changed=path.stat().st_mtime_ns)
    names = {one.name: _read(one) for one in sorted(path.iterdir())}
    return Node(True, names=names, sure=dict(names))


def _below(place: str, folder: Node) -> Iterator[tuple[str, Node]]:
    """By path; folders come before what is in them."""
    for leaf, node in folder.names.items():
        yield f"{place}/{leaf}", node
        yield from _below(f"{place}/{leaf}", node)


def _is(there: Optional[Node], node: Node, data: bytes) -> bool:
    """Whether a path needs no change to become this."""
    if there is None or there.folder or node.folder:
        return there is not None and there.folder and node.folder
    return there.written == data and there.changed == node.changed


def _found(node: Node, state: State, rng: random.Random) -> bytes:
    if state == "least":
        return node.synced
    if state == "most" or node.synced == node.written:
        return node.written
    sure = len(node.synced) if node.written.startswith(node.synced) else 0  # of a file that only grows
    torn = node.written[: rng.randrange(sure, len(node.written) + 1)]
    zeros = node.written[:sure] + bytes(len(node.written) - sure)
    return rng.choice([node.synced, node.written, torn, zeros])
