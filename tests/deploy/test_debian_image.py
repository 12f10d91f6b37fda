"""The recipe of the Debian image and its cache. That an image boots is tested in tests/device."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from patience import PATIENCE_S

from covey_deploy import debian_image
from covey_deploy.boot_partition import detect, open_boot
from covey_deploy.cache import cache_folder
from covey_deploy.debian_image import MIB, build, overlay, root_offset
from covey_deploy.programs import found_program
from covey_protocol.errors import MachineError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COVEY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_lacks_is_named_with_its_packages_before_anything_is_made(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian_image, "PROGRAMS", {"no-mmdebstrap": "mmdebstrap", "no-mke2fs": "e2fsprogs"})
    with pytest.raises(MachineError, match="here: no-mmdebstrap, no-mke2fs; install it: sudo apt install"):
        build(say=lambda text: None)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_machine_that_does_not_run_arm64_programs_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_image, "EMULATION", {})
    monkeypatch.setattr(debian_image, "BINFMT", Path("/nonexistent"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(MachineError, match=r"binfmt_misc\); sudo apt install qemu-user-static.*mount -t binfmt_misc"):
        debian_image.require_emulation()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, "/home/me/.cache/covey"),
        ({"XDG_CACHE_HOME": "/big/cache"}, "/big/cache/covey"),
        ({"XDG_CACHE_HOME": "/big/cache", "COVEY_CACHE": "/mine"}, "/mine"),
        ({"XDG_CACHE_HOME": "", "COVEY_CACHE": ""}, "/home/me/.cache/covey"),
    ],
)
def test_images_and_wheels_are_kept_where_the_user_keeps_caches(
    told: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COVEY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **told}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


class Factory:
    """Stands where packages are fetched and unpacked: minutes, and the network. Counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unpacked = self.made = 0
        monkeypatch.setattr(debian_image, "PROGRAMS", {})
        monkeypatch.setattr(debian_image, "unpack_packages", self.unpack)
        monkeypatch.setattr(debian_image, "make_image", self.make)

    def unpack(self, packages: tuple[str, ...], base: Path | None, target: Path, say: object) -> None:
        self.unpacked += 1
        target.write_text(" ".join([*packages, base.read_text() if base else ""]))

    def make(self, root: Path, recipe: object, image: Path, say: object) -> None:
        self.made += 1
        image.write_text(root.read_text())


def test_an_image_is_made_once_until_its_recipe_changes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory = Factory(monkeypatch)
    first = build(say=lambda text: None)
    assert build(say=lambda text: None) == first
    assert (factory.unpacked, factory.made) == (1, 1)
    monkeypatch.setattr(debian_image, "COMMAND_LINE", "quiet")  # of the image, not of the packages
    second = build(say=lambda text: None)
    assert (factory.unpacked, factory.made) == (1, 2)
    assert second != first
    assert not first.exists()  # nobody needs it any more
    monkeypatch.setattr(debian_image, "PACKAGES", ("fewer",))
    third = build(say=lambda text: None)
    assert (factory.unpacked, factory.made) == (2, 3)
    with_cloud_init = build(cloud_init=True, say=lambda text: None)
    assert with_cloud_init.read_text().startswith("cloud-init")
    assert with_cloud_init.read_text().endswith("fewer ")  # added to the packages that were there
    assert (factory.unpacked, factory.made) == (3, 4)
    assert third.exists()  # the other kind is kept
    build(renew=True, say=lambda text: None)
    assert factory.unpacked == 4
    assert third.exists()


def test_a_build_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory = Factory(monkeypatch)

    def half(root: Path, recipe: object, image: Path, say: object) -> None:
        image.write_text("half")
        raise MachineError("the power is gone")

    monkeypatch.setattr(debian_image, "make_image", half)
    (cache / "covey-made-by-somebody-who-was-killed" / "root").mkdir(parents=True)
    with pytest.raises(MachineError, match="the power is gone"):
        build(say=lambda text: None)
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".tar"]
    monkeypatch.setattr(debian_image, "make_image", factory.make)
    assert build(say=lambda text: None).exists()
    assert factory.unpacked == 1  # the packages were whole


def test_two_at_once_make_one_image(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory = Factory(monkeypatch)
    begun, go_on = threading.Event(), threading.Event()

    def slow(root: Path, recipe: object, image: Path, say: object) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        factory.make(root, recipe, image, say)

    monkeypatch.setattr(debian_image, "make_image", slow)
    said: list[str] = []

    def second_says(text: str) -> None:
        said.append(text)
        go_on.set()  # it waits: the first may finish

    first = threading.Thread(target=build, kwargs={"say": lambda text: None})
    first.start()
    assert begun.wait(PATIENCE_S)
    build(say=second_says)
    first.join(PATIENCE_S)
    assert said == ["another covey makes this image; waiting for it"]
    assert factory.made == 1


def test_the_boot_partition_is_roots_alone_and_the_first_boot_is_flashs() -> None:
    files = overlay(cloud_init=False)
    assert b"umask=0077" in files["etc/fstab"]
    assert files["etc/machine-id"] == b""
    service = files["etc/systemd/system/covey-first-boot.service"]
    assert b"ExecStart=/bin/sh /boot/firmware/covey/first-boot.sh /boot/firmware" in service
    assert "etc/systemd/system/covey-first-boot.service" not in overlay(cloud_init=True)  # user-data brings it


# --- a real image, as `make test-device` has left it in the cache


@pytest.fixture(params=[False, True], ids=["alone", "cloud-init"])
def real(request: pytest.FixtureRequest) -> tuple[Path, bool]:
    packages = debian_image.PROGRAMS
    lacking = [name for name in packages if found_program(name) is None]
    if lacking or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(sorted(set(packages.values())))}")
    return build(cloud_init=request.param), request.param


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_file_systems_of_a_real_image_are_sound(real: tuple[Path, bool]) -> None:
    image, cloud_init = real
    place = f"{image}?offset={root_offset()}"
    subprocess.run([str(found_program("e2fsck")), "-fn", place], check=True, capture_output=True)
    with image.open("rb") as file:
        boot = open_boot(file)
        names = {"vmlinuz", "initrd.img", "cmdline.txt", "EFI", "loader"}
        assert set(boot.names()) == names | ({"user-data", "meta-data"} if cloud_init else set())
        if cloud_init:
            assert detect(boot) == "trixie"
        assert (boot.read("vmlinuz") or b"")[:2] == b"MZ"  # UEFI starts it, too
        assert len(boot.read("initrd.img") or b"") < 16 * MIB
    told = {path: _stat(place, path) for path in ("/", "/etc/shadow", "/usr/bin/su", "/boot/firmware")}
    assert told["/"] == ("0755", "0", "0")
    assert told["/etc/shadow"] == ("0640", "0", "42")
    assert told["/usr/bin/su"] == ("04755", "0", "0")
    assert told["/boot/firmware"] == ("0755", "0", "0")


def _stat(place: str, path: str) -> tuple[str, str, str]:
    """Mode, user and group of a file of the image."""
    command = [str(found_program("debugfs")), "-R", f"stat {path}", place]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return tuple(words[words.index(name) + 1] for name in ("Mode:", "User:", "Group:"))  # type: ignore[return-value]
