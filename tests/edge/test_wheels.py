"""Only whole wheels of pure Python are unpacked, and wherever the power goes the device has an agent to start."""

from __future__ import annotations

import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from patience import PATIENCE_S
from release_helpers import agent_files, released, small_wheel, wheel, zipped

from covey_edge import wheels
from covey_edge.boot import Boot, Folder, Staged, attempted, best, confirmed, taken_up
from covey_edge.wheels import checked, look_at, unpack
from covey_protocol.errors import ReleaseError, StorageError

NAME = "covey_edge-9.0-py3-none-any.whl"
INFO = "covey_edge-9.0.dist-info"


def raw(*entries: tuple[str, bytes], mode: int = 0) -> bytes:
    """A zip with these entries in this order, whatever they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, data)
    return buffer.getvalue()


def without_record(**changes: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(small_wheel()[1])) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}
    return {**files, **changes}


def whole_but(**changes: bytes) -> bytes:
    """A wheel with other files in it, and the RECORD they need."""
    return zipped(without_record(**changes), f"{INFO}/RECORD")


def tampered(data: bytes, name: str, content: bytes) -> bytes:
    """The same wheel with another content of one file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(one, content if one == name else archive.read(one)) for one in archive.namelist()]
    return raw(*entries)


def encrypted() -> bytes:
    """The flag of an encrypted entry, in its header and in the directory."""
    data = bytearray(small_wheel()[1])
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + place] |= 1
    return bytes(data)


REFUSED = {
    "nothing": (lambda: b"", "is not a whole wheel"),
    "half a wheel": (lambda: small_wheel()[1][:400], "is not a whole wheel"),
    "a path to the parent": (lambda: raw(("../evil.py", b"")), "which is no plain file in its folder"),
    "a path in the middle to the parent": (lambda: raw(("a/../../evil.py", b"")), "no plain file in its folder"),
    "an absolute path": (lambda: raw(("/etc/passwd", b"")), "no plain file in its folder"),
    "a drive": (lambda: raw(("C:/evil.py", b"")), "no plain file in its folder"),
    "a backslash": (lambda: raw(("a\\..\\evil.py", b"")), "no plain file in its folder"),
    "a link": (lambda: raw(("covey_edge", b"/etc"), mode=stat.S_IFLNK | 0o777), "no plain file in its folder"),
    "a device": (lambda: raw(("covey_edge", b""), mode=stat.S_IFCHR), "no plain file in its folder"),
    "a folder of scripts": (lambda: raw((f"{NAME[:14]}.data/scripts/x", b"")), "which is not unpacked"),
    "a file twice": (lambda: raw(("a.py", b""), ("a.py", b"1")), "holds a file twice"),
    "too many files": (lambda: raw(*((f"a{n}.py", b"") for n in range(wheels.MAX_FILES + 1))), "at most 4096"),
    "no RECORD": (lambda: raw(*without_record().items()), "has no RECORD"),
    "no dist-info": (lambda: raw(("a.py", b"")), "has no dist-info folder"),
    "a changed file": (lambda: tampered(small_wheel()[1], "covey_edge/deep/er.py", b"x = 2\n"), "not what its RECORD"),
    "a file that RECORD does not know": (
        lambda: raw(*{**dict(read(small_wheel()[1])), "more.py": b""}.items()),
        "'more.py' is not both in the wheel and in its RECORD",
    ),
    "a RECORD that is no text": (lambda: raw(*without_record().items(), (f"{INFO}/RECORD", b"\xff\xfe")), "RECORD of"),
    "compiled code by its own word": (
        lambda: whole_but(**{f"{INFO}/WHEEL": b"Root-Is-Purelib: false\n"}),
        "is not pure Python",
    ),
    "no name": (lambda: whole_but(**{f"{INFO}/METADATA": b"Version: 9.0\n"}), "does not say its name"),
    "encrypted entries": (encrypted, "is not a whole wheel"),
}


