"""Installs a kit: `install.py` of every kit is this text with that of `covey_edge.wheel_files` in it.

    python3 install.py [KIT] [--prefix /opt/covey] [--release-key HEX]
    python3 install.py --check | --uninstall [--prefix /opt/covey]

Runs on the device's own Python, 3.9 or newer, with its standard library alone; nothing is fetched. KIT is a .kit file
or the folder of an unpacked one, by default where this file lies. What lies in PREFIX afterwards:

    versions/NAME    a whole tree, never changed again: an environment of Python's with modules and their bytecode
    current          a link to the one that counts
    bin/covey, bin/python    start what `current` names, and are the same for ever

A power cut leaves the old version or the new one. docs/kits.md says what is trusted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from covey_edge.wheel_files import WheelError, digest_of, files_of, record_rows

FORMAT = 1
SEAL_CONTEXT = b"covey kit\x00"
MANIFEST, SEAL, INSTALLER = "manifest.json", "seal", "install.py"
MAX_KIT_BYTES = 256 * 2**20
MAX_FILES_OF_WHEEL = 8192  # numpy has 1,050
SPARE_BYTES = 16 * 2**20  # what an installation leaves on the disk at least
EXIT_CONFIG, EXIT_MACHINE, EXIT_BUNDLE, EXIT_STORAGE = 2, 3, 6, 10  # docs/exit-codes.md
AGAIN = "copy the kit again"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}")
_FILE = re.compile(r"wheels/[A-Za-z0-9][A-Za-z0-9._+-]{0,159}\.whl|install\.py")

# Imports every module of the agent and what they load later: that shows that nothing lacks, and leaves the bytecode.
TRIAL = """
import importlib, pkgutil
import covey_edge, covey_protocol
for package in (covey_edge, covey_protocol):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
from cryptography.hazmat.primitives.ciphers import aead
from cryptography.hazmat.primitives.kdf import hkdf
import ctypes, paho.mqtt.client, sqlite3, ssl
from covey_edge.runtime import installed
from covey_protocol.seals import SealingKey
key = SealingKey.from_seed(bytes(32))
assert key.public.verifies(key.seal(b"covey"), b"covey")
print(covey_edge.__version__, "with", installed()[1])
"""
COVEY_SCRIPT = """\
import sys

from covey_edge.cli import main

sys.exit(main())
"""
# What is started keeps the version's own path, so that a running agent never mixes two versions' modules.
STARTER = """\
#!/bin/sh
# written by covey's install.py
{clean}here=$(readlink -f {current}) || exit 3
exec "$here/bin/python" {script}"$@"
"""


class InstallError(Exception):
    def __init__(self, code: int, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.code = code


# --- the kit


class Source:
    """The files of a kit, by their names in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packed: dict[str, bytes] = {}
        try:
            if not path.is_dir():
                self._packed = dict(members(path.read_bytes()))
        except OSError as exc:
            raise InstallError(EXIT_BUNDLE, f"cannot read {path} ({exc.strerror or exc})", AGAIN) from exc

    def read(self, name: str) -> bytes:
        try:
            if self._path.is_dir():
                return (self._path / name).read_bytes()
            return self._packed[name]
        except KeyError as exc:
            raise InstallError(EXIT_BUNDLE, f"{self._path} holds no {name}", AGAIN) from exc
        except OSError as exc:
            raise InstallError(EXIT_BUNDLE, f"cannot read {self._path / name} ({exc.strerror or exc})", AGAIN) from exc


