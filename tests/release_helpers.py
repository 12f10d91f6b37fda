"""Releases of this very source under other versions, broken where a test asks for it; and a device for them."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import numpy as np

from covey_edge.releasing import described
from covey_protocol.releases import Release, release_file, seal_release
from covey_protocol.seals import SealingKey

SOURCE = Path(__file__).parent.parent / "edge" / "src"
MAKER = SealingKey.from_seed(b"maker".ljust(32, b"."))
DEVICE = SealingKey.from_seed(b"device".ljust(32, b"."))


def agent_files(version: str, changes: dict[str, tuple[str, str]] | None = None) -> dict[str, bytes]:
    """The agent's modules as they are here, with another version. changes: path -> what to replace, by what."""
    files = {path.relative_to(SOURCE).as_posix(): path.read_bytes() for path in SOURCE.rglob("*.py")}
    every = {"covey_protocol/__init__.py": (r'__version__ = "[^"]+"', f'__version__ = "{version}"'), **(changes or {})}
    for name, (old, new) in every.items():
        text, count = re.subn(old, lambda _, new=new: new, files[name].decode(), count=1)
        assert count == 1, f"{name} has no {old}"
        files[name] = text.encode()
    return files


def wheel(
    files: dict[str, bytes], version: str, name: str = "covey-edge", requires: tuple[str, ...] | None = None
) -> tuple[str, bytes]:
    """File name and bytes of a pure wheel."""
    stem = f"{name.replace('-', '_')}-{version}"
    needs = tuple(metadata(name).get_all("Requires-Dist", ())) if requires is None else requires
    about = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: >=3.9"]
    about += [f"Requires-Dist: {one}" for one in needs]
    info = {
        f"{stem}.dist-info/METADATA": "\n".join(about).encode() + b"\n",
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/entry_points.txt": b"[covey.commands]\nagent = covey_edge.cli_agent:agent\n",
    }
    return f"{stem}-py3-none-any.whl", zipped({**files, **info}, f"{stem}.dist-info/RECORD")


def zipped(files: dict[str, bytes], record: str) -> bytes:
    rows = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**files, record: ("\n".join([*rows, f"{record},,"]) + "\n").encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # of 1980: the same bytes every time
    return buffer.getvalue()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def small_wheel(version: str = "9.0", **more: bytes) -> tuple[str, bytes]:
    """A covey-edge that needs nothing and does nothing."""
    return wheel({"covey_edge/__init__.py": b"", "covey_edge/deep/er.py": b"x = 1\n", **more}, version, requires=())


def released(*wheels: tuple[str, bytes], serial: int = 1, share: float = 1.0, least: str = "") -> Release:
    return described(dict(wheels), serial=serial, share=share, minimum_version=least, notes="")


def as_file(release: Release, *wheels: tuple[str, bytes], key: SealingKey = MAKER) -> bytes:
    return release_file(seal_release(release, key), [data for _, data in wheels])


def write_device(
    folder: Path,
    url: str,
    coordinator_key: SealingKey,
    more: str = "",
    device_id: str = "kitchen-pi",
    key: SealingKey = DEVICE,
) -> Path:
    """An agent.toml with its key and eight examples."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "device.pem").write_bytes(key.pem())
    np.savez(folder / "data.npz", x=np.zeros((8, 8, 8, 1), np.float32), y=np.zeros(8, np.int64))
    config = folder / "agent.toml"
    config.write_text(f"""
device_id = "{device_id}"
fleet = "home"
[broker]
url = "{url}"
[identity]
key_file = "device.pem"
coordinator_key = "{coordinator_key.public.hex()}"
[data]
path = "data.npz"
[update]
release_key = "{MAKER.public.hex()}"
{more}""")
    return config
