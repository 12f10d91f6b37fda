"""Card images of machines so small that they boot in a tenth of a second: a few instructions in place of a kernel."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from covey_deploy.fat import Fat
from covey_deploy.programs import found_program

MIB = 1024 * 1024
STAYS = (0xD503207F, 0x17FFFFFF)  # wfi; b .-4
TURNS_OFF = (0x52800100, 0x72B08000, 0xD4000002)  # w0 = 0x84000008, PSCI's SYSTEM_OFF; hvc #0


def require_qemu() -> None:
    if shutil.which("qemu-system-aarch64") is None:
        pytest.skip("qemu-system-aarch64 is not installed (Debian: apt install qemu-system-arm)")
    if found_program("mkfs.vfat") is None:
        pytest.skip("mkfs.vfat is not installed (Debian: apt install dosfstools)")


def kernel(says: str, then: tuple[int, ...]) -> bytes:
    """Writes a text to the serial port of qemu's `virt` and goes on with `then`: what runs where Linux would."""
    code = [
        0xD2A12000,  # x0 = 0x09000000, the PL011's data register
        0x38401422,  # w2 = *x1++
        0x34000062,  # cbz w2, over the next two
        0xB9000002,  # *x0 = w2
        0x17FFFFFD,  # b to the load
        *then,
    ]
    length = 4 * (1 + len(code))
    adr = 0x10000001 | (length & 3) << 29 | (length >> 2) << 5  # x1 = the text behind the code
    return struct.pack(f"<{1 + len(code)}I", adr, *code) + says.encode() + b"\0"


def image(path: Path, files: dict[str, bytes]) -> Path:
    """A card image with one FAT partition that holds these files: MBR, 8 MiB."""
    entry = struct.pack("<B3sB3sII", 0, b"\0\0\0", 0x0C, b"\0\0\0", 2048, 7 * MIB // 512)
    with path.open("wb") as file:
        file.write(b"\0" * 446 + entry + b"\0" * 48 + b"\x55\xaa")
        file.truncate(8 * MIB)
    make = [str(found_program("mkfs.vfat")), "-F", "16", "-s", "1", "--offset", "2048", str(path), str(7 * 1024)]
    subprocess.run(make, check=True, capture_output=True)
    with path.open("r+b") as file:
        Fat(file, MIB).write(files)
    return path


def bootable(path: Path, says: str, then: tuple[int, ...] = STAYS) -> Path:
    return image(path, {"vmlinuz": kernel(says, then), "initrd.img": b"none", "cmdline.txt": b"quiet\n"})
