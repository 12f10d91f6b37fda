"""The same code under a higher version: how a release is taken back.

A device never installs an older version, so old code comes back as a new release. Its wheel is made again from the old
one: the version is another in its name, its METADATA and `covey_protocol/__init__.py`, and RECORD says so; every other
byte is the old one's. It is sealed like any release, so nobody but its maker can bring old code back.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Mapping

from covey_edge.wheels import AGENT, Facts, look_at
from covey_protocol.errors import ConfigError, ReleaseError
from covey_protocol.releases import is_newer
from covey_protocol.versions import plain_name

SAYS_VERSION = "covey_protocol/__init__.py"
_VERSION_LINE = re.compile(rb'^__version__ = "[^"\n]*"$', re.MULTILINE)
_METADATA_LINE = re.compile(rb"^Version: [^\r\n]*", re.MULTILINE)
_DATE = (1980, 1, 1, 0, 0, 0)  # the same wheel twice has the same hash
_MOST = 999_999


def version_above(version: str, code: str) -> str:
    """0.2.0 gives 0.2.0.1, and that 0.2.0.2: above the version to be taken back, below the next real one.

    ConfigError where that is not above the version of the code itself.
    """
    numbers = [int(one) for one in version.split(".")]
    numbers += [0] * (4 - len(numbers))
    numbers[3] += 1
    made = ".".join(map(str, numbers))
    if numbers[3] > _MOST or not is_newer(made, code):
        raise ConfigError(f"{code} cannot come after {version}", "make a release with a higher version of your own")
    return made


def with_version(wheels: Mapping[str, bytes], version: str) -> dict[str, bytes]:
    """These wheels by file name, covey-edge's under another version. ReleaseError for wheels that are none."""
    made = {}
    for name, data in wheels.items():
        facts = look_at(name, data)
        if plain_name(facts.name) == AGENT:
            name, data = _renamed(name, facts, version)
        made[name] = data
    return made


def _renamed(name: str, facts: Facts, version: str) -> tuple[str, bytes]:
    distribution, _, *tags = name.split("-")
    old = next(path.split("/")[0] for path in facts.files if path.split("/")[0].endswith(".dist-info"))
    new = f"{distribution}-{version}.dist-info"
    files = {
        (new + path[len(old) :] if path.startswith(f"{old}/") else path): content
        for path, content in facts.files.items()
        if path != f"{old}/RECORD"
    }
    for path, pattern, line in (
        (SAYS_VERSION, _VERSION_LINE, f'__version__ = "{version}"'),
        (f"{new}/METADATA", _METADATA_LINE, f"Version: {version}"),
    ):
        files[path] = _with_line(name, path, files.get(path, b""), pattern, line)
    made = "-".join([distribution, version, *tags]), _zipped(files, f"{new}/RECORD")
    if look_at(*made).version != version:
        raise ReleaseError(f"{name} does not take another version", "make a release of your own")
    return made


def _with_line(name: str, path: str, content: bytes, pattern: re.Pattern[bytes], line: str) -> bytes:
    """The first such line of METADATA is its header; of code there is one."""
    made, count = pattern.subn(lambda _: line.encode(), content, count=1)
    if count != 1:
        raise ReleaseError(f"{name}: {path} does not say a version", "give a wheel of covey-edge")
    return made


def _zipped(files: dict[str, bytes], record: str) -> bytes:
    rows, table = io.StringIO(), io.BytesIO()
    writer = csv.writer(rows, lineterminator="\n")
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow([path, f"sha256={digest}", len(content)])
    writer.writerow([record, "", ""])
    with zipfile.ZipFile(table, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in {**files, record: rows.getvalue().encode()}.items():
            entry = zipfile.ZipInfo(path, _DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(entry, content)
    return table.getvalue()
