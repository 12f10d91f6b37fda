"""The FAT boot partition of an image or a written card: which system it starts, and a card's files put into it.

Works on an open file with the whole image in it, be that a file or a disk, and mounts nothing. How a system is told is
in docs/flashing.md; it follows what pi-gen puts into Raspberry Pi OS's boot partition.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO, Optional

from covey_deploy.card import FIRSTRUN, FOLDER, Card, System
from covey_deploy.fat import Fat
from covey_deploy.partitions import read_partitions
from covey_protocol.errors import ConfigError, DataError, StorageError

CMDLINE = "cmdline.txt"
_PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
_FIRST_BOOKWORM = "2023-10-10"
_SUPPORTED = "Raspberry Pi OS bookworm (from 2023-10-10) or trixie, 64-bit"


def open_boot(file: BinaryIO) -> Fat:
    """The first FAT partition. DataError where the file is no image of a card."""
    for partition in read_partitions(file):
        if partition.may_be_fat:
            return Fat(file, partition.start)
    raise DataError("this is no image of a card: it has no FAT boot partition", f"take an image of {_SUPPORTED}")


def detect(boot: Fat) -> System:
    """Which first boot the system has: "trixie" is cloud-init, "bookworm" is a script named in cmdline.txt.

    ConfigError for systems that covey cannot prepare, and for images that were prepared already.
    """
    names = {name.lower() for name in boot.names()}
    if {FOLDER, FIRSTRUN} & names or b"systemd.run=" in (boot.read(CMDLINE) or b""):
        raise ConfigError("this image is prepared for a device already", "take the image as its maker published it")
    if "kernel7.img" in names:
        raise ConfigError("this image is a 32-bit system, for which the agent has no wheels", f"take {_SUPPORTED}")
    if {"user-data", "meta-data"} <= names:
        return "trixie"
    date = re.search(r"Raspberry Pi reference (\d{4}-\d\d-\d\d)", (boot.read("issue.txt") or b"").decode("latin-1"))
    if date is None:
        raise ConfigError(
            "the boot partition has neither cloud-init's user-data and meta-data nor Raspberry Pi OS's issue.txt",
            f"take {_SUPPORTED}, or --debian",
        )
    if date[1] < _FIRST_BOOKWORM:
        raise ConfigError(f"this Raspberry Pi OS of {date[1]} is older than bookworm", f"take {_SUPPORTED}")
    return "bookworm"


def customise(
    file: BinaryIO, make: Callable[[System], Card], system: Optional[System] = None, python: str = ""
) -> Card:
    """Detect the system, make its card and write it. Returns what was written.

    system: where the caller knows it. python: of the kit, such as "3.11", to hold against Raspberry Pi OS's own.
    """
    boot = open_boot(file)
    found = system or detect(boot)
    expected = _PYTHONS.get(found) if boot.read("issue.txt") else None
    if python and expected and python != expected:
        raise ConfigError(
            f"the kit is for Python {python}, and this Raspberry Pi OS ({found}) has Python {expected}",
            f"covey bundle --target pios-{found}-arm64 makes the right one",
        )
    made = make(found)
    boot.write(_all_files(boot, made))
    return made


def check(file: BinaryIO, made: Card) -> None:
    """StorageError where a file of the card is not there as it was written."""
    boot = open_boot(file)
    for path, content in made.files.items():
        if boot.read(path) != content:
            raise StorageError(f"{path} was read back from the card differently", "take another card")
    if made.cmdline_words and not (boot.read(CMDLINE) or b"").decode().split()[-len(made.cmdline_words) :] == list(
        made.cmdline_words
    ):
        raise StorageError(f"{CMDLINE} was read back from the card differently", "take another card")


def _all_files(boot: Fat, made: Card) -> dict[str, bytes]:
    """cmdline.txt last: what it starts is there then."""
    files = dict(made.files)
    if made.cmdline_words:
        old = boot.read(CMDLINE)
        if not old:
            raise ConfigError(f"the image's boot partition has no {CMDLINE}", f"take {_SUPPORTED}")
        files[CMDLINE] = with_words(old.decode(), made.cmdline_words).encode()
    return files


def with_words(cmdline: str, words: tuple[str, ...]) -> str:
    """The kernel's one line with words at its end; words that set the same as a new one are taken out."""
    set_anew = {word.split("=")[0] for word in words}
    kept = [word for word in cmdline.split() if word.split("=")[0] not in set_anew]
    return " ".join([*kept, *words]) + "\n"
