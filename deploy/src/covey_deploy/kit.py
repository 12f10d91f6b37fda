"""Kits: the agent with all it needs for one kind of machine, in one sealed file. docs/kits.md.

A plain tar: manifest.json, seal (Ed25519 of the release key over the manifest), install.py, wheels/*.whl. What a kit is
and how one is checked is in `installer`, which every kit carries; here one is made and opened on a desktop.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from covey_deploy import installer
from covey_deploy.targets import Target, glibc_of
from covey_edge import wheel_files
from covey_edge.wheel_files import WheelError
from covey_protocol.errors import ConfigError, ReleaseError
from covey_protocol.seals import PublicKey, SealingKey
from covey_protocol.versions import plain_name

# What an agent never loads, in patterns of `installer.is_left_out`. Licences and the wheels' RECORDs stay.
LEFT_OUT = (
    "*.pyi",
    "*.pxd",
    "numpy/tests/*",
    "numpy/*/tests/*",
    "numpy/f2py/*",
    "numpy/distutils/*",
    "numpy/doc/*",
    "numpy/_pyinstaller/*",
    "numpy/*/include/*",
    "numpy/*/lib/*.a",
    "numpy/*/_simd.*.so",  # this and the next are NumPy's own tests; _multiarray_tests is needed all the same
    "numpy/*/_umath_tests.*.so",
    "numpy/*/_operand_flag_tests.*.so",
    "numpy/*/_rational_tests.*.so",
    "numpy/*/_struct_ufunc_tests.*.so",
    "ai_edge_litert/libLiteRtWebGpuAccelerator.so",
    "ai_edge_litert/vendors/*",
    "ai_edge_litert/tools/*",
    "ai_edge_litert/aot/*",
    "ai_edge_litert/schema_py_generated.py",
    "ai_edge_litert/*_pb2.py",
)
BYTECODE_SHARE = 1.2  # bytes of bytecode for each of source, at most: 0.6 to 1.1 was seen
DATE = 315532800  # of every file in the tar: 1 January 1980, as FAT has it


@dataclass(frozen=True)
class Kit:
    """One that is whole and sealed by whom it should be."""

    manifest: Mapping[str, Any]
    _files: Mapping[str, bytes]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def version(self) -> str:
        return str(self.manifest["version"])

    @property
    def target(self) -> str:
        return str(self.manifest["target"])

    def files(self) -> Mapping[str, bytes]:
        """Everything, by relative names, as it is to lie on a card: `python3 install.py` installs from there."""
        return self._files


def make_kit(target: Target, wheels: Mapping[str, bytes], key: SealingKey) -> bytes:
    """A sealed kit of these wheels, the agent's among them. The same inputs give the same bytes.

    Raises ReleaseError for a wheel that is damaged, not whole or not for the target's machine, and ConfigError where
    the agent's own or the runtime's is not there.
    """
    versions = {}
    installed = python_bytes = 0
    for name, data in sorted(wheels.items()):
        project, version, kept = _looked_at(name, data)
        versions[plain_name(project)] = version
        installed += sum(kept.values())
        python_bytes += sum(size for file, size in kept.items() if file.endswith(".py"))
    for needed in ("covey-edge", target.runtime):
        if needed not in versions:
            raise ConfigError(f"no wheel of {needed} is among those for the kit", "give it with --wheel")
    version = versions["covey-edge"]
    files = {installer.INSTALLER: installer_text(), **{f"wheels/{name}": wheels[name] for name in sorted(wheels)}}
    manifest = _manifest_bytes(
        {
            "format": installer.FORMAT,
            "name": f"covey-agent-{version}-{target.name}",
            "version": version,
            "target": target.name,
            "python": target.python,
            "machine": target.machine,
            "glibc": max(map(glibc_of, wheels), key=lambda text: int(text[2:])),
            "runtime": f"{target.runtime} {versions[target.runtime]}",
            "installed_bytes": installed + int(BYTECODE_SHARE * python_bytes),
            "left_out": list(LEFT_OUT),
            "release_key": key.public.hex(),
            "files": [
                {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
                for name, data in files.items()
            ],
        }
    )
    seal = key.seal(installer.SEAL_CONTEXT + manifest)
    return _tar({installer.MANIFEST: manifest, installer.SEAL: seal, **files})


def open_kit(path: Path, release_key: PublicKey) -> Kit:
    """The kit in a file: sealed by this key, every file as its manifest says, nothing else in it. Else ReleaseError."""
    return read_kit(_read(path), release_key)


def read_kit(data: bytes, release_key: PublicKey) -> Kit:
    files, manifest = _members(data)
    if not release_key.verifies(files[installer.SEAL], installer.SEAL_CONTEXT + files[installer.MANIFEST]):
        raise ReleaseError("the kit is not sealed by this release key", "ask its maker for another")
    listed = {entry["name"]: entry for entry in manifest["files"]}
    for name in sorted(set(listed) ^ (set(files) - {installer.MANIFEST, installer.SEAL})):
        raise ReleaseError(f"{name} is not both in the kit and in its manifest", installer.AGAIN)
    try:
        for name, entry in listed.items():
            installer.check_file(entry, files[name])
    except installer.InstallError as exc:
        raise ReleaseError(str(exc)) from exc
    return Kit(manifest, files)


def described_unverified(path: Path) -> dict[str, Any]:
    """What a kit says of itself; nothing is checked but its form."""
    return _members(_read(path))[1]


def installer_text() -> bytes:
    """`install.py`: the installer with the look at wheels that it shares with the agent written into it."""
    text = inspect.getsource(installer)
    shared = inspect.getsource(wheel_files)
    body = shared[shared.index("import base64") :].replace("from __future__ import annotations\n", "")
    line = re.search(r"^from covey_edge\.wheel_files import .*\n", text, re.MULTILINE)
    assert line is not None
    return (text[: line.start()] + "# --- covey_edge.wheel_files\n\n" + body + "\n\n" + text[line.end() :]).encode()


def _looked_at(name: str, data: bytes) -> tuple[str, str, dict[str, int]]:
    """Project, version, and size of each file that an installation keeps."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = wheel_files.files_of(name, archive, installer.MAX_KIT_BYTES, installer.MAX_FILES_OF_WHEEL)
            kept, headers = {}, b""
            for file, content in found:
                if file.endswith(".dist-info/METADATA"):
                    headers = content
                if not installer.is_left_out(file, LEFT_OUT):
                    kept[file] = len(content)
    except WheelError as exc:
        raise ReleaseError(exc.what, exc.remedy or "fetch it again") from exc
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as exc:
        raise ReleaseError(f"{name} is not a whole wheel ({exc})", "fetch it again") from exc
    metadata = HeaderParser().parsestr(headers.decode(errors="replace"))
    if not metadata["Name"] or not metadata["Version"]:
        raise ReleaseError(f"{name} does not say its name and version", "fetch it again")
    return str(metadata["Name"]), str(metadata["Version"]), kept


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), 0o644, DATE
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {path} ({exc.strerror or exc})", "check the path") from exc


def _members(data: bytes) -> tuple[dict[str, bytes], dict[str, Any]]:
    try:
        files = dict(installer.members(data))
        if installer.SEAL not in files or installer.MANIFEST not in files:
            raise ReleaseError("this is not a kit", "give a file that `covey bundle` wrote")
        return files, installer.read_manifest(files[installer.MANIFEST])
    except installer.InstallError as exc:
        raise ReleaseError(str(exc)) from exc
