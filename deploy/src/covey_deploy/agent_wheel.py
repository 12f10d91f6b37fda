"""The agent's own wheel, made of the covey-edge that runs here: a checkout's or an installed one, the same bytes again.

No build tool is needed: covey-edge is pure Python. What it says of itself (METADATA) is what is installed here.
"""

from __future__ import annotations

import io
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import covey_edge
import covey_protocol
from covey_edge.wheel_files import digest_of
from covey_protocol.errors import MachineError

NAME = "covey-edge"
WHEEL = b"Wheel-Version: 1.0\nGenerator: covey bundle\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
DATE = (1980, 1, 1, 0, 0, 0)  # a zip's first day


def agent_wheel() -> tuple[str, bytes]:
    """File name and content. MachineError where what is installed does not fit the modules that run."""
    try:
        installed = distribution(NAME)
    except PackageNotFoundError as exc:
        raise MachineError(f"{NAME} is not installed here", "install it, or give its wheel with --wheel") from exc
    version = installed.version
    if version != covey_edge.__version__:
        raise MachineError(
            f"{NAME} {version} is installed, its modules say {covey_edge.__version__}",
            "install it again (in a checkout: make), or give its wheel with --wheel",
        )
    files: dict[str, bytes] = {}
    for package in (covey_edge, covey_protocol):
        files.update(_modules(Path(package.__path__[0])))
    information = f"{NAME.replace('-', '_')}-{version}.dist-info"
    for name in ("METADATA", "entry_points.txt"):
        files[f"{information}/{name}"] = (installed.read_text(name) or "").encode()
    files[f"{information}/WHEEL"] = WHEEL
    return f"{NAME.replace('-', '_')}-{version}-py3-none-any.whl", zipped(files, f"{information}/RECORD")


def _modules(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in paths}


def zipped(files: dict[str, bytes], record: str) -> bytes:
    """A wheel of these files with their RECORD; of the same files always the same bytes."""
    ordered = dict(sorted(files.items()))
    rows = [f"{name},{digest_of(data)},{len(data)}\n" for name, data in ordered.items()]
    ordered[record] = "".join([*rows, f"{record},,\n"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in ordered.items():
            entry = zipfile.ZipInfo(name, DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()
