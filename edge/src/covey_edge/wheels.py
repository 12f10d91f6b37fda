"""Wheels of pure Python: looking at one without trusting it, and unpacking a release's durably. No pip, no building.

What must hold of every wheel is in `wheel_files`. Compiled wheels are refused besides: what a release needs beside its
own wheels must be installed already.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from covey_edge.files import make_folder, sync_folder, write_all
from covey_edge.wheel_files import WheelError, files_of, information_folder
from covey_protocol.errors import ReleaseError, StorageError, UsageError
from covey_protocol.releases import Release
from covey_protocol.versions import fits, plain_name, requirement, version_of

MAX_UNPACKED_BYTES = 32 * 2**20  # of a release; covey-edge's own has 0.7 MB
MAX_FILES = 4096
AGENT = "covey-edge"
REMEDY = "ask the release's maker for another"


@dataclass(frozen=True)
class Facts:
    """Of a wheel that was looked at. files: path in the wheel -> content, RECORD among them."""

    name: str
    version: str
    requires: tuple[str, ...]
    requires_python: str
    files: dict[str, bytes]


def look_at(file_name: str, data: bytes, room_bytes: int = MAX_UNPACKED_BYTES) -> Facts:
    """What a wheel holds. ReleaseError for one that is damaged, compiled, too large or tries to write elsewhere."""
    if not file_name.endswith("-none-any.whl"):
        raise ReleaseError(f"{file_name} is compiled, or for some machines only", "releases hold pure Python alone")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = dict(files_of(file_name, archive, room_bytes, MAX_FILES))
        folder = information_folder(file_name, list(files))
    except WheelError as exc:
        raise ReleaseError(exc.what, exc.remedy or REMEDY) from exc
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as exc:
        raise ReleaseError(f"{file_name} is not a whole wheel ({exc})", REMEDY) from exc
    wheel, metadata = (_headers(file_name, files, f"{folder}/{name}") for name in ("WHEEL", "METADATA"))
    if wheel.get("Root-Is-Purelib", ["false"])[0].lower() != "true":
        raise ReleaseError(f"{file_name} is not pure Python", REMEDY)
    try:
        name, version = metadata["Name"][0], metadata["Version"][0]
        version_of(version)
    except (KeyError, UsageError) as exc:
        raise ReleaseError(f"{file_name} does not say its name and version ({exc})", REMEDY) from exc
    return Facts(
        name, version, tuple(metadata.get("Requires-Dist", ())), metadata.get("Requires-Python", [""])[0], files
    )


def _headers(file_name: str, files: dict[str, bytes], path: str) -> dict[str, list[str]]:
    try:
        text = files[path].decode()
    except (KeyError, UnicodeDecodeError) as exc:
        raise ReleaseError(f"{file_name} has no readable {path}", REMEDY) from exc
    headers: dict[str, list[str]] = {}
    for name, value in HeaderParser().parsestr(text).items():
        headers.setdefault(name, []).append(str(value))
    return headers


# --- a release


def checked(release: Release, wheels: Sequence[bytes], python: str) -> dict[str, bytes]:
    """All files of a release, by path: whole, not in each other's way, and with all that they need on this machine.

    python: "3.11". Raises ReleaseError naming the wheel, the file or the requirement.
    """
    files: dict[str, bytes] = {}
    found: dict[str, Facts] = {}
    for wheel, data in zip(release.wheels, wheels):
        facts = look_at(wheel.name, data, MAX_UNPACKED_BYTES - sum(map(len, files.values())))
        twice = sorted(set(facts.files) & set(files))
        if twice:
            raise ReleaseError(f"{wheel.name} holds {twice[0]!r}, as does another wheel of the release", REMEDY)
        files.update(facts.files)
        found[plain_name(facts.name)] = facts
    agent = found.get(AGENT)
    if agent is None or agent.version != release.version:
        named = "holds no covey-edge" if agent is None else f"holds covey-edge {agent.version}"
        raise ReleaseError(f"release {release.version} {named}", REMEDY)
    for facts in found.values():
        _check_needs(facts, found, python)
    return files


def _check_needs(facts: Facts, found: dict[str, Facts], python: str) -> None:
    try:
        if not fits(python, facts.requires_python):
            raise ReleaseError(f"{facts.name} {facts.version} needs Python {facts.requires_python}, this is {python}")
        for text in facts.requires:
            name, specifier = requirement(text, python)
            have = _version_of(name, found) if name else ""
            if name and (not have or not fits(have, specifier)):
                here = f"is {have}" if have else "is not installed"
                raise ReleaseError(
                    f"{facts.name} {facts.version} needs {name}{specifier}, which {here} here",
                    "install it on the device, or put its pure wheel into the release",
                )
    except UsageError as exc:
        raise ReleaseError(f"{facts.name} {facts.version}: {exc}", REMEDY) from exc


def _version_of(name: str, found: dict[str, Facts]) -> str:
    if plain_name(name) in found:
        return found[plain_name(name)].version
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return ""


def unpack(files: dict[str, bytes], folder: Path) -> None:
    """Make `folder` with these files: whole and durable when this returns, and at no moment there in part. What was
    there goes."""
    unfinished, old = (folder.with_name(f".{folder.name}.{what}.tmp") for what in ("new", "old"))
    try:
        for left in (unfinished, old):
            shutil.rmtree(left, ignore_errors=True)
        make_folder(folder.parent)
        os.mkdir(unfinished)
        folders = {unfinished}
        for name, content in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.update([path.parent, *(one for one in path.parents if unfinished in one.parents)])
            _write(path, content)
        for one in sorted(folders):
            sync_folder(one)
        if folder.is_dir():
            os.rename(folder, old)
        os.rename(unfinished, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as exc:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StorageError(f"cannot unpack {folder} ({exc.strerror or exc})", "free some space") from exc


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
