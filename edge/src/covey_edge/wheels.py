"""Wheels of pure Python: looking at one without trusting it, and unpacking a release's durably. No pip, no building.

A wheel is refused by name unless every file in it is listed in its RECORD with a hash that is right, lies in the folder
and is a plain file. Compiled wheels are refused: what a release needs beside its own wheels must be installed already.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from covey_edge.files import make_folder, sync_folder
from covey_protocol.errors import ReleaseError, StorageError, UsageError
from covey_protocol.releases import Release
from covey_protocol.versions import fits, plain_name, requirement, version_of

MAX_UNPACKED_BYTES = 32 * 2**20  # of a release; covey-edge's own has 0.7 MB
MAX_FILES = 4096
MAX_NAME_CHARS = 240
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
            files = dict(_contents(file_name, archive, room_bytes))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as exc:
        raise ReleaseError(f"{file_name} is not a whole wheel ({exc})", REMEDY) from exc
    folder = _information(file_name, files)
    _check_record(file_name, folder, files)
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


def _contents(file_name: str, archive: zipfile.ZipFile, room_bytes: int) -> Iterator[tuple[str, bytes]]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > MAX_FILES:
        raise ReleaseError(f"{file_name} holds {len(entries)} files", f"at most {MAX_FILES} are unpacked")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ReleaseError(f"{file_name} holds a file twice", REMEDY)
    for entry in archive.infolist():
        _check_place(file_name, entry)
    for entry in entries:
        with archive.open(entry) as stream:
            content = stream.read(room_bytes + 1)  # what the header says of its size may be a lie
        room_bytes -= len(content)
        if room_bytes < 0:
            raise ReleaseError(f"{file_name} is too large when unpacked", f"at most {MAX_UNPACKED_BYTES} bytes are")
        yield entry.filename, content


def _check_place(file_name: str, entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = name.rstrip("/").split("/")
    outside = any(part in ("", ".", "..") for part in parts) or any(char in name for char in "\\:\0")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if outside or len(name) > MAX_NAME_CHARS or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ReleaseError(f"{file_name} holds {name[:80]!r}, which is no plain file in its folder", REMEDY)
    if parts[0].endswith(".data") or not name.isprintable():
        raise ReleaseError(f"{file_name} holds {name[:80]!r}, which is not unpacked", "releases hold modules alone")


def _information(file_name: str, files: dict[str, bytes]) -> str:
    folders = {name.split("/")[0] for name in files if name.split("/")[0].endswith(".dist-info")}
    if len(folders) != 1:
        raise ReleaseError(f"{file_name} has no dist-info folder, or several", REMEDY)
    return folders.pop()


def _check_record(file_name: str, folder: str, files: dict[str, bytes]) -> None:
    """Every file but the list itself is in the list with its sha256, and nothing else is."""
    record = f"{folder}/RECORD"
    if record not in files:
        raise ReleaseError(f"{file_name} has no RECORD", REMEDY)
    try:
        rows = [row for row in csv.reader(io.StringIO(files[record].decode())) if row]
    except (UnicodeDecodeError, csv.Error) as exc:
        raise ReleaseError(f"the RECORD of {file_name} cannot be read", REMEDY) from exc
    listed = {row[0]: row[1] if len(row) > 1 else "" for row in rows}
    for name in sorted(set(listed) ^ set(files)):
        raise ReleaseError(f"{file_name}: {name[:80]!r} is not both in the wheel and in its RECORD", REMEDY)
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if name != record and listed[name] != f"sha256={digest}":
            raise ReleaseError(f"{file_name}: {name[:80]!r} is not what its RECORD says", REMEDY)


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
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
