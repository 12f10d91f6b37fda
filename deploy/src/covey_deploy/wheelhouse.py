"""The wheels of a target: what the lock names for it, fetched by pip, kept in a cache and taken from there offline.

pip judges a requirement's markers by the Python it runs on, not by --python-version. So they are judged here, and pip
gets names, versions and hashes alone. It resolves nothing (--no-deps), builds nothing (--only-binary) and takes nothing
whose hash the lock does not have (--require-hashes).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from covey_deploy.targets import PATCH, Target
from covey_edge.files import write_atomic
from covey_protocol.errors import ConfigError, MachineError, StorageError, TransportError
from covey_protocol.versions import plain_name

LOCK = "edge.txt"
# Asked for by packages that the agent uses, in parts of them that it never does: pycparser by cffi for parsing C, the
# others by ai-edge-litert for its tools. A round is trained without them (tests/deploy/test_kits_alone.py).
NOT_CARRIED = ("backports-strenum", "flatbuffers", "ml-dtypes", "protobuf", "pycparser", "tqdm")


@dataclass(frozen=True)
class Pinned:
    """One requirement of the lock. hashes: sha256, of every file of this version."""

    name: str
    version: str
    hashes: tuple[str, ...]

    def line(self) -> str:
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{one}" for one in self.hashes)])


def lock_file() -> Path:
    """The checkout's, or the one that was installed with this distribution."""
    for path in (Path(__file__).resolve().parents[3] / "locks" / LOCK, Path(sys.prefix, "share", "covey", LOCK)):
        if path.is_file():
            return path
    raise MachineError(f"{LOCK} is not with covey-deploy", "give it with --lock, from locks/ of covey's source")


def pinned(lock: str, target: Target) -> tuple[Pinned, ...]:
    """What the lock names for this target. ConfigError where it is no hashed lock."""
    from packaging.markers import InvalidMarker, Marker

    found = []
    for line in re.sub(r"\\\n", " ", lock).splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        requirement, *hashes = re.split(r"\s--hash=sha256:", line)
        specifier, _, condition = requirement.partition(";")
        match = re.fullmatch(r"\s*([A-Za-z0-9._-]+)==([A-Za-z0-9._+!-]+)\s*", specifier)
        if match is None or not hashes:
            raise ConfigError(f"the lock holds {line.strip()[:80]!r}", "a lock of names, versions and hashes is needed")
        try:
            wanted = not condition.strip() or Marker(condition.strip()).evaluate(target.markers())
        except InvalidMarker as exc:
            raise ConfigError(f"the lock holds the condition {condition.strip()[:80]!r}", "run `make lock`") from exc
        if wanted and plain_name(match.group(1)) not in NOT_CARRIED:
            found.append(Pinned(match.group(1), match.group(2), tuple(one.strip() for one in hashes)))
    return tuple(sorted(found, key=lambda one: one.name))


class Wheelhouse:
    """A folder of wheels, with a list of them for each target and lock. Two programs may use it at the same time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def wheels(self, wanted: tuple[Pinned, ...], target: Target, *, offline: bool = False) -> dict[str, bytes]:
        """File name -> wheel, of all that is wanted. From the cache where all are there whole; else fetched."""
        index = self._folder / f"{_key(wanted, target)}.json"
        kept = self._kept(index, wanted)
        if kept is None:
            if offline:
                raise TransportError(
                    f"the wheels for {target.name} are not in {self._folder}", "run it once without --offline"
                )
            self._fetch(wanted, target, index)
            kept = self._kept(index, wanted)
            if kept is None:
                raise StorageError(f"wheels that were just fetched are not in {self._folder}", "remove the folder")
        return dict(sorted(kept.items()))

    def _kept(self, index: Path, wanted: tuple[Pinned, ...]) -> dict[str, bytes] | None:
        """Held against the lock, not only against the list: others may be able to write to the cache."""
        known = {digest for one in wanted for digest in one.hashes}
        try:
            listed: Mapping[str, str] = json.loads(index.read_bytes())
            found = {name: (self._folder / name).read_bytes() for name in listed}
        except (OSError, ValueError):
            return None
        whole = all(hashlib.sha256(data).hexdigest() == listed[name] for name, data in found.items())
        return found if whole and len(found) == len(wanted) and known.issuperset(listed.values()) else None

    def _fetch(self, wanted: tuple[Pinned, ...], target: Target, index: Path) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".fetching-") as name:
                folder = Path(name)
                download(wanted, target, folder)
                listed = {}
                for path in sorted(folder.glob("*.whl")):
                    listed[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
                    os.replace(path, self._folder / path.name)
        except OSError as exc:
            raise StorageError(f"cannot write to {self._folder} ({exc.strerror or exc})", "give --cache") from exc
        write_atomic(index, json.dumps(listed, indent=1).encode())


def _key(wanted: tuple[Pinned, ...], target: Target) -> str:
    words = [target.python, target.machine, target.glibc, *(one.line() for one in wanted)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]


def download(wanted: tuple[Pinned, ...], target: Target, folder: Path) -> None:
    """Have pip put the wheels into the folder. TransportError, naming what has no wheel where that is the reason."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{one.line()}\n" for one in wanted))
    command = [*pip(), "download", "--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirement", str(requirements)]
    command += ["--python-version", f"{target.python}.{PATCH}", "--implementation", "cp"]
    command += ["--abi", f"cp{target.python.replace('.', '')}"]
    command += [word for platform in target.platforms() for word in ("--platform", platform)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        lacking = re.search(r"No matching distribution found for (\S+)", ended.stderr)
        if lacking:
            raise TransportError(
                f"{lacking.group(1)} has no wheel for Python {target.python} on {target.machine} with glibc "
                f"{target.glibc}, or the package index cannot be reached",
                "docs/compatibility.md says what runs where",
                transient=False,
            )
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TransportError(f"pip could not fetch the wheels ({last[:300]})", "check the network and the index")


def pip() -> list[str]:
    """How pip is called here; any Python's will do, since nothing is run of what it fetches."""
    for python in _pythons():
        ended = subprocess.run([python, "-m", "pip", "--version"], check=False, capture_output=True)
        if ended.returncode == 0:
            return [python, "-m", "pip"]
    raise MachineError("no Python here has pip", "install it (Debian: apt install python3-pip)")


def _pythons() -> Iterator[str]:
    yield sys.executable
    for name in ("python3", "python"):
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
            found = shutil.which(name, path=folder)
            if found:
                yield found
