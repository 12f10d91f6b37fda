"""What is in a wheel, read without trusting it. Standard library alone and nothing of covey: the installer of a kit
(`covey_deploy.installer`) carries this very text to devices on which nothing is installed yet.

A wheel is refused by name unless every file in it is listed in its RECORD with a hash that is right, lies in the folder
and is a plain file.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import stat
import zipfile
from collections.abc import Iterator

MAX_NAME_CHARS = 240
MODULES_ALONE = "releases and kits hold modules alone"


class WheelError(Exception):
    """what: names the wheel and what is wrong. remedy: empty where there is none but another wheel."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


def files_of(file_name: str, archive: zipfile.ZipFile, room_bytes: int, max_files: int) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file of a wheel, its RECORD first, each checked before it is given.

    At most `room_bytes` are unpacked. Raises WheelError, and what zipfile and zlib raise over a damaged archive.
    """
    entries = _entries(file_name, archive, max_files)
    record = f"{information_folder(file_name, entries)}/RECORD"
    if record not in entries:
        raise WheelError(f"{file_name} has no RECORD")
    listed: dict[str, str] = {}
    for name in (record, *(one for one in entries if one != record)):
        with archive.open(name) as stream:
            content = stream.read(room_bytes + 1)  # what the header says of its size may be a lie
        room_bytes -= len(content)
        if room_bytes < 0:
            raise WheelError(f"{file_name} is too large when unpacked", "fewer bytes than it holds are allowed")
        if name == record:
            listed = _read_record(file_name, content, entries)
        elif listed[name] != digest_of(content):
            raise WheelError(f"{file_name}: {name[:80]!r} is not what its RECORD says")
        yield name, content


def digest_of(content: bytes) -> str:
    """As a RECORD has it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def information_folder(file_name: str, names: list[str]) -> str:
    folders = {name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info")}
    if len(folders) != 1:
        raise WheelError(f"{file_name} has no dist-info folder, or several")
    return folders.pop()


def record_rows(content: bytes) -> dict[str, str]:
    """Path -> hash of a RECORD. UnicodeDecodeError or csv.Error where it is none."""
    rows = [row for row in csv.reader(io.StringIO(content.decode())) if row]
    return {row[0]: row[1] if len(row) > 1 else "" for row in rows}


def _entries(file_name: str, archive: zipfile.ZipFile, max_files: int) -> list[str]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > max_files:
        raise WheelError(f"{file_name} holds {len(entries)} files", f"at most {max_files} are unpacked")
    if len({entry.filename for entry in entries}) < len(entries):
        raise WheelError(f"{file_name} holds a file twice")
    for entry in archive.infolist():
        _check_place(file_name, entry)
    return [entry.filename for entry in entries]


def _check_place(file_name: str, entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = name.rstrip("/").split("/")
    outside = any(part in ("", ".", "..") for part in parts) or any(char in name for char in "\\:\0")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if outside or len(name) > MAX_NAME_CHARS or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise WheelError(f"{file_name} holds {name[:80]!r}, which is no plain file in its folder")
    if parts[0].endswith(".data") or not name.isprintable():
        raise WheelError(f"{file_name} holds {name[:80]!r}, which is not unpacked", MODULES_ALONE)


def _read_record(file_name: str, content: bytes, names: list[str]) -> dict[str, str]:
    """Every file but the list itself must be in the list, and nothing else."""
    try:
        listed = record_rows(content)
    except (UnicodeDecodeError, csv.Error) as exc:
        raise WheelError(f"the RECORD of {file_name} cannot be read") from exc
    for name in sorted(set(listed) ^ set(names)):
        raise WheelError(f"{file_name}: {name[:80]!r} is not both in the wheel and in its RECORD")
    return listed
