"""The initial file system: which modules, in which order, and that the archive is what the kernel reads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from covey_deploy.initramfs import initramfs, needed_modules
from covey_protocol.errors import DataError

DEPENDENCIES = """\
kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko
kernel/fs/jbd2/jbd2.ko: kernel/lib/crc16.ko
kernel/lib/crc16.ko:
kernel/fs/mbcache.ko:
kernel/drivers/block/virtio_blk.ko:
kernel/drivers/net/unwanted.ko: kernel/lib/crc16.ko
kernel/crypto/crc32c-generic.ko:
"""


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    folder = tmp_path / "6.1.0-1-arm64"
    for line in DEPENDENCIES.splitlines():
        path = folder / line.partition(":")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (folder / "modules.dep").write_text(DEPENDENCIES)
    return folder


def test_modules_come_after_what_they_need_and_each_once(modules: Path) -> None:
    found = [Path(path).stem for path in needed_modules(modules, ["virtio_blk", "ext4", "jbd2", "crc32c_generic"])]
    assert found == ["virtio_blk", "crc16", "mbcache", "jbd2", "ext4", "crc32c-generic"]


def test_what_is_built_into_the_kernel_is_left_out(modules: Path) -> None:
    assert needed_modules(modules, ["virtio_pci"]) == []


def test_a_folder_without_dependencies_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no modules\.dep; run depmod"):
        needed_modules(tmp_path, ["ext4"])


def test_the_archive_holds_what_the_init_needs(modules: Path) -> None:
    entries = unpacked(initramfs(b"\x7fELF busybox", b"#!/bin/sh\n", modules, ["ext4"]))
    assert entries["init"] == (0o100755, b"#!/bin/sh\n")
    assert entries["bin/sh"] == (0o120777, b"busybox")
    assert entries["bin/busybox"][1] == b"\x7fELF busybox"
    assert entries["modules.list"][1] == b"crc16.ko\nmbcache.ko\njbd2.ko\next4.ko\n"
    assert all(entries[f"modules/{name}"][1] == name.encode() for name in entries["modules.list"][1].decode().split())
    assert "modules/unwanted.ko" not in entries
    names = list(entries)
    assert names.index("modules") < names.index("modules/ext4.ko")  # folders before what is in them


def test_equal_inputs_give_equal_bytes(modules: Path) -> None:
    assert initramfs(b"b", b"i", modules) == initramfs(b"b", b"i", modules)


def test_cpio_reads_the_archive(modules: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed (Debian: apt install cpio)")
    made = initramfs(b"b" * 5, b"i", modules)
    told = subprocess.run(["cpio", "--list", "--quiet"], input=made, capture_output=True, check=True).stdout.decode()
    assert told.split() == list(unpacked(made))


def unpacked(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Read as the kernel's documentation says (buffer-format): name -> mode and content, in the archive's order."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert start == len(archive)
            return found
        found[name] = mode, archive[start : start + size]
        at = (start + size + 3) // 4 * 4