def members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a kit; InstallError for anything that is no kit of plain files."""
    if len(data) > MAX_KIT_BYTES:
        raise InstallError(EXIT_BUNDLE, f"a kit of {len(data)} bytes", f"at most {MAX_KIT_BYTES} are read")
    seen = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                plain = member.name in (MANIFEST, SEAL) or _FILE.fullmatch(member.name)
                if content is None or not plain or member.name in seen:
                    raise InstallError(EXIT_BUNDLE, f"the kit holds {member.name[:80]!r}, which is not its own", AGAIN)
                seen.add(member.name)
                yield member.name, content.read()
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as exc:
        raise InstallError(EXIT_BUNDLE, f"this is not a whole kit ({exc})", AGAIN) from exc


def read_manifest(data: bytes) -> dict[str, Any]:
    """The manifest with everything that is used of it in its form. InstallError for all else, whatever the bytes."""
    try:
        made: dict[str, Any] = json.loads(data)
        if made["format"] != FORMAT:
            raise InstallError(EXIT_BUNDLE, f"a kit of format {made['format']}", f"this installer reads {FORMAT}")
        names = [one["name"] for one in made["files"]]
        good = (
            _NAME.fullmatch(made["name"])
            and _NAME.fullmatch(made["version"])  # a folder is called by it
            and all(_FILE.fullmatch(name) for name in names)
            and len(set(names)) == len(names)
            and all(re.fullmatch(r"[0-9a-f]{64}", one["sha256"]) and one["size"] >= 0 for one in made["files"])
            and re.fullmatch(r"[0-9]+\.[0-9]+", made["python"])
            and re.fullmatch(r"[0-9]+\.[0-9]+", made["glibc"])
            and all(isinstance(made[key], str) for key in ("version", "machine", "target", "runtime"))
            and isinstance(made["installed_bytes"], int)
            and all(isinstance(pattern, str) for pattern in made["left_out"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise InstallError(EXIT_BUNDLE, f"the kit's manifest cannot be read ({exc!r})", AGAIN) from exc
    if not good:
        raise InstallError(EXIT_BUNDLE, "the kit's manifest is not in its form", AGAIN)
    return made


def check_file(entry: dict[str, Any], data: bytes) -> None:
    if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise InstallError(EXIT_BUNDLE, f"{entry['name']} is not what the kit's manifest says", AGAIN)


def is_left_out(name: str, patterns: Sequence[str]) -> bool:
    """Patterns as a shell has them, but that * also takes /."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# --- the seal: Ed25519 as RFC 8032 has it, for checking only, which needs no secret and so no care for time

