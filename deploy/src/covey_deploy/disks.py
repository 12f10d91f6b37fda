"""What Linux says of a disk, and why it must not be overwritten. Reads sysfs and proc; writes nothing.

`Machine` holds where these lie, so that a made-up tree of them can be judged without a disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from covey_deploy.partitions import label, read_partitions
from covey_protocol.errors import ConfigError

LARGE = 256 * 10**9  # bytes; cards beyond it are rare, backup disks are not
_NOT_A_CARD = re.compile(r"(mmcblk\d+(boot|rpmb|gp)\d*|ram\d+|zram\d+|sr\d+|dm-\d+|md\d+)")
_SYSTEM = ("/", "/usr", "/boot", "/boot/firmware", "/boot/efi", "/var", "/home")


@dataclass(frozen=True)
class Disk:
    """size: bytes; 0 without a card. removable: a card reader, a card or a USB stick. partitions: kernel names."""

    name: str
    path: Path
    size: int
    removable: bool
    read_only: bool
    model: str
    partitions: tuple[str, ...]

    def described(self) -> str:
        kind = "removable" if self.removable else "not removable"
        return f"{self.path}: {self.model or 'unknown model'}, {self.size / 1e9:.1f} GB, {kind}"


@dataclass(frozen=True)
class Machine:
    """Where the kernel tells of disks."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    dev: Path = Path("/dev")

    # -- finding

    def find(self, path: Path) -> Disk:
        """The disk behind a name, also /dev/disk/by-id/.... ConfigError for a file, a partition, a folder."""
        try:
            status = path.stat()
        except OSError as exc:
            raise ConfigError(f"there is no {path} ({exc.strerror})", "covey flash --list shows the cards") from exc
        if not stat.S_ISBLK(status.st_mode):
            raise ConfigError(f"{path} is not a disk", "give a disk such as /dev/sdX, or write a file with --output")
        folder = self._of_number(os.major(status.st_rdev), os.minor(status.st_rdev))
        if folder is None:
            raise ConfigError(f"the kernel knows nothing of {path}", "is the card reader still plugged in?")
        if (folder / "partition").exists():
            whole = self.dev / folder.parent.name
            raise ConfigError(f"{path} is a partition of {whole}, not a disk", f"give the whole disk: {whole}")
        return self.disk(folder.name)

    def disk(self, name: str) -> Disk:
        """By its kernel name, such as sda."""
        folder = self.sys / "block" / name
        text = _text(folder / "device" / "model") or _text(folder / "device" / "name")
        vendor = _text(folder / "device" / "vendor")
        return Disk(
            name,
            self.dev / name,
            int(_text(folder / "size") or 0) * 512,
            self._is_removable(folder),
            _text(folder / "ro") == "1",
            f"{vendor} {text}".strip() if not vendor.startswith("0x") else text,
            tuple(sorted(found.parent.name for found in folder.glob(f"{name}*/partition"))),
        )

    def has_card(self, name: str) -> bool:
        """Whether there is one now. A reader's kernel driver looks for itself only when somebody opens the disk."""
        with contextlib.suppress(OSError):
            os.close(os.open(self.dev / name, os.O_RDONLY | os.O_CLOEXEC))
        return self.disk(name).size > 0

    def cards(self) -> list[Disk]:
        """Disks that may be overwritten without further options."""
        names = sorted(_names(self.sys / "block"))
        return [disk for disk in map(self.disk, names) if self._is_free_card(disk)]

    def _is_free_card(self, disk: Disk) -> bool:
        try:
            self.check(disk, 0)
        except ConfigError:
            return False
        return True

    def _is_removable(self, folder: Path) -> bool:
        where = str(folder.resolve())
        is_card = "/mmc" in where and _text(folder / "device" / "type") == "SD"
        return _text(folder / "removable") == "1" or "/usb" in where or is_card

    def _of_number(self, major: int, minor: int) -> Optional[Path]:
        link = self.sys / "dev" / "block" / f"{major}:{minor}"
        return link.resolve() if link.exists() else None

    # -- judging

    def check(self, disk: Disk, needed: int, *, fixed: bool = False, large: bool = False) -> None:
        """ConfigError where this disk must not be overwritten with `needed` bytes. fixed, large: allowed by hand."""
        if _NOT_A_CARD.fullmatch(disk.name):
            raise ConfigError(f"{disk.path} is not a card", "covey flash --list shows the cards")
        if use := next(self.uses(disk), ""):
            raise ConfigError(f"{disk.path} {use}", _remedy(use, disk))
        if not disk.size:
            raise ConfigError(f"{disk.path} has no card in it", "put one in")
        if disk.read_only:
            raise ConfigError(f"{disk.path} is read-only", "slide the card's lock, or take another reader")
        if not disk.removable and not fixed:
            raise ConfigError(f"{disk.described()}: this looks like a built-in disk", "--fixed-disk if you are sure")
        if disk.size > LARGE and not large:
            raise ConfigError(f"{disk.described()}: this is large for a card", "--large-disk if you are sure")
        if disk.size < needed:
            raise ConfigError(
                f"{disk.path} is too small: {disk.size / 1e9:.2f} GB, and the image has {needed / 1e9:.2f} GB",
                "take a larger card; nothing was written",
            )

    def uses(self, disk: Disk) -> Iterator[str]:
        """What the disk is in use for, the weightiest first, in words that follow its name."""
        mounts = list(self._mounts(disk.name))
        for point in (point for point in _SYSTEM if point in mounts):
            yield f"holds this computer's own system (mounted at {point})"
        for point in mounts:
            yield f"is mounted at {point}"
        for line in _text(self.proc / "swaps").splitlines()[1:]:
            if disk.name in self._below_path(line.split()[0]):
                yield "is used as swap space"
        for part in (disk.name, *disk.partitions):
            folder = self.sys / "block" / disk.name / ("" if part == disk.name else part)
            for holder in sorted(_names(folder / "holders")):
                name = _text(self.sys / "block" / holder / "dm" / "name") or holder
                yield f"is part of {name} (LVM, RAID or encryption)"
        paths = {str(self.dev / part) for part in (disk.name, *disk.partitions)}
        for backing in sorted((self.sys / "block").glob("loop*/loop/backing_file")):
            if _text(backing) in paths:
                yield f"is behind {backing.parent.parent.name}"

    def _mounts(self, name: str) -> Iterator[str]:
        """Mount points whose file system lies on the disk, also through LVM, encryption and overlays."""
        for line in _text(self.proc / "self" / "mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            fields, (kind, source, options) = before.split(), (after.split() + ["", "", ""])[:3]
            below = self._below_number(fields[2])
            if not below and source.startswith("/dev/"):  # btrfs has numbers of its own
                below = self._below_path(_unescaped(source))
            if not below and kind == "overlay":
                folders = re.findall(r"(?:upperdir|lowerdir)=([^,]+)", options)
                below = {disk for folder in folders for part in folder.split(":") for disk in self._below_folder(part)}
            if name in below:
                yield _unescaped(fields[4])

    def _below_path(self, path: str) -> set[str]:
        try:
            number = os.stat(path).st_rdev
        except OSError:
            number = 0
        return self._below_number(f"{os.major(number)}:{os.minor(number)}")

    def _below_folder(self, path: str) -> set[str]:
        try:
            number = os.stat(_unescaped(path)).st_dev
        except OSError:
            return set()
        return self._below_number(f"{os.major(number)}:{os.minor(number)}")

    def _below_number(self, number: str) -> set[str]:
        """The disks that a block device lies on."""
        folder = self._of_number(*map(int, number.split(":")))
        return self._below(folder) if folder else set()

    def _below(self, folder: Path) -> set[str]:
        whole = folder.parent if (folder / "partition").exists() else folder
        slaves = [self.sys / "class" / "block" / name for name in _names(folder / "slaves")]
        found = {disk for slave in slaves if slave.exists() for disk in self._below(slave.resolve())}
        backing = _text(folder / "loop" / "backing_file")
        return {whole.name} | found | (self._below_folder(str(Path(backing).parent)) if backing else set())


def contents(disk: Disk) -> list[str]:
    """A line for each partition found on it, for the person who is about to erase it. Empty where nothing is found."""
    try:
        with disk.path.open("rb") as file:
            return [
                f"  partition {part.number}: {part.size / 1e9:.2f} GB {label(file, part)}".rstrip()
                for part in read_partitions(file)
            ]
    except OSError:
        return []


def _remedy(use: str, disk: Disk) -> str:
    if "own system" in use:
        return "covey never writes there; covey flash --list shows the cards"
    if "mounted" in use:
        return f"unmount it first: umount {disk.path}*"
    return "stop what uses it, or take another disk"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _unescaped(text: str) -> str:
    """mountinfo writes spaces and such as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