def read(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_what_is_refused_by_name(what: str) -> None:
    make, words = REFUSED[what]
    with pytest.raises(ReleaseError, match=r"covey_edge-9\.0") as raised:
        look_at(NAME, make())
    assert words in str(raised.value)


def test_a_bomb_is_unpacked_no_further_than_there_is_room() -> None:
    data = zipped({"covey_edge/zeros.py": bytes(2**20)}, f"{INFO}/RECORD")
    assert len(data) < 2**12
    with pytest.raises(ReleaseError, match="too large when unpacked"):
        look_at(NAME, data, room_bytes=2**16)


def test_a_compiled_wheel_is_refused_by_its_file_name() -> None:
    with pytest.raises(ReleaseError, match=r"armv7l\.whl is compiled"):
        look_at("numpy-2.0-cp311-cp311-linux_armv7l.whl", small_wheel()[1])


def test_the_agents_own_wheel_is_whole_and_has_all_it_needs_here(tmp_path: Path) -> None:
    name, data = wheel(agent_files("0.2.0"), "0.2.0")
    files = checked(released((name, data)), [data], "3.11")
    unpack(files, tmp_path / "0.2.0")
    code = "import covey_edge, covey_edge.launcher; print(covey_edge.__version__, covey_edge.__file__)"
    said = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{tmp_path}/0.2.0"})
    assert said.decode().split() == ["0.2.0", f"{tmp_path}/0.2.0/covey_edge/__init__.py"]


LACKING = {
    "a package that is not there": ("no-such-thing>=1", "needs no-such-thing>=1, which is not installed here"),
    "a newer version of one that is": ("click>=99", "needs click>=99, which is"),
    "what nobody knows of this machine": ("click; sys_platform == 'linux'", "the condition"),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_a_release_needs_must_be_here(what: str) -> None:
    needs, words = LACKING[what]
    made = wheel({"covey_edge/__init__.py": b""}, "9.0", requires=(needs,))
    with pytest.raises(ReleaseError) as raised:
        checked(released(made), [made[1]], "3.11")
    assert words in str(raised.value)


def test_or_come_with_it() -> None:
    agent = wheel({"covey_edge/__init__.py": b""}, "9.0", requires=("no-such-thing>=1",))
    other = wheel({"no_such_thing.py": b""}, "1.5", "no-such-thing", requires=())
    files = checked(released(agent, other), [agent[1], other[1]], "3.11")
    assert {"covey_edge/__init__.py", "no_such_thing.py"} <= set(files)


def test_two_wheels_must_not_write_the_same_file() -> None:
    agent, other = small_wheel(), wheel({"covey_edge/__init__.py": b"evil"}, "1.5", "no-such-thing", requires=())
    with pytest.raises(ReleaseError, match="as does another wheel"):
        checked(released(agent, other), [agent[1], other[1]], "3.11")


def test_a_release_that_says_another_version_than_its_wheel_is_refused() -> None:
    from msgspec.structs import replace

    made = small_wheel()
    with pytest.raises(ReleaseError, match=r"release 9\.1 holds covey-edge 9\.0"):
        checked(replace(released(made), version="9.1"), [made[1]], "3.11")


def test_a_full_disk_leaves_nothing_half_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = checked(released(small_wheel()), [small_wheel()[1]], "3.11")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        unpack(files, tmp_path / "9.0")
    assert list(tmp_path.iterdir()) == []


# --- power cuts: at each moment at which something changes on the disk

MOMENTS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink")
OLD = Boot(current="8.0", previous="7.0")


class Cut(BaseException):
    """The power goes."""


def device(folder: Path) -> Folder:
    """It runs 8.0."""
    for version in ("7.0", "8.0"):
        unpack({"covey_edge/__init__.py": version.encode()}, folder / version)
    made = Folder(folder)
    made.save(OLD)
    return made


def renew(folder: Folder) -> None:
    """What the agent and then the launcher do, up to the confirmation."""
    unpack(checked(released(small_wheel()), [small_wheel()[1]], "3.11"), folder.path / "9.0")
    folder.stage(Staged("9.0"))
    boot_once(folder)


def boot_once(folder: Folder) -> str:
    """A start after which the release on trial is healthy; what was started."""
    boot = attempted(taken_up(folder.boot(), folder.staged(), folder.here(), "0.1.0"), folder.here(), "0.1.0")
    folder.save(boot)
    folder.unstage()
    if boot.trial:
        folder.save(confirmed(boot))
        return boot.trial
    return best(boot, folder.here(), "0.1.0")


def cut_at(monkeypatch: pytest.MonkeyPatch, moment: int, how: object) -> None:
    left = [moment]

    def before(real):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] < 0:
                how()  # type: ignore[operator]
            return real(*args, **kwargs)

        return call

    for name in MOMENTS:
        monkeypatch.setattr(os, name, before(getattr(os, name)))


def power_goes() -> None:
    raise Cut


def whole(folder: Folder, version: str) -> bool:
    expected = {"9.0": b""}.get(version, version.encode())
    names = {"9.0": 6}.get(version, 1)
    found = [path for path in (folder.path / version).rglob("*") if path.is_file()]
    return len(found) == names and (folder.path / version / "covey_edge/__init__.py").read_bytes() == expected


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_wherever_the_power_goes_a_whole_agent_starts_and_the_release_comes(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk then is what was written before: the order of this program, not what a disk loses."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # only its moments matter here
    moment, finished = 0, False
    started = set()
    while not finished:
        folder = device(tmp_path / str(moment))
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, moment, power_goes)
            try:
                renew(folder)
                finished = True
            except Cut:
                pass
        for version in folder.here():
            assert whole(folder, version), (moment, version)
        started.add(boot_once(folder))
        renew(folder)  # the release is heard of again
        assert folder.boot().current == "9.0", moment
        assert folder.boot().previous in ("8.0", "9.0"), moment
        shutil.rmtree(folder.path)
        moment += every
    assert moment > 40  # or the cuts were not made
    assert started == {"8.0", "9.0"}


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import test_wheels
from covey_edge.boot import Folder
import pytest
with pytest.MonkeyPatch.context() as patch:
    test_wheels.cut_at(patch, int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    test_wheels.renew(Folder(test_wheels.Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_real_kill_at_every_moment_leaves_a_device_that_starts(tmp_path: Path) -> None:
    moment, ended = 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        folder = device(tmp_path / str(moment))
        code = KILLED.format(paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)])
        ended = subprocess.run(
            [sys.executable, "-c", code, str(folder.path), str(moment)], check=False, timeout=PATIENCE_S
        ).returncode
        assert all(whole(folder, version) for version in folder.here()), moment
        assert boot_once(folder) in ("8.0", "9.0")
        renew(folder)
        assert folder.boot().current == "9.0"
        moment += 1
    assert ended == 0
    assert moment > 40
