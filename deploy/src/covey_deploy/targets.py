"""What kits are made for: a Python, a processor and a C library; and which wheels such a machine takes.

Python and C library of each system as its makers ship it; what has no wheels is here by name, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from covey_protocol.errors import ConfigError

PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
MACHINES = {"aarch64": "arm64", "x86_64": "amd64"}
# the oldest manylinux of a machine; 2.17, 2.12 and 2.5 have names of their own, too
OLDEST_GLIBC = {"aarch64": 17, "x86_64": 5}
OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
# of every Python a patch level that all wheels of the lock take: cryptography refuses 3.9.0 and 3.9.1
PATCH = "2"


@dataclass(frozen=True)
class Target:
    """python: "3.11". machine: as `uname -m` says it. glibc: of the system, the newest that a wheel may ask for."""

    name: str
    python: str
    machine: str
    glibc: str
    what: str = ""

    @property
    def runtime(self) -> str:
        return "tflite-runtime" if self.python in ("3.9", "3.10", "3.11") else "ai-edge-litert"

    def platforms(self) -> Iterator[str]:
        """Platform tags of wheels that run there, the newest first."""
        minor = int(self.glibc.split(".")[1])
        for number in range(minor, OLDEST_GLIBC[self.machine] - 1, -1):
            yield f"manylinux_2_{number}_{self.machine}"
            if number in OLD_NAMES:
                yield f"{OLD_NAMES[number]}_{self.machine}"

    def markers(self) -> dict[str, str]:
        """The environment that requirements are judged in."""
        version = f"{self.python}.{PATCH}"
        return {
            "implementation_name": "cpython",
            "implementation_version": version,
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": version,
            "python_version": self.python,
            "sys_platform": "linux",
        }


TARGETS = {
    target.name: target
    for target in (
        Target("pios-bookworm-arm64", "3.11", "aarch64", "2.36", "Raspberry Pi OS 12, 64 bit"),
        Target("pios-trixie-arm64", "3.13", "aarch64", "2.41", "Raspberry Pi OS 13, 64 bit"),
        Target("debian-12-arm64", "3.11", "aarch64", "2.36", "Debian bookworm"),
        Target("debian-13-arm64", "3.13", "aarch64", "2.41", "Debian trixie"),
        Target("debian-12-amd64", "3.11", "x86_64", "2.36", "Debian bookworm"),
        Target("debian-13-amd64", "3.13", "x86_64", "2.41", "Debian trixie"),
        Target("ubuntu-22.04-arm64", "3.10", "aarch64", "2.35", "Ubuntu jammy"),
        Target("ubuntu-24.04-arm64", "3.12", "aarch64", "2.39", "Ubuntu noble"),
        Target("ubuntu-22.04-amd64", "3.10", "x86_64", "2.35", "Ubuntu jammy"),
        Target("ubuntu-24.04-amd64", "3.12", "x86_64", "2.39", "Ubuntu noble"),
        Target("termux-debian-arm64", "3.13", "aarch64", "2.41", "Debian trixie in Termux on Android"),
    )
}
# machine or system -> why there is no kit
IMPOSSIBLE = {
    "armv7": "numpy, msgspec and ai-edge-litert have no armv7 wheels; use a 64-bit system, which a Raspberry Pi 2 "
    "(from revision 1.2), 3, 4, 5 and Zero 2 run",
    "armv6": "no TFLite runtime has an armv6 wheel (Raspberry Pi 1 and Zero)",
    "musl": "no TFLite runtime has a musl wheel (Alpine)",
    "bullseye": "its glibc 2.31 is too old for the aarch64 wheels of tflite-runtime, which ask for 2.34",
}
_ALIASES = {
    "armv7": r"armv7|armhf|arm32",
    "armv6": r"armv6|armel",
    "musl": r"musl|alpine",
    "bullseye": r"bullseye.*arm64|debian-11-arm64",
}


def named(name: str) -> Target:
    """ConfigError for one that there is not, with the reason where there cannot be one."""
    if name in TARGETS:
        return TARGETS[name]
    _refuse_impossible(name)
    import difflib

    close = difflib.get_close_matches(name, TARGETS, n=1)
    hint = f"did you mean {close[0]}?" if close else "`covey bundle --list-targets` has them."
    raise ConfigError(f"there is no target {name!r}", f"{hint} Or give --python, --arch and --glibc")


def described(python: str, arch: str, glibc: str) -> Target:
    """A target by its facts."""
    _refuse_impossible(arch)
    machines = {**{name: name for name in MACHINES}, **{alias: name for name, alias in MACHINES.items()}}
    if arch not in machines:
        raise ConfigError(f"there are no kits for {arch!r}", f"--arch is one of {', '.join(MACHINES)}")
    if python not in PYTHONS:
        raise ConfigError(f"there are no kits for Python {python}", f"--python is one of {', '.join(PYTHONS)}")
    if not re.fullmatch(r"2\.[0-9]{1,2}", glibc) or int(glibc[2:]) < OLDEST_GLIBC[machines[arch]]:
        raise ConfigError(f"--glibc {glibc} is no version of glibc", "`ldd --version` says it, such as 2.36")
    return Target(f"python{python}-{MACHINES[machines[arch]]}", python, machines[arch], glibc)


def _refuse_impossible(name: str) -> None:
    for key, pattern in _ALIASES.items():
        if re.search(pattern, name):
            raise ConfigError(f"there is no kit for {name}: {IMPOSSIBLE[key]}")


def glibc_of(file_name: str) -> str:
    """The glibc that a wheel asks for at least, by its name; 2.0 where it asks for none."""
    tags = file_name[: -len(".whl")].split("-")[-1].split(".")
    minors = [int(found.group(1)) for tag in tags if (found := re.match(r"manylinux_2_([0-9]+)_", tag))]
    minors += [number for number, name in OLD_NAMES.items() for tag in tags if tag.startswith(f"{name}_")]
    return f"2.{min(minors, default=0)}"
