"""What the installer of a kit leaves on a device: the old agent or the new one, whenever the power goes.

The kits are small and their agent says its version and nothing else; test_kits_alone.py installs real ones.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from kit_helpers import HERE, MAKER, PYTHON, TRIAL, changed, packed, small_kit, small_wheel, small_wheels

from covey_deploy import installer
from covey_deploy.installer import Prefix, main
from covey_deploy.kit import make_kit

KITS = {version: small_kit(version) for version in ("9.0", "9.1", "9.2")}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing waits for everybody's writing on this machine; of it only the moments matter here."""
    monkeypatch.setattr(installer, "TRIAL", TRIAL)
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def _untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the order of things on the disk matters: without starting a Python for each installation."""
    monkeypatch.setattr(installer, "tried", lambda tree, **_: "not tried")


def install(kit: bytes, folder: Path, *more: str) -> int:
    path = folder / "some.kit"
    path.write_bytes(kit)
    return main([str(path), "--prefix", str(folder / "opt"), "--release-key", MAKER.public.hex(), *more])


def said(folder: Path, *command: str, **environment: str) -> str:
    env = {"PATH": os.environ["PATH"], **environment}
    return subprocess.check_output([str(folder / "opt" / "bin" / command[0]), *command[1:]], env=env, text=True).strip()


def test_an_installed_agent_starts_from_anywhere_and_hears_of_no_other_modules(tmp_path: Path) -> None:
    assert install(KITS["9.0"], tmp_path) == 0
    other = tmp_path / "other" / "covey_edge"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('the wrong one')")
    assert said(tmp_path, "covey", PYTHONPATH=str(other.parent)) == "9.0"
    where = "import sys, covey_edge; print(sys.executable, covey_edge.__file__)"
    executable, module = said(tmp_path, "python", "-c", where).split()
    tree = Prefix(tmp_path / "opt").running()
    assert tree is not None
    assert executable == str(tree / "bin" / "python")  # of the version: one that runs never mixes two versions' modules
    assert module == str(tree / "lib" / f"python{PYTHON}" / "site-packages" / "covey_edge" / "__init__.py")
    files = {path.name for path in tree.rglob("*")}
    assert "__init__.cpython-" + PYTHON.replace(".", "") + ".pyc" in files  # whoever runs it cannot write there
    assert not {"typed.pyi", "test_all.py"} & files


@pytest.mark.usefixtures("_untried")
def test_an_upgrade_keeps_the_version_before_and_no_older_one(tmp_path: Path) -> None:
    prefix = Prefix(tmp_path / "opt")
    for version in ("9.0", "9.1", "9.1", "9.2"):
        assert install(KITS[version], tmp_path) == 0
    assert [tree.name.split("-")[0] for tree in prefix.here()] == ["9.1", "9.2"]
    assert said(tmp_path, "covey") == "9.2"
    assert install(KITS["9.1"], tmp_path) == 0  # and back
    assert said(tmp_path, "covey") == "9.1"


@pytest.mark.usefixtures("_untried")
def test_a_version_that_a_process_runs_from_is_kept(tmp_path: Path) -> None:
    library = dict([small_wheel("library", "1.0", {"library.so": bytes(2**14)})])
    kits = [make_kit(HERE, {**small_wheels(version), **library}, MAKER) for version in ("9.0", "9.1", "9.2")]
    prefix = Prefix(tmp_path / "opt")
    assert install(kits[0], tmp_path) == 0
    tree = prefix.running()
    assert tree is not None
    with next(tree.rglob("library.so")).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert [install(kit, tmp_path) for kit in kits[1:]] == [0, 0]
        assert tree in prefix.here()
    assert [install(kit, tmp_path) for kit in kits[1:]] == [0, 0]
    assert tree not in prefix.here()


@pytest.mark.usefixtures("_untried")
def test_what_was_damaged_is_named_and_installed_anew_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(KITS["9.0"], tmp_path) == 0
    prefix = Prefix(tmp_path / "opt")
    tree = prefix.running()
    assert tree is not None
    assert main(["--check", "--prefix", str(prefix.path)]) == 0
    packages = tree / "lib" / f"python{PYTHON}" / "site-packages"
    (packages / "covey_edge" / "cli.py").write_text("broken")
    (packages / "covey_edge" / "more.py").write_text("")
    (packages / "tflite_runtime" / "__init__.py").unlink()
    assert main(["--check", "--prefix", str(prefix.path)]) == installer.EXIT_BUNDLE
    complaint = capsys.readouterr().err
    for words in ("cli.py was changed", "more.py is not of the kit", "tflite_runtime/__init__.py is missing"):
        assert words in complaint
    assert install(KITS["9.0"], tmp_path) == 0
    assert prefix.running() != tree
    assert main(["--check", "--prefix", str(prefix.path)]) == 0
    assert said(tmp_path, "covey") == "9.0"


@pytest.mark.usefixtures("_untried")
def test_uninstalling_takes_what_was_installed_and_nothing_else(tmp_path: Path) -> None:
    assert install(KITS["9.0"], tmp_path) == 0
    (tmp_path / "opt" / "bin" / "mine").write_text("")
    assert main(["--uninstall", "--prefix", str(tmp_path / "opt")]) == 0
    assert [path.name for path in (tmp_path / "opt").rglob("*")] == ["bin", "mine"]
    assert main(["--uninstall", "--prefix", str(tmp_path / "opt")]) == installer.EXIT_CONFIG


def of_another(**changes: object) -> bytes:
    manifest = json.dumps({**json.loads(dict(installer.members(KITS["9.0"]))[installer.MANIFEST]), **changes}).encode()
    files = dict(installer.members(changed(KITS["9.0"], installer.MANIFEST, manifest)))
    return packed(*{**files, installer.SEAL: MAKER.seal(installer.SEAL_CONTEXT + manifest)}.items())


MACHINES = {
    "another Python": (lambda: of_another(python="3.8"), f"the kit is for CPython 3.8, this is CPython {PYTHON}"),
    "another machine": (lambda: of_another(machine="riscv64"), "the kit is for riscv64, this is"),
    "a newer C library": (lambda: of_another(glibc="2.99"), "the kit needs glibc 2.99 or newer, this is glibc"),
}


@pytest.mark.parametrize("what", MACHINES)
def test_a_kit_for_another_machine_is_refused_by_name(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = MACHINES[what]
    assert install(make(), tmp_path) == installer.EXIT_MACHINE
    assert words in capsys.readouterr().err
    assert not (tmp_path / "opt").exists()


def test_a_system_of_32_bits_on_a_64_bit_kernel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installer.struct, "calcsize", lambda _: 4)
    assert install(KITS["9.0"], tmp_path) == installer.EXIT_MACHINE
    assert "with 32-bit programs; covey needs a 64-bit system" in capsys.readouterr().err


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert install(KITS["9.0"], tmp_path) == installer.EXIT_STORAGE
    assert "has 1 MB free, the installation needs" in capsys.readouterr().err
    assert Prefix(tmp_path / "opt").here() == []


def test_an_agent_that_cannot_be_started_here_is_not_installed_and_the_reason_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(KITS["9.0"], tmp_path) == 0
    broken = small_kit("9.1", **{"covey_edge/__init__.py": b"import ctypes\nctypes.CDLL('libnowhere.so.7')\n"})
    assert install(broken, tmp_path) == installer.EXIT_MACHINE
    assert "libnowhere.so.7: cannot open shared object file" in capsys.readouterr().err
    assert said(tmp_path, "covey") == "9.0"
    assert len(Prefix(tmp_path / "opt").here()) == 1


def test_two_wheels_that_write_the_same_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = dict([small_wheel("evil", "1.0", {"covey_edge/cli.py": b""})])
    assert install(make_kit(HERE, {**small_wheels(), **second}, MAKER), tmp_path) == installer.EXIT_BUNDLE
    assert "two wheels of the kit hold" in capsys.readouterr().err


# --- power cuts: at each moment at which something changes on the disk

MOMENTS = ("open", "rename", "replace", "mkdir", "symlink", "unlink", "rmdir", "fsync")


class Cut(BaseException):
    """The power goes."""


def cut_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    left = [moment]

    def before(real):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] < 0:  # what is written while the power is gone would be another test
                raise Cut
            return real(*args, **kwargs)

        return call

    for name in MOMENTS:
        patch.setattr(os, name, before(getattr(os, name)))


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_wherever_the_power_goes_the_old_agent_or_the_new_one_is_there_and_the_kit_can_be_installed_again(
    every: int, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    before.mkdir()
    assert [install(KITS[version], before) for version in ("9.0", "9.1")] == [0, 0]
    moment, finished, seen = 0, False, set()
    while not finished:
        folder = tmp_path / str(moment)
        shutil.copytree(before, folder, symlinks=True)
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, moment)
            with contextlib.suppress(Cut):
                finished = install(KITS["9.2"], folder) == 0
        running = Prefix(folder / "opt").running()
        assert running is not None, moment
        assert list(installer.faults(running)) == [], moment
        seen.add(running.name.split("-")[0])
        assert install(KITS["9.2"], folder) == 0, moment
        left = sorted(path.name for path in (folder / "opt" / "versions").iterdir())
        assert [name.split("-")[0] for name in left if name[0] != "."][-1] == "9.2"
        assert not [name for name in left if name.startswith(".")], moment
        shutil.rmtree(folder)
        moment += every
    assert moment > 30  # or the cuts were not made
    assert seen == {"9.1", "9.2"}
