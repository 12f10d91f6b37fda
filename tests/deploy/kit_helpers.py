"""Small kits whose agent only says its version, for this very Python; and the machine they are for."""

from __future__ import annotations

import io
import platform
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from covey_deploy import installer
from covey_deploy.agent_wheel import zipped
from covey_deploy.kit import make_kit
from covey_deploy.targets import Target
from covey_protocol.seals import SealingKey

MAKER = SealingKey.from_seed(b"maker of kits".ljust(32, b"."))
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
HERE = Target("here", PYTHON, platform.machine(), "2.17")
TRIAL = "import covey_edge; print(covey_edge.__version__, 'tried')"  # the real one needs the real wheels


def small_wheel(project: str, version: str, files: Mapping[str, bytes], tag: str = "py3-none-any") -> tuple[str, bytes]:
    stem = f"{project.replace('-', '_')}-{version}"
    about = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode()
    information = {f"{stem}.dist-info/METADATA": about, f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\n"}
    return f"{stem}-{tag}.whl", zipped({**files, **information}, f"{stem}.dist-info/RECORD")


def small_wheels(version: str = "9.0", **more: bytes) -> dict[str, bytes]:
    agent = {
        "covey_edge/__init__.py": f'__version__ = "{version}"\n'.encode(),
        "covey_edge/cli.py": b"def main():\n    import covey_edge\n    print(covey_edge.__version__)\n    return 0\n",
        "covey_edge/typed.pyi": b"left: out\n",
        **more,
    }
    runtime = {"tflite_runtime/__init__.py": b"", "numpy/tests/test_all.py": b"raise SystemExit\n"}
    tag = "py3-none-manylinux_2_17_" + platform.machine()
    return dict([small_wheel("covey-edge", version, agent), small_wheel(HERE.runtime, "2.14.0", runtime, tag)])


def small_kit(version: str = "9.0", *, target: Target = HERE, key: SealingKey = MAKER, **more: bytes) -> bytes:
    return make_kit(target, small_wheels(version, **more), key)


def unpacked(kit: bytes, folder: Path) -> Path:
    for name, data in installer.members(kit):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def packed(*files: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar with these entries in this order, whatever they are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            entry.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def changed(kit: bytes, name: str, data: bytes) -> bytes:
    return packed(*{**dict(installer.members(kit)), name: data}.items())
