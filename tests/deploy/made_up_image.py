"""Made-up images of Raspberry Pi OS: its partition table, a FAT boot partition with the files covey looks at, and a
root partition with a few known bytes. No real image was at hand; what is in them follows pi-gen (stage1/00-boot-files,
stage2/04-cloud-init, export-image) and raspberrypi-sys-mods. Sparse: most of a file is holes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Optional

from covey_deploy.fat import Fat

MIB = 2**20
BOOT_START = 8 * MIB  # as in images since 2024
BOOT_MIB = 2
ROOT = b"the root file system, of which not one byte may change" * 100
BOOKWORM_CMDLINE = (
    b"console=serial0,115200 console=tty1 root=PARTUUID=4e639091-02 rootfstype=ext4 fsck.repair=yes rootwait quiet"
    b" init=/usr/lib/raspberrypi-sys-mods/firstboot\n"
)
TRIXIE_CMDLINE = (
    b"console=serial0,115200 console=tty1 root=PARTUUID=4e639091-02 rootfstype=ext4 fsck.repair=yes rootwait resize\n"
)


def issue(date: str) -> bytes:
    made = (
        "Generated using pi-gen, https://github.com/RPi-Distro/pi-gen, 4b2a0a7c1d8cd8f4a2d1d1f0d4f3a4b3c2d1e0f9, stage2"
    )
    return f"Raspberry Pi reference {date}\n{made}\n".encode()


BOOKWORM: Mapping[str, bytes] = {
    "cmdline.txt": BOOKWORM_CMDLINE,
    "config.txt": b"arm_64bit=1\n",
    "issue.txt": issue("2025-05-13"),
    "kernel8.img": b"a kernel" * 4000,
    "overlays/README": b"overlays\n",
}
TRIXIE: Mapping[str, bytes] = {
    **BOOKWORM,
    "cmdline.txt": TRIXIE_CMDLINE,
    "issue.txt": issue("2025-12-04"),
    "user-data": b"#cloud-config\n\n# many comments\nssh_pwauth: false\n",
    "meta-data": b"instance-id: rpios-image\n",
    "network-config": b"network:\n  version: 2\n",
}


def format_fat(file: BinaryIO, offset: int, size: int, *, fat32: bool = True) -> None:
    """An empty FAT file system, as mkfs.vfat would make it: clusters of 512 bytes (FAT32) or 2 KiB (FAT16)."""
    sectors, per_cluster = size // 512, 1 if fat32 else 4
    root_slots, reserved = (0, 32) if fat32 else (512, 1)
    width = 4 if fat32 else 2
    table = -(-(sectors // per_cluster + 2) * width // 512)
    boot = bytearray(512)
    boot[:3], boot[3:11], boot[510:] = b"\xeb\x58\x90", b"mkfs.fat", b"\x55\xaa"
    few = sectors if sectors < 65536 and not fat32 else 0
    struct.pack_into("<HBHBHHBH", boot, 11, 512, per_cluster, reserved, 2, root_slots, few, 0xF8, 0 if fat32 else table)
    struct.pack_into("<HHI", boot, 24, 32, 8, offset // 512)
    struct.pack_into("<I", boot, 32, 0 if few else sectors)
    if fat32:
        struct.pack_into("<IHHIHH", boot, 36, table, 0, 0, 2, 1, 6)
    struct.pack_into(
        "<BBBI11s8s",
        boot,
        64 if fat32 else 36,
        0x80,
        0,
        0x29,
        0x4E639091,
        b"bootfs     ",
        b"FAT32   " if fat32 else b"FAT16   ",
    )
    at = {0: bytes(boot)}
    if fat32:
        info = bytearray(512)
        used = reserved + 2 * table
        info[:4], info[484:488], info[508:] = b"RRaA", b"rrAa", b"\0\0\x55\xaa"
        struct.pack_into("<II", info, 488, (sectors - used) // per_cluster - 1, 3)
        at.update({1: bytes(info), 6: bytes(boot), 7: bytes(info)})
    first = struct.pack("<III", 0x0FFFFFF8, 0x0FFFFFFF, 0x0FFFFFFF) if fat32 else struct.pack("<HH", 0xFFF8, 0xFFFF)
    at.update({reserved: first, reserved + table: first})
    for sector, content in at.items():
        file.seek(offset + sector * 512)
        file.write(content)
    label = struct.pack("<11sB20x", b"bootfs     ", 0x08)
    file.seek(offset + (reserved + 2 * table) * 512)
    file.write(label)


def make_image(
    path: Path, files: Mapping[str, bytes], *, boot_mib: int = BOOT_MIB, root_mib: int = 4, fat32: bool = True
) -> Path:
    """An image whose boot partition holds `files`. fsck.vfat wants at least 40 MiB of FAT32; Linux does not."""
    start, boot, root = BOOT_START, boot_mib * MIB, root_mib * MIB
    table = bytearray(512)
    table[440:444], table[510:] = bytes.fromhex("9190634e"), b"\x55\xaa"
    for index, (kind, at, size) in enumerate(((0x0C, start, boot), (0x83, start + boot, root))):
        struct.pack_into("<B3sB3sII", table, 446 + 16 * index, 0, b"", kind, b"", at // 512, size // 512)
    with path.open("w+b") as file:
        file.truncate(start + boot + root)
        file.write(table)
        format_fat(file, start, boot, fat32=fat32)
        file.seek(start + boot)
        file.write(ROOT)
        Fat(file, start).write(files)
    return path


def boot_file(path: Path, name: str) -> Optional[bytes]:
    with path.open("rb") as file:
        return Fat(file, BOOT_START).read(name)