_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, _P - 2, _P) % _P
_ROOT_OF_MINUS_ONE = pow(2, (_P - 1) // 4, _P)
Point = tuple[int, int, int, int]  # X, Y, Z, T with x = X / Z, y = Y / Z, xy = T / Z


def _add(a: Point, b: Point) -> Point:
    first, second = (a[1] - a[0]) * (b[1] - b[0]) % _P, (a[1] + a[0]) * (b[1] + b[0]) % _P
    third, fourth = 2 * a[3] * b[3] * _D % _P, 2 * a[2] * b[2] % _P
    e, f, g, h = second - first, fourth - third, fourth + third, second + first
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _times(number: int, point: Point) -> Point:
    result = (0, 1, 1, 0)
    while number:
        if number & 1:
            result = _add(result, point)
        point = _add(point, point)
        number >>= 1
    return result


def _x_of(y: int, sign: int) -> int:
    square = (y * y - 1) * pow(_D * y * y + 1, _P - 2, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if (x * x - square) % _P:
        x = x * _ROOT_OF_MINUS_ONE % _P
    if (x * x - square) % _P or (x == 0 and sign):
        raise ValueError("no point of the curve")
    return x if x & 1 == sign else _P - x


def _point(data: bytes) -> Point:
    number = int.from_bytes(data, "little")
    y, sign = number & (2**255 - 1), number >> 255
    if y >= _P:
        raise ValueError("no number of the field")
    x = _x_of(y, sign)
    return x, y, 1, x * y % _P


_BASE_Y = 4 * pow(5, _P - 2, _P) % _P
_BASE = (_x_of(_BASE_Y, 0), _BASE_Y, 1, _x_of(_BASE_Y, 0) * _BASE_Y % _P)


def verifies(key: bytes, seal: bytes, data: bytes) -> bool:
    """Whether `seal` (64 bytes) was made over `data` by the owner of `key` (32 bytes). About 10 ms."""
    if len(key) != 32 or len(seal) != 64:
        return False
    try:
        owner, commitment = _point(key), _point(seal[:32])
    except ValueError:
        return False
    answer = int.from_bytes(seal[32:], "little")
    if answer >= _ORDER:
        return False
    challenge = int.from_bytes(hashlib.sha512(seal[:32] + key + data).digest(), "little") % _ORDER
    left, right = _times(answer, _BASE), _add(commitment, _times(challenge, owner))
    return not (left[0] * right[2] - right[0] * left[2]) % _P and not (left[1] * right[2] - right[1] * left[2]) % _P


def opened(source: Source, release_key: str = "") -> tuple[dict[str, Any], bytes]:
    """The kit's manifest, and its bytes. With a key the seal must be its owner's."""
    data = source.read(MANIFEST)
    if release_key:
        try:
            key = bytes.fromhex(release_key)
        except ValueError as exc:
            raise InstallError(EXIT_CONFIG, "--release-key is no key", "give 64 hexadecimal digits") from exc
        if not verifies(key, source.read(SEAL), SEAL_CONTEXT + data):
            raise InstallError(EXIT_BUNDLE, "the kit is not sealed by this release key", "ask its maker for another")
    return read_manifest(data), data


# --- this machine


def check_machine(made: dict[str, Any]) -> None:
    """InstallError naming what the kit is for and what this is."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.implementation.name != "cpython" or here != made["python"]:
        raise InstallError(
            EXIT_MACHINE,
            f"the kit is for CPython {made['python']}, this is {platform.python_implementation()} {here}",
            f"run it with python{made['python']}, or make a kit for --python {here}",
        )
    bits = 8 * struct.calcsize("P")
    if platform.machine() != made["machine"] or bits != 64:
        raise InstallError(
            EXIT_MACHINE,
            f"the kit is for {made['machine']}, this is {platform.machine()} with {bits}-bit programs",
            "covey needs a 64-bit system" if bits != 64 else "make a kit for this machine",
        )
    name, _, version = (libc_version() or "another C library 0").rpartition(" ")
    if name != "glibc" or _numbers(version) < _numbers(made["glibc"]):
        raise InstallError(
            EXIT_MACHINE,
            f"the kit needs glibc {made['glibc']} or newer, this is {name} {version}",
            "use a newer system (docs/compatibility.md)",
        )


def libc_version() -> Optional[str]:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))


def check_room(folder: Path, made: dict[str, Any]) -> None:
    needed, free = made["installed_bytes"] + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise InstallError(
            EXIT_STORAGE,
            f"{folder} has {free / 1e6:.0f} MB free, the installation needs {needed / 1e6:.0f}",
            "free some space",
        )


# --- installing


class Prefix:
    """Where versions are. Every method leaves what is there whole, whenever the power goes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.versions = self.path / "versions"
        self.current = self.path / "current"

    def running(self) -> Optional[Path]:
        """The tree that counts."""
        try:
            tree = self.versions / Path(os.readlink(self.current)).name
        except OSError:
            return None
        return tree if tree.is_dir() else None

    def here(self) -> list[Path]:
        found = self.versions.iterdir() if self.versions.is_dir() else ()
        return sorted(tree for tree in found if not tree.name.startswith("."))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """For one installer alone."""
        self.versions.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise InstallError(EXIT_STORAGE, f"another installer works in {self.path}", "wait for it") from exc
            yield

    def install(self, source: Source, made: dict[str, Any], manifest: bytes) -> tuple[Path, str]:
        """The tree of this kit, which counts from now on, and what it said when it was tried."""
        name = f"{made['version']}-{hashlib.sha256(manifest).hexdigest()[:12]}"
        for left in self.versions.glob(".*"):
            shutil.rmtree(left)
        for tree in self.here():
            if tree.name.split("~")[0] == name and not list(faults(tree)):
                self.choose(tree)
                return tree, "was here already"
        check_room(self.path, made)
        taken = {tree.name for tree in self.here()}
        free = next(one for one in (name, *(f"{name}~{n}" for n in range(1, 100))) if one not in taken)
        unfinished, tree = self.versions / f".{free}", self.versions / free
        try:
            make_tree(unfinished, source, made, manifest)
            said = tried(unfinished)
            os.sync()
            os.rename(unfinished, tree)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_folder(self.versions)
        self.choose(tree)
        return tree, said

    def choose(self, tree: Path) -> None:
        """Let this one count; what neither counts, counted before, nor runs is removed."""
        before = self.running()
        make_starters(self.path, self.current)
        if before != tree:
            replace_link(self.current, f"versions/{tree.name}")
        for other in self.here():
            if other not in (tree, before) and not in_use(other):
                shutil.rmtree(other)

    def uninstall(self) -> None:
        """Remove what an installation made, and nothing else; the link first, so that nothing half is started."""
        if not self.here() and not self.current.is_symlink():
            raise InstallError(EXIT_CONFIG, f"{self.path} holds no installation of covey", "give its --prefix")
        for path in (self.current, self.path / "bin" / "covey", self.path / "bin" / "python", self.path / ".lock"):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        shutil.rmtree(self.versions)
        for folder in (self.path / "bin", self.path):
            with contextlib.suppress(OSError):  # where something else is in it, it stays
                folder.rmdir()


def make_tree(tree: Path, source: Source, made: dict[str, Any], manifest: bytes) -> None:
    """An environment as `python -m venv` makes one, without pip, with the kit's modules."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    packages = packages_of(tree, made)
    (tree / "bin").mkdir(parents=True)
    packages.mkdir(parents=True)
    settings = f"home = {os.path.dirname(python)}\ninclude-system-site-packages = false\nversion = {made['python']}\n"
    (tree / "pyvenv.cfg").write_text(settings)
    (tree / "bin" / "python").symlink_to(python)
    (tree / "bin" / "covey").write_text(COVEY_SCRIPT)
    (tree / MANIFEST).write_bytes(manifest)
    for entry in made["files"]:
        data = source.read(entry["name"])
        check_file(entry, data)
        if entry["name"] == INSTALLER:
            (tree / INSTALLER).write_bytes(data)
        else:
            unpack(entry["name"].rpartition("/")[2], data, made["left_out"], packages)


def packages_of(tree: Path, made: dict[str, Any]) -> Path:
    return tree / "lib" / f"python{made['python']}" / "site-packages"


def unpack(name: str, data: bytes, left_out: Sequence[str], packages: Path) -> None:
    """Every file of the wheel is held against its RECORD, also those that are left out."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for file, content in files_of(name, archive, MAX_KIT_BYTES, MAX_FILES_OF_WHEEL):
                if is_left_out(file, left_out):
                    continue
                path = packages / file
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as stream:
                    stream.write(content)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as exc:
        raise InstallError(EXIT_BUNDLE, f"{name} is not a whole wheel ({exc})", AGAIN) from exc
    except FileExistsError as exc:
        raise InstallError(EXIT_BUNDLE, f"two wheels of the kit hold {exc.filename}", "ask its maker") from exc


def tried(tree: Path, *, writes: bool = True) -> str:
    """What the tree's agent says of itself after everything of it was imported."""
    command = [str(tree / "bin" / "python"), "-W", "ignore", *([] if writes else ["-B"]), "-c", TRIAL]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, cwd=tree)
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or [f"it ended with code {ended.returncode}"]
        cause = next((line for line in said if re.match(r"[\w.]*Error: ", line)), said[-1])  # the first is the cause
        remedy = "install what it names (Debian: apt install python3 libstdc++6)"
        raise InstallError(EXIT_MACHINE, f"the agent cannot be started here ({cause[:300]})", remedy)
    return ended.stdout.strip()


def faults(tree: Path) -> Iterator[str]:
    """What in a tree is not as it was installed."""
    try:
        made = read_manifest((tree / MANIFEST).read_bytes())
    except (OSError, InstallError):
        yield f"{tree / MANIFEST} cannot be read"
        return
    packages = packages_of(tree, made)
    expected: dict[str, str] = {}
    for record in packages.glob("*.dist-info/RECORD"):
        with contextlib.suppress(OSError, ValueError):
            expected.update(record_rows(record.read_bytes()))
    found = {
        path.relative_to(packages).as_posix(): path
        for path in packages.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted = {name for name in expected if not is_left_out(name, made["left_out"])}
    if len(list(packages.glob("*.dist-info/RECORD"))) != len(made["files"]) - 1:
        yield f"{packages} lacks a package of the kit"
    for name in sorted(wanted ^ set(found)):
        yield f"{packages / name} {'is missing' if name in wanted else 'is not of the kit'}"
    for name in sorted(wanted & set(found)):
        if expected[name] and digest_of(found[name].read_bytes()) != expected[name]:
            yield f"{found[name]} was changed"
    for name in ("bin/covey", "bin/python", "pyvenv.cfg"):
        if not (tree / name).exists():
            yield f"{tree / name} is missing, or what it is a link to"


def in_use(tree: Path) -> bool:
    """Whether a process has files of it open as code. Of processes that cannot be looked at nothing is known."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"{tree}/" in maps.read_text(errors="replace"):
                return True
        except OSError:
            continue
    return False


def make_starters(prefix: Path, current: Path) -> None:
    for name, clean, script in (
        ("covey", "unset PYTHONPATH PYTHONHOME\n", '"$here/bin/covey" '),
        ("python", "", ""),
    ):
        text = STARTER.format(current=shlex.quote(str(current)), clean=clean, script=script)
        path = prefix / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.read_text() == text:
            continue
        unfinished = path.with_name(f".{name}.tmp")
        with unfinished.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), 0o755)
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)


def replace_link(link: Path, target: str) -> None:
    unfinished = link.with_name(f".{link.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    os.symlink(target, unfinished)
    os.replace(unfinished, link)
    sync_folder(link.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(tree: Path) -> int:
    """Bytes of all plain files."""
    return sum(path.lstat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink())


# --- the command


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="install.py", description="Install covey's agent from a kit, without network."
    )
    default = Path(os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("kit", nargs="?", type=Path, default=default, help="a .kit file or the folder of one")
    parser.add_argument("--prefix", type=Path, default=Path("/opt/covey"), help="default: /opt/covey")
    parser.add_argument("--release-key", default="", metavar="HEX", help="refuse a kit that its owner has not sealed")
    parser.add_argument("--check", action="store_true", help="look whether what is installed is whole")
    parser.add_argument("--uninstall", action="store_true", help="remove what is installed, not the agent's state")
    options = parser.parse_args(argv)
    os.umask(0o022)
    try:
        for line in run(options):
            print(line, flush=True)
    except WheelError as exc:
        return failed(EXIT_BUNDLE, exc)
    except InstallError as exc:
        return failed(exc.code, exc)
    except OSError as exc:
        return failed(EXIT_STORAGE, f"{exc.filename or options.prefix}: {exc.strerror or exc}")
    return 0


def failed(code: int, what: object) -> int:
    print(f"install.py: error: {what}", file=sys.stderr)
    return code


def run(options: argparse.Namespace) -> Iterator[str]:
    prefix = Prefix(options.prefix)
    if options.uninstall:
        prefix.uninstall()
        yield f"covey is removed from {prefix.path}; the agent's state and configuration are where they were"
        return
    if options.check:
        yield from check(prefix)
        return
    source = Source(options.kit)
    made, manifest = opened(source, options.release_key)
    check_machine(made)
    with prefix.locked():
        yield f"installing {made['name']} in {prefix.path}"
        tree, said = prefix.install(source, made, manifest)
    yield f"covey {said}: {size_of(tree) / 1e6:.1f} MB in {tree}"
    yield f"start it with {prefix.path}/bin/covey; an agent that runs already takes it up when it is started anew"


def check(prefix: Prefix) -> Iterator[str]:
    tree = prefix.running()
    if tree is None:
        raise InstallError(
            EXIT_CONFIG, f"{prefix.path} holds no installation of covey", "run install.py without --check"
        )
    found = list(faults(tree))
    if found:
        raise InstallError(EXIT_BUNDLE, "\n".join(found[:20]), "run install.py of the kit again")
    yield f"{tree} is whole: covey {tried(tree, writes=False)}"


if __name__ == "__main__":
    sys.exit(main())
